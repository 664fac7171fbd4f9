"""Runs that are stopped in every way and continued: what comes out is what an unbroken run gives, bit for bit."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from fmnist import checkpoint, data, engine, environment, experiments, journal, runner, verify
from fmnist import spec as specs
from fmnist.errors import Interrupted, Irreproducible, SpecError, StoreError, UserError
from fmnist.journal import Journal, Recorded, StateFolder
from fmnist.runner import Outcome

# Real images, few of them: 1,000 to train on, and of those to validate and test on the first 300.
DATA, SHOWN = specs.Data(holdout=59_000), 300


def experiment(
    optimizer: Any = None, schedule: Any = None, stopping: specs.EarlyStopping | None = None, **train: Any
) -> specs.ExperimentSpec:
    """34 steps an epoch, the last of 10 images; 68 in all, evaluated at 0, 10, …, 60, 68."""
    return specs.ExperimentSpec(
        name="small",
        data=DATA,
        model=specs.MLP(hidden=(16,)),
        optimizer=optimizer or specs.SGD(lr=0.05, momentum=0.9),
        schedule=schedule or specs.Constant(),
        train=specs.Train(**{"epochs": 2, "batch_size": 30, "eval_every": 10, "early_stopping": stopping, **train}),
        compute=specs.Compute(device="cpu"),
    )


SPEC = experiment()
STOPPING = experiment(specs.SGD(lr=0.2, momentum=0.9), stopping=specs.EarlyStopping(patience=3))
RECIPES = {
    "momentum": SPEC,
    "adamw": experiment(specs.AdamW(lr=0.003)),
    "warm-up and steps": experiment(schedule=specs.Step(warmup_steps=15, every_epochs=1, factor=0.3)),
    "early stopping": STOPPING,
    "collapse": experiment(specs.SGD(lr=0.5)),
}
STOPS = (0, 10, 20, 30, 40, 50, 60, 68)


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    """The data and the environment, read once for all runs."""
    device = engine.device(SPEC.compute)
    full, facts = data.load(DATA, REPOSITORY, device), environment.collect("", device)

    def shown(split: data.Split) -> data.Split:
        return data.Split(split.images[:SHOWN].clone(), split.labels[:SHOWN].clone(), split.index[:SHOWN])

    assert full.test is not None
    few = data.Dataset(full.train, shown(full.validation), shown(full.test))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "load", lambda *arguments: few)
        patched.setattr(environment, "collect", lambda *arguments: {**facts, "threads": torch.get_num_threads()})
        yield


# ---- runs, whole and killed

Watch = Callable[[Any], None]


def run(root: Path, spec: specs.ExperimentSpec, said: list[str] | None = None, watch: Watch = lambda training: None, **how: Any) -> Outcome:
    context = runner.Context(root, sync=False, say=print if said is None else said.append, watch=watch)
    return runner.run(experiments.Resolved(spec, spec.name, {}, ()), context, **how)


def only(root: Path) -> StateFolder:
    [folder] = journal.state_folders(root)
    return folder


def in_child(act: Callable[[], object]) -> int:
    """Do it in a process of its own; returns its exit code, minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            act()
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def save_always() -> None:
    runner.CHECKPOINT_S = runner.CHECKPOINT_SHARE = 0  # in a child


def save_never() -> None:
    runner.CHECKPOINT_S = 3600  # but at the end


def at_step(step: int, act: Callable[[], object]) -> Watch:
    return lambda training: training.step == step and act() and None


def kill(root: Path, spec: specs.ExperimentSpec, step: int, prepare: Callable[[], None] = save_always, **how: Any) -> StateFolder:
    """Train up to this step in a process that is killed there."""

    def train() -> None:
        prepare()
        run(root, spec, watch=at_step(step, die), **how)

    assert in_child(train) == -signal.SIGKILL
    return journal.state_folders(root)[-1]


def finish(folder: StateFolder, spec: specs.ExperimentSpec, said: list[str] | None = None) -> Outcome:
    """Continue a run, which adds to what is on record and changes nothing of it."""
    path = folder.path / "journal"
    whole = path.read_bytes()[: journal.read(path)[1]] if path.exists() else b""
    outcome = run(folder.path.parents[2], spec, said)
    assert outcome.key == folder.path.name
    assert path.read_bytes().startswith(whole)
    return outcome


def result(folder: StateFolder) -> dict[str, object]:
    """All that must not depend on how a run came about, in forms that compare bit for bit."""
    records, end = journal.read(folder.path / "journal")
    assert end == (folder.path / "journal").stat().st_size
    kinds: dict[str, list[dict[str, Any]]] = {
        kind: [r.fields for r in records if r.kind == kind] for kind in ("train", "evaluation", "final")
    }
    recorded, state = Recorded(records), checkpoint.load(folder.path / "checkpoint.pt", folder.spec)
    with np.load(folder.path / "predictions.npz") as predictions:
        predicted = {name: predictions[name].tobytes() for name in predictions}
    best = state["best"] or {"step": None, "parameters": torch.empty(0)}
    return {
        "steps": [step for fields in kinds["train"] for step in range(fields["first"], fields["first"] + fields["count"])],
        **{name: array.tobytes() for name, array in recorded.arrays.items()},
        "evaluations": [repr({key: value for key, value in fields.items() if key != "t"}) for fields in kinds["evaluation"]],
        "results": [repr([fields[key] for key in ("metrics", "weights", "collapsed_at", "stopped_early_at")]) for fields in kinds["final"]],
        "end": (records[-1].kind, records[-1].fields.get("status")),
        "step": state["step"],
        "parameters": state["parameters"].numpy().tobytes(),
        "buffers": {name: buffer.numpy().tobytes() for name, buffer in state["buffers"].items()},
        "best weights": (best["step"], best["parameters"].numpy().tobytes()),
        "predictions": predicted,
    }


def differences(folder: StateFolder, wanted: dict[str, object]) -> list[str]:
    found = result(folder)
    return [key for key in wanted if found[key] != wanted[key]]


Unbroken = Callable[[specs.ExperimentSpec], dict[str, object]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """What a spec gives when nothing stops it."""
    results: dict[str, dict[str, object]] = {}

    def train(spec: specs.ExperimentSpec) -> dict[str, object]:
        if spec.fingerprint not in results:
            root = tmp_path_factory.mktemp("unbroken")
            assert run(root, spec).status == "FINISHED"
            results[spec.fingerprint] = result(only(root))
        return results[spec.fingerprint]

    return train


def continued(folder: StateFolder, step: int, spec: specs.ExperimentSpec = SPEC) -> str:
    return f"continuing {folder.path.name} at step {step} of {spec.steps} (--fresh would start anew)"


# ---- killed between two segments


def test_the_recipes_are_what_they_are_here_for(unbroken: Unbroken) -> None:
    assert unbroken(SPEC)["steps"] == list(range(1, 69))
    assert len(unbroken(SPEC)["buffers"]) == 1  # type: ignore[arg-type]
    assert len(unbroken(RECIPES["adamw"])["buffers"]) == 2  # type: ignore[arg-type]
    assert len(set(np.frombuffer(unbroken(RECIPES["warm-up and steps"])["lr"]))) == 17  # type: ignore[call-overload]
    assert unbroken(STOPPING)["results"][0].endswith("'best', None, 50]")  # type: ignore[index]
    assert unbroken(STOPPING)["best weights"][0] == 20  # type: ignore[index]
    assert unbroken(RECIPES["collapse"])["results"][0].endswith("'final', 50, None]")  # type: ignore[index]
    assert len({str(result) for result in map(unbroken, RECIPES.values())}) == 5


def test_an_unbroken_run_is_the_same_twice(unbroken: Unbroken, tmp_path: Path) -> None:
    assert run(tmp_path, SPEC).status == "FINISHED"
    assert differences(only(tmp_path), unbroken(SPEC)) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_after_any_segment_ends_as_if_it_had_not_been(recipe: str, unbroken: Unbroken, tmp_path: Path) -> None:
    spec = RECIPES[recipe]
    for step in [stop for stop in STOPS if stop <= unbroken(spec)["step"]]:  # type: ignore[operator]
        said: list[str] = []
        folder = kill(tmp_path / str(step), spec, step)
        assert finish(folder, spec, said).status == "FINISHED"
        assert said == [continued(folder, step)]
        assert differences(folder, unbroken(spec)) == [], step


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_without_a_checkpoint_is_computed_again_and_compared(recipe: str, unbroken: Unbroken, tmp_path: Path) -> None:
    said: list[str] = []
    folder = kill(tmp_path, RECIPES[recipe], 40, save_never)
    finish(folder, RECIPES[recipe], said)
    assert said == [continued(folder, 0)]
    assert differences(folder, unbroken(RECIPES[recipe])) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_behind_the_checkpoint_are_computed_again_and_compared(recipe: str, unbroken: Unbroken, tmp_path: Path) -> None:
    def save_up_to_20() -> None:
        save_always()
        save = checkpoint.save
        checkpoint.save = lambda folder, spec, state: save(folder, spec, state) if state["step"] <= 20 else None

    said: list[str] = []
    folder = kill(tmp_path, RECIPES[recipe], 40, save_up_to_20)
    finish(folder, RECIPES[recipe], said)
    assert said == [continued(folder, 20)]
    assert differences(folder, unbroken(RECIPES[recipe])) == []


@pytest.mark.parametrize("recipe", ["momentum", "early stopping"])
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(recipe: str, unbroken: Unbroken, tmp_path: Path) -> None:
    spec = RECIPES[recipe]
    for step in (20, 30, 50):
        folder = kill(tmp_path, spec, step)
    finish(folder, spec)
    assert only(tmp_path) == folder
    resumes = [record.fields["step"] for record in journal.read(folder.path / "journal")[0] if record.kind == "resume"]
    assert resumes == [20, 30, 50]
    assert differences(folder, unbroken(spec)) == []


def test_training_time_goes_on_from_where_it_was(tmp_path: Path) -> None:
    folder = kill(tmp_path, SPEC, 30)
    times = [record.fields["elapsed_s"] for record in journal.read(folder.path / "journal")[0] if record.kind == "train"]
    outcome = finish(folder, SPEC)
    later = [record.fields["elapsed_s"] for record in journal.read(folder.path / "journal")[0] if record.kind == "train"]
    assert later == sorted(later)
    assert later[:3] == times
    assert outcome.training_s == later[-1] > times[-1]


# ---- killed at any moment


def interpose(act: Callable[..., Any]) -> None:
    """Have all that changes the disk done by act(name, the real one, its arguments), in a child."""
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        setattr(os, name, lambda *arguments, name=name, real=real: act(name, real, *arguments))


def moments(root: Path, train: Callable[[], object]) -> list[str]:
    """What a run does to the disk, in order."""
    path = root / "moments"

    def act(name: str, real: Callable[..., Any], *arguments: Any) -> Any:
        with open(path, "a") as file:
            file.write(f"{name}\n")
        return real(*arguments)

    def note() -> None:
        interpose(act)
        train()

    root.mkdir()
    assert in_child(note) == 0
    return path.read_text().splitlines()


def kill_at(
    moment: int, train: Callable[[], object], torn: bool = False, then: Callable[[str, Any, Any], None] = lambda *arguments: None
) -> None:
    """Train in a process that is killed before that moment, or in the midst of what it writes then."""
    count = itertools.count()

    def act(name: str, real: Callable[..., Any], *arguments: Any) -> Any:
        if next(count) == moment:
            if torn:
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            die()
        done = real(*arguments)
        then(name, arguments, done)
        return done

    def killed() -> None:
        interpose(act)
        train()

    assert in_child(killed) == -signal.SIGKILL


FEW = experiment(eval_every=30)


def train_few(root: Path) -> Callable[[], object]:
    def train() -> Outcome:
        save_always()
        return run(root, FEW)

    return train


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(unbroken: Unbroken, tmp_path: Path) -> None:
    done = moments(tmp_path / "whole", train_few(tmp_path / "whole"))
    assert (done.count("write"), done.count("fsync"), done.count("replace")) == (10, 11, 10)
    for moment, name in enumerate(done):
        for torn in (False, True) if name == "write" else (False,):
            root, said = tmp_path / f"{moment}{torn}", list[str]()
            kill_at(moment, train_few(root), torn)
            folder = only(root)
            if moment == len(done) - 1:  # its end is on record
                assert not folder.resumable
            else:
                finish(folder, FEW, said)
                assert [line.split(" at ")[0] for line in said] == [f"continuing {folder.path.name}"], f"{moment}: {name}"
            assert differences(folder, unbroken(FEW)) == [], f"{moment}: {name}"


def test_a_kill_in_the_midst_of_a_checkpoint_leaves_the_one_before(unbroken: Unbroken, tmp_path: Path) -> None:
    def die_at_the_fourth() -> None:
        save_always()
        count = itertools.count()
        checkpoint.hashlib = SimpleNamespace(sha256=lambda content: die() if next(count) == 3 else hashlib.sha256(content))

    said: list[str] = []
    folder = kill(tmp_path, SPEC, 30, die_at_the_fourth)
    assert (folder.path / "checkpoint.pt.partial").exists()
    finish(folder, SPEC, said)
    assert said == [continued(folder, 20)]
    assert differences(folder, unbroken(SPEC)) == []


# ---- power loss


def lose_power(folder: StateFolder, flushed: dict[int, int]) -> None:
    """Leave of each file what had been on the disk for sure: {inode: its size when it was last flushed}."""
    for path in (folder.path / name for name in ("journal", "checkpoint.pt", "checkpoint.previous.pt", "predictions.npz")):
        if path.exists():
            os.truncate(path, flushed.get(path.stat().st_ino, 0))


def lose_power_at(root: Path, moment: int, train: Callable[[], object]) -> None:
    root.mkdir(exist_ok=True)

    def note(name: str, arguments: Any, done: Any) -> None:
        if name == "fsync":
            with open(root / "flushed", "a") as file:
                file.write(f"{os.fstat(arguments[0]).st_ino} {os.fstat(arguments[0]).st_size}\n")

    kill_at(moment, train, then=note)
    lines = (root / "flushed").read_text().splitlines() if (root / "flushed").exists() else []
    for folder in journal.state_folders(root):
        lose_power(folder, dict(tuple(map(int, line.split())) for line in lines))  # type: ignore[misc]


def falls_back(root: Path, spec: specs.ExperimentSpec, train: Callable[[], object]) -> tuple[list[str], set[str]]:
    """What is said, beyond that it goes on, and what differs, with the power lost at each moment of a run that ends later."""
    done = moments(root / "whole", train_in(root / "whole", train))
    wanted = result(only(root / "whole"))
    told, different = [], set()
    for moment in range(1, len(done) - 1):
        lose_power_at(root / str(moment), moment, train_in(root / str(moment), train))
        folder, said = only(root / str(moment)), list[str]()
        run(root / str(moment), spec, said)
        told += [line for line in said if not line.startswith("continuing")]
        different |= set(differences(folder, wanted))
    return told, different


def train_in(root: Path, train: Callable[[Path], object]) -> Callable[[], object]:
    return lambda: train(root)


def test_after_a_power_loss_no_checkpoint_is_ahead_of_its_journal(unbroken: Unbroken, tmp_path: Path) -> None:
    assert falls_back(tmp_path, FEW, lambda root: train_few(root)()) == ([], set())


def test_a_run_that_has_ended_is_whole_after_a_power_loss(unbroken: Unbroken, tmp_path: Path) -> None:
    def train(root: Path) -> None:
        train_few(root)()
        os.write(os.open(os.devnull, os.O_WRONLY), b"after it")

    done = moments(tmp_path / "whole", train_in(tmp_path / "whole", train))
    lose_power_at(tmp_path / "lost", len(done) - 1, train_in(tmp_path / "lost", train))
    assert differences(only(tmp_path / "lost"), unbroken(FEW)) == []
