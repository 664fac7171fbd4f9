"""The journal: a run's folder is whole or unseen, its records survive every damage but their own, and points follow from them alone."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from fmnist import experiments, files, journal, state
from fmnist import spec as specs
from fmnist.errors import Irreproducible, StoreError, UserError
from fmnist.journal import ARRAYS, Record, Recorded, encode
from fmnist.state import Journal, StateFolder

SPEC = specs.ExperimentSpec(
    name="small", train=specs.Train(epochs=2, batch_size=12_000)
)  # 5 steps an epoch
ENVIRONMENT = {"python": "3", "packages": {"torch": "2"}}


def start(root: Path, spec: specs.ExperimentSpec = SPEC, store: str | None = "local") -> Journal:
    return Journal.create(root, spec, f"{spec.name} lr=0.1", ENVIRONMENT, store)


def fill_disk_after(writes: int, half: bool = False) -> Callable[[int, bytes], int]:
    """os.write on a disk that is full after so many writes: then nothing is written, or half of it."""
    real, done = os.write, itertools.count()

    def write(file: int, data: bytes) -> int:
        if next(done) < writes:
            return real(file, data)
        if half:
            return real(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return write


def values(count: int, first: int = 1) -> dict[str, np.ndarray]:
    """Arrays as a step's measurements: no two values alike, and one that isn't finite."""
    found = {
        name: (np.arange(first, first + count) + 10 * i).astype(dtype) / 3
        for i, (name, dtype) in enumerate(ARRAYS.items())
    }
    found["loss"][-1] = np.nan
    return found


def text(record: Record) -> str:
    """A record in a form that compares bit for bit, NaN included."""
    return repr(
        (
            record.kind,
            record.fields,
            {name: (array.dtype, array.tobytes()) for name, array in record.arrays.items()},
        )
    )


def write(written: Journal) -> list[int]:
    """Append one record of each kind; returns where each ends."""
    ends = []
    for append in (
        lambda: written.event(
            "evaluation",
            step=0,
            epoch=0.0,
            **{"val/loss": 2.3, "val/accuracy": 0.1, "train/lr": None},
        ),
        lambda: written.train(1, values(3), 1_000, 2_000, 0.5),
        lambda: written.event("final", metrics={"best/val_loss": float("inf")}, training_s=0.5),
        lambda: written.event("end", status="FAILED", reason="Größe\nzwei"),
    ):
        append()
        ends.append((written.folder / "journal").stat().st_size)
    return ends


# ---- the folder


@pytest.mark.parametrize("store", ["local", "http://127.0.0.1:5000", None])
def test_a_folder_is_whole_and_locked_until_release(store: str | None, tmp_path: Path) -> None:
    before = state.now_ms()
    made = start(tmp_path, store=store)
    [found] = state.state_folders(tmp_path)
    assert found.path == made.folder
    started = found.run.pop("started_ms")
    told = {"key": made.folder.name, "name": "small lr=0.1", "store": store, "extends": None}
    assert found.run == {**told, "fingerprint": SPEC.fingerprint, "group": SPEC.group}
    assert before <= started <= state.now_ms()
    assert found.spec == SPEC
    assert json.loads((found.path / "environment.json").read_text()) == ENVIRONMENT
    assert json.loads((found.path / "lock").read_text()) == {
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    assert found.running
    made.release()
    assert not found.running


def test_a_folder_that_cant_be_made_whole_is_never_seen_nor_left_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Journal.create(tmp_path, SPEC, "small", {"not": {"for", "JSON"}}, "local")
    assert list(state.state_folder(tmp_path).iterdir()) == []


def test_a_root_that_cant_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "mlruns").touch()
    with pytest.raises(OSError, match="mlruns"):
        start(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from fmnist import spec as specs, state
held = state.Journal.create(Path(sys.argv[1]), specs.ExperimentSpec(name="held"), "held", {}, None)
held.event("end", status="KILLED", resumable=True)
print(held.folder, flush=True)
time.sleep(60)
"""


def test_a_killed_trainer_holds_its_lock_no_longer(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        folder = StateFolder(Path(process.stdout.readline().strip()), {})
        running = folder.running
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert running
    assert not folder.running
    assert [record.kind for record in journal.read(folder.path / "journal")[0]] == ["end"]


def test_runs_of_one_spec_within_a_second_have_keys_of_their_own(tmp_path: Path) -> None:
    keys = [start(tmp_path).folder.name for _ in range(5)]
    assert len({key[: -len("123456")] for key in keys}) < 5, (
        "no two of them fell into one second, so this proves nothing"
    )
    assert keys == sorted(set(keys))
    assert [folder.path.name for folder in state.state_folders(tmp_path)] == keys


def test_a_run_that_extends_another_begins_with_its_records(tmp_path: Path) -> None:
    records = [
        evaluation(0),
        train(1, 3, 1_000, 2_000, 0.5),
        evaluation(3),
        train(4, 2, 2_000, 3_000, 0.75),
    ]
    made = Journal.create(tmp_path, SPEC, "longer", ENVIRONMENT, None, "abc", records)
    [found] = state.state_folders(tmp_path)
    assert (found.run["extends"], found.run["started_ms"]) == ("abc", 1_000)
    assert [text(record) for record in journal.read(made.folder / "journal")[0]] == [
        text(record) for record in records
    ]
    assert made.elapsed_s == 0.75
    assert made.size == (made.folder / "journal").stat().st_size
    made.train(
        5,
        {
            name: np.append(records[3].arrays[name][1:], array)
            for name, array in values(2, 6).items()
        },
        4_000,
        5_000,
        0.25,
    )
    [record] = journal.read(made.folder / "journal")[0][4:]
    assert text(record) == text(
        Record(
            "train",
            {"first": 6, "count": 2, "t0": 4_000, "t1": 5_000, "elapsed_s": 1.0},
            values(2, 6),
        )
    )


def test_a_folder_that_cant_hold_all_it_begins_with_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", fill_disk_after(1))
    with pytest.raises(OSError, match="No space"):
        Journal.create(
            tmp_path, SPEC, "longer", ENVIRONMENT, None, "abc", [evaluation(0), evaluation(5)]
        )
    assert list(state.state_folder(tmp_path).iterdir()) == []


def test_state_folders_are_listed_oldest_first_without_strays(tmp_path: Path) -> None:
    for name in ("zeta", "alpha"):
        start(tmp_path, SPEC.model_copy(update={"name": name}))
        time.sleep(0.005)
    (state.state_folder(tmp_path) / "stray").mkdir()
    (state.state_folder(tmp_path) / "file").touch()
    assert [folder.run["name"] for folder in state.state_folders(tmp_path)] == [
        "zeta lr=0.1",
        "alpha lr=0.1",
    ]


def test_a_note_replaces_the_one_before(tmp_path: Path) -> None:
    folder = StateFolder(start(tmp_path).folder, {})
    assert folder.carried == {}
    for note in (
        {"run_id": "a", "offset": 7, "error": "x"},
        {"run_id": "a", "offset": 9, "closed": None},
    ):
        folder.note(**note)
        assert folder.carried == note
    assert list(folder.path.glob("*.partial")) == []
    (folder.path / "mlflow.json").write_text('{"run_id"')
    assert folder.carried == {}


CLAIM = """
import sys, time
from pathlib import Path
from fmnist import state
claims = state.Claims(Path(sys.argv[1]), sys.argv[2])
print(*(claims.take(name) for name in ("mine", "yours")), flush=True)
sys.stdin.read()
"""


def test_a_claim_is_one_processs_until_it_lets_go(tmp_path: Path) -> None:
    claims = state.Claims(tmp_path, state.AWAITED)
    assert claims.take("mine")
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path), state.AWAITED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "False True\n"
    assert not claims.take("yours")
    letting_go = threading.Timer(0.1, other.communicate)
    letting_go.start()
    assert claims.take("yours", patience_s=20)
    letting_go.join()


def test_what_a_kill_left_is_swept_out_by_the_next_run(tmp_path: Path) -> None:
    folder = state.state_folder(tmp_path)
    key = interrupted(tmp_path).path.name
    gone = [f".{key}-4711", f".removed-{key}", f".removed-{key}-12"]
    kept = [".mine", f".{key}-young", f".{key}-17"]
    for name in gone + kept:
        (folder / name / "deeper").mkdir(parents=True)
        (folder / name / "lock").touch()
    for name in gone:
        os.utime(folder / name, (0, 0))
    os.utime(folder / ".mine", (0, 0))
    os.utime(folder / f".{key}-17", (0, 0))
    with open(folder / f".{key}-17" / "lock") as held:  # by a process that is making it
        fcntl.flock(held, fcntl.LOCK_EX)
        start(tmp_path)
    left = {path.name for path in folder.glob(".*")}
    assert left == set(kept)


def test_scratch_folders_of_killed_processes_are_swept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "SETTLED_S", 0)
    code = "import os, signal; from fmnist import files\nwith files.scratch() as folder: (folder / 'x').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    for _ in range(2):  # the second sweeps out what the first left, if it is old enough
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], env=environment)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "fmnist-scratch-link").symlink_to(REPOSITORY)
    with files.scratch() as mine, files.scratch() as another:
        assert {*tmp_path.iterdir()} == {mine, another, tmp_path / "fmnist-scratch-link"}
    assert [path.name for path in tmp_path.iterdir()] == ["fmnist-scratch-link"]


def test_a_lock_is_not_taken_through_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), files.locked(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="symbolic links"):
        state.is_locked(tmp_path / "lock")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"), files.locked(tmp_path / "pipe"):
        pass
    assert (tmp_path / "precious").read_text() == "as it was"


def test_a_removed_folder_is_gone(tmp_path: Path) -> None:
    start(tmp_path).release()
    state.state_folders(tmp_path)[0].remove()
    assert list(state.state_folder(tmp_path).iterdir()) == []


def test_each_root_and_store_has_one_carrier(tmp_path: Path) -> None:
    locks = {
        state.carrier_lock(root, store)
        for root in (tmp_path, tmp_path / "other")
        for store in ("local", "http://a", "http://b")
    }
    assert len(locks) == 6
    assert state.carrier_lock(tmp_path, "http://a") in locks


# ---- the records


def test_records_come_back_bit_for_bit(tmp_path: Path) -> None:
    before = state.now_ms()
    written = start(tmp_path)
    ends = write(written)
    records, offset = journal.read(written.folder / "journal")
    assert offset == ends[-1]
    times = [record.fields.pop("t") for record in records if record.kind != "train"]
    assert before <= min(times) <= max(times) <= state.now_ms()
    metrics = {"val/loss": 2.3, "val/accuracy": 0.1, "train/lr": None}
    assert [text(record) for record in records] == [
        text(Record("evaluation", {"step": 0, "epoch": 0.0, **metrics})),
        text(
            Record(
                "train",
                {"first": 1, "count": 3, "t0": 1_000, "t1": 2_000, "elapsed_s": 0.5},
                values(3),
            )
        ),
        text(Record("final", {"metrics": {"best/val_loss": float("inf")}, "training_s": 0.5})),
        text(Record("end", {"status": "FAILED", "reason": "Größe\nzwei"})),
    ]


def test_reading_on_gives_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert journal.read(path) == ([], 0)
    written = start(tmp_path)
    path, ends = written.folder / "journal", write(written)
    whole = [text(record) for record in journal.read(path)[0]]
    for i, end in enumerate(ends):
        records, offset = journal.read(path, end)
        assert ([text(record) for record in records], offset) == (whole[i + 1 :], ends[-1])
    written.event("end", status="FINISHED")
    [record], offset = journal.read(path, ends[-1])
    assert record.fields["status"] == "FINISHED"
    assert journal.read(path, offset) == ([], offset)


def test_a_journal_cut_anywhere_gives_its_whole_records(tmp_path: Path) -> None:
    written = start(tmp_path)
    ends, data, path = write(written), (written.folder / "journal").read_bytes(), tmp_path / "cut"
    whole = [text(record) for record in journal.read(written.folder / "journal")[0]]
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        records, offset = journal.read(path)
        complete = sum(end <= length for end in ends)
        assert [text(record) for record in records] == whole[:complete]
        assert offset == (ends[complete - 1] if complete else 0)


def test_what_no_program_of_ours_wrote_ends_what_is_read(tmp_path: Path) -> None:
    """Records with a right checksum whose fields are wrong."""
    written = start(tmp_path)
    written.train(1, values(3), 1_000, 2_000, 0.5)
    path, whole = written.folder / "journal", (written.folder / "journal").read_bytes()
    right = train(4, 2)
    crafted = [
        Record("train", {**right.fields, **changed}, right.arrays)
        for changed in (
            *({"count": count} for count in (0, 1, 3, -1, 2.5, "2", None, 10**9)),
            *({"first": first} for first in (0, 1, 3, 5, 10**30, "4", True)),
            {"t0": 10**30},
            {"t1": None},
            {"elapsed_s": float("nan")},
        )
    ]
    crafted += [
        Record("evaluation", {**evaluation(3).fields, "step": "3"}),
        Record("evaluation", {"t": 1, "step": 3}),
        Record("final", {"t": 1, "metrics": {"last/val_loss": "low"}}),
        Record("final", {"t": 1, "metrics": []}),
        Record("end", {"t": 1, "status": "DELETED"}),
        Record("end", {"t": 1, "status": ["FINISHED"]}),
        Record("resume", {"t": 1, "step": 3, "environment": []}),
        Record("surprise", {"t": 1}),
    ]
    payloads = [encode(record)[journal.HEAD.size :] for record in crafted]
    payloads += [
        b"",
        b"[]\n",
        b"null\n",
        b"7\n",
        b"\xff\xfe\n",
        b"[" * 100_000,
        b"{}\n",
        b'{"kind": {}}\n',
    ]
    for payload in payloads:
        head = journal.HEAD.pack(journal.MAGIC, len(payload), zlib.crc32(payload))
        path.write_bytes(whole + head + payload + encode(right))
        records, end = journal.read(path)
        assert ([record.fields["first"] for record in records], end) == ([1], len(whole)), payload
    path.write_bytes(whole + encode(right))
    assert len(journal.read(path)[0]) == 2


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "journal")
    with pytest.raises(OSError, match="no regular file"):
        journal.read(tmp_path / "journal")


def test_a_flipped_bit_anywhere_ends_what_is_read(tmp_path: Path) -> None:
    written = start(tmp_path)
    ends, data, path = (
        write(written),
        bytearray((written.folder / "journal").read_bytes()),
        tmp_path / "flipped",
    )
    whole = [text(record) for record in journal.read(written.folder / "journal")[0]]
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        intact = sum(end <= bit // 8 for end in ends)
        assert [text(record) for record in journal.read(path)[0]] == whole[:intact]


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from fmnist import journal, spec as specs, state
full = state.Journal.create(Path(sys.argv[1]), specs.ExperimentSpec(name="full"), "full", {}, None)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
arrays = {name: np.zeros(9, dtype) for name, dtype in journal.ARRAYS.items()}
failed = 0
for written in range(20):
    try:
        full.train(1 + 9 * (written - failed), arrays, 0, 1, 0.1)
    except OSError:
        failed += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
full.event("end", status="FAILED")
assert full.size == (full.folder / "journal").stat().st_size
print(failed)
"""


def test_a_full_disk_fails_the_append_and_keeps_the_records_before_and_after(
    tmp_path: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    path = state.state_folders(tmp_path)[0].path / "journal"
    records, end = journal.read(path)
    assert [record.kind for record in records] == ["train"] * (20 - int(result.stdout)) + ["end"]
    assert 1 < len(records) < 21
    assert end == path.stat().st_size


@pytest.mark.parametrize("half", [True, False])
def test_what_a_full_disk_took_of_a_record_is_cut_off_again(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = start(tmp_path)
    written.evaluation(0, measured(0))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fill_disk_after(0, half))
        for _ in range(3):
            with pytest.raises(OSError, match="bytes written" if half else "No space") as raised:
                written.train(1, values(3), 1_000, 2_000, 0.5)
            assert raised.value.errno == errno.ENOSPC
    written.event("end", status="FAILED")
    records, end = journal.read(written.folder / "journal")
    assert [record.kind for record in records] == ["evaluation", "end"]
    assert end == written.size == (written.folder / "journal").stat().st_size


# ---- a run that is continued


def interrupted(root: Path, steps: int = 10) -> StateFolder:
    """A run that stopped after `steps` steps, in records of five, each evaluated at its end."""
    written = start(root, store=None)
    written.evaluation(0, measured(0))
    for first in range(1, steps, 5):
        written.train(first, values(5, first), 1_000 * first, 1_000 * first + 500, 0.5)
        written.evaluation(first + 4, measured(first + 4))
    written.release()
    return StateFolder.at(written.folder)


def measured(step: int) -> dict[str, Any]:
    return {
        "epoch": step / 5,
        "val/loss": 2.0 + step,
        "val/accuracy": 0.1,
        "train/lr": 0.01 if step else None,
    }


@contextlib.contextmanager
def resumed(folder: StateFolder, exact: bool = True) -> Iterator[Journal]:
    written = Journal.resume(folder)
    written.exact = exact
    yield written
    written.release()


def content(folder: StateFolder) -> bytes:
    return (folder.path / "journal").read_bytes()


def test_a_continued_journal_knows_what_is_on_record_and_goes_on_behind_it(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    before = content(folder)
    with resumed(folder) as written:
        assert folder.running
        assert written.recorded.last == 10
        assert sorted(written.recorded.evaluations) == [0, 5, 10]
        assert written.recorded.metrics is None
        assert written.elapsed_s == 1.0
        assert written.size == len(before)
        written.train(11, values(4, 11), 20_000, 21_000, 0.25)
        assert written.size == len(content(folder))
    assert not folder.running
    assert content(folder).startswith(before)
    *earlier, last = journal.read(folder.path / "journal")[0]
    assert len(earlier) == 5
    assert text(last) == text(
        Record(
            "train",
            {"first": 11, "count": 4, "t0": 20_000, "t1": 21_000, "elapsed_s": 1.25},
            values(4, 11),
        )
    )


def test_a_journal_is_continued_wherever_it_was_cut(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    whole, ends = content(folder), [0]
    while ends[-1] < len(whole):
        ends.append(ends[-1] + journal.HEAD.size + journal.HEAD.unpack_from(whole, ends[-1])[1])
    for length in [*(round(i * len(whole) / 19) for i in range(20)), *ends]:
        (folder.path / "journal").write_bytes(whole[:length])
        with resumed(folder) as written:
            written.event("end", status="KILLED")
        intact = sum(end <= length for end in ends) - 1
        assert content(folder).startswith(whole[: ends[intact]])
        assert [record.kind for record in journal.read(folder.path / "journal")[0]][intact:] == [
            "end"
        ]


def test_a_journal_is_continued_from_before_the_damage(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    whole, kinds = (
        content(folder),
        [record.kind for record in journal.read(folder.path / "journal")[0]],
    )
    for place in (round(i * (len(whole) - 1) / 19) for i in range(20)):
        (folder.path / "journal").write_bytes(
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        )
        intact = len(journal.read(folder.path / "journal")[0])
        with resumed(folder) as written:
            assert len(written.records) == intact
            written.event("end", status="KILLED")
        records, end = journal.read(folder.path / "journal")
        assert [record.kind for record in records] == [*kinds[:intact], "end"]
        assert end == len(content(folder))


def test_a_run_that_stopped_before_its_first_record_is_continued(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    (folder.path / "journal").unlink()
    with resumed(folder) as written:
        assert (written.recorded.last, written.elapsed_s, written.records) == (0, 0.0, [])
        written.train(1, values(3), 0, 1, 0.5)
    assert len(journal.read(folder.path / "journal")[0]) == 1


def test_a_run_that_another_process_trains_is_not_continued(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        folder = StateFolder.at(Path(process.stdout.readline().strip()))
        before = content(folder) + b"torn"
        (folder.path / "journal").write_bytes(before)
        with pytest.raises(
            StoreError,
            match=f"being trained by process {process.pid} on {re.escape(socket.gethostname())}; --fresh",
        ):
            Journal.resume(folder)
        assert content(folder) == before
        process.kill()
    with resumed(folder):
        assert folder.holder == f"process {os.getpid()} on {socket.gethostname()}"


def test_who_looks_whether_a_run_is_going_on_keeps_nobody_from_continuing_it(
    tmp_path: Path,
) -> None:
    folder = interrupted(tmp_path)
    with open(folder.path / "lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        looked = threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN))
        looked.start()
        Journal.resume(folder).release()
        looked.join()


def test_the_holder_that_has_not_written_its_name_yet_is_another_process(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    for words in ("", '{"pid": 1'):
        (folder.path / "lock").write_text(words)
        assert folder.holder == "another process"


def test_a_journal_damaged_before_what_mlflow_holds_is_refused_and_let_go_of(
    tmp_path: Path,
) -> None:
    folder = interrupted(tmp_path)
    whole = content(folder)
    folder.note(offset=len(whole))
    with resumed(folder):
        pass
    (folder.path / "journal").write_bytes(whole[:-1])
    _, end = journal.read(folder.path / "journal")
    with pytest.raises(
        StoreError, match=f"damaged at byte {end:,}, where MLflow holds more already; --fresh"
    ):
        Journal.resume(folder)
    assert content(folder) == whole[:-1]
    assert not folder.running
    folder.note(offset=end)
    with resumed(folder) as written:
        assert written.size == end


@pytest.mark.parametrize(
    ("first", "count", "appended"),
    [(1, 5, 0), (3, 8, 0), (10, 1, 0), (8, 5, 2), (1, 14, 4), (11, 3, 3), (12, 1, 1)],
)
def test_steps_on_record_are_compared_and_only_new_ones_appended(
    first: int, count: int, appended: int, tmp_path: Path
) -> None:
    folder = interrupted(tmp_path)
    computed = {name: array.copy() for name, array in values(20).items()}
    for step in (5, 10):
        computed["loss"][step - 1] = np.nan
    before = content(folder)
    with resumed(folder) as written:
        written.train(
            first,
            {name: array[first - 1 : first - 1 + count] for name, array in computed.items()},
            50_000,
            51_000,
            0.5,
        )
        assert written.elapsed_s == (1.5 if appended else 1.0)
    assert content(folder).startswith(before)
    new = journal.read(folder.path / "journal", len(before))[0]
    assert sum(record.fields["count"] for record in new) == appended
    if appended:
        [record] = new
        assert record.fields == {
            "first": first + count - appended,
            "count": appended,
            "t0": 50_000,
            "t1": 51_000,
            "elapsed_s": 1.5,
        }
        for name, array in record.arrays.items():
            assert (
                array.tobytes()
                == computed[name][first - 1 + count - appended : first - 1 + count].tobytes()
            )


def flip(array: np.ndarray, row: int) -> None:
    """Change a value's last bit."""
    array.view(f"i{array.itemsize}")[row] ^= 1


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("step", [6, 7, 9])
def test_a_step_that_differs_by_one_bit_is_irreproducible(
    name: str, step: int, tmp_path: Path
) -> None:
    folder = interrupted(tmp_path)
    before, computed = content(folder), values(5, 6)
    flip(computed[name], step - 6)
    with (
        resumed(folder) as written,
        pytest.raises(
            Irreproducible, match=f"differs: step {step}: train/{name} was .* now; .*--fresh"
        ),
    ):
        written.train(6, computed, 0, 1, 0.5)
    assert content(folder) == before
    with resumed(folder, exact=False) as written:
        written.train(6, computed, 0, 1, 0.5)
    assert content(folder) == before


def test_a_zero_of_the_other_sign_is_irreproducible(tmp_path: Path) -> None:
    written, zeros = start(tmp_path), {name: np.zeros(3, dtype) for name, dtype in ARRAYS.items()}
    written.train(1, zeros, 0, 1, 0.5)
    written.release()
    with resumed(StateFolder.at(written.folder)) as again:
        again.train(1, zeros, 0, 1, 0.5)
        with pytest.raises(Irreproducible, match=r"step 1: train/loss was 0\.0 and is -0\.0 now"):
            again.train(1, {name: -array for name, array in zeros.items()}, 0, 1, 0.5)


def test_the_first_of_several_steps_that_differ_is_told(tmp_path: Path) -> None:
    computed = values(5, 6)
    flip(computed["lr"], 1)
    flip(computed["loss"], 2)
    with (
        resumed(interrupted(tmp_path)) as written,
        pytest.raises(Irreproducible, match="step 7: train/lr"),
    ):
        written.train(6, computed, 0, 1, 0.5)


def test_a_step_whose_loss_is_not_a_number_is_what_it_was(tmp_path: Path) -> None:
    with resumed(interrupted(tmp_path)) as written:
        assert np.isnan(written.recorded.arrays["loss"][[4, 9]]).all()
        written.train(
            1, {name: array[:5] for name, array in written.recorded.arrays.items()}, 0, 1, 0.5
        )
        other, number = values(5), values(5)
        other["loss"].view(np.uint32)[4] ^= 1 << 31
        written.train(1, other, 0, 1, 0.5)
        number["loss"][4] = 1.0
        with pytest.raises(Irreproducible, match=r"step 5: train/loss was nan and is 1\.0 now"):
            written.train(1, number, 0, 1, 0.5)


def test_evaluations_on_record_are_compared_and_new_ones_appended(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    before = content(folder)
    with resumed(folder) as written:
        for step in (0, 5, 10):
            written.evaluation(step, measured(step))
        assert content(folder) == before
        for key in ("val/loss", "val/accuracy", "train/lr"):
            other = measured(5) | {key: np.nextafter(measured(5)[key], 9).item()}
            with pytest.raises(Irreproducible, match=f"step 5: {key} was"):
                written.evaluation(5, other)
        with pytest.raises(Irreproducible, match=r"step 0: train/lr was None and is 0\.01 now"):
            written.evaluation(0, measured(0) | {"train/lr": 0.01})
        written.evaluation(11, measured(11))
    [record] = journal.read(folder.path / "journal", len(before))[0]
    assert (record.kind, record.fields["step"]) == ("evaluation", 11)
    with resumed(folder, exact=False) as written:
        written.evaluation(5, measured(5) | {"val/loss": 0.0})
        assert written.recorded.evaluations[5]["val/loss"] == 7.0


def test_results_on_record_are_compared(tmp_path: Path) -> None:
    folder, metrics = (
        interrupted(tmp_path),
        {"best/step": 5, "best/val_loss": 1 / 3, "last/val_loss": float("nan")},
    )
    with resumed(folder) as written:
        written.final(metrics, weights="best")
    before = content(folder)
    assert journal.read(folder.path / "journal")[0][-1].fields["weights"] == "best"
    with resumed(folder) as written:
        written.final(metrics, weights="best")
        for key, value in (
            ("best/val_loss", np.nextafter(1 / 3, 1).item()),
            ("best/step", 10),
            ("last/val_loss", 1.0),
        ):
            with pytest.raises(Irreproducible, match=f"step 10: {key} was"):
                written.final(metrics | {key: value})
    with resumed(folder, exact=False) as written:
        written.final(metrics | {"best/step": 10})
    assert content(folder) == before


def test_what_is_on_record_is_the_same_however_its_records_are_cut(tmp_path: Path) -> None:
    once = Recorded([train(1, 12)])
    for cut in (1, 5, 11):
        arrays = [
            {name: array[rows] for name, array in values(12).items()}
            for rows in (slice(cut), slice(cut, None))
        ]
        cut_up = Recorded(
            [
                Record("train", {"first": 1, "count": cut}, arrays[0]),
                evaluation(cut),
                Record("train", {}, arrays[1]),
            ]
        )
        assert cut_up.last == once.last == 12
        assert all(cut_up.arrays[name].tobytes() == once.arrays[name].tobytes() for name in ARRAYS)


def test_a_time_stamp_once_given_stays(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    before = [
        list(journal.points(SPEC, record)) for record in journal.read(folder.path / "journal")[0]
    ]
    with resumed(folder) as written:
        written.evaluation(10, measured(10))
        written.train(6, values(5, 6), 90_000, 91_000, 0.5)
    assert repr(
        [list(journal.points(SPEC, record)) for record in journal.read(folder.path / "journal")[0]]
    ) == repr(before)


# ---- which runs can be continued


def ending(**fields: Any) -> Callable[[StateFolder], None]:
    def end(folder: StateFolder) -> None:
        with resumed(folder) as written:
            written.event("end", **{"reason": None, **fields})

    return end


def end_then_resume(folder: StateFolder) -> None:
    ending(status="FAILED", resumable=True)(folder)
    with resumed(folder) as written:
        written.event("resume", step=10, changed={})


def damage(folder: StateFolder) -> None:
    (folder.path / "journal").write_bytes(content(folder)[:-1])


def carry(folder: StateFolder, **fields: Any) -> None:
    folder.note(offset=len(content(folder)), **fields)


def carry_and_damage(folder: StateFolder) -> None:
    carry(folder)
    damage(folder)


@pytest.mark.parametrize(
    ("resumable", "end"),
    [
        pytest.param(True, lambda folder: None, id="killed without a word"),
        pytest.param(
            True,
            lambda folder: (folder.path / "journal").unlink(),
            id="killed before the first record",
        ),
        pytest.param(True, damage, id="torn"),
        pytest.param(True, carry, id="carried up to its end"),
        pytest.param(True, lambda folder: carry(folder, closed="KILLED"), id="closed as killed"),
        pytest.param(True, ending(status="KILLED", resumable=True), id="Ctrl-C"),
        pytest.param(True, ending(status="FAILED", resumable=True), id="disk full"),
        pytest.param(True, end_then_resume, id="killed after it was continued"),
        pytest.param(False, ending(status="FAILED", resumable=False), id="diverged"),
        pytest.param(False, ending(status="KILLED", resumable=False), id="given up"),
        pytest.param(False, ending(status="FINISHED", resumable=False), id="finished"),
        pytest.param(False, ending(status="KILLED"), id="written by an older version"),
        pytest.param(False, lambda folder: carry(folder, closed="DELETED"), id="deleted in MLflow"),
        pytest.param(False, carry_and_damage, id="damaged where MLflow holds more"),
    ],
)
def test_a_run_can_be_continued_if_it_stopped_by_no_fault_of_its_own(
    resumable: bool, end: Callable[[StateFolder], None], tmp_path: Path
) -> None:
    folder = interrupted(tmp_path)
    end(folder)
    assert folder.resumable is resumable


def test_a_run_that_is_trained_now_cant_be_continued(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    with resumed(folder):
        assert not folder.resumable
    assert folder.resumable


def test_a_spec_changed_on_disk_is_refused(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    path = folder.path / "spec.yaml"
    path.write_text(path.read_text().replace("name: small", "name: renamed"))
    assert folder.spec.name == "renamed"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    other = folder.path / "spec.yaml"
    with pytest.raises(
        StoreError,
        match=f"{re.escape(str(other))} was changed: .* the run has {SPEC.fingerprint[:8]}",
    ):
        _ = folder.spec
    for damaged in ("", "name: [", "name: small\nunknown: 1\n", "name: small\ntrain: {epochs: -1}"):
        path.write_text(damaged)
        with pytest.raises(UserError):
            _ = folder.spec
    path.write_text(experiments.dump(SPEC))
    assert folder.spec == SPEC


# ---- folders that are damaged

WRONG = [b"", b"{", b"{}", b"[]", b"null", b"7", b"\xff", b"[" * 100_000]
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"{word[:7]!r}": lambda path, word=word: path.write_bytes(word) for word in WRONG},
    "a wrong type": lambda path: path.write_text(
        json.dumps({key: [1] for key in json.loads(path.read_bytes())})
    ),
    "gone": Path.unlink,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_run_json_is_damaged_is_recovered(damage: str, tmp_path: Path) -> None:
    folder, other = interrupted(tmp_path), interrupted(tmp_path)
    DAMAGES[damage](folder.path / "run.json")
    found, beside = state.state_folders(tmp_path)
    assert (found.path, beside) == (folder.path, other)
    lost: dict[str, Any] = {"name": "small", "store": None, "extends": None}
    assert abs(found.run["started_ms"] - folder.run["started_ms"]) < 50
    lost["started_ms"] = found.run["started_ms"]
    assert found.run == {**folder.run, **lost}
    assert found.resumable
    assert found.run["fingerprint"] not in state.at_hand(tmp_path)
    [fault] = state.faults(tmp_path)
    assert folder.path.name in fault.what
    assert "\n" not in fault.what
    if damage not in ("a folder",):
        found.assign("local")
        assert StateFolder.at(folder.path).run == {**folder.run, **lost, "store": "local"}
        assert list(state.faults(tmp_path)) == []


def both(folder: StateFolder) -> None:
    for name in ("run.json", "spec.yaml"):
        (folder.path / name).write_text("")


BEYOND: dict[str, Callable[[StateFolder], object]] = {
    "run.json and spec.yaml": both,
    "run.json, with another's spec.yaml": lambda folder: (
        (folder.path / "run.json").write_text(""),
        (folder.path / "spec.yaml").write_text(experiments.dump(SPEC.model_copy(update={"data": specs.Data(holdout=10)}))),
    ),
    "run.json, with another name": lambda folder: (
        (folder.path / "run.json").write_text(""),
        folder.path.rename(folder.path.with_name("renamed")),
    ),
    "a pipe for a journal": lambda folder: DAMAGES["a pipe"](folder.path / "journal"),
    "a folder for a journal": lambda folder: DAMAGES["a folder"](folder.path / "journal"),
    "a link for a journal": lambda folder: link(folder.path / "journal"),
    "a link for a lock": lambda folder: link(folder.path / "lock"),
    "a pipe for a lock": lambda folder: DAMAGES["a pipe"](folder.path / "lock"),
}  # fmt: skip


def link(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "precious"
    elsewhere.write_text("as it was")
    path.unlink()
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", BEYOND)
def test_a_folder_that_cant_be_used_leaves_the_others_alone(damage: str, tmp_path: Path) -> None:
    folder, other = interrupted(tmp_path), interrupted(tmp_path)
    BEYOND[damage](folder)
    assert state.state_folders(tmp_path) == [other]
    assert state.at_hand(tmp_path) == {}
    assert state.find(tmp_path, "small") == other
    [fault] = state.faults(tmp_path)
    assert "can't be used and is left alone" in fault.what
    assert "\n" not in fault.what
    if (precious := tmp_path / "mlruns" / "precious").exists():
        assert precious.read_text() == "as it was"


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "gone"])
def test_a_damaged_note_is_none(damage: str, tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    folder.note(run_id="a", offset=3)
    assert list(state.faults(tmp_path)) == []
    DAMAGES[damage](folder.path / "mlflow.json")
    assert folder.carried == {}
    assert folder.resumable
    assert [fault.remedy for fault in state.faults(tmp_path)] == (
        [] if damage == "b'{}'" else ["fmnist sync looks in MLflow"]
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_does_not_know_where_it_began_is_named_and_not_continued(
    damage: str, tmp_path: Path
) -> None:
    folder, other = interrupted(tmp_path), interrupted(tmp_path)
    DAMAGES[damage](folder.path / "environment.json")
    assert [each.resumable for each in state.state_folders(tmp_path)] == [False, True]
    with pytest.raises(StoreError, match=r"can't be read.*--fresh"):
        _ = folder.environment
    [fault] = state.faults(tmp_path)
    assert "environment.json" in fault.what
    assert f"rm -r {folder.path}" in fault.remedy
    assert other.environment["packages"] == {"torch": "2"}


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    folder, target = interrupted(tmp_path), tmp_path / "precious"
    target.write_text("as it was")
    for name in ("mlflow.json", "run.json"):
        (folder.path / f"{name}.partial").symlink_to(target)
    folder.note(run_id="a")
    folder.assign("local")
    link(folder.path / "lock")
    with pytest.raises(OSError, match="symbolic links"):
        Journal.resume(folder)
    assert target.read_text() == (tmp_path / "mlruns" / "precious").read_text() == "as it was"


# ---- finding one


def test_a_run_is_found_by_its_key_or_its_id_or_how_they_begin(tmp_path: Path) -> None:
    first, second = (
        StateFolder.at(start(tmp_path, SPEC.model_copy(update={"name": name})).folder)
        for name in ("first", "second")
    )
    second.note(run_id="0123abc")
    for name in (first.path.name, "first", "f", first.path.name[:-1]):
        assert state.find(tmp_path, name).path == first.path
    for name in (second.path.name, "sec", "0123abc", "01"):
        assert state.find(tmp_path, name).path == second.path


def test_a_run_that_fits_not_or_not_alone_is_refused_naming_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"'x' fits 0 of the runs that are on disk; there are: none$"
    ):
        state.find(tmp_path, "x")
    keys = [start(tmp_path).folder.name for _ in range(2)]
    other = start(tmp_path, SPEC.model_copy(update={"name": "other"})).folder.name
    with pytest.raises(StoreError, match=f"'x' fits 0 .*there are: {keys[0]}, {keys[1]}, {other}$"):
        state.find(tmp_path, "x")
    with pytest.raises(StoreError, match=f"'small' fits 2 .*there are: {keys[0]}, {keys[1]}$"):
        state.find(tmp_path, "small")
    assert state.find(tmp_path, keys[1]).path.name == keys[1]


@pytest.mark.parametrize("name", ["None", "N"])
def test_a_run_that_has_no_id_is_not_found_by_one(name: str, tmp_path: Path) -> None:
    start(tmp_path)
    with pytest.raises(StoreError, match="fits 0"):
        state.find(tmp_path, name)


# ---- what follows from them


def train(first: int, count: int, t0: int = 1_000, t1: int = 2_000, elapsed: float = 1.0) -> Record:
    return Record(
        "train",
        {"first": first, "count": count, "t0": t0, "t1": t1, "elapsed_s": elapsed},
        values(count, first),
    )


def evaluation(step: int, **changed: Any) -> Record:
    fields = {
        "t": 5,
        "step": step,
        "epoch": step / 5,
        "val/loss": 2.0 + step,
        "val/accuracy": 0.1,
        "train/lr": 0.01,
    }
    return Record("evaluation", fields | changed)


@settings(deadline=None)  # the first call is slow on a busy machine
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    every=st.integers(1, 40),
    duration=st.integers(0, 100),
)
def test_points_are_every_nth_step_however_the_records_are_cut(
    counts: list[int], every: int, duration: int
) -> None:
    spec = SPEC.model_copy(update={"tracking": specs.Tracking(log_every=every)})
    ends = np.cumsum(counts)
    records = [
        train(int(end) - n + 1, n, 1_000 * i, 1_000 * i + duration)
        for i, (end, n) in enumerate(zip(ends, counts, strict=True))
    ]
    found = [list(journal.points(spec, record)) for record in records]
    assert repr(found) == repr([list(journal.points(spec, record)) for record in records])
    for record, some in zip(records, found, strict=True):
        assert all(
            record.fields["t0"] <= point.timestamp_ms <= record.fields["t1"] for point in some
        )
    for name in ("loss", "accuracy"):
        chosen = [point for some in found for point in some if point.key == f"train/{name}"]
        assert [point.step for point in chosen] == [*range(every, ends[-1] + 1, every)]
        wanted = np.concatenate([record.arrays[name] for record in records])[every - 1 :: every]
        np.testing.assert_array_equal(
            [point.value for point in chosen], wanted
        )  # takes NaN for equal to NaN
        times = [point.timestamp_ms for point in chosen]
        assert times == sorted(times)


def test_step_times_spread_over_the_record() -> None:
    assert journal.step_times(train(7, 4, 1_000, 2_000)).tolist() == [1_250, 1_500, 1_750, 2_000]


def test_evaluations_and_results_become_points() -> None:
    def found(record: Record) -> list[tuple[str, float, int, int]]:
        return [
            (point.key, point.value, point.timestamp_ms, point.step)
            for point in journal.points(SPEC, record)
        ]

    assert found(evaluation(3)) == [
        ("val/accuracy", 0.1, 5, 3),
        ("val/loss", 5.0, 5, 3),
        ("train/lr", 0.01, 5, 3),
        ("epoch", 0.6, 5, 3),
    ]
    assert [key for key, *_ in found(evaluation(0, **{"train/lr": None}))] == [
        "val/accuracy",
        "val/loss",
        "epoch",
    ]
    assert np.isnan(found(evaluation(3, **{"val/loss": float("nan")}))[1][1])
    assert found(Record("final", {"t": 9, "metrics": {"best/step": 3, "best/val_loss": 5.0}})) == [
        ("best/step", 3, 9, 0),
        ("best/val_loss", 5.0, 9, 0),
    ]
    assert found(Record("end", {"t": 9, "status": "FINISHED"})) == []


COLUMNS = [
    "step",
    "epoch",
    "elapsed_s",
    "train/loss",
    "train/accuracy",
    "train/lr",
    "val/loss",
    "val/accuracy",
]


def test_curves_have_every_step_once() -> None:
    parts = [train(1, 4, elapsed=0.5), train(5, 6, elapsed=2.0)]
    frame = journal.curves(
        SPEC,
        [evaluation(0), parts[0], evaluation(4), parts[1], evaluation(10), Record("end", {"t": 9})],
    )
    assert list(frame) == COLUMNS
    assert frame["step"].tolist() == [*range(11)]
    np.testing.assert_array_equal(frame["epoch"], np.arange(11) / 5)
    for name in ARRAYS:
        wanted = np.concatenate([[np.nan], *(part.arrays[name] for part in parts)])
        np.testing.assert_array_equal(frame[f"train/{name}"], wanted)
    val = frame.dropna(subset=["val/loss"])
    assert val[["step", "val/loss", "val/accuracy"]].to_numpy().tolist() == [
        [0, 2, 0.1],
        [4, 6, 0.1],
        [10, 12, 0.1],
    ]
    np.testing.assert_allclose(
        frame["elapsed_s"][1:], [0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    )


@pytest.mark.parametrize(
    "records", [[], [evaluation(0)], [train(1, 4)]], ids=["nothing", "no step", "no evaluation"]
)
def test_curves_of_a_run_that_broke_off_have_the_same_columns(records: list[Record]) -> None:
    frame = journal.curves(SPEC, records)
    assert list(frame) == COLUMNS
    assert [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])] == []


def recording(spec: specs.ExperimentSpec, last: int) -> list[Record]:
    """What a run of this spec has on record after `last` steps."""
    records = []
    for segment in specs.plan(spec):
        if (stop := min(segment.stop, last)) > segment.start:
            records.append(
                train(
                    segment.start + 1,
                    stop - segment.start,
                    7 * segment.start,
                    7 * stop,
                    0.007 * stop,
                )
            )
        if segment.evaluate and segment.stop <= last:
            lr = float(values(segment.stop)["lr"][-1]) if segment.stop else None
            records.append(
                evaluation(
                    segment.stop,
                    epoch=segment.stop / spec.steps_per_epoch,
                    t=7 * segment.stop,
                    **{"train/lr": lr},
                )
            )
    return records


def without_times(record: Record) -> str:
    fields = {
        key: field for key, field in sorted(record.fields.items()) if key not in ("t", "t0", "t1")
    }
    return text(Record(record.kind, fields, record.arrays))


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    every=st.integers(1, 30),
    batch=st.integers(2_000, 60_000),
    epochs=st.integers(1, 3),
)
def test_curves_give_the_records_back(
    data: st.DataObject, every: int, batch: int, epochs: int
) -> None:
    spec = specs.ExperimentSpec(
        name="small", train=specs.Train(epochs=epochs, batch_size=batch, eval_every=every)
    )
    last = data.draw(st.integers(0, spec.steps))
    records = recording(spec, last)
    found = journal.from_curves(spec, journal.curves(spec, records), last, 7 * last)
    assert [without_times(record) for record in found] == [
        without_times(record) for record in records
    ]
    for one, other in zip(found, records, strict=True):
        for time_of in ("t", "t0", "t1"):
            assert (
                abs(one.fields.get(time_of, 0) - other.fields.get(time_of, 0)) <= 1
            )  # a rounded millisecond


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    every=st.integers(1, 30),
    batch=st.integers(2_000, 60_000),
    epochs=st.integers(1, 3),
    longer=st.integers(0, 3),
)
def test_curves_are_cut_as_a_longer_plan_has_it(
    data: st.DataObject, every: int, batch: int, epochs: int, longer: int
) -> None:
    spec = specs.ExperimentSpec(
        name="small", train=specs.Train(epochs=epochs, batch_size=batch, eval_every=every)
    )
    other = spec.model_copy(
        update={"train": spec.train.model_copy(update={"epochs": epochs + longer})}
    )
    last = data.draw(st.integers(0, spec.steps))
    frame = journal.curves(spec, recording(spec, spec.steps))
    wanted, found = recording(other, last), journal.from_curves(other, frame, last, 0)
    assert [
        (record.kind, {**record.fields, **dict.fromkeys(("t", "t0", "t1", "elapsed_s"))})
        for record in found
    ] == [
        (record.kind, {**record.fields, **dict.fromkeys(("t", "t0", "t1", "elapsed_s"))})
        for record in wanted
    ]
    assert Recorded(found).last == last
    whole = np.concatenate(
        [
            np.empty(0, np.float32),
            *(record.arrays["loss"] for record in recording(spec, spec.steps) if record.arrays),
        ]
    )
    assert Recorded(found).arrays["loss"].tobytes() == whole.astype(np.float32)[:last].tobytes()


def test_forty_epochs_begin_with_twenty_less_the_evaluation_at_their_end(tmp_path: Path) -> None:
    short, long = (
        specs.ExperimentSpec(name="small", train=specs.Train(epochs=epochs)) for epochs in (20, 40)
    )
    assert short.steps % short.train.eval_every
    path = tmp_path / "curves.parquet"
    journal.curves(short, recording(short, short.steps)).to_parquet(path, index=False)
    found = journal.from_curves(long, pd.read_parquet(path), short.steps, 1_000_000)
    assert [without_times(record) for record in found[:-1]] == [
        without_times(record) for record in recording(long, short.steps)[:-1]
    ]
    assert found[-1].fields | {"t0": 0, "elapsed_s": 0} == {
        "first": 37_001,
        "count": 500,
        "t0": 0,
        "t1": 1_000_000,
        "elapsed_s": 0,
    }
    assert {record.fields["step"] for record in found if record.kind == "evaluation"} == set(
        range(0, 37_001, 1_000)
    )
    made = Journal.create(tmp_path, long, "longer", ENVIRONMENT, None, "abc", found)
    again, _ = journal.read(made.folder / "journal")
    assert [text(record) for record in again] == [
        text(Record(r.kind, json.loads(json.dumps(r.fields)), r.arrays)) for r in found
    ]


def test_a_run_that_is_being_continued_is_unfinished_and_not_resumable(tmp_path: Path) -> None:
    written = start(tmp_path)
    folder = state.state_folders(tmp_path)[0]
    assert (folder.unfinished, folder.resumable) == (True, False)
    written.event("end", status="KILLED", reason="SIGINT", resumable=True)
    written.release()
    assert (folder.unfinished, folder.resumable) == (True, True)
    continued = Journal.resume(folder)
    continued.event("end", status="FINISHED", reason=None, resumable=False)
    assert (folder.unfinished, folder.resumable, folder.running) == (False, False, True)
    continued.release()
    with pytest.raises(StoreError, match="has ended, there is nothing to continue"):
        Journal.resume(folder)
    assert not folder.running
    folder.remove()
    with pytest.raises(StoreError, match="is gone"):
        Journal.resume(folder)
