"""The journal: a run's folder is whole or unseen, its records survive every damage but their own, and points follow from them alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from fmnist import journal
from fmnist import spec as specs
from fmnist.journal import ARRAYS, Journal, Record, StateFolder

SPEC = specs.ExperimentSpec(name="small", train=specs.Train(epochs=2, batch_size=12_000))  # 5 steps an epoch
ENVIRONMENT = {"python": "3", "packages": {"torch": "2"}}


def start(root: Path, spec: specs.ExperimentSpec = SPEC, store: str | None = "local") -> Journal:
    return Journal.create(root, spec, f"{spec.name} lr=0.1", ENVIRONMENT, store)


def values(count: int, first: int = 1) -> dict[str, np.ndarray]:
    """Arrays as a step's measurements: no two values alike, and one that isn't finite."""
    found = {name: (np.arange(first, first + count) + 10 * i).astype(dtype) / 3 for i, (name, dtype) in enumerate(ARRAYS.items())}
    found["loss"][-1] = np.nan
    return found


def text(record: Record) -> str:
    """A record in a form that compares bit for bit, NaN included."""
    return repr((record.kind, record.fields, {name: (array.dtype, array.tobytes()) for name, array in record.arrays.items()}))


def write(written: Journal) -> list[int]:
    """Append one record of each kind; returns where each ends."""
    ends = []
    for append in (
        lambda: written.event("evaluation", step=0, epoch=0.0, **{"val/loss": 2.3, "val/accuracy": 0.1, "train/lr": None}),
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
    before = journal.now_ms()
    made = start(tmp_path, store=store)
    [found] = journal.state_folders(tmp_path)
    assert found.path == made.folder
    started = found.run.pop("started_ms")
    assert found.run == {"key": made.folder.name, "name": "small lr=0.1", "store": store}
    assert before <= started <= journal.now_ms()
    assert found.spec == SPEC
    assert json.loads((found.path / "environment.json").read_text()) == ENVIRONMENT
    assert json.loads((found.path / "lock").read_text())["pid"] == os.getpid()
    assert found.running
    made.release()
    assert not found.running


def test_a_folder_that_cant_be_made_whole_is_never_seen(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Journal.create(tmp_path, SPEC, "small", {"not": {"for", "JSON"}}, "local")
    assert journal.state_folders(tmp_path) == []
    assert list(journal.state_folder(tmp_path).glob("[!.]*")) == []


def test_a_root_that_cant_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "mlruns").touch()
    with pytest.raises(OSError, match="mlruns"):
        start(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from fmnist import journal, spec as specs
held = journal.Journal.create(Path(sys.argv[1]), specs.ExperimentSpec(name="held"), "held", {}, None)
held.event("end", status="FINISHED")
print(held.folder, flush=True)
time.sleep(60)
"""


def test_a_killed_trainer_holds_its_lock_no_longer(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
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
    assert len(set(keys)) == 5
    assert any(key.endswith("-2") for key in keys), "no two of them fell into one second, so this proves nothing"
    assert {folder.run["key"] for folder in journal.state_folders(tmp_path)} == set(keys)


def test_state_folders_are_listed_oldest_first_without_strays(tmp_path: Path) -> None:
    for name in ("zeta", "alpha"):
        start(tmp_path, SPEC.model_copy(update={"name": name}))
        time.sleep(0.005)
    (journal.state_folder(tmp_path) / "stray").mkdir()
    (journal.state_folder(tmp_path) / "file").touch()
    assert [folder.run["name"] for folder in journal.state_folders(tmp_path)] == ["zeta lr=0.1", "alpha lr=0.1"]


def test_a_note_replaces_the_one_before(tmp_path: Path) -> None:
    folder = StateFolder(start(tmp_path).folder, {})
    assert folder.carried == {}
    for note in ({"run_id": "a", "offset": 7, "error": "x"}, {"run_id": "a", "offset": 9, "closed": None}):
        folder.note(**note)
        assert folder.carried == note
    assert list(folder.path.glob("*.partial")) == []
    (folder.path / "mlflow.json").write_text('{"run_id"')
    assert folder.carried == {}


def test_a_removed_folder_is_gone(tmp_path: Path) -> None:
    start(tmp_path).release()
    journal.state_folders(tmp_path)[0].remove()
    assert list(journal.state_folder(tmp_path).iterdir()) == []


def test_each_root_and_store_has_one_carrier(tmp_path: Path) -> None:
    locks = {journal.carrier_lock(root, store) for root in (tmp_path, tmp_path / "other") for store in ("local", "http://a", "http://b")}
    assert len(locks) == 6
    assert journal.carrier_lock(tmp_path, "http://a") in locks


# ---- the records


def test_records_come_back_bit_for_bit(tmp_path: Path) -> None:
    before = journal.now_ms()
    written = start(tmp_path)
    ends = write(written)
    records, offset = journal.read(written.folder / "journal")
    assert offset == ends[-1]
    times = [record.fields.pop("t") for record in records if record.kind != "train"]
    assert before <= min(times) <= max(times) <= journal.now_ms()
    metrics = {"val/loss": 2.3, "val/accuracy": 0.1, "train/lr": None}
    assert [text(record) for record in records] == [
        text(Record("evaluation", {"step": 0, "epoch": 0.0, **metrics})),
        text(Record("train", {"first": 1, "count": 3, "t0": 1_000, "t1": 2_000, "elapsed_s": 0.5}, values(3))),
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
    written.event("end", status="again")
    [record], offset = journal.read(path, ends[-1])
    assert record.fields["status"] == "again"
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


def test_a_flipped_bit_anywhere_ends_what_is_read(tmp_path: Path) -> None:
    written = start(tmp_path)
    ends, data, path = write(written), bytearray((written.folder / "journal").read_bytes()), tmp_path / "flipped"
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
from fmnist import journal, spec as specs
full = journal.Journal.create(Path(sys.argv[1]), specs.ExperimentSpec(name="full"), "full", {}, None)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
arrays = {name: np.zeros(9, dtype) for name, dtype in journal.ARRAYS.items()}
failed = 0
for written in range(20):
    try:
        full.train(1, arrays, 0, 1, 0.1)
    except OSError:
        failed += 1
print(failed)
"""


def test_a_full_disk_fails_the_append_and_keeps_the_records(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    records, _ = journal.read(journal.state_folders(tmp_path)[0].path / "journal")
    assert 0 < len(records) < 20
    assert len(records) + int(result.stdout) == 20


# ---- what follows from them


def train(first: int, count: int, t0: int = 1_000, t1: int = 2_000, elapsed: float = 1.0) -> Record:
    return Record("train", {"first": first, "count": count, "t0": t0, "t1": t1, "elapsed_s": elapsed}, values(count, first))


def evaluation(step: int, **changed: Any) -> Record:
    fields = {"t": 5, "step": step, "epoch": step / 5, "val/loss": 2.0 + step, "val/accuracy": 0.1, "train/lr": 0.01}
    return Record("evaluation", fields | changed)


@settings(deadline=None)  # the first call is slow on a busy machine
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=8), every=st.integers(1, 40), duration=st.integers(0, 100))
def test_points_are_every_nth_step_however_the_records_are_cut(counts: list[int], every: int, duration: int) -> None:
    spec = SPEC.model_copy(update={"tracking": specs.Tracking(log_every=every)})
    ends = np.cumsum(counts)
    records = [train(int(end) - n + 1, n, 1_000 * i, 1_000 * i + duration) for i, (end, n) in enumerate(zip(ends, counts, strict=True))]
    found = [list(journal.points(spec, record)) for record in records]
    assert repr(found) == repr([list(journal.points(spec, record)) for record in records])
    for record, some in zip(records, found, strict=True):
        assert all(record.fields["t0"] <= point.timestamp_ms <= record.fields["t1"] for point in some)
    for name in ("loss", "accuracy"):
        chosen = [point for some in found for point in some if point.key == f"train/{name}"]
        assert [point.step for point in chosen] == [*range(every, ends[-1] + 1, every)]
        wanted = np.concatenate([record.arrays[name] for record in records])[every - 1 :: every]
        np.testing.assert_array_equal([point.value for point in chosen], wanted)  # takes NaN for equal to NaN
        times = [point.timestamp_ms for point in chosen]
        assert times == sorted(times)


def test_step_times_spread_over_the_record() -> None:
    assert journal.step_times(train(7, 4, 1_000, 2_000)).tolist() == [1_250, 1_500, 1_750, 2_000]


def test_evaluations_and_results_become_points() -> None:
    def found(record: Record) -> list[tuple[str, float, int, int]]:
        return [(point.key, point.value, point.timestamp_ms, point.step) for point in journal.points(SPEC, record)]

    assert found(evaluation(3)) == [("val/loss", 5.0, 5, 3), ("val/accuracy", 0.1, 5, 3), ("train/lr", 0.01, 5, 3), ("epoch", 0.6, 5, 3)]
    assert [key for key, *_ in found(evaluation(0, **{"train/lr": None}))] == ["val/loss", "val/accuracy", "epoch"]
    assert np.isnan(found(evaluation(3, **{"val/loss": float("nan")}))[0][1])
    assert found(Record("final", {"t": 9, "metrics": {"best/step": 3, "best/val_loss": 5.0}})) == [
        ("best/step", 3, 9, 0),
        ("best/val_loss", 5.0, 9, 0),
    ]
    assert found(Record("end", {"t": 9, "status": "FINISHED"})) == []


COLUMNS = ["step", "epoch", "elapsed_s", "train/loss", "train/accuracy", "train/lr", "val/loss", "val/accuracy"]


def test_curves_have_every_step_once() -> None:
    parts = [train(1, 4, elapsed=0.5), train(5, 6, elapsed=2.0)]
    frame = journal.curves(SPEC, [evaluation(0), parts[0], evaluation(4), parts[1], evaluation(10), Record("end", {"t": 9})])
    assert list(frame) == COLUMNS
    assert frame["step"].tolist() == [*range(11)]
    np.testing.assert_array_equal(frame["epoch"], np.arange(11) / 5)
    for name in ARRAYS:
        wanted = np.concatenate([[np.nan], *(part.arrays[name] for part in parts)])
        np.testing.assert_array_equal(frame[f"train/{name}"], wanted)
    val = frame.dropna(subset=["val/loss"])
    assert val[["step", "val/loss", "val/accuracy"]].to_numpy().tolist() == [[0, 2, 0.1], [4, 6, 0.1], [10, 12, 0.1]]
    np.testing.assert_allclose(frame["elapsed_s"][1:], [0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])


@pytest.mark.parametrize("records", [[], [evaluation(0)], [train(1, 4)]], ids=["nothing", "no step", "no evaluation"])
def test_curves_of_a_run_that_broke_off_have_the_same_columns(records: list[Record]) -> None:
    frame = journal.curves(SPEC, records)
    assert list(frame) == COLUMNS
    assert [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])] == []
