"""Processes of this machine that train the trials of sweeps, one after the other; any of them may be killed at any moment.

A worker is told what to train through a pipe and tells through it how it goes. It claims each run first, so that several sweeps
share the work; its claims end with it, and what it leaves half trained is continued by the next that gets it.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fmnist.errors import FmnistError, UserError
from fmnist.experiments import Resolved

if TYPE_CHECKING:
    from fmnist.training import Training

STARTS = 5
"""How many workers in a row may end before they are ready."""

GONE = (EOFError, ConnectionError)
"""What a pipe raises whose other end is no more."""

Job = dict[int, Resolved]
"""Runs to train in the same steps, by the numbers of the trials that want them."""


class Progress(NamedTuple):
    """How far a trial is."""

    number: int
    step: int
    loss: float | None  # the mean of its last steps in training
    accuracy: float  # at its last evaluation
    evaluated: bool  # at this very step; then it waits to be told whether to go on


class Ended(NamedTuple):
    """A trial that a worker is done with."""

    number: int
    outcome: dict[str, Any] | None  # None where another process trains it, or it is there already


class Lost(NamedTuple):
    """Trials whose worker died over them."""

    numbers: list[int]


def progress(number: int, training: "Training", evaluated: bool) -> Progress:
    """How far the trial of this number is."""
    loss = None if training.curves is None else float(training.curves["loss"][-200:].mean())
    return Progress(number, training.step, loss, training.evaluations[-1].accuracy, evaluated)


# ---- the worker's side


def serve(pipe: Connection, root: Path, sync: bool, number: int) -> None:
    """A worker's life: train what comes through the pipe until it closes, which ends a run with a checkpoint."""
    os.setsid()  # a terminal's Ctrl-C goes to the sweep, which closes the pipe
    from fmnist.engine import device, stack_size, take_turn
    from fmnist.state import Claims

    with contextlib.suppress(*GONE):
        spec = pipe.recv()
        try:
            claims = Claims(root)
            take_turn(number)
            size = stack_size(spec.compute, device(spec.compute, spec.train.precision))
        except (FmnistError, OSError) as error:  # every worker would meet it
            pipe.send(str(error))
            return
        pipe.send(size)
        while True:
            for number, outcome in train(pipe.recv(), root, sync, claims, pipe).items():
                pipe.send(Ended(number, outcome))
            pipe.send(None)


def train(
    job: Job, root: Path, sync: bool, claims: Any, pipe: Connection
) -> dict[int, dict[str, Any] | None]:
    """Train those of the job's runs that nobody else has; how each ended."""
    from fmnist import database, runner
    from fmnist import spec as specs

    numbers = {resolved.spec.fingerprint: number for number, resolved in job.items()}
    alone = False

    def tell(training: "Training", evaluated: bool) -> bool:
        nonlocal alone
        try:
            pipe.send(progress(numbers[training.spec.fingerprint], training, evaluated))
            return evaluated and bool(pipe.recv())
        except GONE:  # the sweep is gone, and with it who wanted this
            if not alone:  # a second signal would not wait for the checkpoint
                os.kill(os.getpid(), signal.SIGTERM)
            alone = True
            return False

    watch, prune = (functools.partial(tell, evaluated=evaluated) for evaluated in (False, True))
    context = runner.Context(root, sync, lambda text: None, watch, prune, wait=False)
    claimed = [resolved for resolved in job.values() if claims.take(resolved.spec.fingerprint)]
    try:
        recorded = (
            database.recorded(root) if specs.tracking_server() is None else {}
        )  # the sweep has asked the server
        wanted = runner.missing(claimed, recorded, context)
        outcomes = [
            dataclasses.asdict(outcome)
            for outcome in (runner.run(wanted, context) if wanted else [])
        ]
    except (FmnistError, OSError) as error:
        wanted, outcomes = claimed, [{"status": "FAILED", "reason": str(error)}] * len(claimed)
    for resolved in claimed:
        claims.release(resolved.spec.fingerprint)
    ended = {
        numbers[resolved.spec.fingerprint]: outcome
        for resolved, outcome in zip(wanted, outcomes, strict=False)
    }
    return {number: ended.get(number) for number in job}


# ---- the sweep's side


@dataclasses.dataclass
class Worker:
    process: SpawnProcess
    pipe: Connection
    size: int = 0  # how many runs it trains at once; 0 until it is ready
    numbers: set[int] | None = None  # of the trials that it has; None where it has no job


class Pool:
    """Workers of one sweep; those that die are replaced."""

    def __init__(self, root: Path, jobs: int, sync: bool, spec: Any) -> None:
        self._make = multiprocessing.get_context("spawn")
        self._arguments, self._spec, self._failures = (root, sync), spec, 0
        self.workers = [self._start(number) for number in range(jobs)]

    def _start(self, number: int) -> Worker:
        """Start a worker; by its number it gets one of the machine's CUDA devices, where there are any."""
        ours, theirs = self._make.Pipe()
        process = self._make.Process(target=serve, args=(theirs, *self._arguments, number))
        process.start()
        theirs.close()
        ours.send(self._spec)
        return Worker(process, ours)

    @property
    def idle(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.size and worker.numbers is None]

    def give(self, worker: Worker, job: Job) -> None:
        worker.numbers = set(job)
        with contextlib.suppress(*GONE):  # it has just died; that will be told
            worker.pipe.send(job)

    def answer(self, number: int, prune: bool) -> None:
        """Tell who trains this trial whether to end it."""
        for worker in self.workers:
            if number in (worker.numbers or ()):
                with contextlib.suppress(*GONE):
                    worker.pipe.send(prune)

    def events(self, timeout_s: float) -> Iterator[Progress | Ended | Lost]:
        """What has happened, once something has or time is up."""
        connection.wait(
            [each for worker in self.workers for each in (worker.pipe, worker.process.sentinel)],
            timeout_s,
        )
        for index, worker in enumerate(self.workers):
            alive = (
                worker.process.is_alive()
            )  # asked first: what it sent before it died is still read
            yield from self._heard(worker)
            if not alive:
                yield Lost(sorted(worker.numbers or ()))
                self._failures += not worker.size
                if self._failures >= STARTS:
                    raise UserError(
                        f"the workers end before they are ready (exit code {worker.process.exitcode}); try one run: fmnist run"
                    )
                self.workers[index] = self._start(index)

    def _heard(self, worker: Worker) -> Iterator[Progress | Ended]:
        with contextlib.suppress(*GONE):
            while worker.pipe.poll():
                match worker.pipe.recv():
                    case int(size):
                        worker.size, self._failures = size, 0
                    case None:
                        worker.numbers = None
                    case str(why):
                        raise UserError(f"the workers can't begin: {why}")
                    case message:
                        if isinstance(message, Ended) and worker.numbers:
                            worker.numbers.discard(message.number)
                        yield message

    def stop(self) -> None:
        """End the workers, those at work after a checkpoint, and wait for them."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join()

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
