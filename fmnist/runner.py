"""The story of a run, read top to bottom: refuse what can't work, train by the plan, journal, hand over, wait.

Nothing here computes and nothing here knows MLflow: the journal is carried there by another process.
"""

import contextlib
import importlib.metadata
import platform
import signal
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from fmnist import __version__, checkpoint, data, experiments
from fmnist import engine as engines
from fmnist import spec as specs
from fmnist.errors import Diverged, FmnistError, Interrupted, SpecError, StoreError
from fmnist.journal import Journal, StateFolder, carrier_lock, is_locked, now_ms

COLLAPSED_LOSS, COLLAPSED_ACCURACY = 2.29, 0.12
"""Chance level over ten classes is ln 10 = 2.303 and 0.1."""
PREFLIGHT_TIMEOUT_S = 5
CARRIER_SILENCE_S = 60
"""How long a carrier may report an error, or be gone, before the command stops waiting for it."""


@dataclass(frozen=True)
class Progress:
    """What there is to show after a segment."""

    step: int
    steps: int
    epoch: float
    elapsed_s: float
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float
    val_accuracy: float


@dataclass
class Outcome:
    """How a run ended; what `fmnist run --json` prints."""

    key: str
    name: str
    status: str = "RUNNING"
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    weights: str = "final"
    collapsed_at: int | None = None
    stopped_early_at: int | None = None
    training_s: float = 0.0
    total_s: float = 0.0
    reason: str | None = None
    """Why it did not finish."""
    exit_code: int = 0
    run_id: str | None = None
    experiment_id: str | None = None
    unsynced: str | None = None
    """Why the run isn't in MLflow yet; None when it is."""


def run(resolved: experiments.Resolved, root: Path, sync: bool, say: Callable[[str], None], watch: Callable[[Progress], None]) -> Outcome:
    """Train an experiment and see it into MLflow (not with `sync` false); raises UserError before anything is written.

    However the training ends, by divergence, an error or a signal, what was trained is stored and the outcome says so.
    """
    began = time.monotonic()
    spec = resolved.spec
    _preflight(sync)
    try:
        device = engines.device(spec.compute)
    except ValueError as error:
        raise SpecError(str(error)) from None
    dataset = data.load(spec.data, root, device, say)
    engine = engines.Engine(spec, dataset)
    try:
        journal = Journal.create(
            root, spec, resolved.display_name, _environment(resolved.command, device), specs.store_name() if sync else None
        )
    except OSError as error:
        raise StoreError(
            f"{root / 'mlruns'}: can't be written: {error.strerror or error}; mend that or set FMNIST_HOME to another folder"
        ) from None
    outcome = Outcome(journal.folder.name, resolved.display_name)
    carrier = _start_carrier(root) if sync else None
    with _signals() as caught:
        try:
            _Run(spec, engine, dataset, journal, outcome, watch, caught).train()
        except Exception as error:  # whatever broke, the record says so before the process ends
            _record_failure(journal, outcome, error)
    if carrier is not None:
        _wait_for_carrier(root, journal.folder, carrier, outcome, say)
    else:
        outcome.unsynced = "--no-sync was given"
    journal.release()
    outcome.total_s = time.monotonic() - began
    return outcome


def _record_failure(journal: Journal, outcome: Outcome, error: Exception) -> None:
    expected = isinstance(error, FmnistError)
    outcome.status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
    outcome.reason = str(error) if expected else f"{type(error).__name__}: {error}"
    outcome.exit_code = error.exit_code if isinstance(error, FmnistError) else Diverged.exit_code
    details = None if expected else "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # a full disk can't take even this; the missing end tells the same
        journal.event("end", status=outcome.status, reason=outcome.reason, traceback=details)


@dataclass
class _Run:
    """One run's training: the plan walked segment by segment."""

    spec: specs.ExperimentSpec
    engine: engines.Engine
    dataset: data.Dataset
    journal: Journal
    outcome: Outcome
    watch: Callable[[Progress], None]
    caught: list[int]
    """Signals that came."""
    evaluated: list[int] = field(default_factory=list)
    """Steps."""
    best: tuple[int, float, float] = field(init=False)
    """Step, loss, accuracy."""
    best_state: dict[str, Any] | None = None
    latest: engines.Evaluation = field(init=False)
    interval: list[engines.Curves] = field(default_factory=list)
    """Since the last evaluation."""
    last_curves: engines.Curves | None = None

    def train(self) -> None:
        for segment in specs.plan(self.spec):
            if segment.stop > segment.start:
                self._steps(segment)
            if segment.evaluate:
                self._evaluate()
            self._show()
            if self.caught:
                raise Interrupted(self.caught[0], self.engine.step)
            if segment.evaluate and self._patience_is_over():
                self.outcome.stopped_early_at = self.engine.step
                break
        self._finish()

    def _steps(self, segment: specs.Segment) -> None:
        started, clock = now_ms(), time.monotonic()
        curves = self.engine.train(segment.stop)
        self.outcome.training_s += time.monotonic() - clock
        bad = np.flatnonzero(~np.isfinite(curves.loss))
        kept = int(bad[0]) + 1 if len(bad) else len(curves.loss)
        arrays = {"loss": curves.loss[:kept], "accuracy": curves.accuracy[:kept], "lr": curves.lr[:kept]}
        self.journal.train(segment.start + 1, arrays, started, now_ms(), self.outcome.training_s)
        self.outcome.steps = segment.start + kept
        if len(bad):
            raise Diverged(
                f"the training loss is {curves.loss[bad[0]]} at step {self.outcome.steps}, the first that isn't finite; try a smaller optimizer.lr"
            )
        self.interval.append(curves)
        self.last_curves = curves

    def _evaluate(self) -> None:
        self.latest = self.engine.evaluate(self.dataset.validation)
        step, curves = self.engine.step, self.last_curves
        measured = {"epoch": step / self.spec.steps_per_epoch, "val/loss": self.latest.loss, "val/accuracy": self.latest.accuracy}
        self.journal.event("evaluation", step=step, **measured, **{"train/lr": None if curves is None else float(curves.lr[-1])})
        evaluation = (step, self.latest.loss, self.latest.accuracy)
        if not self.evaluated or self._beats(evaluation, self.best):
            self.best = evaluation
            self.best_state = self.engine.state() if self.spec.train.early_stopping else None
        self.evaluated.append(step)
        self._look_for_collapse(step)
        self.interval = []

    def _look_for_collapse(self, step: int) -> None:
        steps = sum(len(curves.loss) for curves in self.interval)
        if self.outcome.collapsed_at is not None or steps == 0 or step - steps < self.spec.steps_per_epoch:
            return
        loss = np.concatenate([curves.loss for curves in self.interval]).mean()
        accuracy = np.concatenate([curves.accuracy for curves in self.interval]).mean()
        if loss >= COLLAPSED_LOSS and accuracy <= COLLAPSED_ACCURACY:
            self.outcome.collapsed_at = step

    def _beats(self, new: tuple[int, float, float], best: tuple[int, float, float]) -> bool:
        """Whether an evaluation is better: by early stopping's measure, or by accuracy where that is off."""
        stopping = self.spec.train.early_stopping
        if stopping is not None and stopping.metric == "loss":
            return new[1] < best[1] - stopping.min_delta
        return new[2] > best[2] + (stopping.min_delta if stopping else 0.0)

    def _patience_is_over(self) -> bool:
        stopping = self.spec.train.early_stopping
        return stopping is not None and sum(step > self.best[0] for step in self.evaluated) >= stopping.patience

    def _finish(self) -> None:
        if self.best_state is not None and self.best_state["step"] != self.engine.step:
            self.engine.load_state(self.best_state)
            self.latest = self.engine.evaluate(self.dataset.validation)
            self.outcome.weights = "best"
        step, loss, accuracy = self.best
        metrics = {"best/step": step, "best/val_loss": loss, "best/val_accuracy": accuracy}
        metrics |= {"last/val_loss": self.latest.loss, "last/val_accuracy": self.latest.accuracy}
        predictions = {"val": (self.dataset.validation, self.latest)}
        if self.dataset.test is not None:
            test = self.engine.evaluate(self.dataset.test)
            metrics |= {"test/loss": test.loss, "test/accuracy": test.accuracy}
            predictions["test"] = (self.dataset.test, test)
        self.outcome.metrics = metrics
        arrays = {f"{split}_index": images.index for split, (images, _) in predictions.items()}
        arrays |= {f"{split}_labels": images.labels.cpu().numpy() for split, (images, _) in predictions.items()}
        arrays |= {f"{split}_logits": evaluation.logits for split, (_, evaluation) in predictions.items()}
        partial = self.journal.folder / ".predictions.npz"
        np.savez(partial, allow_pickle=False, **arrays)
        partial.replace(self.journal.folder / "predictions.npz")
        checkpoint.save(self.journal.folder / "checkpoint.pt", self.spec, self.engine.state())
        told = {name: getattr(self.outcome, name) for name in ("weights", "collapsed_at", "stopped_early_at", "training_s")}
        self.journal.event("final", metrics=metrics, **told)
        self.journal.event("end", status="FINISHED", reason=None)
        self.outcome.status = "FINISHED"

    def _show(self) -> None:
        curves = self.last_curves
        self.watch(
            Progress(
                step=self.engine.step,
                steps=self.spec.steps,
                epoch=self.engine.step / self.spec.steps_per_epoch,
                elapsed_s=self.outcome.training_s,
                train_loss=None if curves is None else float(curves.loss[-200:].mean()),
                train_accuracy=None if curves is None else float(curves.accuracy[-200:].mean()),
                val_loss=self.latest.loss,
                val_accuracy=self.latest.accuracy,
            )
        )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that came: they end the current segment, not the process."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:  # who asks twice doesn't want to wait, neither for the segment nor for the store
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- before the run


def _preflight(sync: bool) -> None:
    """Refuse a tracker that can't be reached now; what fails later is an outage, and training goes on."""
    uri = specs.tracking_server() if sync else None
    if uri is None:
        return
    try:
        urllib.request.urlopen(specs.redacted(uri) + "/health", timeout=PREFLIGHT_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # it is there and speaks HTTP; a proxy may hide /health
    except (OSError, ValueError) as error:
        raise StoreError(
            f"no MLflow server answers at {specs.redacted(uri)} ({error}); start it, unset MLFLOW_TRACKING_URI for the local store, or give --no-sync"
        ) from None


def _environment(command: str, device: torch.device) -> dict[str, Any]:
    """What could make the same spec give other numbers elsewhere."""
    packages = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name}
    return {
        "fmnist": __version__,
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "data_digest": data.DIGEST,
        **_git(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor()


def _git() -> dict[str, Any]:
    """The commit of the working tree and how it differs from it; empty outside a repository."""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
            return result.stdout
        return None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain")
    if commit is None or status is None:
        return {"git_commit": None, "git_dirty": None, "git_diff": None}
    return {"git_commit": commit.strip(), "git_dirty": bool(status), "git_diff": git("diff", "HEAD") if status else ""}


# ---- after the run


def _believe(outcome: Outcome, note: dict[str, Any]) -> None:
    """Take over how the run was closed: it may be FAILED although training ended well, if the store lost points."""
    if note["closed"] != outcome.status:
        outcome.status, outcome.reason = note["closed"], note.get("reason")
        outcome.exit_code = Diverged.exit_code if outcome.status == "FAILED" else outcome.exit_code


def _start_carrier(root: Path) -> "subprocess.Popen[bytes]":
    """Start the store's sidecar; where one is at work already, this one sees that and exits.

    A session of its own, so that Ctrl-C reaches the trainer only; its words go to mlruns/sidecar.log.
    """
    with open(root / "mlruns" / "sidecar.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fmnist.sidecar", str(root)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _wait_for_carrier(root: Path, folder: Path, carrier: "subprocess.Popen[bytes]", outcome: Outcome, say: Callable[[str], None]) -> None:
    """Wait until the run is closed in MLflow; a carrier that is gone is started again, one that keeps failing is told of."""
    state = StateFolder(folder, {})
    quiet_since, last, told = time.monotonic(), None, False
    try:
        while True:
            note = state.carried
            outcome.run_id, outcome.experiment_id = note.get("run_id"), note.get("experiment_id")
            if note.get("closed"):
                outcome.unsynced = None
                _believe(outcome, note)
                return
            if note.get("error") and not told:
                say(f"training is over; the store does not take the run: {note['error']}; trying for {CARRIER_SILENCE_S} s (Ctrl-C: later)")
                told = True
            if note.get("offset") != last:
                quiet_since, last = time.monotonic(), note.get("offset")
            if time.monotonic() - quiet_since > CARRIER_SILENCE_S:
                outcome.unsynced = note.get("error") or f"nothing was carried over for {CARRIER_SILENCE_S} s; see mlruns/sidecar.log"
                return
            if carrier.poll() is not None and not is_locked(carrier_lock(root, specs.store_name())):
                carrier = _start_carrier(root)
            time.sleep(0.05)
    except KeyboardInterrupt:
        outcome.unsynced = "interrupted while it was being stored; it goes on in the background"
