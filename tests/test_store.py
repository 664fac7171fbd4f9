"""Where runs go: the local store, a server, or neither yet; and that a store is only ever written whole."""

import contextlib
import dataclasses
import json
import os
import secrets
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import LONG, SMALL, Fmnist, free_port, start, stored_steps, trained, wait_for
from PIL import Image

from fmnist import journal, sidecar, state, tracking
from fmnist import spec as specs


def test_no_sync_stays_on_disk_until_sync(fmnist: Fmnist, home: Path) -> None:
    quiet = fmnist(*SMALL, "--no-sync")
    assert quiet.stderr == ""  # no terminal, no progress
    assert "not in MLflow yet" in quiet.stdout
    assert not tracking.database(home).exists()
    (folder,) = state.state_folders(home)
    journalled = journal.curves(folder.spec, journal.read(folder.path / "journal")[0])
    synced = json.loads(fmnist("sync", "--json").stdout)["runs"]
    assert [(run["key"], run["status"]) for run in synced] == [(folder.path.name, "FINISHED")]
    assert "nothing to carry over" in fmnist("sync").stdout
    pd.testing.assert_frame_equal(
        tracking.connect(home).curves(synced[0]["run_id"]), journalled, check_exact=True
    )


@pytest.mark.slow
def test_two_first_runs_at_once_share_one_store(home: Path) -> None:
    processes = [start(*SMALL, "--json") for _ in range(2)]
    outcomes = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [outcome["status"] for outcome in outcomes] == ["FINISHED"] * 2
    store = tracking.connect(home)
    assert len({outcome["run_id"] for outcome in outcomes}) == 2
    for outcome in outcomes:
        assert stored_steps(store, outcome["run_id"]) == list(range(1, 61))


@pytest.mark.slow
def test_run_on_a_server(fmnist: Fmnist, home: Path, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{(port := free_port())}"
    password = secrets.token_hex(8)
    with_password = uri.replace("//", f"//someone:{password}@")
    command = [
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    environment = {**os.environ, **tracking.SETTINGS}
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port), "--workers", "1"],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
        )
    try:
        wait_for(lambda: answers(uri))
        result = fmnist(*SMALL, "--json", MLFLOW_TRACKING_URI=with_password)
        outcome = json.loads(result.stdout)
        assert (outcome["status"], outcome["unsynced"]) == ("FINISHED", None), result.stderr
        assert outcome["link"].startswith(f"{uri}/#/experiments/")
        assert not tracking.database(home).exists()
        report = json.loads(fmnist("report", "--json", MLFLOW_TRACKING_URI=uri).stdout)
        assert [row["last val acc"] for row in report["runs"]] == [
            f"{outcome['metrics']['last/val_accuracy']:.4f}"
        ]
        Image.new("L", (28, 28)).save(tmp_path / "x.png")
        for arguments in (
            ("promote", outcome["run_id"], "--because", "a drill"),
            ("predict", outcome["run_id"], str(tmp_path / "x.png")),
            ("predict", "champion", str(tmp_path / "x.png")),
        ):
            used = fmnist(*arguments, MLFLOW_TRACKING_URI=uri)
            assert used.returncode == 0, used.stderr
        assert "model of 1 runs" in fmnist("doctor", "--deep", MLFLOW_TRACKING_URI=uri).stdout
        [program] = (tmp_path / "kept").rglob("model.pt2")
        program.write_bytes(program.read_bytes()[:-1] + b"x")
        used = fmnist(*arguments, MLFLOW_TRACKING_URI=uri)
        assert (used.returncode, used.stderr) == (
            2,
            f"fmnist: run {outcome['run_id']}: its model: data/model.pt2 is not as it was recorded; restore it from a copy or train again\n",
        )
        assert fmnist(*SMALL, "--no-sync", MLFLOW_TRACKING_URI=with_password).returncode == 0
    finally:
        server.terminate()
        server.wait()
    said = fmnist(
        "sync", MLFLOW_TRACKING_URI=with_password
    )  # the server is gone: every error may name its address
    assert said.returncode != 0
    written = [
        path
        for folder in (home / "mlruns", tmp_path / "kept")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    texts = [path.read_bytes() for path in [*written, tmp_path / "server.db"]]
    texts += [text.encode() for text in (result.stdout, result.stderr, said.stdout, said.stderr)]
    assert len(texts) > 10
    assert not [text for text in texts if password.encode() in text]


def answers(uri: str) -> bool:
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_run_deleted_in_mlflow_while_it_trains_stays_deleted(home: Path) -> None:
    process = start(*LONG, "-s", "train.epochs=3", "--json")
    wait_for(lambda: trained(home) >= 1000 and state.state_folders(home)[0].carried.get("offset"))
    store = tracking.connect(home)
    run_id = state.state_folders(home)[0].carried["run_id"]
    store.client.delete_run(run_id)
    outcome = json.loads(process.communicate(timeout=120)[0])
    assert (process.returncode, outcome["status"]) == (0, "DELETED")
    assert store.client.get_run(run_id).info.lifecycle_stage == "deleted"
    assert store.runs(status=None).empty


def test_a_send_that_fails_is_made_up_for_and_counted_once(fmnist: Fmnist, home: Path) -> None:
    assert fmnist(*SMALL, "--no-sync").returncode == 0
    store = tracking.connect(home, create=True)
    carrier = sidecar.Carrier(state.state_folders(home)[0], store)

    def rename(before: str, after: str) -> None:
        with contextlib.closing(sqlite3.connect(tracking.database(home))) as connection:
            connection.execute(f"ALTER TABLE {before} RENAME TO {after}")

    rename("metrics", "away")
    for _ in range(2):
        with pytest.raises(Exception, match="metrics"):
            carrier.advance()
    rename("away", "metrics")
    assert carrier.advance()
    assert (carrier.closed, carrier.reason) == ("FINISHED", None)
    assert stored_steps(store, carrier.run_id) == list(range(1, 61))


@pytest.mark.parametrize("mutant", [False, True])
def test_a_carrier_killed_before_it_noted_what_it_sent_doubles_nothing(
    fmnist: Fmnist, home: Path, monkeypatch: pytest.MonkeyPatch, mutant: bool, with_store: None
) -> None:
    assert fmnist(*SMALL, "--no-sync").returncode == 0
    store = tracking.connect(home)
    folder = state.state_folders(home)[0]
    killed = sidecar.Carrier(folder, store)
    killed._open()
    records, _ = journal.read(folder.path / "journal")
    store.log_points(
        killed.run_id,
        (point for record in records for point in journal.points(folder.spec, record)),
    )
    if mutant:  # new time stamps on replay: the store takes such points for others

        def later(spec: specs.ExperimentSpec, record: journal.Record) -> Iterator[journal.Point]:
            return (
                dataclasses.replace(point, timestamp_ms=point.timestamp_ms + 1)
                for point in journal.points(spec, record)
            )

        monkeypatch.setattr(sidecar, "points", later)
    carrier = sidecar.Carrier(folder, store)
    assert carrier.run_id == killed.run_id
    assert carrier.advance()
    assert (carrier.closed, stored_steps(store, carrier.run_id) == list(range(1, 61))) == (
        ("FAILED", False) if mutant else ("FINISHED", True)
    )
    assert ("train/loss 120 of 60" in (carrier.reason or "")) == mutant


@pytest.mark.slow
def test_a_store_that_is_deleted_is_made_anew_with_the_whole_run(
    fmnist: Fmnist, home: Path, with_store: None
) -> None:
    process = start(*LONG, "-s", "train.epochs=5", "--json")
    wait_for(lambda: trained(home) >= 1000 and state.state_folders(home)[0].carried.get("offset"))
    for path in (home / "mlruns").glob("mlflow.db*"):
        path.unlink()
    stdout, stderr = process.communicate(timeout=120)
    outcome = json.loads(stdout)
    assert (outcome["status"], outcome["unsynced"]) == ("FINISHED", None), stderr
    assert stored_steps(tracking.connect(home), outcome["run_id"]) == list(range(1, 5 * 1875 + 1))


@pytest.mark.slow
def test_a_store_put_back_from_a_copy_while_a_run_trains_gets_the_whole_run(
    home: Path, with_store: None
) -> None:
    database = tracking.database(home)
    before = sqlite3.connect(":memory:")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.backup(before)
    process = start(*LONG, "-s", "train.epochs=5", "--json")
    wait_for(lambda: trained(home) >= 1000 and state.state_folders(home)[0].carried.get("offset"))
    first = state.state_folders(home)[0].carried["run_id"]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        before.backup(connection)
    stdout, stderr = process.communicate(timeout=120)
    outcome = json.loads(stdout)
    assert (outcome["status"], outcome["unsynced"]) == ("FINISHED", None), stderr
    assert outcome["run_id"] != first
    assert stored_steps(tracking.connect(home), outcome["run_id"]) == list(range(1, 5 * 1875 + 1))


def test_a_carrier_leaves_a_run_alone_that_is_continued_while_it_looks(
    fmnist: Fmnist, home: Path, monkeypatch: pytest.MonkeyPatch, with_store: None
) -> None:
    assert fmnist(*SMALL, "--no-sync").returncode == 0
    folder = state.state_folders(home)[0]
    path = folder.path / "journal"
    records, _ = journal.read(path)
    kept = next(index for index, record in enumerate(records) if record.kind == "final")
    path.write_bytes(
        path.read_bytes()[: journal_end(path, kept)]
    )  # as if killed before it had its results
    carrier = sidecar.Carrier(folder, tracking.connect(home))
    assert carrier.advance()
    assert (carrier.closed, carrier.settled) == ("KILLED", True)
    taken: list[state.Journal] = []
    running = state.StateFolder.running

    def taken_once_seen_free(self: state.StateFolder) -> bool:
        free = not running.fget(self)
        if free and not taken:
            taken.append(state.Journal.resume(self))
        return not free

    monkeypatch.setattr(state.StateFolder, "running", property(taken_once_seen_free))
    assert not carrier.advance()
    assert folder.path.exists()


def journal_end(path: Path, records: int) -> int:
    """Where this many records end."""
    return next(
        end for end in range(path.stat().st_size) if len(journal.read(path, end=end)[0]) == records
    )
