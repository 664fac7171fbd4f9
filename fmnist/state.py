"""A run's folder while the run trains, while it can be continued, and until MLflow has all of it: mlruns/state/<run key>/.

lock              held (flock) by the trainer as long as it lives; holds its pid and host
run.json          key, display name, fingerprint, group, start, the store that it is for (none with --no-sync), the run that it extends
spec.yaml         the resolved spec; environment.json: where the run began
journal           its records, the source of truth
checkpoint.pt     the training state, never ahead of what the disk holds of the journal; checkpoint.previous.pt: the one before
predictions.npz   written at the end
mlflow.json       written by the upload: MLflow's run id, how far the journal is uploaded, the closing status, a digest of all that
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, Self, TextIO, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmnist import experiments, files
from fmnist import spec as specs
from fmnist.errors import Irreproducible, StoreError, UserError
from fmnist.journal import ARRAYS, Record, Recorded, Result, Unequal, encode, read, unequal_values

LEFT_BEHIND = re.compile(r"\.(removed-)?.+-s\d+-[0-9a-f]{8}-\d{8}T\d{12}(-\d+)?")
"""A state folder before it has its name, when nothing was trained yet, or after it was removed, when all of it is in MLflow."""
AWAITED = "awaited"
"""The claims on runs that ended, by the commands that wait for them to be in MLflow: their folders stay till then."""
UPLOADER = "the uploader"
PROBE_BYTES = 65_536
"""Enough for an upload's notes and for its log."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def state_folder(root: Path) -> Path:
    return root / "mlruns" / "state"


def unwritable(root: Path, error: OSError) -> StoreError:
    what = f"{root / 'mlruns'}: can't be written: {error.strerror or error}"
    return StoreError(f"{what}; mend that or set FMNIST_HOME to another folder")


def check_writable(root: Path) -> None:
    """Raise StoreError where no run can be begun here."""
    folder = state_folder(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder.parent):
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise unwritable(root, error) from None


def carrier_lock(root: Path, store: str = "local") -> Path:
    """Held by the one process, written down in it (Holder), that carries this root's journals into a store."""
    digest = "" if store == "local" else f"-{hashlib.sha256(store.encode()).hexdigest()[:8]}"
    return root / "mlruns" / f".sidecar{digest}.lock"


def start_carrier(root: Path) -> "subprocess.Popen[bytes] | None":
    """Start the store's sidecar, unless one is at work or none can be started; its words: mlruns/sidecar.log.

    Another one would find that one is at work only after importing for a second.
    """
    if is_locked(carrier_lock(root, specs.store_name())):
        return None
    command = [sys.executable, "-m", "fmnist.sidecar", str(root)]
    with (
        contextlib.suppress(OSError),  # a full disk; who waits for the upload says so
        open(root / "mlruns" / "sidecar.log", "ab") as log,
    ):  # in a session of its own: Ctrl-C reaches the trainer only
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return None


def why_unwritable(root: Path) -> str | None:
    """Why no file can be written in mlruns/ now, as on a disk that is full or has no inodes left; None where one can."""
    probe = root / "mlruns" / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        return f"{root / 'mlruns'} can't be written: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def is_locked(path: Path) -> bool:
    """Whether a living process holds this lock file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        lock = os.open(path, flags)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class Holder(NamedTuple):
    """The process that holds an upload lock, as it wrote itself down there."""

    what: str
    """UPLOADER, or a command that waits for nobody to end it."""
    pid: int
    host: str
    process: str
    """What tells it from others that had or will have its number; see `process`."""

    def __str__(self) -> str:
        return f"{self.what} (process {self.pid} on {self.host})"

    @property
    def is_uploader_here(self) -> bool:
        """Whether this is, beyond doubt, an uploader that lives on this machine, and may be ended at any moment."""
        here = self.host == socket.gethostname() and self.process == process(self.pid)
        return here and self.what == UPLOADER


def process(pid: int) -> str:
    """A digest of when this machine's process of that number started, and of its command line; empty where none is found."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        found = started.encode() + Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # no such process, or a system without /proc
        try:
            command = ["ps", "-o", "lstart=,args=", "-p", str(pid)]
            found = subprocess.run(command, capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""
    return hashlib.sha256(found).hexdigest()[:32]


def hold(lock: TextIO, what: str) -> None:
    """Write this process into a lock file that it holds."""
    pid = os.getpid()
    found = Holder(what, pid, socket.gethostname(), process(pid))
    os.ftruncate(lock.fileno(), 0)
    with contextlib.suppress(OSError):  # on a full disk nobody can be told, and the lock is held
        os.write(lock.fileno(), json.dumps(found._asdict()).encode())


def holder(lock: Path) -> Holder | None:
    """Who wrote itself into a lock file last; None where nobody did."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads(lock.read_text()))
    return None


def end_uploader(lock: Path, number: int = signal.SIGTERM) -> None:
    """Send a signal to the uploader that holds a lock, if there is one on this machine, even if it is stopped."""
    found = holder(lock)
    if found and found.is_uploader_here and is_locked(lock):
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, number)
            os.kill(found.pid, signal.SIGCONT)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that came, for work that ends in order; a second one raises KeyboardInterrupt."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if (
            len(caught) > 1
        ):  # who asks twice doesn't want to wait, neither for a segment nor for a store
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _File(BaseModel):
    """What a file of a state folder has to hold, so that nothing that reads it has to doubt it; more is let be."""

    model_config = ConfigDict(strict=True, extra="allow")


Model = TypeVar("Model", bound=_File)


class RunFile(_File):
    """run.json."""

    key: str
    name: str
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    group: str
    started_ms: Annotated[int, Field(ge=0, lt=10**15)]
    store: str | None
    extends: str | None


class EnvironmentFile(_File):
    """environment.json: of where a run began what is tagged in MLflow."""

    command: str = ""
    data_digest: str = ""
    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: dict[str, str]


class NoteFile(_File):
    """mlflow.json."""

    run_id: str = ""
    experiment_id: str = ""
    offset: Annotated[int, Field(ge=0)] = 0
    closed: str | None = None
    reason: str | None = None
    error: str | None = None
    store: str = ""
    key: str = ""
    remark: str | None = None
    sha256: str = ""


class HolderFile(_File):
    """lock."""

    pid: int
    host: str


def _checked(model: type[Model], path: Path) -> Model:
    """What a file holds; raises OSError where it can't be read, ValueError (a line) where it holds anything but what it should."""
    content = files.read(path)
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path.name}: {place}{': ' if place else ''}{first['msg']}") from None


class Journal:
    """The state folder of a run that is training: made whole before it is visible, locked until the trainer ends."""

    def __init__(self, folder: Path, lock: int, records: Sequence[Record], size: int = 0) -> None:
        self.folder, self.records, self.recorded, self.size = (
            folder,
            records,
            Recorded(records),
            size,
        )
        self.elapsed_s: float = max(
            (record.fields["elapsed_s"] for record in records if record.kind == "train"),
            default=0.0,
        )
        self._lock, self.exact = (
            lock,
            True,
        )  # whether what is computed again has to equal what is on record
        self._file = os.open(
            folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        )
        os.ftruncate(self._file, size)  # what is torn off at its end is cut
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
        """Start a run, with the records of the run (its id) that it extends; raises OSError where mlruns/ can't be written."""
        stamp = datetime.now(UTC).strftime(
            "%Y%m%dT%H%M%S%f"
        )  # the same spec may be started several times within a second
        folder = (
            state_folder(root) / f"{spec.name}-s{spec.train.seed}-{spec.fingerprint[:8]}-{stamp}"
        )
        partial = folder.with_name(f".{folder.name}-{os.getpid()}")
        for left in state_folder(root).glob(".*"):  # by processes that were killed
            if LEFT_BEHIND.fullmatch(left.name):
                files.sweep_out(left, "lock")
        started = min(
            [now_ms(), *(record.fields["t0"] for record in records if record.kind == "train")]
        )
        run = {
            "key": folder.name,
            "name": display_name,
            "fingerprint": spec.fingerprint,
            "group": spec.group,
            "started_ms": started,
        }
        partial.mkdir(parents=True)
        try:
            lock = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            (partial / "run.json").write_text(
                json.dumps({**run, "store": store, "extends": extends}), encoding="utf-8"
            )
            (partial / "spec.yaml").write_text(experiments.dump(spec), encoding="utf-8")
            (partial / "environment.json").write_text(
                json.dumps(environment, indent=2), encoding="utf-8"
            )
            for path in (
                partial.iterdir()
            ):  # a journal without its spec would be of no use after a power loss
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
    def resume(cls, state: "StateFolder") -> Self:
        """Go on with a run that stopped; raises StoreError where another process has it, it has ended, or MLflow holds more of it."""
        try:
            lock = os.open(state.path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreError(f"{state.path.name} is gone: it has ended, or was given up") from None
        try:
            for _ in range(50):  # who only looks whether it is locked holds it for a moment too
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.005)
            else:
                raise StoreError(
                    f"{state.path.name} is being trained by {state.holder}; --fresh starts another run"
                )
            journal = state.path / "journal"
            records, end = read(journal)
            if end < state.carried.get("offset", 0):
                raise StoreError(
                    f"{journal} is damaged at byte {end:,}, where MLflow holds more already; --fresh starts another run"
                )
            if not state.unfinished or not state.path.exists():
                raise StoreError(
                    f"{state.path.name} has ended, there is nothing to continue; `fmnist sync` carries it into MLflow"
                )
            return cls(state.path, lock, records, end)
        except BaseException:
            os.close(lock)
            raise

    def train(
        self,
        first: int,
        arrays: dict[str, np.ndarray],
        started_ms: int,
        ended_ms: int,
        seconds: float,
    ) -> None:
        """Append the steps from `first` on, done in `seconds` of training, or compare those on record; raises Irreproducible."""
        self._compare(self.recorded.unequal_steps(first, arrays))
        known = max(0, self.recorded.last + 1 - first)
        arrays = {name: array[known:].astype(ARRAYS[name]) for name, array in arrays.items()}
        if count := len(arrays["loss"]):
            self.elapsed_s += seconds
            fields = {
                "first": first + known,
                "count": count,
                "t0": started_ms,
                "t1": ended_ms,
                "elapsed_s": self.elapsed_s,
            }
            self._append(Record("train", fields, arrays))

    def evaluation(self, step: int, measured: dict[str, Any]) -> None:
        """Append an evaluation, or compare it with the one on record; raises Irreproducible."""
        if step in self.recorded.evaluations:
            self._compare(unequal_values(step, self.recorded.evaluations[step], measured))
        else:
            self.event("evaluation", step=step, **measured)

    def final(self, metrics: dict[str, float], **fields: Any) -> None:
        """Append the results, or compare them with those on record; raises Irreproducible."""
        if self.recorded.metrics is not None:
            self._compare(unequal_values(self.recorded.last, self.recorded.metrics, metrics))
        else:
            self.event("final", metrics=metrics, **fields)

    def event(self, kind: str, **fields: Any) -> None:
        self._append(Record(kind, {"t": now_ms(), **fields}))

    def _compare(self, unequal: list[Unequal]) -> None:
        if unequal and self.exact:
            first = min(unequal, key=lambda difference: difference.step)
            raise Irreproducible(
                f"{self.folder.name} does not come out here as it did, though nothing known differs: {first}; it stays as it was,"
                " to be continued where it came out so, or start anew with --fresh"
            )

    def _append(self, record: Record) -> None:
        encoded = encode(record)
        written = os.write(self._file, encoded)
        if written != len(encoded):
            os.ftruncate(self._file, self.size)  # else what comes after could not be read
            raise OSError(
                errno.ENOSPC,
                f"{written} of {len(encoded)} bytes written",
                str(self.folder / "journal"),
            )
        self.size += written

    def flush(self) -> None:
        """See to it that all of it is on the disk: before a checkpoint is, which must not be ahead of it."""
        os.fsync(self._file)

    def release(self) -> None:
        """Let go of the lock: from here on the run counts as ended."""
        os.close(self._file)
        os.close(self._lock)


@dataclass(frozen=True)
class StateFolder:
    """A run's state folder, as anyone but its trainer sees it."""

    path: Path
    run: dict[str, Any]
    recovered: str | None = None
    """Why what run.json said is taken from elsewhere; None where it is whole."""

    @classmethod
    def at(cls, path: Path) -> Self:
        """The folder there; raises OSError or ValueError where none is, or none that can be used."""
        for name in ("lock", "journal"):
            with contextlib.suppress(FileNotFoundError):
                if (path / name).is_symlink():
                    raise ValueError(f"{name} is a link")
                files.open_regular(path / name).close()
        try:
            return cls(path, _checked(RunFile, path / "run.json").model_dump())
        except (OSError, ValueError) as error:
            return cls(path, _recovered(path), str(error))

    @property
    def spec(self) -> specs.ExperimentSpec:
        """The run's spec; raises UserError where the file no longer holds it."""
        path = self.path / "spec.yaml"
        with _given_up(path):
            text = files.read(path).decode()
        spec = experiments.parse(text, str(path))
        if spec.fingerprint != (fingerprint := self.run.get("fingerprint", spec.fingerprint)):
            raise StoreError(
                f"{path} was changed: it gives the fingerprint {spec.fingerprint[:8]}, the run has {fingerprint[:8]}"
            )
        return spec

    @property
    def environment(self) -> dict[str, Any]:
        """Where the run began; raises StoreError where the file no longer tells."""
        path = self.path / "environment.json"
        with _given_up(path):
            return _checked(EnvironmentFile, path).model_dump()

    @property
    def resumable(self) -> bool:
        """Whether its trainer is gone and left it such that it can be continued."""
        with contextlib.suppress(StoreError):
            return not self.running and self.unfinished and bool(self.environment)
        return False

    @property
    def unfinished(self) -> bool:
        """Whether by what it holds there is, or will be, something to continue: once that is not so, it never is again."""
        note = self.carried
        records, end = read(self.path / "journal")
        if note.get("closed") == "DELETED" or end < note.get("offset", 0):
            return False
        last = next(
            (record for record in reversed(records) if record.kind in ("end", "resume")), None
        )
        return last is None or bool(last.fields.get("resumable", last.kind == "resume"))

    @property
    def holder(self) -> str:
        """Who has it, or had it last."""
        with contextlib.suppress(OSError, ValueError):
            held = _checked(HolderFile, self.path / "lock")
            return f"process {held.pid} on {held.host}"
        return "another process"

    @property
    def running(self) -> bool:
        """Whether its trainer lives: it holds the lock until it ends, however it ends."""
        return is_locked(self.path / "lock")

    @property
    def awaited(self) -> bool:
        """Whether another process, which trained it, is still to read here how it was closed."""
        root = self.path.parents[2]
        if not (root / "mlruns" / AWAITED).exists():
            return False
        others = Claims(root, AWAITED)
        try:
            return not others.take(self.path.name)
        finally:
            others.close()

    @property
    def carried(self) -> dict[str, Any]:
        """What its upload has noted: run_id, offset, closed, error; empty before it begins, and where the note is damaged."""
        with contextlib.suppress(OSError, ValueError):
            note = _checked(NoteFile, self.path / "mlflow.json").model_dump(exclude_unset=True)
            if note.pop("sha256", None) == _digest(note):
                return note
        return {}

    @property
    def result(self) -> Result | None:
        """What came of it, or that it is being trained; None where it failed, is to be continued, or was deleted in MLflow."""
        if self.running:
            return Result("running", f"being trained by {self.holder}")
        records, _ = read(self.path / "journal")
        end = records[-1].fields if records and records[-1].kind == "end" else {}
        final = next((record.fields for record in records if record.kind == "final"), {})
        outcome = end.get("outcome", {"FINISHED": "finished"}.get(end.get("status", "")))
        if outcome is None or self.carried.get("closed") == "DELETED":
            return None
        if end["status"] == "FINISHED" and not final:
            return None  # a finished run has results
        return Result(
            outcome,
            f"on its way into MLflow from {self.path.name}",
            final.get("metrics", {}).get("last/val_accuracy"),
        )

    def note(self, **fields: Any) -> None:
        """Replace the upload's note, whole or not at all."""
        self._replace("mlflow.json", {**fields, "sha256": _digest(fields)})

    def assign(self, store: str | None) -> None:
        """Say which store the run is for, in a run.json that is whole again."""
        self._replace("run.json", {**self.run, "store": store})

    def _replace(self, name: str, content: dict[str, Any]) -> None:
        files.replace(self.path / name, json.dumps(content).encode())

    def remove(self) -> None:
        """Take the folder away: out of sight first, so that nobody finds half of it. Only sidecar.Carrier calls this, which see."""
        hidden = self.path.with_name(f".removed-{self.path.name}")
        self.path.rename(hidden)
        shutil.rmtree(hidden)


def _digest(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def find(root: Path, text: str) -> StateFolder:
    """The run in mlruns/state/ whose key or MLflow id begins like this; raises StoreError where that isn't one."""
    folders = state_folders(root)
    found = [
        folder
        for folder in folders
        if folder.path.name.startswith(text)
        or (folder.carried.get("run_id") or "").startswith(text)
    ]
    if len(found) != 1:
        known = ", ".join(folder.path.name for folder in found or folders) or "none"
        raise StoreError(
            f"{text!r} fits {len(found)} of the runs that are on disk; there are: {known}"
        )
    return found[0]


def _recovered(path: Path) -> dict[str, Any]:
    """What run.json said, from the folder's name and spec.yaml; raises OSError or ValueError where that can't be."""
    named = re.fullmatch(r".+-s\d+-(?P<fingerprint>[0-9a-f]{8})-(?P<start>\d{8}T\d{12})", path.name)
    if named is None:
        raise ValueError("run.json can't be read, and the folder's name is not that of a run")
    text = files.read(path / "spec.yaml").decode()
    try:
        spec = experiments.parse(text, "spec.yaml")
        start = datetime.strptime(named["start"], "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
    except UserError as error:
        raise ValueError(f"neither run.json nor spec.yaml can be read: {error}") from None
    if not spec.fingerprint.startswith(named["fingerprint"]):
        raise ValueError("run.json can't be read, and spec.yaml is another run's")
    lost = {"store": None, "extends": None}
    same = {"key": path.name, "name": spec.name, "started_ms": int(1000 * start.timestamp())}
    return {**same, "fingerprint": spec.fingerprint, "group": spec.group, **lost}


@contextlib.contextmanager
def _given_up(path: Path) -> Iterator[None]:
    """Make one line of whatever keeps a file from being read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} can't be read: {error}; give the run up with --fresh") from None


class Fault(NamedTuple):
    """What is wrong with a state folder, and what can be done about it."""

    what: str
    remedy: str


def _looked_at(root: Path) -> Iterator[tuple[Path, StateFolder | str]]:
    """Every visible state folder, or why it can't be used."""
    for path in state_folder(root).glob("[!.]*"):
        try:
            yield path, StateFolder.at(path)
        except NotADirectoryError:
            continue
        except (OSError, ValueError) as error:
            if path.exists():  # else it is gone by now: all of it is in MLflow
                yield path, " ".join(str(error).split())


def state_folders(root: Path) -> list[StateFolder]:
    """Every visible state folder that can be used, oldest first; `faults` tells of the others."""
    found = [folder for _, folder in _looked_at(root) if isinstance(folder, StateFolder)]
    return sorted(found, key=lambda folder: (folder.run["started_ms"], folder.path.name))


def faults(root: Path) -> Iterator[Fault]:
    """What can't be read of the runs on disk; the others are none the worse for it."""
    for path, folder in sorted(_looked_at(root), key=lambda found: found[0]):
        give_up = f"restore it from a copy, or give the run up: rm -r {path}"
        if isinstance(folder, str):
            yield Fault(f"{path.name} can't be used and is left alone: {folder}", give_up)
            continue
        if folder.recovered:
            what = f"{path.name}: {folder.recovered}; its name and spec.yaml tell most of it"
            yield Fault(what, f"fmnist run --resume {path.name}, or fmnist sync if it has ended")
        for name, model in (("environment.json", EnvironmentFile), ("mlflow.json", NoteFile)):
            try:
                _checked(model, path / name)
            except FileNotFoundError:
                if name == "environment.json":
                    yield Fault(f"{path.name}: {name} is missing", give_up)
            except (OSError, ValueError) as error:
                remedy = give_up if name == "environment.json" else "fmnist sync looks in MLflow"
                yield Fault(f"{path.name}: {' '.join(str(error).split())}", remedy)


def at_hand(root: Path) -> dict[str, Result]:
    """Fingerprints of the runs on disk that are finished, diverged, pruned or being trained, and what is known of each."""
    return {
        folder.run["fingerprint"]: result
        for folder in state_folders(root)
        if (result := folder.result)
    }


class Claims:
    """Who has what, where several processes work in the same root: a byte of a file for each thing, locked until its holder lets go or dies.

    One descriptor is enough for any number of them. What a process holds is lost when it closes the file, however often it opened it.
    """

    def __init__(self, root: Path, kind: str = "claims") -> None:
        (root / "mlruns").mkdir(exist_ok=True)
        self._file = files.open_lock(root / "mlruns" / kind)

    @staticmethod
    def _place(name: str) -> int:
        return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)

    def take(self, name: str, patience_s: float = 0.0) -> bool:
        """Claim something, unless another process has it for longer than this: who only looks has it for a moment too."""
        deadline = time.monotonic() + patience_s
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._place(name))
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)

    def release(self, name: str) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._place(name))

    def close(self) -> None:
        """Let go of all."""
        os.close(self._file)
