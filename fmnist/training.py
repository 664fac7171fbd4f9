"""The training of runs, segment by segment: steps, evaluations, early stopping, checkpoints, and how each run ends."""

import functools
import hashlib
import io
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fmnist import checkpoint
from fmnist import engine as engines
from fmnist import spec as specs
from fmnist.errors import Diverged, FmnistError, Interrupted, Irreproducible
from fmnist.state import Journal, now_ms

COLLAPSED_LOSS, COLLAPSED_ACCURACY = (
    2.29,
    0.12,
)  # chance level over ten classes is ln 10 = 2.303 and 0.1
CHECKPOINT_S = 2.0  # checkpoints are saved at the end of a segment when this much has passed since the last ...
CHECKPOINT_SHARE = (
    100  # ... and this many times what those took, so that they stay below 1 % of the run
)

State = dict[str, Any]  # what a checkpoint holds


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
    pruned_at: int | None = None  # the step at which a search gave it up
    training_s: float = 0.0
    total_s: float = 0.0  # the command's, which may train several runs
    recording_s: float = 0.0  # what of it the journal and the checkpoints took
    reason: str | None = None  # why it did not finish
    diverged: bool = False
    resumable: bool = False  # whether the same command continues it
    exit_code: int = 0
    run_id: str | None = None
    experiment_id: str | None = None
    unsynced: str | None = None  # why the run isn't in MLflow yet; None when it is


class Segment(NamedTuple):
    """What an engine trained at a stretch."""

    first: int  # step
    curves: list[engines.Curves]  # one for each of its models
    started_ms: int
    seconds: float


class Stack:
    """Runs that are trained in the same steps by one engine; an ordinary run is a stack of one.

    Each ends by itself, as it would alone, and the rest go on.
    """

    def __init__(self, engine: engines.Engine) -> None:
        self.engine = engine
        self.trainings: list[Training] = []
        self._segment = Segment(0, [], 0, 0.0)
        self._evaluated: tuple[int, list[engines.Evaluation]] = (-1, [])

    def train(
        self,
        watch: Callable[["Training"], object],
        caught: Sequence[int],
        prune: Callable[["Training"], bool],
    ) -> None:
        """Train all to their ends; where a signal was `caught`, they end with a checkpoint after the segment.

        `watch` sees the first of them after each segment; `prune` tells of each, after an evaluation, whether to end it there.
        """
        save_due = time.monotonic() + CHECKPOINT_S
        for segment in specs.plan(self.engine.specs[0]):
            self._each(Training.end_early)
            wanting = [training for training in self._live() if training.wants(segment)]
            if not wanting:
                continue  # done before the checkpoint
            self._each(functools.partial(Training.do, segment=segment), wanting)
            if (began := time.monotonic()) > save_due:
                self._each(Training.save_beyond_record)
                save_due = time.monotonic() + max(
                    CHECKPOINT_S, CHECKPOINT_SHARE * (time.monotonic() - began)
                )
            self._each(watch, self._live()[:1])
            if segment.evaluate:
                self._each(functools.partial(Training.end_if, prune=prune))
            if caught:
                self._each(functools.partial(Training.interrupt, number=caught[0]))
        self._each(Training.finish)

    def up_to(self, stop: int) -> Segment:
        """The segment that ends at this step, trained when the first of the runs asks for it."""
        if self.engine.step < stop:
            first, started, began = self.engine.step + 1, now_ms(), time.monotonic()
            curves = self.engine.train(stop)
            self._segment = Segment(first, curves, started, time.monotonic() - began)
        return self._segment

    def evaluation(self, member: int) -> engines.Evaluation:
        """A run's validation at this step, where all are evaluated when the first of the runs asks for its own."""
        step = self.engine.step
        if self._evaluated[0] != step:
            self._evaluated = (step, self.engine.evaluate_all(self.engine.dataset.validation))
        return self._evaluated[1][member]

    def _live(self) -> list["Training"]:
        return [training for training in self.trainings if training.outcome.status == "RUNNING"]

    def _each(
        self, act: Callable[["Training"], object], some: Sequence["Training"] | None = None
    ) -> None:
        for training in self._live() if some is None else some:
            try:
                act(training)
            except Exception as error:  # whatever broke, the record says so before the process ends
                training.fail(error)


@dataclass
class Training:
    """One run's training, as a member of a stack."""

    spec: specs.ExperimentSpec
    stack: Stack
    member: int
    journal: Journal
    outcome: Outcome
    step: int = 0
    went_on: bool = False  # whether it began from a checkpoint
    evaluations: list[Evaluated] = field(default_factory=list)
    best: Evaluated | None = None
    since_best: int = 0  # evaluations after the best one
    best_weights: State | None = (
        None  # {step, parameters} of the best evaluation, with early stopping
    )
    latest: engines.Evaluation | None = None
    curves: dict[str, np.ndarray] | None = None  # the latest segment's
    interval: list[dict[str, np.ndarray]] = field(
        default_factory=list
    )  # the curves since the last evaluation

    @property
    def engine(self) -> engines.Engine:
        return self.stack.engine

    def go_on_from(self, state: State) -> None:
        """Be where an unbroken run was at this checkpoint; what the loop remembers comes from the journal."""
        self.engine.load_state(state, self.member)
        self.step, self.best_weights, self.went_on = self.engine.step, state.get("best"), True
        for record in self.journal.records:
            if record.kind == "train" and (count := self.step + 1 - record.fields["first"]) > 0:
                self.curves = {name: array[:count] for name, array in record.arrays.items()}
                self.interval.append(self.curves)
            elif record.kind == "evaluation" and record.fields["step"] <= self.step:
                self._note_evaluation(record.fields["step"], record.fields)
        self.outcome.steps, self.outcome.training_s = self.step, self.journal.elapsed_s

    def wants(self, segment: specs.Segment) -> bool:
        """Whether this run has not done it yet."""
        evaluated = self.evaluations[-1].step if self.evaluations else -1
        return segment.stop > self.step or (segment.evaluate and segment.stop > evaluated)

    def do(self, segment: specs.Segment) -> None:
        """Take over what the stack trained, and evaluate; raises Diverged."""
        if segment.stop > self.step:
            self._train_to(segment.stop)
        if segment.evaluate:
            self._evaluate()

    def end_early(self) -> None:
        """Finish, if evaluations have not improved for as long as the spec has patience."""
        stopping = self.spec.train.early_stopping
        if stopping and self.since_best >= stopping.patience:
            self.outcome.stopped_early_at = self.step
            self.finish()

    def end_if(self, prune: Callable[["Training"], bool]) -> None:
        """Finish where a search finds that it is not worth going on."""
        if prune(self) and self.step < self.spec.steps:
            self.outcome.pruned_at = self.step
            self.finish()

    def interrupt(self, number: int) -> None:
        self.save_beyond_record()
        raise Interrupted(number, self.step)

    def fail(self, error: Exception) -> None:
        """Write down why the run ends, and whether it can be continued."""
        outcome, expected = self.outcome, isinstance(error, FmnistError)
        outcome.status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
        outcome.reason = str(error) if expected else f"{type(error).__name__}: {error}"
        outcome.exit_code = (
            error.exit_code if isinstance(error, FmnistError) else Diverged.exit_code
        )
        outcome.diverged = isinstance(error, Diverged)
        outcome.resumable = isinstance(
            error, Interrupted | Irreproducible | OSError
        )  # neither a full disk nor another arithmetic is the run's fault
        details = None if expected else "".join(traceback.format_exception(error))
        try:
            told = {"outcome": "diverged"} if outcome.diverged else {}
            self.journal.event(
                "end",
                status=outcome.status,
                reason=outcome.reason,
                traceback=details,
                resumable=outcome.resumable,
                **told,
            )
        except (
            OSError
        ) as another:  # a full disk can't take even this; the missing end tells the same
            outcome.unsynced = f"how it ended could not be written: {another}"

    def _train_to(self, stop: int) -> None:
        segment = self.stack.up_to(stop)
        curves, began = segment.curves[self.member], time.monotonic()
        bad = np.flatnonzero(~np.isfinite(curves.loss))
        kept = int(bad[0]) + 1 if len(bad) else len(curves.loss)
        self.curves = {name: array[:kept] for name, array in vars(curves).items()}
        self.interval.append(self.curves)
        self.journal.train(
            segment.first, self.curves, segment.started_ms, now_ms(), segment.seconds
        )
        self.outcome.recording_s += time.monotonic() - began
        self.step = stop
        self.outcome.training_s, self.outcome.steps = (
            self.journal.elapsed_s,
            segment.first - 1 + kept,
        )
        if len(bad):
            raise Diverged(
                f"the training loss is {curves.loss[bad[0]]} at step {self.outcome.steps}, the first that isn't finite; try a smaller optimizer.lr"
            )

    def _evaluate(self) -> None:
        self.latest = self.stack.evaluation(self.member)
        measured = {
            "epoch": self.step / self.spec.steps_per_epoch,
            "val/loss": self.latest.loss,
            "val/accuracy": self.latest.accuracy,
        }
        lr = None if self.curves is None else float(self.curves["lr"][-1])
        began = time.monotonic()
        self.journal.evaluation(self.step, {**measured, "train/lr": lr})
        self.outcome.recording_s += time.monotonic() - began
        self._note_evaluation(self.step, measured)
        if self.spec.train.early_stopping and self.since_best == 0:
            self.best_weights = {
                "step": self.step,
                "parameters": self.engine.state(self.member)["parameters"],
            }

    def _note_evaluation(self, step: int, measured: dict[str, float]) -> None:
        evaluated = Evaluated(step, measured["val/loss"], measured["val/accuracy"])
        self.since_best += 1
        if self.best is None or self._beats(evaluated, self.best):
            self.best, self.since_best = evaluated, 0
        before = self.evaluations[-1].step if self.evaluations else 0
        if (
            self.outcome.collapsed_at is None and before >= self.spec.steps_per_epoch
        ):  # a run may begin by guessing
            loss, accuracy = (
                np.concatenate([arrays[name] for arrays in self.interval]).mean()
                for name in ("loss", "accuracy")
            )
            if loss >= COLLAPSED_LOSS and accuracy <= COLLAPSED_ACCURACY:
                self.outcome.collapsed_at = step
        self.evaluations.append(evaluated)
        self.interval = []

    def _beats(self, new: Evaluated, best: Evaluated) -> bool:
        """Whether an evaluation is better: by early stopping's measure, or by accuracy where that is off."""
        stopping = self.spec.train.early_stopping
        if stopping is not None and stopping.metric == "loss":
            return new.loss < best.loss - stopping.min_delta
        return new.accuracy > best.accuracy + (stopping.min_delta if stopping else 0.0)

    def save_beyond_record(self) -> None:
        """Save, unless steps on record are still to be compared: if one comes out otherwise, the checkpoint before them is the right one."""
        if not (self.went_on and self.journal.exact and self.step < self.journal.recorded.last):
            self.save()

    def save(self) -> None:
        began = time.monotonic()
        self.journal.flush()
        checkpoint.save(
            self.journal.folder,
            self.spec,
            {**self.engine.state(self.member), "best": self.best_weights},
        )
        self.outcome.recording_s += time.monotonic() - began

    def finish(self) -> None:
        """Evaluate the final weights, or with early stopping the best ones, and write down the results."""
        self.save()
        if self.best_weights is not None and self.best_weights["step"] != self.step:
            self.engine.parameters[self.member].copy_(self.best_weights["parameters"])
            self.latest, self.outcome.weights = None, "best"
        assert self.best is not None
        dataset = self.engine.dataset
        latest = self.latest or self.engine.evaluate(dataset.validation, self.member)
        metrics = {
            "best/step": self.best.step,
            "best/val_loss": self.best.loss,
            "best/val_accuracy": self.best.accuracy,
        }
        metrics |= {"last/val_loss": latest.loss, "last/val_accuracy": latest.accuracy}
        predictions = {"val": (dataset.validation, latest)}
        if dataset.test is not None:
            test = self.engine.evaluate(dataset.test, self.member)
            metrics |= {"test/loss": test.loss, "test/accuracy": test.accuracy}
            predictions["test"] = (dataset.test, test)
        arrays: dict[str, np.ndarray] = {}
        for split, (images, evaluation) in predictions.items():
            columns = {
                "index": images.index,
                "labels": images.labels.cpu().numpy(),
                "logits": evaluation.logits,
            }
            arrays |= {f"{split}_{name}": column for name, column in columns.items()}
        digests = {"predictions": self._keep(arrays), "parameters": self._weights_digest()}
        self.outcome.metrics = metrics
        names = (
            "weights",
            "collapsed_at",
            "stopped_early_at",
            "pruned_at",
            "training_s",
            "recording_s",
        )
        told = {name: getattr(self.outcome, name) for name in names}
        self.journal.final(metrics, digests=digests, **told)
        self.journal.flush()
        pruned = {} if self.outcome.pruned_at is None else {"outcome": "pruned"}
        self.journal.event("end", status="FINISHED", reason=None, resumable=False, **pruned)
        self.outcome.status = "FINISHED"

    def _keep(self, predictions: dict[str, np.ndarray]) -> str:
        """Write predictions.npz, unless the one there is on record already; returns the SHA-256 of the file."""
        path = self.journal.folder / "predictions.npz"
        final = next((each.fields for each in self.journal.records if each.kind == "final"), None)
        if final and path.exists():
            there = hashlib.sha256(path.read_bytes()).hexdigest()
            if there == final["digests"]["predictions"]:
                return there  # another machine's last bits would not fit what is on record
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **predictions)
        checkpoint.write(path, content)
        return hashlib.sha256(content.getbuffer()).hexdigest()

    def _weights_digest(self) -> str:
        """The digest of the weights that the results are of."""
        if self.outcome.weights == "best" and self.best_weights:
            return checkpoint.digest(self.best_weights["parameters"])
        return checkpoint.digest(self.engine.state(self.member)["parameters"])
