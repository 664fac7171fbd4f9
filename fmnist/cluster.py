"""Trials as tasks of a Ray cluster that is there: placement, retries and what becomes of lost nodes are Ray's.

Each node has the package and a home of its own, or one that they share (FMNIST_HOME where `ray start` was called); runs go to the
MLflow server that all of them reach. A trial on a lost node starts again, or goes on from its checkpoint where the home is shared.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmnist import spec as specs
from fmnist.errors import FmnistError, UserError
from fmnist.experiments import Resolved
from fmnist.workers import Ended, Job, Lost, Progress, progress

if TYPE_CHECKING:
    from fmnist.training import Training

RETRIES = 10  # how often Ray starts a trial again whose node or process was lost
PATIENCE_S = 600.0  # how long a node keeps trying to hand a run over
POLL_S = 0.25
PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)


@dataclasses.dataclass
class Slot:
    """Room for one trial in the cluster."""

    size: int = 1
    number: int | None = None
    task: Any = None


class Mailbox:
    """An actor: trials say how far they are, and hear whether to go on."""

    def __init__(self) -> None:
        self._news: list[Progress] = []
        self._ended: set[int] = set()
        self._begun: set[int] = set()

    def begin(self, number: int) -> bool:
        """Whether this trial was begun before, on a node that was lost since."""
        again = number in self._begun
        self._begun.add(number)
        return again

    def report(self, progress: Progress) -> bool:
        self._news.append(progress)
        return progress.number in self._ended

    def end(self, number: int) -> None:
        self._ended.add(number)

    def take(self) -> list[Progress]:
        news, self._news = self._news, []
        return news


def train(
    number: int, resolved: Resolved, mailbox: Any, environment: dict[str, str]
) -> dict[str, Any] | None:
    """Train one run on the node that this is called on, and see it into MLflow; how it ended, or None where another process has it."""
    os.environ.update(environment)
    import ray

    from fmnist import data, database, runner

    def prune(training: "Training") -> bool:
        return bool(ray.get(mailbox.report.remote(progress(number, training, True))))

    # what a node has not handed over may be lost with it: a trial counts as ended once the server has it
    context = runner.Context(
        specs.home(), say=lambda text: None, prune=prune, patience_s=PATIENCE_S
    )
    try:
        data.ensure(context.root, lambda text: None)
        recorded = database.recorded(context.root) if ray.get(mailbox.begin.remote(number)) else {}
        wanted = runner.missing([resolved], recorded, context)
        return dataclasses.asdict(runner.run(wanted, context)[0]) if wanted else None
    except (FmnistError, OSError) as error:
        return {"status": "FAILED", "reason": str(error)}


class Cluster:
    """What workers.Pool is on one machine."""

    def __init__(
        self, root: Path, jobs: int | None, address: str | None, spec: specs.ExperimentSpec
    ) -> None:
        try:
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError:
            raise UserError(
                "--on ray: Ray is not installed here; install the extra: pip install 'fmnist[ray]'"
            ) from None
        if specs.tracking_server() is None:
            raise UserError(
                "--on ray: the nodes need an MLflow server that all of them reach; set MLFLOW_TRACKING_URI to it"
            )
        if spec.compute.device.startswith("cuda:"):
            raise UserError(
                f"--on ray: compute.device: given {spec.compute.device}; Ray says which device of"
                " which node a trial gets; give cuda"
            )
        where = address or os.environ.get("RAY_ADDRESS", "auto")
        host, _, port = where.rpartition(":")
        try:
            if (
                port.isdigit() and "/" not in host
            ):  # Ray itself would go on trying for a quarter of an hour
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=where, log_to_driver=False, configure_logging=False)
        except (OSError, ValueError, RuntimeError) as error:
            why = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"--on ray: no cluster answers ({why}); start one with `ray start --head`, or give its --address"
            ) from None
        # pinned to this node, which this process cannot outlive: on another it would be lost with that one
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._ray, self._mailbox = (
            ray,
            ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote(),
        )
        needs = {
            "num_cpus": spec.compute.threads,
            "num_gpus": 1 if spec.compute.device == "cuda" else 0,
        }
        self._task = ray.remote(train).options(**needs, max_retries=RETRIES)
        self._environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
        room = int(ray.cluster_resources().get("CPU", 1) // spec.compute.threads)
        self._slots = [Slot() for _ in range(jobs or max(1, room))]

    @property
    def idle(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.number is None]

    def give(self, slot: Slot, job: Job) -> None:
        [(slot.number, resolved)] = job.items()
        slot.task = self._task.remote(slot.number, resolved, self._mailbox, self._environment)

    def answer(self, number: int, prune: bool) -> None:
        if prune:
            self._mailbox.end.remote(number)

    def events(self, timeout_s: float) -> Iterator[Progress | Ended | Lost]:
        """What has happened, once something has or time is up."""
        busy = {slot.task: slot for slot in self._slots if slot.number is not None}
        deadline = time.monotonic() + timeout_s
        done: list[Any] = []
        news: list[Progress] = []
        while not (done or news) and time.monotonic() < deadline:
            if busy:
                done, _ = self._ray.wait(list(busy), num_returns=len(busy), timeout=POLL_S)
            else:
                time.sleep(POLL_S)
            news = self._ray.get(self._mailbox.take.remote())
        yield from news
        for task in done:
            slot = busy[task]
            number, slot.number = slot.number, None
            try:
                yield Ended(number or 0, self._ray.get(task))
            except self._ray.exceptions.RayError:  # beyond its retries
                yield Lost([number or 0])

    def stop(self) -> None:
        """End the trials that are at work, after a checkpoint."""
        busy = [slot.task for slot in self._slots if slot.number is not None]
        for task in busy:
            self._ray.cancel(task)
        if busy:
            self._ray.wait(busy, num_returns=len(busy), timeout=60)
        self._ray.shutdown()

    def kill(self) -> None:
        self._ray.shutdown()
