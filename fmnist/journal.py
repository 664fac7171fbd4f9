"""A run's records, append-only and checksummed, and what follows from them: comparison, MLflow's points, curves, words.

A record is a 12-byte head (magic, payload length, CRC-32 of the payload) and the payload: one line of JSON, then
for `train` the arrays it names. A torn or damaged record ends what can be read. A run that is continued finds steps on
record that are behind its checkpoint: it computes them again and compares them bit for bit instead of recording them
twice, so that a point keeps its first time stamp and MLflow, where that is part of a point's key, never holds it twice.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fmnist import files
from fmnist import spec as specs

if TYPE_CHECKING:
    import pandas as pd

MAGIC = b"FMJ1"
HEAD = struct.Struct("<4sII")
# What a `train` record holds for each of its steps, in this order.
ARRAYS: dict[str, np.dtype[Any]] = {
    "loss": np.dtype("<f4"),
    "accuracy": np.dtype("<f4"),
    "lr": np.dtype("<f8"),
}


Milliseconds = Annotated[int, Field(ge=0, lt=10**15)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Fields(BaseModel):
    """What the JSON of a record has to hold, so that nothing that reads it has to doubt it; more is let be."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=True)


class _Train(_Fields):
    kind: Literal["train"]
    first: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    t0: Milliseconds
    t1: Milliseconds
    elapsed_s: Seconds


class _Evaluation(_Fields):
    kind: Literal["evaluation"]
    t: Milliseconds
    step: Annotated[int, Field(ge=0)]
    epoch: Seconds
    loss: Annotated[float, Field(alias="val/loss")]
    accuracy: Annotated[float, Field(alias="val/accuracy")]
    lr: Annotated[float | None, Field(alias="train/lr")]


class _Final(_Fields):
    kind: Literal["final"]
    t: Milliseconds
    metrics: dict[str, float]
    weights: Literal["final", "best"] = "final"
    training_s: Seconds = 0.0
    collapsed_at: int | None = None
    stopped_early_at: int | None = None
    pruned_at: int | None = None


class _End(_Fields):
    kind: Literal["end"]
    t: Milliseconds
    status: Literal["FINISHED", "FAILED", "KILLED"]
    reason: str | None = None
    traceback: str | None = None
    outcome: str | None = None
    resumable: bool = False


class _Resume(_Fields):
    kind: Literal["resume"]
    t: Milliseconds
    step: Annotated[int, Field(ge=0)]
    environment: dict[str, Any] = {}


CHECKED: TypeAdapter[Any] = TypeAdapter(
    Annotated[_Train | _Evaluation | _Final | _End | _Resume, Field(discriminator="kind")]
)


@dataclass(frozen=True)
class Record:
    """`kind` is train, evaluation, final, end or resume; `fields` is its JSON; `arrays` are a train record's, each [S]."""

    kind: str
    fields: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One value of one metric, as MLflow keeps it."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True)
class Unequal:
    """A value that came out otherwise when it was computed again."""

    step: int
    key: str
    recorded: float
    computed: float

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.key} was {self.recorded!r} and is {self.computed!r} now"


class Recorded:
    """What is on record of a run's steps and evaluations, to be compared bit for bit with what is computed again."""

    def __init__(self, records: Sequence[Record]) -> None:
        trained = [record.arrays for record in records if record.kind == "train"]
        self.arrays = {
            name: np.concatenate([np.empty(0, dtype), *(arrays[name] for arrays in trained)])
            for name, dtype in ARRAYS.items()
        }
        self.last = len(self.arrays["loss"])  # the last step on record
        self.evaluations = {
            record.fields["step"]: record.fields
            for record in records
            if record.kind == "evaluation"
        }
        self.metrics: dict[str, float] | None = next(
            (record.fields["metrics"] for record in records if record.kind == "final"), None
        )

    def unequal_steps(self, first: int, arrays: dict[str, np.ndarray]) -> list[Unequal]:
        """Where the steps from `first` on differ from those on record; NaN equals NaN."""
        found = []
        for name, dtype in ARRAYS.items():
            recorded = self.arrays[name][first - 1 : first - 1 + len(arrays[name])]
            computed = arrays[name][: len(recorded)].astype(dtype)
            bits, no_number = f"i{dtype.itemsize}", np.isnan(recorded) & np.isnan(computed)
            rows = np.flatnonzero((recorded.view(bits) != computed.view(bits)) & ~no_number)
            found += [
                Unequal(
                    first + int(row), f"train/{name}", float(recorded[row]), float(computed[row])
                )
                for row in rows
            ]
        return found


def unequal_values(step: int, recorded: dict[str, Any], computed: dict[str, Any]) -> list[Unequal]:
    """Where values with these names differ; NaN equals NaN."""
    return [
        Unequal(step, key, recorded[key], value)
        for key, value in computed.items()
        if repr(recorded[key]) != repr(value)
    ]


def encode(record: Record) -> bytes:
    """A record as it stands in the journal."""
    payload = json.dumps({"kind": record.kind, **record.fields}).encode() + b"\n"
    payload += b"".join(record.arrays[name].tobytes() for name in ARRAYS if record.arrays)
    return HEAD.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


def _decode(payload: bytes) -> Record:
    """The record with this payload; raises ValueError where it holds anything but what it should."""
    line, _, data = payload.partition(b"\n")
    CHECKED.validate_json(line)
    fields = json.loads(line)
    arrays, start = dict[str, np.ndarray](), 0
    if fields["kind"] == "train":
        for name, dtype in ARRAYS.items():
            arrays[name] = np.frombuffer(data, dtype, fields["count"], start)
            start += arrays[name].nbytes
    if start != len(data):
        raise ValueError(f"{len(data)} bytes behind the fields instead of {start}")
    return Record(fields.pop("kind"), fields, arrays)


def read(path: Path, offset: int = 0, end: int | None = None) -> tuple[list[Record], int]:
    """The whole records from `offset` on (up to `end`), and the offset behind the last of them; raises OSError where it can't be read."""
    try:
        with files.open_regular(path) as file:
            file.seek(offset)
            data = file.read(-1 if end is None else end - offset)
    except FileNotFoundError:
        return [], offset
    records, position = list[Record](), 0
    following = None if offset else 1  # the step that the next `train` record has to begin with
    while position + HEAD.size <= len(data):
        magic, length, checksum = HEAD.unpack_from(data, position)
        payload = data[position + HEAD.size : position + HEAD.size + length]
        if magic != MAGIC or len(payload) < length or zlib.crc32(payload) != checksum:
            break
        try:
            record = _decode(payload)
        except (
            ValueError
        ):  # its checksum is right and what it says is not: no program of ours wrote it
            break
        if record.kind == "train":
            if record.fields["first"] != (following or record.fields["first"]):
                break
            following = record.fields["first"] + record.fields["count"]
        records.append(record)
        position += HEAD.size + length
    return records, offset + position


def step_times(record: Record) -> np.ndarray:
    """[S] milliseconds since the epoch at which each step of a train record ended, interpolated within it."""
    count = record.fields["count"]
    duration = record.fields["t1"] - record.fields["t0"]
    times: np.ndarray = (
        record.fields["t0"] + np.arange(1, count + 1, dtype=np.int64) * duration // count
    )
    return times


def points(spec: specs.ExperimentSpec, record: Record) -> Iterator[Point]:
    """The MLflow points of a record: a pure function of it, so that sending a record twice stores it once."""
    fields = record.fields
    match record.kind:
        case "train":
            first = fields["first"]
            times = step_times(record)
            wanted = spec.logged_steps(first + fields["count"] - 1)
            for step in wanted[max(0, -(-first // wanted.step) - 1) :]:
                for name in ("loss", "accuracy"):
                    yield Point(
                        f"train/{name}",
                        float(record.arrays[name][step - first]),
                        int(times[step - first]),
                        step,
                    )
        case "evaluation":
            for key in (
                "val/accuracy",
                "val/loss",
                "train/lr",
                "epoch",
            ):  # MLflow compares by the first one
                if fields[key] is not None:
                    yield Point(key, fields[key], fields["t"], fields["step"])
        case "final":
            for key, value in fields["metrics"].items():
                yield Point(key, value, fields["t"], 0)


def in_words(results: Mapping[str, Any]) -> list[str]:
    """A finished run's results, given the fields of its `final` record: a sentence each."""
    metrics = results["metrics"]
    kept = "the best weights, restored" if results["weights"] == "best" else "the last step"
    lines = [
        f"Validation accuracy {metrics['last/val_accuracy']:.4f}, loss {metrics['last/val_loss']:.4f} ({kept});"
        f" best accuracy {metrics['best/val_accuracy']:.4f} at step {metrics['best/step']:,.0f}."
    ]
    if "test/accuracy" in metrics:
        lines += [
            f"Test accuracy {metrics['test/accuracy']:.4f}, loss {metrics['test/loss']:.4f}, read once, at the end."
        ]
    else:
        lines += [
            "Validation is the test set here (data.holdout: null): don't choose by it what you then report on it."
        ]
    if (step := results["stopped_early_at"]) is not None:
        lines += [f"Stopped early at step {step:,}."]
    if (step := results.get("pruned_at")) is not None:
        lines += [f"Pruned at step {step:,}: a search saw that others were better by then."]
    if (step := results["collapsed_at"]) is not None:
        lines += [
            f"COLLAPSED: by step {step:,} it only guesses (loss about ln 10, accuracy about 0.1); try a smaller optimizer.lr."
        ]
    return lines


class Result(NamedTuple):
    """What is known of a run that needs no other beside it."""

    outcome: str
    """finished, diverged, pruned, or running."""
    where: str
    """In words, with how it ended."""
    accuracy: float | None = None
    """On the validation images, after the last step."""


def curves(spec: specs.ExperimentSpec, records: list[Record]) -> "pd.DataFrame":
    """Every step, one row each: step, epoch, elapsed_s, train/loss, train/accuracy, train/lr, val/loss, val/accuracy (NaN where none)."""
    import pandas as pd

    recorded = Recorded(records)
    steps = np.arange(1, recorded.last + 1)
    trained = [record.fields for record in records if record.kind == "train"]
    ends = [0, *(fields["first"] + fields["count"] - 1 for fields in trained)]
    seconds = np.interp(steps, ends, [0.0, *(fields["elapsed_s"] for fields in trained)])
    train = pd.DataFrame(
        {
            "step": steps,
            "elapsed_s": seconds,
            **{f"train/{name}": array for name, array in recorded.arrays.items()},
        }
    )
    val = pd.DataFrame(
        list(recorded.evaluations.values()), columns=["step", "val/loss", "val/accuracy"]
    )
    val = val.astype({"step": int, "val/loss": float, "val/accuracy": float})
    frame = train.merge(val, on="step", how="outer").sort_values("step", ignore_index=True)
    frame.insert(1, "epoch", frame["step"] / spec.steps_per_epoch)
    return frame


def from_curves(
    spec: specs.ExperimentSpec, frame: "pd.DataFrame", last: int, ended_ms: int
) -> list[Record]:
    """The records of the first `last` steps of a run's `curves`, cut and evaluated as this spec's plan has it."""
    rows = frame.set_index("step")
    elapsed_s = rows["elapsed_s"].fillna(0.0)
    times = (ended_ms + 1000 * (elapsed_s - elapsed_s[last])).astype(int)
    records = []
    for segment in specs.plan(spec):
        start, stop = segment.start, min(segment.stop, last)
        if stop > start:
            steps = rows.loc[start + 1 : stop]
            arrays = {
                name: steps[f"train/{name}"].to_numpy(dtype) for name, dtype in ARRAYS.items()
            }
            fields = {
                "first": start + 1,
                "count": stop - start,
                "t0": int(times[start]),
                "t1": int(times[stop]),
            }
            records.append(Record("train", {**fields, "elapsed_s": float(elapsed_s[stop])}, arrays))
        if segment.evaluate and segment.stop <= last and not np.isnan(rows["val/accuracy"][stop]):
            measured: dict[str, Any] = {
                key: float(rows[key][stop]) for key in ("val/loss", "val/accuracy", "train/lr")
            }
            measured |= {
                "epoch": stop / spec.steps_per_epoch,
                **({} if stop else {"train/lr": None}),
            }
            records.append(Record("evaluation", {"t": int(times[stop]), "step": stop, **measured}))
    return records
