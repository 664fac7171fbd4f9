"""A run's own record on disk: append-only, checksummed, the source of truth until MLflow has it all.

A run lives in mlruns/state/<run key>/ while it trains and until it is carried into MLflow:

    lock            held (flock) by the trainer as long as it lives; holds its pid and host
    run.json        key, display name, start, and the store that it is for (none with --no-sync)
    spec.yaml       the resolved spec
    environment.json
    journal         the records below
    checkpoint.pt   predictions.npz         written at the end
    mlflow.json     written by who carries it: MLflow's run id, how far the journal is carried, the closing status

A record is a 12-byte head (magic, payload length, CRC-32 of the payload) and the payload: one line of JSON, then
for `train` the arrays it names. A torn or damaged record ends what can be read.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fmnist import experiments
from fmnist import spec as specs

if TYPE_CHECKING:
    import pandas as pd

MAGIC = b"FMJ1"
HEAD = struct.Struct("<4sII")
ARRAYS: dict[str, np.dtype[Any]] = {"loss": np.dtype("<f4"), "accuracy": np.dtype("<f4"), "lr": np.dtype("<f8")}
"""What a `train` record holds for each of its steps, in this order."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Record:
    """`kind` is train, evaluation, final or end; `fields` is its JSON; `arrays` are a train record's, each [S]."""

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


def is_locked(path: Path) -> bool:
    """Whether a living process holds this lock file."""
    try:
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


# ---- writing


def state_folder(root: Path) -> Path:
    return root / "mlruns" / "state"


def carrier_lock(root: Path, store: str = "local") -> Path:
    """Held, with its pid in it, by the one process that carries this root's journals into a store."""
    digest = "" if store == "local" else f"-{hashlib.sha256(store.encode()).hexdigest()[:8]}"
    return root / "mlruns" / f".sidecar{digest}.lock"


class Journal:
    """The state folder of a run that is training: made whole before it is visible, locked until the trainer ends."""

    def __init__(self, folder: Path, lock: int, file: int) -> None:
        self.folder, self._lock, self._file = folder, lock, file

    @classmethod
    def create(cls, root: Path, spec: specs.ExperimentSpec, display_name: str, environment: dict[str, Any], store: str | None) -> Self:
        """Start a run for a store, or for none until `fmnist sync` takes it; raises OSError where mlruns/ can't be written."""
        state = state_folder(root)
        started = now_ms()
        stamp = datetime.fromtimestamp(started / 1000, UTC).strftime("%Y%m%dT%H%M%S")
        key = f"{spec.name}-s{spec.train.seed}-{spec.fingerprint[:8]}-{stamp}"
        partial = state / f".{key}-{os.getpid()}"
        partial.mkdir(parents=True)
        lock = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        (partial / "spec.yaml").write_text(experiments.dump(spec), encoding="utf-8")
        (partial / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")
        for attempt in itertools.count(1):  # the same spec may be started several times within a second
            unique = key if attempt == 1 else f"{key}-{attempt}"
            run = {"key": unique, "name": display_name, "started_ms": started, "store": store}
            (partial / "run.json").write_text(json.dumps(run), encoding="utf-8")
            try:
                partial.rename(state / unique)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            else:
                break
        folder = state / unique
        return cls(folder, lock, os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC))

    def train(self, first: int, arrays: dict[str, np.ndarray], started_ms: int, ended_ms: int, elapsed_s: float) -> None:
        """Append the steps from `first` on, done between the two times; `elapsed_s` is the training time up to the last of them."""
        fields = {"first": first, "count": len(arrays["loss"]), "t0": started_ms, "t1": ended_ms, "elapsed_s": elapsed_s}
        data = b"".join(arrays[name].astype(dtype).tobytes() for name, dtype in ARRAYS.items())
        self._append("train", fields, data)

    def event(self, kind: str, **fields: Any) -> None:
        self._append(kind, {"t": now_ms(), **fields}, b"")

    def _append(self, kind: str, fields: dict[str, Any], data: bytes) -> None:
        payload = json.dumps({"kind": kind, **fields}).encode() + b"\n" + data
        record = HEAD.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload
        written = os.write(self._file, record)
        if written != len(record):
            raise OSError(f"{self.folder / 'journal'}: {written} of {len(record)} bytes written; is the disk full?")

    def release(self) -> None:
        """Let go of the lock: from here on the run counts as ended."""
        os.close(self._file)
        os.close(self._lock)


# ---- reading


def read(path: Path, offset: int = 0, end: int | None = None) -> tuple[list[Record], int]:
    """The whole records from `offset` on (up to `end`), and the offset behind the last of them."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(-1 if end is None else end - offset)
    except FileNotFoundError:
        return [], offset
    records, position = [], 0
    while position + HEAD.size <= len(data):
        magic, length, checksum = HEAD.unpack_from(data, position)
        payload = data[position + HEAD.size : position + HEAD.size + length]
        if magic != MAGIC or len(payload) < length or zlib.crc32(payload) != checksum:
            break
        records.append(_decode(payload))
        position += HEAD.size + length
    return records, offset + position


def _decode(payload: bytes) -> Record:
    line, _, data = payload.partition(b"\n")
    fields = json.loads(line)
    arrays, start = {}, 0
    if fields["kind"] == "train":
        for name, dtype in ARRAYS.items():
            arrays[name] = np.frombuffer(data, dtype, fields["count"], start)
            start += arrays[name].nbytes
    return Record(fields.pop("kind"), fields, arrays)


def step_times(record: Record) -> np.ndarray:
    """[S] milliseconds since the epoch at which each step of a train record ended, interpolated within it."""
    count = record.fields["count"]
    duration = record.fields["t1"] - record.fields["t0"]
    times: np.ndarray = record.fields["t0"] + np.arange(1, count + 1, dtype=np.int64) * duration // count
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
                row = step - first
                yield Point("train/loss", float(record.arrays["loss"][row]), int(times[row]), step)
                yield Point("train/accuracy", float(record.arrays["accuracy"][row]), int(times[row]), step)
        case "evaluation":
            for key in ("val/loss", "val/accuracy", "train/lr", "epoch"):
                if fields[key] is not None:
                    yield Point(key, fields[key], fields["t"], fields["step"])
        case "final":
            for key, value in fields["metrics"].items():
                yield Point(key, value, fields["t"], 0)


def curves(spec: specs.ExperimentSpec, records: list[Record]) -> "pd.DataFrame":
    """Every step, one row each: step, epoch, elapsed_s, train/loss, train/accuracy, train/lr, val/loss, val/accuracy (NaN where none)."""
    import pandas as pd

    # A record of no steps first: a run that broke off before its first step has the same columns.
    nothing = Record("train", {"first": 1, "count": 0, "elapsed_s": 0.0}, {name: np.empty(0, dtype) for name, dtype in ARRAYS.items()})
    frames, elapsed = [], 0.0
    for record in [nothing, *(record for record in records if record.kind == "train")]:
        count = record.fields["count"]
        steps = np.arange(record.fields["first"], record.fields["first"] + count)
        seconds = np.linspace(elapsed, record.fields["elapsed_s"], count + 1)[1:]
        columns = {f"train/{name}": array for name, array in record.arrays.items()}
        frames.append(pd.DataFrame({"step": steps, "elapsed_s": seconds, **columns}))
        elapsed = record.fields["elapsed_s"]
    evaluations = [record.fields for record in records if record.kind == "evaluation"]
    val = pd.DataFrame(evaluations, columns=["step", "val/loss", "val/accuracy"]).astype(
        {"step": int, "val/loss": float, "val/accuracy": float}
    )
    frame = pd.concat(frames).merge(val, on="step", how="outer").sort_values("step", ignore_index=True)
    frame.insert(1, "epoch", frame["step"] / spec.steps_per_epoch)
    return frame


@dataclass(frozen=True)
class StateFolder:
    """A run's state folder, as anyone but its trainer sees it."""

    path: Path
    run: dict[str, Any]

    @property
    def spec(self) -> specs.ExperimentSpec:
        return experiments.parse((self.path / "spec.yaml").read_text(encoding="utf-8"), str(self.path / "spec.yaml"))

    @property
    def running(self) -> bool:
        """Whether its trainer lives: it holds the lock until it ends, however it ends."""
        return is_locked(self.path / "lock")

    @property
    def carried(self) -> dict[str, Any]:
        """What who carries it has noted: run_id, offset, closed, error; empty before it begins."""
        try:
            return dict(json.loads((self.path / "mlflow.json").read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def note(self, **fields: Any) -> None:
        """Replace the carrier's note, whole or not at all."""
        partial = self.path / "mlflow.json.partial"
        partial.write_text(json.dumps(fields))
        partial.replace(self.path / "mlflow.json")

    def remove(self) -> None:
        """Take the folder away: out of sight first, so that nobody finds half of it."""
        hidden = self.path.with_name(f".removed-{self.path.name}")
        self.path.rename(hidden)
        shutil.rmtree(hidden)


def state_folders(root: Path) -> list[StateFolder]:
    """Every visible state folder, oldest first."""
    found = []
    for path in state_folder(root).glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            found.append(StateFolder(path, json.loads((path / "run.json").read_text(encoding="utf-8"))))
    return sorted(found, key=lambda folder: (folder.run["started_ms"], folder.path.name))
