"""A run's own record on disk: append-only, checksummed, the source of truth until MLflow has it all.

A run lives in mlruns/state/<run key>/ while it trains, while it can be continued, and until it is carried into MLflow:

    lock            held (flock) by the trainer as long as it lives; holds its pid and host
    run.json        key, display name, fingerprint, start, the store that it is for (none with --no-sync), the run that it extends
    spec.yaml       the resolved spec
    environment.json
    journal         the records below
    checkpoint.pt   checkpoint.previous.pt  the training state, never ahead of what the disk holds of the journal
    predictions.npz                         written at the end
    mlflow.json     written by who carries it: MLflow's run id, how far the journal is carried, the closing status

A record is a 12-byte head (magic, payload length, CRC-32 of the payload) and the payload: one line of JSON, then
for `train` the arrays it names. A torn or damaged record ends what can be read. A run that is continued finds steps on
record that are behind its checkpoint: it computes them again and compares them bit for bit instead of recording them
twice, so that a point keeps its first time stamp and MLflow, where that is part of a point's key, never holds it twice.
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
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fmnist import experiments
from fmnist import spec as specs
from fmnist.errors import Irreproducible, StoreError

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
        self.arrays = {name: np.concatenate([np.empty(0, dtype), *(arrays[name] for arrays in trained)]) for name, dtype in ARRAYS.items()}
        self.evaluations = {record.fields["step"]: record.fields for record in records if record.kind == "evaluation"}
        self.metrics: dict[str, float] | None = next((record.fields["metrics"] for record in records if record.kind == "final"), None)

    @property
    def last(self) -> int:
        """The last step on record."""
        return len(self.arrays["loss"])

    def unequal_steps(self, first: int, arrays: dict[str, np.ndarray]) -> list[Unequal]:
        """Where the steps from `first` on differ from those on record; NaN equals NaN."""
        found = []
        for name, dtype in ARRAYS.items():
            recorded = self.arrays[name][first - 1 : first - 1 + len(arrays[name])]
            computed = arrays[name][: len(recorded)].astype(dtype)
            bits, no_number = f"i{dtype.itemsize}", np.isnan(recorded) & np.isnan(computed)
            rows = np.flatnonzero((recorded.view(bits) != computed.view(bits)) & ~no_number)
            found += [Unequal(first + int(row), f"train/{name}", float(recorded[row]), float(computed[row])) for row in rows]
        return found

    def unequal_values(self, step: int, recorded: dict[str, Any], computed: dict[str, Any]) -> list[Unequal]:
        """Where values with these names differ; NaN equals NaN."""
        return [Unequal(step, key, recorded[key], value) for key, value in computed.items() if repr(recorded[key]) != repr(value)]


# ---- writing


def state_folder(root: Path) -> Path:
    return root / "mlruns" / "state"


def carrier_lock(root: Path, store: str = "local") -> Path:
    """Held, with its pid in it, by the one process that carries this root's journals into a store."""
    digest = "" if store == "local" else f"-{hashlib.sha256(store.encode()).hexdigest()[:8]}"
    return root / "mlruns" / f".sidecar{digest}.lock"


def start_carrier(root: Path) -> "subprocess.Popen[bytes]":
    """Start the store's sidecar; where one is at work already, this one sees that and exits.

    A session of its own, so that Ctrl-C reaches the trainer only; its words go to mlruns/sidecar.log.
    """
    with open(root / "mlruns" / "sidecar.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fmnist.sidecar", str(root)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


class Journal:
    """The state folder of a run that is training: made whole before it is visible, locked until the trainer ends."""

    def __init__(self, folder: Path, lock: int, records: Sequence[Record], exact: bool = True) -> None:
        self.folder, self._lock, self._exact = folder, lock, exact
        self._file = os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self.records, self.recorded = records, Recorded(records)
        self.elapsed_s: float = max((record.fields["elapsed_s"] for record in records if record.kind == "train"), default=0.0)
        """Training time of all steps on record."""
        self.size = os.fstat(self._file).st_size
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    @classmethod
    def create(
        cls,
        root: Path,
        spec: specs.ExperimentSpec,
        display_name: str,
        environment: dict[str, Any],
        store: str | None,
        extends: str | None = None,
        records: Sequence[Record] = (),
    ) -> Self:
        """Start a run for a store, or for none until `fmnist sync` takes it; raises OSError where mlruns/ can't be written.

        A run that extends another (its id there) begins with that one's records.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")  # the same spec may be started several times within a second
        folder = state_folder(root) / f"{spec.name}-s{spec.train.seed}-{spec.fingerprint[:8]}-{stamp}"
        partial = folder.with_name(f".{folder.name}-{os.getpid()}")
        started = min([now_ms(), *(record.fields["t0"] for record in records if record.kind == "train")])
        run = {"key": folder.name, "name": display_name, "fingerprint": spec.fingerprint, "started_ms": started}
        partial.mkdir(parents=True)
        try:
            lock = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            (partial / "run.json").write_text(json.dumps({**run, "store": store, "extends": extends}), encoding="utf-8")
            (partial / "spec.yaml").write_text(experiments.dump(spec), encoding="utf-8")
            (partial / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")
            for path in partial.iterdir():  # a journal without its spec would be of no use after a power loss
                with open(path) as file:
                    os.fsync(file.fileno())
            made = cls(partial, lock, records)
            for record in records:
                made._append(record)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        made.folder = folder
        return made

    @classmethod
    def resume(cls, state: "StateFolder", exact: bool = True) -> Self:
        """Go on with a run that stopped: what is on record is compared (if `exact`), what is torn off at the end is cut.

        Raises StoreError where another process has the run, or where its journal is damaged before what MLflow holds of it.
        """
        try:
            lock = os.open(state.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreError(f"{state.path.name} is gone: it has ended, or was given up") from None
        for attempt in itertools.count():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 50:
                    os.close(lock)
                    raise StoreError(f"{state.path.name} is being trained by {state.holder}; --fresh starts another run") from None
                time.sleep(0.005)  # who only looks whether it is locked holds it for a moment too
        records, end = read(state.path / "journal")
        if end < state.carried.get("offset", 0):
            os.close(lock)
            raise StoreError(
                f"{state.path / 'journal'} is damaged at byte {end:,}, where MLflow holds more already; --fresh starts another run"
            )
        if not state.unfinished or not state.path.exists():
            os.close(lock)
            raise StoreError(f"{state.path.name} has ended, there is nothing to continue; `fmnist sync` carries it into MLflow")
        with open(state.path / "journal", "ab") as file:
            file.truncate(end)
        return cls(state.path, lock, records, exact)

    def train(self, first: int, arrays: dict[str, np.ndarray], started_ms: int, ended_ms: int, seconds: float) -> None:
        """Append the steps from `first` on, done between the two times, in `seconds` of training; raises Irreproducible.

        Steps that are on record already are compared instead.
        """
        known = min(max(0, self.recorded.last + 1 - first), len(arrays["loss"]))
        self._compare(self.recorded.unequal_steps(first, arrays))
        arrays = {name: array[known:].astype(ARRAYS[name]) for name, array in arrays.items()}
        if count := len(arrays["loss"]):
            self.elapsed_s += seconds
            fields = {"first": first + known, "count": count, "t0": started_ms, "t1": ended_ms, "elapsed_s": self.elapsed_s}
            self._append(Record("train", fields, arrays))

    def evaluation(self, step: int, measured: dict[str, Any]) -> None:
        """Append an evaluation, or compare it with the one on record; raises Irreproducible."""
        if step not in self.recorded.evaluations:
            self.event("evaluation", step=step, **measured)
        else:
            self._compare(self.recorded.unequal_values(step, self.recorded.evaluations[step], measured))

    def final(self, metrics: dict[str, float], **fields: Any) -> None:
        """Append the results, or compare them with those on record; raises Irreproducible."""
        if self.recorded.metrics is None:
            self.event("final", metrics=metrics, **fields)
        else:
            self._compare(self.recorded.unequal_values(self.recorded.last, self.recorded.metrics, metrics))

    def event(self, kind: str, **fields: Any) -> None:
        self._append(Record(kind, {"t": now_ms(), **fields}))

    def _compare(self, unequal: list[Unequal]) -> None:
        if unequal and self._exact:
            first = min(unequal, key=lambda difference: difference.step)
            raise Irreproducible(f"this machine does not repeat its own results: {first}; start anew with --fresh")

    def _append(self, record: Record) -> None:
        data = b"".join(record.arrays[name].tobytes() for name in ARRAYS if record.arrays)
        payload = json.dumps({"kind": record.kind, **record.fields}).encode() + b"\n" + data
        framed = HEAD.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload
        written = os.write(self._file, framed)
        if written != len(framed):
            os.ftruncate(self._file, self.size)  # else what comes after could not be read
            raise OSError(errno.ENOSPC, f"{written} of {len(framed)} bytes written", str(self.folder / "journal"))
        self.size += written

    def flush(self) -> None:
        """See to it that all of it is on the disk: before a checkpoint is, which must not be ahead of it."""
        os.fsync(self._file)

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


def in_words(results: Mapping[str, Any]) -> list[str]:
    """A finished run's results, given the fields of its `final` record: a sentence each."""
    metrics = results["metrics"]
    kept = "the best weights, restored" if results["weights"] == "best" else "the last step"
    lines = [
        f"Validation accuracy {metrics['last/val_accuracy']:.4f}, loss {metrics['last/val_loss']:.4f} ({kept});"
        f" best accuracy {metrics['best/val_accuracy']:.4f} at step {metrics['best/step']:,.0f}."
    ]
    if "test/accuracy" in metrics:
        lines += [f"Test accuracy {metrics['test/accuracy']:.4f}, loss {metrics['test/loss']:.4f}, read once, at the end."]
    else:
        lines += ["Validation is the test set here (data.holdout: null): don't choose by it what you then report on it."]
    if (step := results["stopped_early_at"]) is not None:
        lines += [f"Stopped early at step {step:,}."]
    if (step := results["collapsed_at"]) is not None:
        lines += [f"COLLAPSED: by step {step:,} it only guesses (loss about ln 10, accuracy about 0.1); try a smaller optimizer.lr."]
    return lines


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


def from_curves(spec: specs.ExperimentSpec, frame: "pd.DataFrame", last: int, ended_ms: int) -> list[Record]:
    """The records of the first `last` steps of a run's `curves`, cut and evaluated as this spec's plan has it."""
    rows = frame.set_index("step")
    elapsed_s = rows["elapsed_s"].fillna(0.0)
    times = (ended_ms + 1000 * (elapsed_s - elapsed_s[last])).astype(int)
    records = []
    for segment in specs.plan(spec):
        start, stop = segment.start, min(segment.stop, last)
        if stop > start:
            steps = rows.loc[start + 1 : stop]
            arrays = {name: steps[f"train/{name}"].to_numpy(dtype) for name, dtype in ARRAYS.items()}
            fields = {"first": start + 1, "count": stop - start, "t0": int(times[start]), "t1": int(times[stop])}
            records.append(Record("train", {**fields, "elapsed_s": float(elapsed_s[stop])}, arrays))
        if segment.evaluate and segment.stop <= last and not np.isnan(rows["val/accuracy"][stop]):
            measured: dict[str, Any] = {key: float(rows[key][stop]) for key in ("val/loss", "val/accuracy", "train/lr")}
            measured |= {"epoch": stop / spec.steps_per_epoch, **({} if stop else {"train/lr": None})}
            records.append(Record("evaluation", {"t": int(times[stop]), "step": stop, **measured}))
    return records


@dataclass(frozen=True)
class StateFolder:
    """A run's state folder, as anyone but its trainer sees it."""

    path: Path
    run: dict[str, Any]

    @classmethod
    def at(cls, path: Path) -> Self:
        """The folder there; raises OSError or ValueError where none is."""
        return cls(path, json.loads((path / "run.json").read_text(encoding="utf-8")))

    @property
    def spec(self) -> specs.ExperimentSpec:
        """The run's spec; raises UserError where the file no longer holds it."""
        path = self.path / "spec.yaml"
        spec = experiments.parse(self._text("spec.yaml"), str(path))
        if spec.fingerprint != (fingerprint := self.run.get("fingerprint", spec.fingerprint)):
            raise StoreError(f"{path} was changed: it gives the fingerprint {spec.fingerprint[:8]}, the run has {fingerprint[:8]}")
        return spec

    @property
    def environment(self) -> dict[str, Any]:
        """Where the run began; raises StoreError where the file no longer tells."""
        try:
            return dict(json.loads(self._text("environment.json")))
        except ValueError:
            raise StoreError(f"{self.path / 'environment.json'} is damaged; give the run up with --fresh") from None

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path / name} can't be read: {error}; give the run up with --fresh") from None

    @property
    def resumable(self) -> bool:
        """Whether its trainer is gone and left it such that it can be continued."""
        return not self.running and self.unfinished

    @property
    def unfinished(self) -> bool:
        """Whether by what it holds there is, or will be, something to continue: once that is not so, it never is again."""
        note = self.carried
        records, end = read(self.path / "journal")
        if note.get("closed") == "DELETED" or end < note.get("offset", 0):
            return False
        last = next((record for record in reversed(records) if record.kind in ("end", "resume")), None)
        return last is None or bool(last.fields.get("resumable", last.kind == "resume"))

    @property
    def holder(self) -> str:
        """Who has it, or had it last."""
        with contextlib.suppress(OSError, ValueError):
            held = json.loads((self.path / "lock").read_text())
            return f"process {held['pid']} on {held['host']}"
        return "another process"

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
        self._replace("mlflow.json", fields)

    def assign(self, store: str) -> None:
        """Say which store the run is for."""
        self._replace("run.json", {**self.run, "store": store})

    def _replace(self, name: str, content: dict[str, Any]) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self.path / name)

    def remove(self) -> None:
        """Take the folder away: out of sight first, so that nobody finds half of it."""
        hidden = self.path.with_name(f".removed-{self.path.name}")
        self.path.rename(hidden)
        shutil.rmtree(hidden)


def find(root: Path, text: str) -> StateFolder:
    """The run in mlruns/state/ whose key or MLflow id begins like this; raises StoreError where that isn't one."""
    folders = state_folders(root)
    found = [folder for folder in folders if folder.path.name.startswith(text) or (folder.carried.get("run_id") or "").startswith(text)]
    if len(found) != 1:
        known = ", ".join(folder.path.name for folder in found or folders) or "none"
        raise StoreError(f"{text!r} fits {len(found)} of the runs that are on disk; there are: {known}")
    return found[0]


def state_folders(root: Path) -> list[StateFolder]:
    """Every visible state folder, oldest first."""
    found = []
    for path in state_folder(root).glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            found.append(StateFolder.at(path))
    return sorted(found, key=lambda folder: (folder.run["started_ms"], folder.path.name))
