"""Sweeps by real workers: killed, interrupted, shared, and equal bit for bit to the same runs alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Fmnist, command, make_home, start, stop_sidecar, wait_for

from fmnist import database, journal, state, sweep_run, sweeps, tracking

pytestmark = pytest.mark.usefixtures("with_store")
TINY = "extends: holdout\ntrain:\n  epochs: {epochs}\n  batch_size: {batch}\n  eval_every: {every}\nmodel:\n  hidden: [32]\n"
GRID = "base: tiny\ngrid:\n  optimizer.lr: [0.01, 0.05, 0.1]\nseeds: [0, 1, 2, 3]\n"


def lay_out(home: Path, sweep: str, epochs: int = 1, batch: int = 500, every: int = 20) -> None:
    (home / "experiments" / "tiny.yaml").write_text(
        TINY.format(epochs=epochs, batch=batch, every=every)
    )
    (home / "experiments" / "sweeps" / "it.yaml").write_text(sweep)


def runs(home: Path) -> pd.DataFrame:
    return tracking.connect(home).runs(status=None)


def sweep_runs(home: Path) -> list:  # type: ignore[type-arg]
    store = tracking.connect(home)
    ids = [experiment.experiment_id for experiment in store.client.search_experiments()]
    return list(store.client.search_runs(ids, "tags.kind = 'sweep'"))


def assert_equal_alone(home: Path, parent: Path, among: pd.DataFrame) -> None:
    """Each of these runs, trained by its own recorded command in another home, has the same curves and predictions, bit for bit."""
    alone = make_home(parent)
    lay_out(alone, GRID)
    (alone / "experiments" / "tiny.yaml").write_text(
        (home / "experiments" / "tiny.yaml").read_text()
    )
    store = tracking.connect(home)
    for _, run in among.iterrows():
        words = run["t/command"].split()[1:]
        assert command(alone, *words, "--no-sync").returncode == 0
    for folder in state.state_folders(alone):
        [run_id] = among[among["t/fingerprint"] == folder.run["fingerprint"]]["run_id"]
        curves = journal.curves(folder.spec, journal.read(folder.path / "journal")[0])
        there = store.curves(run_id)
        pd.testing.assert_frame_equal(
            curves.drop(columns="elapsed_s"), there.drop(columns="elapsed_s"), check_exact=True
        )
        predicted = np.load(folder.path / "predictions.npz")
        stored = store.predictions(run_id)
        stored = stored[stored["split"] == "val"].filter(like="logit_").to_numpy()
        assert (predicted["val_logits"] == stored).all()
    assert len(state.state_folders(alone)) == len(among)


@pytest.mark.slow
def test_a_sweep_trains_its_set_and_then_only_what_is_missing(
    fmnist: Fmnist, home: Path, tmp_path: Path
) -> None:
    lay_out(
        home, "question: which\nbase: tiny\ngrid:\n  optimizer.lr: [0.01, 0.05]\nseeds: [0, 1]\n"
    )
    result = fmnist("sweep", "it", "--jobs", "2", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [trial["outcome"] for trial in answer["trials"]] == ["finished"] * 4
    found = runs(home)
    assert len(found) == 4
    assert set(found["t/sweep"]) == {"it"}
    assert set(found["status"]) == {"FINISHED"}
    [its] = sweep_runs(home)
    assert (its.data.tags["outcome"], its.data.tags["n"], its.data.params["sweep.sampler"]) == (
        "finished",
        "4",
        "grid",
    )
    assert its.data.metrics["best/val_accuracy"] == found["m/last/val_accuracy"].max()
    best = found.groupby("t/group")["m/last/val_accuracy"].mean().idxmax()
    parent = tmp_path / "alone"
    parent.mkdir()
    assert_equal_alone(home, parent, found)

    (home / "experiments" / "sweeps" / "it.yaml").write_text(
        "base: tiny\ngrid:\n  optimizer.lr: [0.01, 0.05, 0.1]\nseeds: [0, 1]\n"
    )
    shown = json.loads(fmnist("show", "it", "--json").stdout)
    assert (shown["total"], shown["missing"]) == (6, 2)
    assert shown["seconds"] > 0
    result = fmnist("sweep", "it", "--jobs", "1")
    assert "lr=0.1 s1: finished, val accuracy" in result.stderr
    assert "(6 of 6)" in result.stderr
    assert len(runs(home)) == 6
    [again] = sweep_runs(home)
    assert (again.data.tags["n"], again.info.run_id == its.info.run_id) == ("6", False)

    best_file = (
        tracking.connect(home).download(again.info.run_id, "best.yaml", tmp_path).read_text()
    )
    (home / "experiments" / "best-of-it.yaml").write_text(best_file)
    group = json.loads(fmnist("show", "best-of-it", "--json").stdout)["group"]
    found = runs(home)
    best = found.groupby("t/group")["m/last/val_accuracy"].mean().idxmax()
    assert group == best

    result = fmnist("sweep", "it", "--jobs", "2")
    assert result.stdout.startswith("6 of 6 trials are there; best so far")
    assert (len(runs(home)), sweep_runs(home)[0].info.run_id) == (6, again.info.run_id)


@pytest.mark.slow
def test_a_sweep_that_is_complete_on_this_disk_gets_into_the_store(
    fmnist: Fmnist, home: Path
) -> None:
    """As where it was killed with its uploader."""
    lay_out(home, "base: tiny\ngrid:\n  optimizer.lr: [0.01, 0.05]\n")
    assert fmnist("sweep", "it", "--jobs", "1", "--no-sync").returncode == 0
    assert len(state.state_folders(home)) == 2
    assert runs(home).empty
    again = fmnist("sweep", "it", "--jobs", "1")
    assert (again.returncode, again.stdout.startswith("2 of 2 trials are there")) == (0, True)
    assert "2 of the runs are complete on this disk; waiting for their upload" in again.stderr
    assert runs(home)["status"].tolist() == ["FINISHED"] * 2
    [its] = sweep_runs(home)
    assert its.data.tags["n"] == "2"


@pytest.mark.slow
def test_a_bad_trial_does_not_end_the_others(fmnist: Fmnist, home: Path) -> None:
    lay_out(
        home,
        "base: tiny\ngrid:\n  optimizer.lr: [0.01, 900]\n  optimizer.weight_decay: [0.0, 10]\n",
    )
    answer = json.loads(fmnist("sweep", "it", "--jobs", "2", "--json").stdout)
    assert sorted(trial["outcome"] for trial in answer["trials"])[:2] == ["diverged", "finished"]
    assert len(runs(home)) == 4
    assert "diverged" in set(runs(home)["t/outcome"])
    again = fmnist("sweep", "it", "--json")
    assert len(runs(home)) == 4  # what diverged is a result
    assert [trial["outcome"] for trial in json.loads(again.stdout)["trials"]] == [
        trial["outcome"] for trial in answer["trials"]
    ]


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_in_order_and_the_same_command_goes_on(
    fmnist: Fmnist, home: Path
) -> None:
    lay_out(
        home, "base: tiny\ngrid:\n  optimizer.lr: [0.01, 0.05]\n", epochs=30, batch=32, every=500
    )
    process = start("sweep", "it", "--jobs", "2", "--json")
    wait_for(
        lambda: (
            len(
                [
                    folder
                    for folder in state.state_folders(home)
                    if (folder.path / "checkpoint.pt").exists()
                ]
            )
            == 2
        )
    )
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [trial["outcome"] for trial in json.loads(out)["trials"]] == [None, None]
    interrupted = {folder.path.name for folder in state.state_folders(home)}
    assert all(folder.resumable for folder in state.state_folders(home))
    result = fmnist("sweep", "it", "--jobs", "2")
    assert result.returncode == 0, result.stderr
    found = runs(home)
    assert set(found["t/run_key"]) == interrupted
    assert set(found["status"]) == {"FINISHED"}
    assert (found["t/resumed_from_step"].astype(int) > 0).all()


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work(home: Path) -> None:
    lay_out(home, GRID)
    both = [start("sweep", "it", "--jobs", "1", "--json") for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=200)[0]) for process in both]
    for answer in answers:
        assert [trial["outcome"] for trial in answer["trials"]] == ["finished"] * 12
    assert len(runs(home)) == 12
    assert runs(home)["t/fingerprint"].is_unique
    assert len(sweep_runs(home)) == 1


def children(pid: int) -> list[int]:
    """The workers of a sweep: its children that train."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(pid)],
        capture_output=True,
        text=True,
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_and_sweeps_that_are_killed_leave_exactly_the_set(
    fmnist: Fmnist, home: Path, tmp_path: Path
) -> None:
    lay_out(home, GRID, epochs=6, batch=32, every=500)
    chance = random.Random(0)
    kills = {"worker": 0, "sweep": 0}
    for stop_after in (3, 7, None):  # trials; then the sweep itself is killed
        process = subprocess.Popen(
            [sys.executable, "-m", "fmnist", "sweep", "it", "--jobs", "2", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None:
            time.sleep(chance.uniform(1.0, 5.0))
            if (
                stop_after is not None
                and len(state.at_hand(home)) + len(database.recorded(home)) >= stop_after
            ):
                process.kill()
                kills["sweep"] += 1
                break
            if (workers := children(process.pid)) and kills["worker"] < 12:
                os.kill(chance.choice(workers), signal.SIGKILL)
                kills["worker"] += 1
        process.wait()
    assert kills["sweep"] == 2
    assert kills["worker"] >= 6
    answer = json.loads(process.stdout.read())  # type: ignore[union-attr]
    assert [trial["outcome"] for trial in answer["trials"]] == ["finished"] * 12
    found = runs(home)
    finished = found[found["t/outcome"] == "finished"]
    assert len(finished) == len(found) == 12
    assert finished["t/fingerprint"].is_unique
    parent = tmp_path / "alone"
    parent.mkdir()
    assert_equal_alone(home, parent, finished)


@pytest.mark.slow
def test_a_trial_whose_worker_keeps_dying_is_given_up(home: Path) -> None:
    lay_out(home, "base: tiny\ngrid:\n  optimizer.lr: [0.01]\n", epochs=40, batch=32, every=500)
    process = start("sweep", "it", "--jobs", "1", "--json")
    killed: set[int] = set()
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if any(folder.running for folder in state.state_folders(home)):
            for pid in set(children(process.pid)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=30)
    [trial] = json.loads(out)["trials"]
    assert (process.returncode, trial["outcome"]) == (3, "failed")
    assert "its worker died 3 times" in trial["reason"]


@pytest.mark.slow
def test_a_search_prunes_and_is_gone_on_with(fmnist: Fmnist, home: Path) -> None:
    search = "base: tiny\nsearch:\n  sampler: random\n  trials: {trials}\n  space:\n    optimizer.lr: {{low: 1.0e-5, high: 0.2, log: true}}\n"
    lay_out(home, search.format(trials=7), epochs=2, batch=500, every=10)
    answer = json.loads(fmnist("sweep", "it", "--jobs", "2", "--json").stdout)
    outcomes = [trial["outcome"] for trial in answer["trials"]]
    assert (len(outcomes), outcomes.count("finished") + outcomes.count("pruned")) == (7, 7)
    (home / "experiments" / "sweeps" / "it.yaml").write_text(search.format(trials=12))
    answer = json.loads(fmnist("sweep", "it", "--jobs", "2", "--json").stdout)
    found = runs(home)
    assert (answer["total"], len(answer["trials"]), len(found)) == (12, 12, 12)
    pruned = found[found["t/outcome"] == "pruned"]
    assert len(pruned) >= 1
    assert set(found["status"]) == {"FINISHED"}
    assert (pruned["t/pruned_at"].astype(int) < 200).all()
    assert (
        pruned["m/last/val_accuracy"].max()
        < found[found["t/outcome"] == "finished"]["m/last/val_accuracy"].max()
    )
    sweep = sweeps.load("it", home)
    [its] = sweep_runs(home)
    figure = tracking.connect(home).download(its.info.run_id, "sweep.png", home)
    assert figure.stat().st_size > 10_000
    assert "```yaml" in its.data.tags["mlflow.note.content"]
    best = json.loads(fmnist("show", "it", "--json").stdout)["trials"]
    assert (
        max(trial["val_accuracy"] for trial in best if trial["outcome"] == "finished")
        == its.data.metrics["best/val_accuracy"]
    )
    assert (
        sweep_run.place(sweep.name)
        in (tracking.connect(home).download(its.info.run_id, "best.yaml", home)).read_text()
    )
    stop_sidecar(home)
