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
import torch
from conftest import LONG, SMALL, Fmnist, start, stored_steps, trained, wait_for

from fmnist import state, tracking

pytestmark = pytest.mark.usefixtures("with_store")
EPOCHS = (*LONG, "-s", "train.epochs=4", "--json")
STEPS = 4 * 1875


def only_folder(home: Path) -> state.StateFolder:
    (folder,) = state.state_folders(home)
    return folder


def assert_continued(home: Path, run_id: str, finished: "subprocess.CompletedProcess[str]") -> None:
    """The second command finished the first one's run, with every point once and nothing left of the interruption but its tags."""
    outcome = json.loads(finished.stdout)
    assert (finished.returncode, outcome["status"], outcome["run_id"]) == (0, "FINISHED", run_id), (
        finished.stderr
    )
    store = tracking.connect(home)
    run = store.client.get_run(run_id)
    assert (run.info.status, run.data.tags["resumes"], run.data.tags.get("reason")) == (
        "FINISHED",
        "1",
        None,
    )
    assert stored_steps(store, run_id) == list(range(1, STEPS + 1))
    assert [point.step for point in store.client.get_metric_history(run_id, "val/loss")] == [
        *range(0, STEPS, 500),
        STEPS,
    ]
    assert len(store.runs(status=None)) == 1
    assert store.curves(run_id)["step"].tolist() == list(range(STEPS + 1))
    wait_for(lambda: not state.state_folders(home))


@pytest.mark.parametrize(
    ("signal_number", "exit_code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_signal_ends_a_run_as_killed_and_the_same_command_continues_it(
    fmnist: Fmnist, home: Path, signal_number: int, exit_code: int
) -> None:
    process = start(*EPOCHS)
    wait_for(lambda: trained(home) >= 500)
    process.send_signal(signal_number)
    outcome = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == exit_code
    assert (outcome["status"], outcome["resumable"]) == ("KILLED", True)
    store = tracking.connect(home)
    assert store.client.get_run(outcome["run_id"]).info.status == "KILLED"
    assert stored_steps(store, outcome["run_id"]) == list(range(1, outcome["steps"] + 1))
    assert (
        signal.Signals(signal_number).name
        in store.client.get_run(outcome["run_id"]).data.tags["reason"]
    )
    assert (
        torch.load(only_folder(home).path / "checkpoint.pt", weights_only=True)["step"]
        == outcome["steps"]
    )
    finished = fmnist(*EPOCHS)
    assert (
        f"continuing {outcome['key']} at step {outcome['steps']:,} of {STEPS:,}" in finished.stderr
    )
    assert_continued(home, outcome["run_id"], finished)


@pytest.mark.slow
def test_kill_9_of_trainer_and_sidecar_is_seen_by_the_next_command_and_continued_once(
    fmnist: Fmnist, home: Path
) -> None:
    process = start(*EPOCHS)
    wait_for(lambda: trained(home) >= 1000 and only_folder(home).carried.get("offset"))
    process.kill()
    state.end_uploader(state.carrier_lock(home), signal.SIGKILL)
    process.wait()
    run_id, key = only_folder(home).carried["run_id"], only_folder(home).path.name
    store = tracking.connect(home)
    assert store.client.get_run(run_id).info.status == "RUNNING"
    assert f"{key} was interrupted" in fmnist("list").stderr
    doctor = fmnist("doctor")
    assert doctor.returncode == 1
    assert f"{key}: interrupted at step {trained(home):,} of {STEPS:,}" in doctor.stdout
    wait_for(
        lambda: store.client.get_run(run_id).info.status == "KILLED"
    )  # `list` has started a sidecar
    tags = store.client.get_run(run_id).data.tags
    assert "kill -9" in tags["reason"]
    assert stored_steps(store, run_id) == list(range(1, trained(home) + 1))
    first = start("run", "--resume", run_id[:8], "--json")
    wait_for(lambda: f"process {first.pid} " in only_folder(home).holder)
    first.send_signal(signal.SIGSTOP)  # so that it is at work until the second has looked
    second = fmnist("run", "--resume", key)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert f"{key} is being trained by process {first.pid} on " in second.stderr
    stdout, stderr = first.communicate(timeout=120)
    assert_continued(
        home, run_id, subprocess.CompletedProcess([], first.returncode, stdout, stderr)
    )


@pytest.mark.slow
def test_killed_sidecar_is_started_again_and_nothing_is_lost_or_doubled(home: Path) -> None:
    process = start(*LONG, "-s", "train.epochs=3", "--json")
    for steps in (1000, 3000):
        wait_for(lambda: trained(home) >= steps and state.is_locked(state.carrier_lock(home)))  # noqa: B023
        state.end_uploader(state.carrier_lock(home), signal.SIGKILL)
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


@pytest.mark.slow
def test_error_while_training_fails_the_run_with_its_traceback(
    fmnist: Fmnist, home: Path, tmp_path: Path
) -> None:
    # 200 kB let the journal grow and not the predictions: what a full disk does, at a place that is known.
    limit = 200_000
    command = [sys.executable, "-m", "fmnist", *SMALL, "--no-sync", "--json"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    outcome = json.loads(result.stdout)
    assert (result.returncode, outcome["status"], outcome["resumable"]) == (3, "FAILED", True)
    assert "Traceback" not in result.stderr
    assert fmnist("sync").returncode == 0
    store = tracking.connect(home)
    run = store.runs(status=None).iloc[0]
    assert run["status"] == "FAILED"
    assert "OSError" in run["t/reason"]
    assert "Traceback" in store.download(run["run_id"], "traceback.txt", tmp_path).read_text()
    assert stored_steps(store, run["run_id"]) == list(range(1, 61))
    continued = json.loads(fmnist(*SMALL, "--json").stdout)  # there is room again
    assert (continued["status"], continued["run_id"]) == ("FINISHED", run["run_id"])
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
