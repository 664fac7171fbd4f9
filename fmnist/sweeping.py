"""The story of a sweep: find what is missing of it, have it trained, see the runs into MLflow, write the sweep's own run.

A sweep is a set of runs and not a process: whoever works on it, now or again, trains what is not there yet.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fmnist import database, state, tracking
from fmnist.errors import StoreError
from fmnist.journal import Result
from fmnist.state import signals
from fmnist.sweeps import Sweep, Trial
from fmnist.workers import Ended, Job, Lost, Progress

if TYPE_CHECKING:
    from fmnist.search import Study

CRASHES = 3
"""How often in a row a trial may take its worker with it, without getting further, before it is given up."""
LOOK_S = 1.0
"""How long to wait for events, and between two looks at what others do."""


class Workers(Protocol):
    """What trains: processes of this machine (workers.Pool) or a cluster's (cluster.Cluster)."""

    @property
    def idle(self) -> list[Any]: ...
    def give(self, worker: Any, job: Job) -> None: ...
    def answer(self, number: int, prune: bool) -> None: ...
    def events(self, timeout_s: float) -> Iterator[Progress | Ended | Lost]: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class Grid:
    """The trials of a grid; see search.Study, which has the same methods."""

    def __init__(self, sweep: Sweep) -> None:
        self._trials = {trial.number: trial for trial in sweep.grid()}
        self.total, self._results = len(self._trials), dict[int, Result]()

    def open(self) -> list[Trial]:
        return [trial for number, trial in self._trials.items() if number not in self._results]

    def settled(self) -> list[tuple[Trial, Result]]:
        return [(self._trials[number], result) for number, result in self._results.items()]

    def ask(self) -> Trial | None:
        return None

    def tell(self, number: int, result: Result) -> None:
        if result.outcome != "pruned":  # by a search, whose business it is
            self._results[number] = result

    def prune(self, number: int, step: int, accuracy: float) -> bool:
        return False


@dataclass
class Standing:
    """How a sweep stands, for who watches; numbers are of trials."""

    total: int
    trials: dict[int, Trial] = field(default_factory=dict)
    running: dict[int, Progress | None] = field(
        default_factory=dict
    )  # here; None before there is anything to tell
    elsewhere: set[int] = field(default_factory=set)  # trained by others
    results: dict[int, Result] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # why
    trained: list[dict[str, Any]] = field(
        default_factory=list
    )  # the outcomes of the runs that ended here
    interrupted: int | None = None  # by this signal

    @property
    def best(self) -> Trial | None:
        """Of single runs; with several seeds the sweep's run has the means."""
        finished = {
            number: result
            for number, result in self.results.items()
            if result.outcome == "finished"
        }
        found = {
            number: result.accuracy
            for number, result in finished.items()
            if result.accuracy is not None
        }
        return self.trials[max(found, key=lambda number: found[number])] if found else None


def known(sweep: Sweep) -> dict[str, Result]:
    """Fingerprints of the runs that the store or the disk knows of."""
    return {**database.recorded(sweep.root), **state.at_hand(sweep.root)}


def source(sweep: Sweep, copy: bool) -> "Grid | Study":
    """Where a sweep's trials come from, and their results go; in a `copy` nothing that others see."""
    if sweep.spec.search is None:
        return Grid(sweep)
    from fmnist.search import Study

    return Study(sweep, sweep.spec.search, copy)


def look(sweep: Sweep) -> Standing:
    """How a sweep stands now."""
    conduct = Conduct(sweep, lambda standing: None, copy=True)
    conduct.look()
    return conduct.standing


def run(sweep: Sweep, start: Callable[[], Workers], watch: Callable[[Standing], None]) -> Standing:
    """Train what is missing of a sweep until all of it is there, has failed, or a signal came; a trial that fails leaves the others alone."""
    conduct = Conduct(sweep, watch)
    conduct.look()
    if conduct.complete():
        return conduct.standing
    state.check_writable(sweep.root)
    with signals() as caught:
        conduct.workers = start()
        try:
            while not caught and not conduct.complete():
                conduct.give()
                conduct.hear()
        finally:
            _end(conduct.workers)
    conduct.standing.interrupted = caught[0] if caught else None
    return conduct.standing


class Conduct:
    """Who has which trial of a sweep."""

    workers: Workers

    def __init__(self, sweep: Sweep, watch: Callable[[Standing], None], copy: bool = False) -> None:
        self.sweep, self.source, self.watch = sweep, source(sweep, copy), watch
        self.standing = Standing(self.source.total)
        self._crashes: Counter[int] = Counter()
        self._reached: dict[int, int] = {}
        self._looked = 0.0

    def complete(self) -> bool:
        """Whether every trial is there or has failed; a search is asked for its next trials on the way."""
        standing = self.standing
        return (
            not standing.running and len(standing.results) + len(standing.failed) >= standing.total
        )

    def look(self) -> None:
        """Take over what is known by now of the trials that are not being trained here; raises StoreError where nothing can be known."""
        found, standing = known(self.sweep), self.standing
        standing.elsewhere.clear()
        for trial in self.source.open():
            standing.trials[trial.number] = trial
            result = found.get(trial.fingerprint)
            if result is None or trial.number in standing.running.keys() | standing.failed.keys():
                continue
            if result.outcome == "running":
                standing.elsewhere.add(trial.number)
            else:
                self.source.tell(trial.number, result)
        for trial, result in self.source.settled():
            standing.trials[trial.number], standing.results[trial.number] = trial, result

    def give(self) -> None:
        """Give those that have nothing to do what is missing."""
        for worker in self.workers.idle:
            job: Job = {}
            while len(job) < worker.size and (trial := self._next(job)) is not None:
                job[trial.number] = trial.resolved
                self.standing.running[trial.number] = None
            if job:
                self.workers.give(worker, job)

    def _next(self, job: Job) -> Trial | None:
        """A trial that nobody has, of the shape of those in the job."""
        standing = self.standing
        taken = standing.running.keys() | standing.failed.keys() | standing.elsewhere
        shapes = {resolved.spec.shape for resolved in job.values()}
        for trial in self.source.open():
            if trial.number not in taken and (not job or trial.resolved.spec.shape in shapes):
                return trial
        new = None if job else self.source.ask()
        if new is not None:
            standing.trials[new.number] = new
        return new

    def hear(self) -> None:
        """Wait for events, and see to them."""
        for event in self.workers.events(LOOK_S):
            match event:
                case Progress():
                    self.standing.running[event.number] = event
                    if event.evaluated:
                        self.workers.answer(
                            event.number,
                            self.source.prune(event.number, event.step, event.accuracy),
                        )
                case Ended():
                    self.standing.running.pop(event.number, None)
                    self._end(event.number, event.outcome)
                case Lost():
                    for number in event.numbers:
                        self._crash(number)
        if self.standing.elsewhere and time.monotonic() - self._looked > LOOK_S:
            try:
                self.look()
            except StoreError:
                if not self.standing.running:  # else training goes on meanwhile, as in any outage
                    raise
            self._looked = time.monotonic()
        self.watch(self.standing)

    def _end(self, number: int, outcome: dict[str, Any] | None) -> None:
        if outcome is None:  # another has it, or had it: which of the two is seen at the next look
            self.standing.elsewhere.add(number)
            return
        self.standing.trained.append(outcome)
        if outcome["status"] == "FINISHED" or outcome.get("diverged"):
            how = (
                "diverged"
                if outcome["diverged"]
                else "finished"
                if outcome["pruned_at"] is None
                else "pruned"
            )
            self.standing.results[number] = Result(
                how, "trained here", outcome["metrics"].get("last/val_accuracy")
            )
            self.source.tell(number, self.standing.results[number])
        elif outcome["status"] == "FAILED":
            self.standing.failed[number] = outcome["reason"]

    def _crash(self, number: int) -> None:
        """A worker died over a trial; it is given out again unless it keeps doing that."""
        progress = self.standing.running.pop(number, None)
        step = 0 if progress is None else progress.step
        self._crashes[number] = (
            1 if step > self._reached.get(number, -1) else self._crashes[number] + 1
        )
        self._reached[number] = max(step, self._reached.get(number, -1))
        if self._crashes[number] >= CRASHES:
            self.standing.failed[number] = (
                f"its worker died {CRASHES} times at step {step:,} or before (out of memory?)"
            )


def _end(workers: Workers) -> None:
    try:
        workers.stop()
    except KeyboardInterrupt:  # a second signal: who sends it doesn't want to wait for checkpoints
        workers.kill()
        workers.stop()


def finish(sweep: Sweep, standing: Standing, sync: bool, say: Callable[[str], None]) -> None:
    """See the runs that were trained into MLflow, and write the sweep's own run; what can't be stored now stays on disk."""
    from fmnist import runner, sweep_run
    from fmnist.training import Outcome

    outcomes = [Outcome(**fields) for fields in standing.trained if "key" in fields]
    context = runner.Context(sweep.root, sync, say)
    runner.hand_over(outcomes, context)
    if not standing.interrupted:
        runner.upload_complete({each.fingerprint for each in standing.trials.values()}, context)
    late = [outcome for outcome in outcomes if outcome.unsynced and sync]
    if late:
        say(
            f"{len(late)} runs are not in MLflow yet: {late[0].unsynced}; `fmnist sync` carries them over"
        )
    if sync and tracking.exists(sweep.root):
        sweep_run.write(
            tracking.connect(sweep.root), sweep, list(standing.trials.values()), standing.total
        )
