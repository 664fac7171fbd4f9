"""What an upload may remove: a run whose points are in no store stays on this disk, whatever happens to the store meanwhile."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Fmnist, command, make_home, stop_sidecar, stored_steps, wait_for

from fmnist import checkpoint, doctor, journal, runner, sidecar, state, tracking
from fmnist import spec as specs
from fmnist.journal import ARRAYS
from fmnist.state import Journal, StateFolder
from fmnist.training import Outcome

SPEC = specs.ExperimentSpec(
    name="small", train=specs.Train(epochs=1, batch_size=6000), tracking=specs.Tracking()
)
ENVIRONMENT = {
    "data_digest": "0" * 64,
    "device": "cpu",
    "threads": 1,
    "stack": 1,
    "git_commit": None,
    "git_dirty": False,
    "packages": {"torch": "0"},
    "command": "fmnist run small",
}


def begin(home: Path, store: str | None = None) -> Journal:
    return Journal.create(home, SPEC, "small", ENVIRONMENT, store)


def train(written: Journal, first: int, count: int) -> None:
    arrays = {name: np.arange(first, first + count).astype(dtype) for name, dtype in ARRAYS.items()}
    written.train(first, arrays, 1_000 * first, 1_000 * (first + count), 0.5)


def end(written: Journal, resumable: bool = False) -> None:
    written.event("end", status="FAILED", reason="for a test", resumable=resumable)


def failed(home: Path, resumable: bool = False) -> StateFolder:
    """A run of ten steps that failed; nothing of it is in a store."""
    written = begin(home)
    train(written, 1, 6)
    train(written, 7, 4)
    end(written, resumable)
    written.release()
    return StateFolder.at(written.folder)


def copy(home: Path, to: Path) -> Path:
    """Copy the database as SQLite has it, whatever is in its write-ahead log."""
    with (
        contextlib.closing(sqlite3.connect(tracking.database(home))) as here,
        contextlib.closing(sqlite3.connect(to)) as there,
    ):
        here.backup(there)
    return to


def replace(home: Path, with_copy: Path) -> None:
    for path in (home / "mlruns").glob("mlflow.db-*"):
        path.unlink()
    shutil.copy(with_copy, home / "new.db")
    (home / "new.db").replace(tracking.database(home))


def write_back(home: Path, with_copy: Path) -> None:
    """Put a copy back into the file that others have open."""
    with (
        contextlib.closing(sqlite3.connect(with_copy)) as here,
        contextlib.closing(sqlite3.connect(tracking.database(home))) as there,
    ):
        here.backup(there)


def delete(home: Path, _: Path) -> None:
    for path in (home / "mlruns").glob("mlflow.db*"):
        path.unlink()


def in_store(home: Path) -> list[list[int]]:
    """The steps that the store holds of each run."""
    if not tracking.exists(home):
        return []
    store = tracking.connect(home)
    return [stored_steps(store, run_id) for run_id in store.runs(status=None).get("run_id", [])]


STEPS = [[*range(1, 11)]]


def send_first(folder: StateFolder, store: tracking.Store) -> sidecar.Carrier:
    """Send all but the end, as while a run trains."""
    carrier = sidecar.Carrier(folder, store)
    carrier._open()
    records, _ = journal.read(folder.path / "journal")
    part = sum(len(journal.encode(record)) for record in records[:1])
    carrier._send(records[:1], part)
    carrier.offset = part
    carrier._note(None, None)
    return carrier


def close(folder: StateFolder, store: tracking.Store) -> sidecar.Carrier:
    """Upload all of it; the folder is still there."""
    carrier = sidecar.Carrier(folder, store)
    assert carrier.advance()
    assert carrier.closed == "FAILED"
    return carrier


def sync(carrier: sidecar.Carrier, home: Path) -> None:
    sidecar.sync(home, lambda text: None)


def carry_on(carrier: sidecar.Carrier, home: Path) -> None:
    """Go on as the background process does: with the same store while that is there, else with another."""
    for _ in range(10):
        if carrier.store.stale:
            carrier = sidecar.Carrier(carrier.folder, tracking.connect(home, create=True))
        if not carrier.folder.path.exists() or not carrier.advance():
            break
    assert not carrier.folder.path.exists()


@pytest.mark.parametrize("go_on", [sync, carry_on])
@pytest.mark.parametrize("when", [send_first, close])
@pytest.mark.parametrize("restore", [replace, write_back, delete])
def test_a_store_put_back_from_a_copy_gets_the_whole_run_again(
    restore: Callable[[Path, Path], None],
    when: Callable[[StateFolder, tracking.Store], sidecar.Carrier],
    go_on: Callable[[sidecar.Carrier, Path], None],
    home: Path,
    with_store: None,
) -> None:
    before = copy(home, home / "before.db")
    folder = failed(home)
    folder.assign("local")
    carrier = when(folder, tracking.connect(home))
    restore(home, before)
    go_on(carrier, home)
    assert in_store(home) == STEPS
    assert not folder.path.exists()
    assert tracking.connect(home).runs(status=None)["status"].tolist() == ["FAILED"]


@pytest.mark.parametrize("restore", [replace, write_back, delete])
def test_a_run_that_can_be_continued_is_uploaded_again_and_stays(
    restore: Callable[[Path, Path], None], home: Path, with_store: None
) -> None:
    before = copy(home, home / "before.db")
    folder = failed(home, resumable=True)
    files = {path.name for path in folder.path.iterdir()}
    sidecar.sync(home, lambda text: None)
    assert in_store(home) == STEPS
    restore(home, before)
    assert in_store(home) == []
    sidecar.sync(home, lambda text: None)
    assert in_store(home) == STEPS
    assert {path.name for path in folder.path.iterdir()} == files | {"mlflow.json"}
    assert folder.resumable


def test_a_copy_that_holds_less_of_a_run_gets_the_rest_of_it(home: Path, with_store: None) -> None:
    folder = failed(home)
    carrier = send_first(folder, tracking.connect(home))
    before = copy(home, home / "before.db")
    assert carrier.advance()
    run_id = carrier.run_id
    write_back(home, before)
    assert in_store(home) == [[*range(1, 7)]]
    carry_on(carrier, home)
    assert in_store(home) == STEPS
    assert tracking.connect(home).runs(status=None)["run_id"].tolist() == [run_id]


def test_only_a_run_that_the_store_says_is_deleted_is_given_up(
    home: Path, with_store: None
) -> None:
    store, folder = tracking.connect(home), failed(home)
    carrier = send_first(folder, store)
    store.client.delete_run(carrier.run_id)
    assert carrier.advance()
    assert carrier.closed == "DELETED"
    assert folder.path.exists()
    assert carrier.advance()
    assert not folder.path.exists()
    run = store.client.get_run(carrier.run_id)
    assert (run.info.lifecycle_stage, run.info.status) == ("deleted", "KILLED")
    store.client.restore_run(carrier.run_id)  # its end is told then, too
    assert store.client.get_run(carrier.run_id).info.status == "KILLED"


def test_a_deleted_run_restored_while_its_folder_is_there_goes_on(
    home: Path, with_store: None
) -> None:
    store, folder = tracking.connect(home), failed(home)
    carrier = send_first(folder, store)
    store.client.delete_run(carrier.run_id)
    assert carrier.advance()
    store.client.restore_run(carrier.run_id)
    carry_on(carrier, home)
    assert in_store(home) == STEPS
    run = store.client.get_run(carrier.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == ("FAILED", "failed")


def test_a_deleted_run_that_the_store_knows_no_more_is_uploaded_anew(
    home: Path, with_store: None
) -> None:
    before = copy(home, home / "before.db")
    store, folder = tracking.connect(home), failed(home)
    carrier = send_first(folder, store)
    store.client.delete_run(carrier.run_id)
    assert carrier.advance()
    write_back(home, before)
    carry_on(carrier, home)
    assert in_store(home) == STEPS


def test_no_other_path_removes_a_folder() -> None:
    sources = {path.name: path.read_text() for path in Path(state.__file__).parent.glob("*.py")}
    assert [name for name, text in sources.items() if "folder.remove()" in text] == ["sidecar.py"]
    assert sources["sidecar.py"].count("folder.remove()") == 1
    # files.py: scratch folders, and state folders that have no name yet or no longer; data.py: half of a download
    removing = {name for name, text in sources.items() if "rmtree(" in text}
    assert removing == {"data.py", "files.py", "state.py"}


# ---- a note of an upload that is not right


@pytest.mark.parametrize("off", [-1, 1, 1 << 20])
def test_an_upload_offset_that_is_off_loses_nothing(off: int, home: Path, with_store: None) -> None:
    folder = failed(home)
    store = tracking.connect(home)
    carrier = send_first(folder, store)
    folder.note(**{**folder.carried, "offset": carrier.offset + off})
    carry_on(sidecar.Carrier(folder, store), home)
    assert in_store(home) == STEPS


@pytest.mark.parametrize("off", [-1, 1, 1 << 20])
def test_a_closed_run_whose_offset_is_off_is_not_taken_for_whole(
    off: int, home: Path, with_store: None
) -> None:
    """As if the records behind what was sent were not to be found from there."""
    folder = failed(home)
    store = tracking.connect(home)
    carrier = send_first(folder, store)
    store.close_run(carrier.run_id, "FAILED", 1)
    note = {**folder.carried, "closed": "FAILED", "offset": carrier.offset + off}
    folder.note(**note)
    carry_on(sidecar.Carrier(folder, store), home)
    assert in_store(home) == STEPS


def test_a_damaged_note_is_none(home: Path, with_store: None) -> None:
    folder = failed(home)
    store = tracking.connect(home)
    run_id = send_first(folder, store).run_id
    path = folder.path / "mlflow.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        assert folder.carried == {}
    carry_on(sidecar.Carrier(folder, store), home)
    assert in_store(home) == STEPS
    assert store.runs(status=None)["run_id"].tolist() == [run_id]


def test_a_journal_whose_end_was_torn_off_is_settled(home: Path, with_store: None) -> None:
    folder = failed(home, resumable=True)
    sidecar.sync(home, lambda text: None)
    with open(folder.path / "journal", "ab") as file:
        file.write(b"FMJ1 half a record")
    carrier = sidecar.Carrier(folder, tracking.connect(home))
    assert carrier.settled
    assert not carrier.advance()
    assert folder.path.exists()


# ---- the commands


@pytest.mark.slow
@pytest.mark.parametrize("go_on", [("sync",), SMALL])
def test_a_finished_run_survives_that_the_store_is_put_back(
    go_on: tuple[str, ...], fmnist: Fmnist, home: Path, with_store: None
) -> None:
    before = copy(home, home / "before.db")
    assert fmnist(*SMALL, "--no-sync").returncode == 0
    [folder] = state.state_folders(home)
    folder.assign("local")
    carrier = sidecar.Carrier(folder, tracking.connect(home))
    assert carrier.advance()
    assert carrier.closed == "FINISHED"
    replace(home, before)
    assert fmnist(*go_on).returncode == 0
    wait_for(lambda: os.listdir(state.state_folder(home)) == [])
    runs = tracking.connect(home).runs(status=None)
    assert set(runs["status"]) == {"FINISHED"}
    assert in_store(home) == [[*range(1, 61)]] * len(runs)


# ---- who is in the way of `sync`


@contextlib.contextmanager
def process(*command: str) -> Iterator["subprocess.Popen[bytes]"]:
    started = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def uploader(home: Path) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
    return process(sys.executable, "-m", "fmnist.sidecar", str(home))


def lives(started: "subprocess.Popen[bytes]") -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(timeout=0.5)
    return started.poll() is None


@pytest.mark.parametrize("changed", [{}, {"process": "0"}, {"host": "x"}, {"what": "a command"}])
def test_only_an_uploader_of_this_machine_is_ended(changed: dict[str, str], tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with process("sleep", "100") as other, open(lock, "w") as file:
        wait_for(lambda: b"sleep" in Path(f"/proc/{other.pid}/cmdline").read_bytes())
        fcntl.flock(file, fcntl.LOCK_EX)
        found = state.Holder(
            state.UPLOADER, other.pid, socket.gethostname(), state.process(other.pid)
        )
        file.write(json.dumps(found._asdict() | changed))
        file.flush()
        state.end_uploader(lock)
        assert lives(other) == bool(changed)


def test_what_names_nobody_ends_nobody(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for text in ("", "1", "[1]", "{}", f"{os.getpid()}", '{"pid": 1}'):
        lock.write_text(text)
        assert state.holder(lock) is None
        state.end_uploader(lock)
    assert state.holder(tmp_path / "none") is None
    assert state.process(2**22 + 1) == ""


def test_sync_takes_the_place_of_an_uploader_even_if_that_is_stopped(
    home: Path, with_store: None
) -> None:
    lock = state.carrier_lock(home)
    with uploader(home) as stopped:
        wait_for(lambda: state.is_locked(lock) and state.holder(lock))
        stopped.send_signal(signal.SIGSTOP)
        said: list[str] = []
        sidecar.sync(home, said.append)
        assert stopped.wait(timeout=5) == -signal.SIGTERM
        assert said == []


def test_sync_waits_for_another_one_and_says_so(home: Path, with_store: None) -> None:
    lock = state.carrier_lock(home)
    hold = (
        "import sys, time, pathlib; from fmnist import sidecar\n"
        "with sidecar._sole_carrier(pathlib.Path(sys.argv[1]), print): time.sleep(100)"
    )
    with process(sys.executable, "-c", hold, str(home)) as other:
        wait_for(lambda: state.is_locked(lock) and state.holder(lock))
        said: list[str] = []

        def end(text: str) -> None:
            said.append(text)
            assert lives(other)
            other.kill()

        sidecar.sync(home, end)
        who = f"another `fmnist sync` (process {other.pid} on {socket.gethostname()})"
        assert said == [f"waiting for {who}, which is uploading; if it hangs, end it"]


# ---- results that are another's


@pytest.fixture(scope="module")
def two_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two finished runs of other seeds that are in no store."""
    folder = make_home(tmp_path_factory.mktemp("finished"))
    result = command(folder, *SMALL, "--seeds", "2", "--no-sync")
    assert result.returncode == 0, result.stderr
    return folder


def swap(name: str) -> Callable[[Path, Path], object]:
    return lambda one, other: shutil.copy(other / name, one / name)


def alter_checkpoint(one: Path, _: Path) -> None:
    """Change one weight and have the file's own checksum fit."""
    spec = StateFolder.at(one).spec
    loaded = checkpoint.load(one / checkpoint.NEWEST, spec)
    loaded["parameters"][0] += 1
    checkpoint.save(one, spec, loaded)


def forget_results(one: Path, _: Path) -> None:
    records = journal.read(one / "journal")[0]
    kept = (journal.encode(record) for record in records if record.kind != "final")
    (one / "journal").write_bytes(b"".join(kept))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda one, other: None, None),
        (swap("predictions.npz"), "the predictions on disk are not those that it recorded"),
        (alter_checkpoint, "the parameters on disk are not those that it recorded"),
        (forget_results, "its journal says that it finished, and holds no results"),
    ],
    ids=["none", "predictions", "parameters", "no results"],
)
def test_only_results_that_the_run_recorded_are_taken_for_its_own(
    harm: Callable[[Path, Path], object],
    told: str | None,
    two_finished: Path,
    home: Path,
    with_store: None,
) -> None:
    shutil.copytree(state.state_folder(two_finished), state.state_folder(home))
    one, other = state.state_folders(home)
    harm(one.path, other.path)
    if harm is forget_results:
        assert one.result is None
    carrier = sidecar.Carrier(one, tracking.connect(home))
    assert carrier.advance()
    assert carrier.closed == ("FAILED" if told else "FINISHED")
    assert (told or "") in (carrier.reason or "")


def test_results_on_record_are_kept_where_a_run_ends_again(two_finished: Path, home: Path) -> None:
    """As where the end was lost and another machine, whose last bits differ, goes on."""
    shutil.copytree(state.state_folder(two_finished), state.state_folder(home))
    folder = state.state_folders(home)[0]
    path = folder.path / "journal"
    records = journal.read(path)[0]
    path.write_bytes(b"".join(journal.encode(record) for record in records[:-1]))
    before = (folder.path / "predictions.npz").stat().st_mtime_ns
    assert folder.resumable
    assert command(home, *SMALL, "--no-sync").returncode == 0
    assert (folder.path / "predictions.npz").stat().st_mtime_ns == before
    result = folder.result
    assert result is not None
    assert (result.outcome, result.accuracy) == (
        "finished",
        records[-2].fields["metrics"]["last/val_accuracy"],
    )


# ---- runs that are complete on this disk only


def test_seeds_that_are_complete_on_this_disk_get_into_the_store(
    two_finished: Path, home: Path, with_store: None
) -> None:
    shutil.copytree(state.state_folder(two_finished), state.state_folder(home))
    result = command(home, *SMALL, "--seeds", "2")
    assert result.returncode == 0, result.stderr
    assert "2 of the runs are complete on this disk; waiting for their upload" in result.stderr
    runs = tracking.connect(home).runs(status=None)
    assert sorted(runs["t/seed"]) == ["0", "1"]
    assert set(runs["status"]) == {"FINISHED"}


def test_a_group_that_was_not_written_to_its_end_is_named_and_ended(
    home: Path, with_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tracking.connect(home)
    experiment = store.experiment("fashion-mnist")
    new = tracking.Derived(
        experiment, "group", "key", "a group (2 seeds)", {}, {}, [], [], 1, 2, "FINISHED", "x"
    )

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    (home / "files").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(store.client, "set_terminated", killed)
        with pytest.raises(KeyboardInterrupt):
            store.replace(new, home / "files")
    assert sidecar._half_written_groups(store) == {"key"}
    told = [
        finding for finding in doctor._store(home, deep=False) if finding.remedy == "fmnist sync"
    ]
    assert "the run of group a group (2 seeds) says RUNNING" in told[0].what
    sidecar.sync(home, lambda text: None)
    assert store.half_written() == []
    assert not [finding for finding in doctor._store(home, deep=False) if finding.remedy]


def test_doctor_names_a_run_that_the_store_does_not_know(home: Path, with_store: None) -> None:
    before = copy(home, home / "before.db")
    failed(home, resumable=True)
    sidecar.sync(home, lambda text: None)
    assert not [finding for finding in doctor._store(home, deep=False) if finding.remedy]
    write_back(home, before)
    [told] = [finding for finding in doctor._store(home, deep=False) if finding.remedy]
    assert "is not in the store any more" in told.what


# ---- a disk that takes nothing


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """mlruns/ on a disk of its own, of 1 MB and 40 inodes."""
    folder = home / "mlruns"
    folder.mkdir()
    options = "size=1m,nr_inodes=40"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this test mounts a small disk, which is not allowed here")
    try:
        yield folder
    finally:
        stop_sidecar(home)
        # lazily: an uploader that was just started may still have its log open there
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "full", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def use_inodes(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(100):
            (folder / f"used {number}").touch()


@pytest.mark.parametrize("use_up", [fill, use_inodes])
def test_a_full_disk_is_told_of_at_once_with_how_long_was_waited(
    use_up: Callable[[Path], None], home: Path, small_disk: Path
) -> None:
    folder = failed(home)
    folder.assign("local")
    use_up(small_disk)
    outcome = Outcome(folder.path.name, "small")
    began, said = time.monotonic(), list[tuple[float, str]]()
    context = runner.Context(
        home, say=lambda text: said.append((time.monotonic() - began, text)), patience_s=3
    )
    runner.hand_over([outcome], context)
    waited = time.monotonic() - began
    full = f"{small_disk} can't be written: No space left on device"
    assert full in said[0][1]
    assert said[0][0] < 1
    assert waited < 10
    assert outcome.unsynced == f"{full}; waited for {waited:.0f} s; mlruns/sidecar.log may say more"
    assert folder.path.exists()
