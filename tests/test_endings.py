"""Runs that end otherwise: what they say, what they leave, and that nothing of it is lost."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import Fmnist, free_port

from fmnist import journal, tracking

LONG = ("run", "baseline", "-s", "train.eval_every=500")
SMALL = ("run", "baseline", "-s", "train.epochs=1", "-s", "train.batch_size=1000")


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "fmnist", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def trained(home: Path) -> int:
    """Steps that the one journal in this home holds."""
    records = [record for folder in journal.state_folders(home) for record in journal.read(folder.path / "journal")[0]]
    return sum(record.fields["count"] for record in records if record.kind == "train")


def stored_steps(store: tracking.Store, run_id: str) -> list[int]:
    return [point.step for point in store.client.get_metric_history(run_id, "train/loss")]


@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_run_as_killed_with_all_its_steps(home: Path, signal_number: int, exit_code: int) -> None:
    process = start(*LONG, "--json")
    wait_for(lambda: trained(home) >= 1000)
    process.send_signal(signal_number)
    outcome = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == exit_code
    assert outcome["status"] == "KILLED"
    store = tracking.connect(home)
    assert store.client.get_run(outcome["run_id"]).info.status == "KILLED"
    assert stored_steps(store, outcome["run_id"]) == list(range(1, outcome["steps"] + 1))
    assert signal.Signals(signal_number).name in store.client.get_run(outcome["run_id"]).data.tags["reason"]


def test_kill_9_is_seen_and_what_was_trained_is_stored(home: Path) -> None:
    process = start(*LONG)
    wait_for(lambda: trained(home) >= 1000)
    process.kill()
    process.wait()
    steps = trained(home)
    wait_for(lambda: not journal.state_folders(home))
    store = tracking.connect(home)
    run = store.runs(status=None).iloc[0]
    assert run["status"] == "KILLED"
    assert "kill -9" in run["t/reason"]
    assert stored_steps(store, run["run_id"]) == list(range(1, steps + 1))


def test_killed_sidecar_is_started_again_and_nothing_is_lost_or_doubled(home: Path) -> None:
    process = start(*LONG, "-s", "train.epochs=3", "--json")
    for steps in (1000, 3000):
        wait_for(lambda: trained(home) >= steps and journal.is_locked(journal.carrier_lock(home)))  # noqa: B023
        os.kill(int(journal.carrier_lock(home).read_text()), signal.SIGKILL)
    outcome = json.loads(process.communicate(timeout=120)[0])
    assert (process.returncode, outcome["status"]) == (0, "FINISHED")
    store = tracking.connect(home)
    assert stored_steps(store, outcome["run_id"]) == list(range(1, 3 * 1875 + 1))
    assert len(store.runs(status=None)) == 1


def test_divergence_fails_the_run_and_names_the_first_bad_step(fmnist: Fmnist, home: Path) -> None:
    result = fmnist(*SMALL, "-s", "optimizer.lr=1000", "--json")
    outcome = json.loads(result.stdout)
    assert (result.returncode, outcome["status"]) == (3, "FAILED")
    store = tracking.connect(home)
    run = store.client.get_run(outcome["run_id"])
    assert run.info.status == "FAILED"
    assert f"step {outcome['steps']}, the first that isn't finite" in run.data.tags["reason"]
    assert run.data.tags["reason"] in run.data.tags["mlflow.note.content"]
    losses = store.curves(outcome["run_id"])["train/loss"].dropna()
    history = store.client.get_metric_history(outcome["run_id"], "train/loss")
    assert len(history) == outcome["steps"]
    assert len(losses) == outcome["steps"] - 1  # all but the last are numbers
    assert run.outputs.model_outputs == []


def test_error_while_training_fails_the_run_with_its_traceback(fmnist: Fmnist, home: Path, tmp_path: Path) -> None:
    # 200 kB let the journal grow and not the predictions: what a full disk does, at a place that is known.
    limit = 200_000
    command = [sys.executable, "-m", "fmnist", *SMALL, "--no-sync", "--json"]
    result = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    outcome = json.loads(result.stdout)
    assert (result.returncode, outcome["status"]) == (3, "FAILED")
    assert "Traceback" not in result.stderr
    assert fmnist("sync").returncode == 0
    store = tracking.connect(home)
    run = store.runs(status=None).iloc[0]
    assert run["status"] == "FAILED"
    assert "OSError" in run["t/reason"]
    assert "Traceback" in store.download(run["run_id"], "traceback.txt", tmp_path).read_text()
    assert stored_steps(store, run["run_id"]) == list(range(1, 61))


def test_no_sync_stays_on_disk_until_sync(fmnist: Fmnist, home: Path) -> None:
    local = json.loads(fmnist(*SMALL, "--no-sync", "--json").stdout)
    assert (local["status"], local["run_id"]) == ("FINISHED", None)
    assert not tracking.database(home).exists()
    assert [folder.path.name for folder in journal.state_folders(home)] == [local["key"]]
    synced = json.loads(fmnist("sync", "--json").stdout)["runs"]
    assert [(run["key"], run["status"]) for run in synced] == [(local["key"], "FINISHED")]
    assert "nothing to carry over" in fmnist("sync").stdout
    direct = json.loads(fmnist(*SMALL, "--json").stdout)
    store = tracking.connect(home)
    frames = [store.curves(run_id).drop(columns="elapsed_s") for run_id in (synced[0]["run_id"], direct["run_id"])]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_two_first_runs_at_once_share_one_store(home: Path) -> None:
    processes = [start(*SMALL, "-s", f"train.seed={seed}", "--json") for seed in (0, 0, 1)]
    outcomes = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [outcome["status"] for outcome in outcomes] == ["FINISHED"] * 3
    store = tracking.connect(home)
    assert len({outcome["run_id"] for outcome in outcomes}) == 3
    for outcome in outcomes:
        assert stored_steps(store, outcome["run_id"]) == list(range(1, 61))


def test_run_on_a_server(fmnist: Fmnist, home: Path, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{(port := free_port())}"
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
            [sys.executable, "-m", *command, "--port", str(port), "--workers", "1"], env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        wait_for(lambda: fmnist("run", "baseline", "-s", "train.epochs=0", MLFLOW_TRACKING_URI=uri).returncode == 2 and answers(uri))
        result = fmnist(*SMALL, "--json", MLFLOW_TRACKING_URI=uri)
        outcome = json.loads(result.stdout)
        assert (outcome["status"], outcome["unsynced"]) == ("FINISHED", None), result.stderr
        assert outcome["link"].startswith(f"{uri}/#/experiments/")
        assert not tracking.database(home).exists()
        report = json.loads(fmnist("report", "--json", MLFLOW_TRACKING_URI=uri).stdout)
        assert [row["last val acc"] for row in report["runs"]] == [f"{outcome['metrics']['last/val_accuracy']:.4f}"]
    finally:
        server.terminate()
        server.wait()


def answers(uri: str) -> bool:
    import urllib.request

    try:
        urllib.request.urlopen(f"{uri}/health", timeout=1).close()
    except OSError:
        return False
    return True


def test_progress_is_shown_on_a_terminal_and_only_there(fmnist: Fmnist, home: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fmnist", *SMALL, "--no-sync"],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the terminal's other end is closed
            break
    assert process.wait() == 0
    assert b"60/60" in shown
    assert b"steps/s" in shown
    assert fmnist(*SMALL, "--no-sync").stderr == ""


def test_run_deleted_in_mlflow_while_it_trains_stays_deleted(home: Path) -> None:
    process = start(*LONG, "-s", "train.epochs=3", "--json")
    wait_for(lambda: trained(home) >= 1000 and journal.state_folders(home)[0].carried.get("offset"))
    store = tracking.connect(home)
    run_id = journal.state_folders(home)[0].carried["run_id"]
    store.client.delete_run(run_id)
    outcome = json.loads(process.communicate(timeout=120)[0])
    assert (process.returncode, outcome["status"]) == (0, "DELETED")
    assert store.client.get_run(run_id).info.lifecycle_stage == "deleted"
    assert store.runs(status=None).empty
