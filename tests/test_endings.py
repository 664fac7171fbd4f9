"""Runs that end otherwise: what they say, what they leave, and that nothing of it is lost."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG, SMALL, Fmnist, start, stored_steps, trained, wait_for

from fmnist import journal, tracking


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


def test_progress_is_shown_on_a_terminal(home: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fmnist", *SMALL, "--no-sync"],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
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
