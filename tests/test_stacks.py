"""Several runs by one command, one after the other or in the same steps: each is what it would be alone."""

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, Fmnist, wait_for
from test_resume import SPEC, experiment, in_child, save_always, save_never, send, surroundings  # noqa: F401

from fmnist import checkpoint, experiments, journal, runner, tracking
from fmnist import spec as specs
from fmnist.journal import Recorded
from fmnist.state import state_folders
from fmnist.training import Outcome, Training


def seeded(
    seed: int, spec: specs.ExperimentSpec = SPEC, stack: int | str = 3
) -> specs.ExperimentSpec:
    update = {
        "train": spec.train.model_copy(update={"seed": seed}),
        "compute": specs.Compute(device="cpu", stack=stack),
    }
    return spec.model_copy(update=update)


def run(
    root: Path, wanted: list[specs.ExperimentSpec], said: list[str] | None = None, **how: Any
) -> list[Outcome]:
    context = runner.Context(root, sync=False, say=print if said is None else said.append, **how)
    return runner.run(
        [experiments.Resolved(spec, f"small s{spec.train.seed}", {}, ()) for spec in wanted],
        context,
    )


def records(root: Path) -> dict[str, tuple[specs.ExperimentSpec, list[journal.Record]]]:
    return {
        folder.path.name: (folder.spec, journal.read(folder.path / "journal")[0])
        for folder in state_folders(root)
    }


def alone(root: Path, spec: specs.ExperimentSpec) -> list[journal.Record]:
    run(root, [spec])
    [(_, found)] = records(root).values()
    return found


def assert_alike(found: list[journal.Record], wanted: list[journal.Record]) -> None:
    """The same steps, evaluations and results, but for the rounding of float32 sums."""
    ours, theirs = Recorded(found), Recorded(wanted)
    np.testing.assert_allclose(ours.arrays["loss"], theirs.arrays["loss"], rtol=1e-4)
    np.testing.assert_array_equal(ours.arrays["lr"], theirs.arrays["lr"])
    assert ours.evaluations.keys() == theirs.evaluations.keys()
    for step, fields in theirs.evaluations.items():
        assert ours.evaluations[step]["val/loss"] == pytest.approx(fields["val/loss"], rel=1e-3)
    for kind in ("final", "end"):
        [last], [expected] = (
            [record.fields for record in some if record.kind == kind] for some in (found, wanted)
        )
        for key in ("status", "weights", "collapsed_at", "stopped_early_at"):
            assert last.get(key) == expected.get(key)
    for name in ("last/val_loss", "test/loss"):
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-3)


@pytest.mark.parametrize("stack", [1, 2, 3, "off", "auto"])
def test_each_run_is_what_it_would_be_alone(stack: int | str, tmp_path: Path) -> None:
    said: list[str] = []
    outcomes = run(tmp_path / "all", [seeded(seed, stack=stack) for seed in (0, 5, 2)], said)
    assert [outcome.status for outcome in outcomes] == ["FINISHED"] * 3
    assert said == {
        2: ["s0, s5: 2 of 3 runs", "s2: 3 of 3 runs"], 3: ["s0, s5, s2: 3 of 3 runs"]
    }.get(stack, ["s0: 1 of 3 runs", "s5: 2 of 3 runs", "s2: 3 of 3 runs"])  # fmt: skip
    found = records(tmp_path / "all")
    assert [spec.train.seed for spec, _ in found.values()] == [0, 5, 2]
    assert list(found) == [outcome.key for outcome in outcomes]
    for spec, ours in found.values():
        assert_alike(ours, alone(tmp_path / str(spec.train.seed), spec))
    at_once = [
        json.loads((folder.path / "environment.json").read_text())["stack"]
        for folder in state_folders(tmp_path / "all")
    ]
    assert at_once == {2: [2, 2, 1], 3: [3, 3, 3]}.get(stack, [1, 1, 1])


def test_runs_of_a_stack_end_each_by_itself(tmp_path: Path) -> None:
    stopping = specs.EarlyStopping(patience=3, metric="accuracy", min_delta=0.3)
    diverging = experiment(specs.SGD(lr=500.0, momentum=0.9, weight_decay=10.0), stopping=stopping)
    wanted = [
        seeded(0, experiment(stopping=stopping)),
        seeded(0, diverging),
        seeded(3, experiment(stopping=stopping)),
    ]
    outcomes = run(tmp_path / "all", wanted)
    assert [(outcome.status, outcome.exit_code) for outcome in outcomes] == [
        ("FINISHED", 0),
        ("FAILED", 3),
        ("FINISHED", 0),
    ]
    assert "the first that isn't finite" in str(outcomes[1].reason)
    assert outcomes[0].stopped_early_at in (40, 50)
    assert outcomes[0].weights == outcomes[2].weights == "best"
    found = list(records(tmp_path / "all").values())
    for k in (0, 2):
        assert_alike(found[k][1], alone(tmp_path / str(k), wanted[k]))
    assert not np.isfinite(Recorded(found[1][1]).arrays["loss"][-1])
    assert np.isfinite(Recorded(found[1][1]).arrays["loss"][:-1]).all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_runs_of_a_stack_go_on_bit_for_bit(
    number: signal.Signals, tmp_path: Path
) -> None:
    wanted = [seeded(seed) for seed in (0, 1, 2, 3)]

    def train(root: Path, stopped_at: int | None) -> None:
        (
            save_always if number == signal.SIGKILL else save_never
        )()  # a caught signal saves by itself
        run(
            root,
            wanted,
            watch=lambda training: training.step == stopped_at and send(number) and None,
        )

    train_whole = run(tmp_path / "whole", wanted)
    assert len(train_whole) == 4
    code = in_child(lambda: train(tmp_path / "cut", 30))
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert len(records(tmp_path / "cut")) == 3  # the fourth had not begun
    said: list[str] = []
    assert [outcome.status for outcome in run(tmp_path / "cut", wanted, said)] == ["FINISHED"] * 4
    assert sum("at step 30 of 68" in line for line in said) == 3  # each had its checkpoint
    for (_, found), (_, expected) in zip(
        records(tmp_path / "cut").values(), records(tmp_path / "whole").values(), strict=True
    ):
        for name, array in Recorded(expected).arrays.items():
            np.testing.assert_array_equal(Recorded(found).arrays[name], array)
        assert Recorded(found).metrics == Recorded(expected).metrics


def test_runs_of_a_stack_that_stopped_at_different_steps_go_on_from_there(tmp_path: Path) -> None:
    wanted = [seeded(seed) for seed in (0, 1, 2)]

    def train() -> None:
        save_always()
        save = checkpoint.save
        checkpoint.save = lambda folder, spec, state: (
            save(folder, spec, state) if spec.train.seed != 1 or state["step"] <= 10 else None
        )
        run(
            tmp_path / "cut",
            wanted,
            watch=lambda training: training.step == 30 and send(signal.SIGKILL) and None,
        )

    assert in_child(train) == -signal.SIGKILL
    said: list[str] = []
    assert [outcome.status for outcome in run(tmp_path / "cut", wanted, said)] == ["FINISHED"] * 3
    assert [line.split(" at step ")[1].split()[0] for line in said if "continuing" in line] == [
        "30",
        "30",
        "10",
    ]
    for spec, found in records(tmp_path / "cut").values():
        assert_alike(found, alone(tmp_path / str(spec.train.seed), spec))
        resumed = [
            record.fields["environment"]["stack"] for record in found if record.kind == "resume"
        ]
        assert resumed == [
            1 if spec.train.seed == 1 else 2
        ]  # those at the same step go on together, and are recorded so


def test_a_run_of_a_stack_goes_on_alone_and_says_that_bits_may_differ(tmp_path: Path) -> None:
    def train() -> None:
        save_always()
        run(
            tmp_path,
            [seeded(seed) for seed in (0, 1, 2)],
            watch=lambda training: training.step == 30 and send(signal.SIGINT) and None,
        )

    assert in_child(train) == 0
    said: list[str] = []
    [outcome] = run(tmp_path, [seeded(1, stack=1)], said)
    assert outcome.status == "FINISHED"
    assert (
        said[1]
        == "it began elsewhere, so what is computed from here on may differ in its last bits: stack 3 -> 1"
    )


def test_an_engine_goes_when_its_runs_have_ended(tmp_path: Path) -> None:
    engines: list[weakref.ref[Any]] = []
    gc.disable()  # what goes now goes without the collector, which comes too late
    try:
        run(
            tmp_path,
            [seeded(0, stack=1), seeded(1, stack=1)],
            watch=lambda training: engines.append(weakref.ref(training.engine)),
        )
        assert [engine() for engine in engines] == [None] * len(engines)
    finally:
        gc.enable()


def test_an_error_in_one_run_leaves_the_others(tmp_path: Path) -> None:
    def fault(training: Training) -> None:
        if training.step == 30 and training.spec.train.seed == 0:
            raise RuntimeError("a fault")

    outcomes = run(tmp_path, [seeded(seed) for seed in (0, 1, 2)], watch=fault)
    assert [outcome.status for outcome in outcomes] == ["FAILED", "FINISHED", "FINISHED"]
    assert outcomes[0].reason == "RuntimeError: a fault"


def test_an_engine_that_breaks_fails_all_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*arguments: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("fmnist.engine.Engine._do", out_of_memory)
    outcomes = run(tmp_path, [seeded(seed) for seed in (0, 1)])
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [
        ("FAILED", "MemoryError: no room")
    ] * 2


@pytest.mark.usefixtures("with_store")
def test_the_command_records_a_run_for_each_seed(fmnist: Fmnist, home: Path) -> None:
    result = fmnist(*SMALL, "--seeds", "4,7", "-s", "compute.stack=2", "--json")
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)["runs"]
    store = tracking.connect(home)
    assert [outcome["name"] for outcome in outcomes] == [
        f"baseline epochs=1 batch_size=1000 s{seed}" for seed in (4, 7)
    ]
    for seed, outcome in zip((4, 7), outcomes, strict=True):
        run = store.client.get_run(outcome["run_id"])
        assert (run.info.status, run.data.params["train.seed"]) == ("FINISHED", str(seed))
        assert len(store.client.get_metric_history(outcome["run_id"], "train/loss")) == 60
        assert run.data.metrics["last/val_accuracy"] == outcome["metrics"]["last/val_accuracy"]
        assert {artifact.path for artifact in store.client.list_artifacts(outcome["run_id"])} >= {
            "curves.parquet",
            "figures",
        }
        assert len(run.outputs.model_outputs) == 1
    wait_for(lambda: not state_folders(home))


def test_many_runs_need_no_more_open_files_than_one(home: Path) -> None:
    words = shlex.join([sys.executable, "-m", "fmnist", *SMALL, "--seeds", "16", "--no-sync"])
    result = subprocess.run(
        ["bash", "-c", f"ulimit -n 32; {words} --json"],
        env={**os.environ, "FMNIST_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)["runs"]
    assert [outcome["status"] for outcome in outcomes] == ["FINISHED"] * 16


@pytest.mark.usefixtures("with_store")
def test_a_run_is_let_go_of_when_it_ends_and_its_folder_stays_till_it_is_read(home: Path) -> None:
    open_files, ended = list[int](), list[bool]()

    def look(training: Training) -> None:
        open_files.append(len(os.listdir("/proc/self/fd")))
        ended.extend(
            folder.running
            for folder in state_folders(home)
            if folder.path.name != training.journal.folder.name
        )

    context = runner.Context(home, say=lambda text: None, watch=look)
    resolved = [experiments.Resolved(seeded(seed, stack=1), "seeded", {}, ()) for seed in range(3)]
    outcomes = runner.run(resolved, context)
    assert len(set(open_files)) == 1
    assert ended
    assert not any(ended)
    assert [(each.status, each.unsynced) for each in outcomes] == [("FINISHED", None)] * 3
    assert all(each.run_id for each in outcomes)
    wait_for(lambda: not state_folders(home))


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (
            "0",
            "--seeds: given '0'; give how many, as in 5 for the seeds 0 to 4, or which, as in 3,7,9 (one: 3,)",
        ),
        ("a", "--seeds: given 'a'; give how many"),
        ("-1", "--seeds: given '-1'; give how many"),
        ("1,,2", "--seeds: given '1,,2'; give how many"),
        ("3,3", "--seeds: given '3,3'; give at most 1,000 seeds, none of them twice"),
        ("9999999999", "--seeds: given '9999999999'; give at most 1,000 seeds"),
        ("1001", "--seeds: given '1001'; give at most 1,000 seeds"),
        ("4294967296,", "train.seed"),
    ],
)
def test_mistaken_seeds_are_refused(seeds: str, message: str, fmnist: Fmnist, home: Path) -> None:
    result = fmnist("run", "baseline", f"--seeds={seeds}")
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (home / "mlruns").exists()


def test_resume_takes_no_seeds(fmnist: Fmnist, home: Path) -> None:
    (home / "mlruns" / "state").mkdir(parents=True)
    run(home, [seeded(0)])
    [folder] = state_folders(home)
    result = fmnist("run", "--resume", folder.path.name, "--seeds", "3")
    assert result.returncode == 2
    assert "leave --seeds and --set out" in result.stderr
