"""The story of a run, read top to bottom: refuse what can't work, train by the plan, journal, hand over, wait.

Nothing here computes and nothing here knows MLflow: the journal is carried there by another process.
"""

import contextlib
import io
import re
import signal
import subprocess
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from fmnist import checkpoint, data, environment, experiments
from fmnist import engine as engines
from fmnist import spec as specs
from fmnist.errors import Diverged, FmnistError, Interrupted, SpecError, StoreError
from fmnist.journal import Journal, StateFolder, carrier_lock, from_curves, is_locked, now_ms, read, start_carrier, state_folders

COLLAPSED_LOSS, COLLAPSED_ACCURACY = 2.29, 0.12
"""Chance level over ten classes is ln 10 = 2.303 and 0.1."""
PREFLIGHT_TIMEOUT_S = 5
CHECKPOINT_S = 2.0
"""Training time at risk: a checkpoint is saved at the end of a segment when this much has passed since the last ..."""
CHECKPOINT_SHARE = 100
"""... and this many times what that one took, so that they stay below 1 % of the run."""
ARTIFACTS = ("spec.yaml", "curves.parquet", "checkpoint.pt")
"""What `extend` needs of a run."""
CARRIER_SILENCE_S = 60
"""How long a carrier may report an error, or be gone, before the command stops waiting for it."""


class Evaluated(NamedTuple):
    """One evaluation on the validation split."""

    step: int
    loss: float
    accuracy: float


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
    recording_s: float = 0.0
    """What of it the journal and the checkpoints took."""
    reason: str | None = None
    """Why it did not finish."""
    resumable: bool = False
    """Whether the same command continues it."""
    exit_code: int = 0
    run_id: str | None = None
    experiment_id: str | None = None
    unsynced: str | None = None
    """Why the run isn't in MLflow yet; None when it is."""


@dataclass(frozen=True)
class Context:
    """Where a run is kept and whom it tells how it goes."""

    root: Path
    sync: bool = True
    """Whether it goes into MLflow now; else with a later `fmnist sync`."""
    say: Callable[[str], None] = print
    watch: Callable[["Training"], None] = lambda training: None
    """Called after each segment."""

    @property
    def store(self) -> str | None:
        return specs.store_name() if self.sync else None


Begin = Callable[[engines.Engine, dict[str, Any]], tuple[Journal, dict[str, Any] | None]]
"""Given an engine and the environment: the journal to write, and the checkpoint to go on from or None."""


def run(resolved: experiments.Resolved, context: Context, fresh: bool = False, resume: StateFolder | None = None) -> Outcome:
    """Train an experiment and see it into MLflow; raises UserError before anything is written.

    An interrupted run of the same spec, or the one to `resume`, is continued, unless it is to be a `fresh` one. However
    the training ends, by divergence, an error or a signal, what was trained is stored and the outcome says so.
    """
    spec = resolved.spec
    if resume is not None and (differences := spec.differences(resume.spec.flat())):
        raise SpecError(f"{resume.path.name} can't be continued with another spec: {differences}")

    def begin(engine: engines.Engine, now: dict[str, Any]) -> tuple[Journal, dict[str, Any] | None]:
        same = [folder for folder in state_folders(context.root) if folder.run.get("fingerprint") == spec.fingerprint]
        here = [folder for folder in same if context.store is None or folder.run["store"] in (None, context.store)]
        interrupted = [folder for folder in here if folder.resumable]
        if resume or (interrupted and not fresh):
            return _continue(resume or interrupted[-1], engine, now, context)
        for folder in interrupted:
            _give_up(folder, context.say)
        for folder in same:
            if folder.running:
                context.say(f"{folder.path.name} has the same spec and is being trained by {folder.holder}; this is another run beside it")
        return Journal.create(context.root, spec, resolved.display_name, now, context.store), None

    return _train(spec, resolved.command, context, begin)


def extend(origin: Path, run_id: str, name: str, epochs: int, context: Context) -> Outcome:
    """Train a finished run on as a new run that begins with its steps, given the folder with its artifacts.

    Raises UserError where a run of that length would not have begun like this one.
    """
    before = experiments.parse((origin / "spec.yaml").read_text(encoding="utf-8"), f"run {run_id}: spec.yaml")
    refuse = f"run {run_id} can't be extended to {epochs} epochs: "
    if epochs <= before.train.epochs:
        raise SpecError(f"{refuse}it has {before.train.epochs} already; give more")
    longer = before.model_copy(update={"train": before.train.model_copy(update={"epochs": epochs})})
    spec = experiments.parse(experiments.dump(longer), "--epochs")
    if not isinstance(spec.schedule, specs.Constant | specs.Step):
        raise SpecError(
            f"{refuse}its schedule ({spec.schedule.type}) sets every learning rate by the run's length, so the longer run differs from the first"
            f" step on; train it from the start: --set train.epochs={epochs}"
        )
    try:
        state = checkpoint.load(origin / checkpoint.NEWEST, before)
    except ValueError as error:
        raise StoreError(f"{refuse}{error}") from None
    if spec.train.early_stopping and (state["step"] != before.steps or before.steps % spec.train.eval_every):
        raise SpecError(f"{refuse}early stopping ended it, or looked at its last step, where the longer run would not have looked")
    if state["step"] != before.steps:
        raise SpecError(f"{refuse}it ended at step {state['step']:,} of {before.steps:,}")

    def begin(engine: engines.Engine, now: dict[str, Any]) -> tuple[Journal, dict[str, Any]]:
        import pandas as pd

        records = from_curves(spec, pd.read_parquet(origin / "curves.parquet"), before.steps, now_ms())
        journal = Journal.create(
            context.root, spec, f"{re.sub(' epochs=[0-9]+', '', name)} epochs={epochs}", now, context.store, run_id, records
        )
        journal.flush()
        checkpoint.save(journal.folder, spec, state)
        context.say(f"extending run {run_id} from step {before.steps:,} to {spec.steps:,}")
        return journal, state

    return _train(spec, f"fmnist extend {run_id} --epochs {epochs}", context, begin)


def _train(spec: specs.ExperimentSpec, command: str, context: Context, begin: Begin) -> Outcome:
    began = time.monotonic()
    _preflight(context)
    try:
        device = engines.device(spec.compute)
    except ValueError as error:
        raise SpecError(str(error)) from None
    dataset = data.load(spec.data, context.root, device, context.say)
    engine = engines.Engine(spec, dataset)
    try:
        journal, state = begin(engine, environment.collect(command, device))
    except OSError as error:
        raise StoreError(
            f"{context.root / 'mlruns'}: can't be written: {error.strerror or error}; mend that or set FMNIST_HOME to another folder"
        ) from None
    folder = StateFolder.at(journal.folder)
    outcome = Outcome(folder.path.name, folder.run["name"])
    carrier = start_carrier(context.root) if context.sync else None
    with _signals() as caught:
        try:
            training = Training(spec, engine, dataset, journal, outcome, context.watch, caught)
            training.go_on_from(state)
            training.train()
        except Exception as error:  # whatever broke, the record says so before the process ends
            _record_failure(journal, outcome, error)
    if carrier is None:
        outcome.unsynced = "--no-sync was given"
    elif outcome.unsynced is None:
        _wait_for_carrier(context, folder, journal.size, carrier, outcome)
    journal.release()
    outcome.total_s = time.monotonic() - began
    return outcome


def _continue(folder: StateFolder, engine: engines.Engine, now: dict[str, Any], context: Context) -> tuple[Journal, dict[str, Any] | None]:
    """Take up an interrupted run at the newest checkpoint that is whole and that its journal reaches."""
    if context.store is not None and folder.run["store"] not in (None, context.store):
        raise StoreError(
            f"{folder.path.name} is for {folder.run['store']}: set or unset MLFLOW_TRACKING_URI accordingly, or give --no-sync"
        )
    here, resumed = environment.facts(now), [record for record in read(folder.path / "journal")[0] if record.kind == "resume"]
    places = [environment.facts(folder.environment), *(record.fields["environment"] for record in resumed)]
    changed = [environment.differences(place, here) for place in places]
    other = sorted({f"{key} {change[key]}" for change in changed for key in environment.BITS if key in change})
    journal = Journal.resume(folder, exact=not other)
    try:
        state = _newest_checkpoint(folder, journal, engine.spec, context.say)
        if context.store is not None:
            folder.assign(context.store)
        step = state["step"] if state else 0
        context.say(f"continuing {folder.path.name} at step {step:,} of {engine.spec.steps:,} (--fresh would start anew)")
        if other:
            context.say(f"it began elsewhere, so what is computed from here on may differ in its last bits: {', '.join(other)}")
        journal.event("resume", step=step, environment=here)
    except BaseException:
        journal.release()
        raise
    return journal, state


def _newest_checkpoint(
    folder: StateFolder, journal: Journal, spec: specs.ExperimentSpec, say: Callable[[str], None]
) -> dict[str, Any] | None:
    for path in (folder.path / checkpoint.NEWEST, folder.path / checkpoint.PREVIOUS):
        try:
            state = checkpoint.load(path, spec)
            if state["step"] <= journal.recorded.last:
                return state
            say(f"{path} is of step {state['step']:,}; the journal is whole up to step {journal.recorded.last:,}")
        except FileNotFoundError:
            continue
        except ValueError as error:
            say(f"{error}; what there is before it is taken")
    return None


def _give_up(folder: StateFolder, say: Callable[[str], None]) -> None:
    journal = Journal.resume(folder)
    journal.event("end", status="KILLED", reason="given up for a fresh run", resumable=False)
    journal.release()
    say(f"giving up {folder.path.name}, which stopped at step {journal.recorded.last:,}")


def _record_failure(journal: Journal, outcome: Outcome, error: Exception) -> None:
    expected = isinstance(error, FmnistError)
    outcome.status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
    outcome.reason = str(error) if expected else f"{type(error).__name__}: {error}"
    outcome.exit_code = error.exit_code if isinstance(error, FmnistError) else Diverged.exit_code
    outcome.resumable = isinstance(error, Interrupted | OSError)  # a full disk is not the run's fault
    details = None if expected else "".join(traceback.format_exception(error))
    try:
        journal.event("end", status=outcome.status, reason=outcome.reason, traceback=details, resumable=outcome.resumable)
    except OSError as another:  # a full disk can't take even this; the missing end tells the same
        outcome.unsynced = f"how it ended could not be written: {another}"


@dataclass
class Training:
    """One run's training: the plan walked segment by segment."""

    spec: specs.ExperimentSpec
    engine: engines.Engine
    dataset: data.Dataset
    journal: Journal
    outcome: Outcome
    watch: Callable[["Training"], None]
    caught: list[int]
    """Signals that came."""
    evaluations: list[Evaluated] = field(default_factory=list)
    best: Evaluated | None = None
    best_weights: dict[str, Any] | None = None
    """{step, parameters} of the best evaluation, with early stopping."""
    latest: engines.Evaluation | None = None
    interval: list[dict[str, np.ndarray]] = field(default_factory=list)
    """The curves since the last evaluation."""
    curves: dict[str, np.ndarray] | None = None
    """The latest segment's."""
    saved_at: float = field(default_factory=time.monotonic)
    save_s: float = 0.0
    """What the last checkpoint took."""
    recording_s: float = 0.0

    @property
    def step(self) -> int:
        return self.engine.step

    def go_on_from(self, state: dict[str, Any] | None) -> None:
        """Be where an unbroken run was at this checkpoint; what the loop remembers comes from the journal."""
        if state is None:
            return
        self.engine.load_state(state)
        self.best_weights = state["best"]
        for record in self.journal.records:
            if record.kind == "train" and (count := self.step + 1 - record.fields["first"]) > 0:
                self._note_steps({name: array[:count] for name, array in record.arrays.items()})
            elif record.kind == "evaluation" and record.fields["step"] <= self.step:
                self._note_evaluation(Evaluated(record.fields["step"], record.fields["val/loss"], record.fields["val/accuracy"]))
        self.outcome.steps, self.outcome.training_s = self.step, self.journal.elapsed_s

    def train(self) -> None:
        for segment in specs.plan(self.spec):
            if self._patience_is_over():
                self.outcome.stopped_early_at = self.step
                break
            evaluated = self.evaluations[-1].step if self.evaluations else -1
            if segment.stop <= self.step and (segment.stop <= evaluated or not segment.evaluate):
                continue  # done before the checkpoint
            if segment.stop > self.step:
                self._steps(segment.stop)
            if segment.evaluate:
                self._evaluate()
            if time.monotonic() - self.saved_at > max(CHECKPOINT_S, CHECKPOINT_SHARE * self.save_s):
                self._save()
            self.watch(self)
            if self.caught:
                self._save()
                raise Interrupted(self.caught[0], self.step)
        self._finish()

    def _steps(self, stop: int) -> None:
        first, started, clock = self.step + 1, now_ms(), time.monotonic()
        curves = self.engine.train(stop)
        seconds = time.monotonic() - clock
        bad = np.flatnonzero(~np.isfinite(curves.loss))
        kept = int(bad[0]) + 1 if len(bad) else len(curves.loss)
        arrays = {"loss": curves.loss[:kept], "accuracy": curves.accuracy[:kept], "lr": curves.lr[:kept]}
        with self._recording():
            self.journal.train(first, arrays, started, now_ms(), seconds)
        self.outcome.training_s = self.journal.elapsed_s
        self.outcome.steps = first - 1 + kept
        if len(bad):
            raise Diverged(
                f"the training loss is {curves.loss[bad[0]]} at step {self.outcome.steps}, the first that isn't finite; try a smaller optimizer.lr"
            )
        self._note_steps(arrays)

    def _note_steps(self, arrays: dict[str, np.ndarray]) -> None:
        self.interval.append(arrays)
        self.curves = arrays

    def _evaluate(self) -> None:
        self.latest = self.engine.evaluate(self.dataset.validation)
        step, lr = self.step, None if self.curves is None else float(self.curves["lr"][-1])
        measured = {"epoch": step / self.spec.steps_per_epoch, "val/loss": self.latest.loss, "val/accuracy": self.latest.accuracy}
        with self._recording():
            self.journal.evaluation(step, {**measured, "train/lr": lr})
        self._note_evaluation(Evaluated(step, self.latest.loss, self.latest.accuracy))
        if self.spec.train.early_stopping and self.best == self.evaluations[-1]:
            self.best_weights = {"step": step, "parameters": self.engine.state()["parameters"]}

    def _note_evaluation(self, evaluated: Evaluated) -> None:
        if self.best is None or self._beats(evaluated, self.best):
            self.best = evaluated
        self.evaluations.append(evaluated)
        self._look_for_collapse(evaluated.step)
        self.interval = []

    def _look_for_collapse(self, step: int) -> None:
        steps = sum(len(arrays["loss"]) for arrays in self.interval)
        if self.outcome.collapsed_at is not None or steps == 0 or step - steps < self.spec.steps_per_epoch:
            return
        loss, accuracy = (np.concatenate([arrays[name] for arrays in self.interval]).mean() for name in ("loss", "accuracy"))
        if loss >= COLLAPSED_LOSS and accuracy <= COLLAPSED_ACCURACY:
            self.outcome.collapsed_at = step

    def _beats(self, new: Evaluated, best: Evaluated) -> bool:
        """Whether an evaluation is better: by early stopping's measure, or by accuracy where that is off."""
        stopping = self.spec.train.early_stopping
        if stopping is not None and stopping.metric == "loss":
            return new.loss < best.loss - stopping.min_delta
        return new.accuracy > best.accuracy + (stopping.min_delta if stopping else 0.0)

    def _patience_is_over(self) -> bool:
        stopping = self.spec.train.early_stopping
        if stopping is None or self.best is None:
            return False
        return sum(evaluated.step > self.best.step for evaluated in self.evaluations) >= stopping.patience

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Count what the journal and the checkpoints cost the run."""
        began = time.monotonic()
        yield
        self.recording_s += time.monotonic() - began

    def _save(self) -> None:
        began = time.monotonic()
        with self._recording():
            self.journal.flush()
            checkpoint.save(self.journal.folder, self.spec, {**self.engine.state(), "best": self.best_weights})
        self.saved_at = time.monotonic()
        self.save_s = self.saved_at - began

    def _finish(self) -> None:
        self._save()
        if self.best_weights is not None and self.best_weights["step"] != self.step:
            self.engine.load_state({**self.engine.state(), **self.best_weights})
            self.latest = None
            self.outcome.weights = "best"
        latest = self.latest or self.engine.evaluate(self.dataset.validation)
        assert self.best is not None
        metrics = {"best/step": self.best.step, "best/val_loss": self.best.loss, "best/val_accuracy": self.best.accuracy}
        metrics |= {"last/val_loss": latest.loss, "last/val_accuracy": latest.accuracy}
        predictions = {"val": (self.dataset.validation, latest)}
        if self.dataset.test is not None:
            test = self.engine.evaluate(self.dataset.test)
            metrics |= {"test/loss": test.loss, "test/accuracy": test.accuracy}
            predictions["test"] = (self.dataset.test, test)
        self.outcome.metrics = metrics
        arrays = {f"{split}_index": images.index for split, (images, _) in predictions.items()}
        arrays |= {f"{split}_labels": images.labels.cpu().numpy() for split, (images, _) in predictions.items()}
        arrays |= {f"{split}_logits": evaluation.logits for split, (_, evaluation) in predictions.items()}
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        checkpoint.write(self.journal.folder / "predictions.npz", content)
        self.outcome.recording_s = self.recording_s
        told = {name: getattr(self.outcome, name) for name in ("weights", "collapsed_at", "stopped_early_at", "training_s", "recording_s")}
        self.journal.final(metrics, **told)
        self.journal.flush()
        self.journal.event("end", status="FINISHED", reason=None, resumable=False)
        self.outcome.status = "FINISHED"


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


def _preflight(context: Context) -> None:
    """Refuse a tracker that can't be reached now; what fails later is an outage, and training goes on."""
    uri = specs.tracking_server() if context.sync else None
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


# ---- after the run


def _believe(outcome: Outcome, note: dict[str, Any]) -> None:
    """Take over how the run was closed: it may be FAILED although training ended well, if the store lost points."""
    if note["closed"] != outcome.status:
        outcome.status, outcome.reason = note["closed"], note.get("reason")
        outcome.exit_code = Diverged.exit_code if outcome.status == "FAILED" else outcome.exit_code


def _wait_for_carrier(context: Context, state: StateFolder, end: int, carrier: "subprocess.Popen[bytes]", outcome: Outcome) -> None:
    """Wait until the run is carried up to its `end` and closed in MLflow.

    A carrier that is gone is started again, one that keeps failing is told of and then left to a later `fmnist sync`.
    """
    quiet_since, last, told = time.monotonic(), None, False
    try:
        while True:
            note = state.carried
            outcome.run_id, outcome.experiment_id = note.get("run_id"), note.get("experiment_id")
            if note.get("closed") == "DELETED" or (note.get("closed") and note["offset"] >= end):
                outcome.unsynced = None
                _believe(outcome, note)
                return
            if note.get("error") and not told:
                context.say(
                    f"training is over; the store does not take the run: {note['error']}; trying for {CARRIER_SILENCE_S} s (Ctrl-C: later)"
                )
                told = True
            if note.get("offset") != last:
                quiet_since, last = time.monotonic(), note.get("offset")
            if time.monotonic() - quiet_since > CARRIER_SILENCE_S:
                outcome.unsynced = note.get("error") or f"nothing was carried over for {CARRIER_SILENCE_S} s; see mlruns/sidecar.log"
                return
            if carrier.poll() is not None and not is_locked(carrier_lock(context.root, specs.store_name())):
                carrier = start_carrier(context.root)
            time.sleep(0.05)
    except KeyboardInterrupt:
        outcome.unsynced = "interrupted while it was being stored; it goes on in the background"
