"""Runs that are stopped in every way and continued: what comes out is what an unbroken run gives, bit for bit."""

import errno
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
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

from fmnist import (
    checkpoint,
    data,
    engine,
    environment,
    experiments,
    files,
    journal,
    runner,
    training,
    verify,
)
from fmnist import spec as specs
from fmnist.errors import Irreproducible, SpecError, StoreError, UserError
from fmnist.journal import Recorded
from fmnist.state import Journal, StateFolder, state_folders
from fmnist.training import Outcome, Training

# Real images, few of them: 1,000 to train on, and of those to validate and test on the first 300.
DATA, SHOWN = specs.Data(holdout=59_000), 300


def experiment(
    optimizer: Any = None,
    schedule: Any = None,
    stopping: specs.EarlyStopping | None = None,
    **train: Any,
) -> specs.ExperimentSpec:
    """34 steps an epoch, the last of 10 images; 68 in all, evaluated at 0, 10, …, 60, 68."""
    return specs.ExperimentSpec(
        name="small",
        data=DATA,
        model=specs.MLP(hidden=(16,)),
        optimizer=optimizer or specs.SGD(lr=0.05, momentum=0.9),
        schedule=schedule or specs.Constant(),
        train=specs.Train(
            **{"epochs": 2, "batch_size": 30, "eval_every": 10, "early_stopping": stopping, **train}
        ),
        compute=specs.Compute(device="cpu"),
    )


SPEC = experiment()
STOPPING = experiment(specs.SGD(lr=0.2, momentum=0.9), stopping=specs.EarlyStopping(patience=3))
RECIPES = {
    "momentum": SPEC,
    "adamw": experiment(specs.AdamW(lr=0.003)),
    "warm-up and steps": experiment(
        schedule=specs.Step(warmup_steps=15, every_epochs=1, factor=0.3)
    ),
    "early stopping": STOPPING,
    "collapse": experiment(specs.SGD(lr=0.5)),
}
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
STOPS = (0, 10, 20, 30, 40, 50, 60, 68)


def load_few() -> data.Dataset:
    full = data.load(DATA, REPOSITORY, engine.device(SPEC.compute))

    def shown(split: data.Split) -> data.Split:
        return data.Split(
            split.images[:SHOWN].clone(), split.labels[:SHOWN].clone(), split.index[:SHOWN]
        )

    assert full.test is not None
    return data.Dataset(full.train, shown(full.validation), shown(full.test))


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    """The data and the environment, read once for all runs."""
    few, facts = load_few(), environment.collect("", engine.device(SPEC.compute))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "load", lambda *arguments: few)
        patched.setattr(
            environment,
            "collect",
            lambda command, device, stack=1, device_check=None: {
                **facts,
                "threads": torch.get_num_threads(),
                "stack": stack,
            },
        )
        yield


# ---- runs, whole and killed

Watch = Callable[[Any], None]


def run(
    root: Path,
    spec: specs.ExperimentSpec,
    said: list[str] | None = None,
    watch: Watch = lambda training: None,
    **how: Any,
) -> Outcome:
    context = runner.Context(
        root, sync=False, say=print if said is None else said.append, watch=watch
    )
    [outcome] = runner.run([experiments.Resolved(spec, spec.name, {}, ())], context, **how)
    return outcome


def only(root: Path) -> StateFolder:
    [folder] = state_folders(root)
    return folder


def in_child(act: Callable[[], object]) -> int:
    """Do it in a process of its own; returns its exit code, minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            gc.disable()  # it would touch, and so copy, all the memory that is shared with the parent
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
    training.CHECKPOINT_S = training.CHECKPOINT_SHARE = 0  # in a child


def save_never() -> None:
    training.CHECKPOINT_S = 3600  # but at the end


def save_up_to(step: int) -> Callable[[], None]:
    def prepare() -> None:
        save_always()
        save = checkpoint.save
        checkpoint.save = lambda folder, spec, state: (
            save(folder, spec, state) if state["step"] <= step else None
        )

    return prepare


def at_step(step: int, act: Callable[[], object]) -> Watch:
    return lambda run: run.step == step and act() and None


def kill(
    root: Path,
    spec: specs.ExperimentSpec,
    step: int,
    prepare: Callable[[], None] = save_always,
    **how: Any,
) -> StateFolder:
    """Train up to this step in a process that is killed there."""

    def train() -> None:
        prepare()
        run(root, spec, watch=at_step(step, die), **how)

    assert in_child(train) == -signal.SIGKILL
    return state_folders(root)[-1]


def finish(
    folder: StateFolder, spec: specs.ExperimentSpec, said: list[str] | None = None
) -> Outcome:
    """Continue a run, which adds to what is on record and changes nothing of it."""
    path = folder.path / "journal"
    whole = path.read_bytes()[: journal.read(path)[1]] if path.exists() else b""
    outcome = run(folder.path.parents[2], spec, said)
    assert outcome.key == folder.path.name
    assert path.read_bytes().startswith(whole)
    return outcome


MEASURED = ("val/loss", "val/accuracy", "train/lr")


def result(folder: StateFolder) -> dict[str, object]:
    """All that must not depend on how a run came about, in forms that compare bit for bit."""
    records, end = journal.read(folder.path / "journal")
    kinds: dict[str, list[dict[str, Any]]] = {
        kind: [r.fields for r in records if r.kind == kind]
        for kind in ("train", "evaluation", "final")
    }
    recorded, state = Recorded(records), checkpoint.load(folder.path / "checkpoint.pt", folder.spec)
    with np.load(folder.path / "predictions.npz") as predictions:
        predicted = {name: predictions[name].tobytes() for name in predictions}
    best = state["best"] or {"step": None, "parameters": torch.empty(0)}
    return {
        "whole": end == (folder.path / "journal").stat().st_size,
        "steps": [
            step
            for fields in kinds["train"]
            for step in range(fields["first"], fields["first"] + fields["count"])
        ],
        **{name: array.tobytes() for name, array in recorded.arrays.items()},
        "evaluations": [
            repr([fields[key] for key in ("step", "epoch", *MEASURED)])
            for fields in kinds["evaluation"]
        ],
        "results": [
            repr(
                [fields[key] for key in ("metrics", "weights", "collapsed_at", "stopped_early_at")]
            )
            for fields in kinds["final"]
        ],
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
            assert results[spec.fingerprint]["whole"]
        return results[spec.fingerprint]

    return train


def continued(folder: StateFolder, step: int, spec: specs.ExperimentSpec = SPEC) -> str:
    return (
        f"continuing {folder.path.name} at step {step} of {spec.steps} (--fresh would start anew)"
    )


# ---- killed between two segments


def test_the_recipes_are_what_they_are_here_for(unbroken: Unbroken) -> None:
    assert unbroken(SPEC)["steps"] == list(range(1, 69))
    assert len(unbroken(SPEC)["buffers"]) == 1
    assert len(unbroken(RECIPES["adamw"])["buffers"]) == 2
    assert len(set(np.frombuffer(unbroken(RECIPES["warm-up and steps"])["lr"]))) == 16
    assert unbroken(STOPPING)["results"][0].endswith("'best', None, 50]")
    assert unbroken(STOPPING)["best weights"][0] == 20
    assert unbroken(RECIPES["collapse"])["results"][0].endswith("'final', 50, None]")
    assert len({str(result) for result in map(unbroken, RECIPES.values())}) == 5


def test_an_unbroken_run_is_the_same_twice(unbroken: Unbroken, tmp_path: Path) -> None:
    assert run(tmp_path, SPEC).status == "FINISHED"
    assert differences(only(tmp_path), unbroken(SPEC)) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_after_any_segment_ends_as_if_it_had_not_been(
    recipe: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    spec = RECIPES[recipe]
    stops = STOPS if recipe in ("momentum", "early stopping") else (0, 20, 50, 68)
    for step in [stop for stop in stops if stop <= unbroken(spec)["step"]]:
        said: list[str] = []
        folder = kill(tmp_path / str(step), spec, step)
        assert finish(folder, spec, said).status == "FINISHED"
        assert said == [continued(folder, step)]
        assert differences(folder, unbroken(spec)) == [], step


@pytest.mark.parametrize("recipe", ["momentum", "early stopping", "collapse"])
def test_a_run_killed_where_it_was_not_evaluated_ends_as_if_it_had_not_been(
    recipe: str, unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = unbroken(RECIPES[recipe])
    monkeypatch.setattr(specs, "SEGMENT_STEPS", 7)
    for step in (7, 28, 35, 49):
        said: list[str] = []
        folder = kill(tmp_path / str(step), RECIPES[recipe], step)
        finish(folder, RECIPES[recipe], said)
        assert said == [continued(folder, step)]
        assert differences(folder, wanted) == [], step


@pytest.mark.parametrize("recipe", ["momentum", "early stopping", "collapse"])
def test_a_run_goes_on_whose_steps_are_cut_otherwise_now(
    recipe: str, unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, said = unbroken(RECIPES[recipe]), list[str]()
    kill(tmp_path, RECIPES[recipe], 50, save_never)
    monkeypatch.setattr(specs, "SEGMENT_STEPS", 7)
    folder = kill(tmp_path, RECIPES[recipe], 42)
    finish(folder, RECIPES[recipe], said)
    assert said == [continued(folder, 42)]
    assert differences(folder, wanted) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_without_a_checkpoint_is_computed_again_and_compared(
    recipe: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = kill(tmp_path, RECIPES[recipe], 40, save_never)
    finish(folder, RECIPES[recipe], said)
    assert said == [continued(folder, 0)]
    assert differences(folder, unbroken(RECIPES[recipe])) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_behind_the_checkpoint_are_computed_again_and_compared(
    recipe: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = kill(tmp_path, RECIPES[recipe], 40, save_up_to(20))
    finish(folder, RECIPES[recipe], said)
    assert said == [continued(folder, 20)]
    assert differences(folder, unbroken(RECIPES[recipe])) == []


@pytest.mark.parametrize("recipe", ["momentum", "early stopping"])
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    recipe: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    spec = RECIPES[recipe]
    for step in (20, 30, 50):
        folder = kill(tmp_path, spec, step)
    finish(folder, spec)
    assert only(tmp_path) == folder
    resumes = [
        record.fields["step"]
        for record in journal.read(folder.path / "journal")[0]
        if record.kind == "resume"
    ]
    assert resumes == [20, 30, 50]
    assert differences(folder, unbroken(spec)) == []


def test_training_time_goes_on_from_where_it_was(tmp_path: Path) -> None:
    folder = kill(tmp_path, SPEC, 30)
    times = [
        record.fields["elapsed_s"]
        for record in journal.read(folder.path / "journal")[0]
        if record.kind == "train"
    ]
    outcome = finish(folder, SPEC)
    later = [
        record.fields["elapsed_s"]
        for record in journal.read(folder.path / "journal")[0]
        if record.kind == "train"
    ]
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
    moment: int,
    train: Callable[[], object],
    torn: bool = False,
    then: Callable[[str, Any, Any], None] = lambda *arguments: None,
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


PAPERS = 4
"""The first moments of a run: its lock, run.json, spec.yaml and environment.json are flushed, and only then is it to be seen."""
FEW = experiment(eval_every=40)
LEAST = experiment(eval_every=68)


def train_few(root: Path, spec: specs.ExperimentSpec = FEW) -> Callable[[], object]:
    def train() -> Outcome:
        save_always()
        return run(root, spec)

    return train


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    done = moments(tmp_path / "whole", train_few(tmp_path / "whole"))
    assert len(done) >= 28
    assert done[: PAPERS + 1] == ["fsync"] * PAPERS + ["write"]
    for moment, name in enumerate(done):
        for torn in (False, True) if name == "write" else (False,):
            root, said = tmp_path / f"{moment}{torn}", list[str]()
            kill_at(moment, train_few(root), torn)
            if moment < PAPERS:
                assert state_folders(root) == []
                continue
            folder = only(root)
            finish(folder, FEW, said)
            assert [line.split(" at ")[0] for line in said] == [f"continuing {folder.path.name}"], (
                f"{moment}: {name}"
            )
            assert differences(folder, unbroken(FEW)) == [], f"{moment}: {name}"


def test_a_run_killed_at_any_moment_of_its_end_keeps_its_best_weights(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    done = moments(tmp_path / "whole", train_few(tmp_path / "whole", STOPPING))
    for moment in range(len(done) - 10, len(done) - 1):
        kill_at(moment, train_few(tmp_path / str(moment), STOPPING))
        folder = only(tmp_path / str(moment))
        finish(folder, STOPPING)
        assert differences(folder, unbroken(STOPPING)) == [], f"{moment}: {done[moment]}"


def test_a_kill_in_the_midst_of_a_checkpoint_leaves_the_one_before(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    def die_at_the_fourth() -> None:
        save_always()
        count, fsync = itertools.count(), os.fsync

        def written(file: int) -> None:
            name = os.readlink(f"/proc/self/fd/{file}")
            if name.endswith(".pt.partial") and next(count) == 3:
                die()
            fsync(file)

        os.fsync = written

    said: list[str] = []
    folder = kill(tmp_path, SPEC, 30, die_at_the_fourth)
    assert (folder.path / "checkpoint.pt.partial").exists()
    finish(folder, SPEC, said)
    assert said == [continued(folder, 20)]
    assert differences(folder, unbroken(SPEC)) == []


# ---- power loss


def lose_power(folder: StateFolder, flushed: dict[int, int]) -> None:
    """Leave of each file what had been on the disk for sure: {inode: its size when it was last flushed}."""
    for path in (
        folder.path / name
        for name in ("journal", "checkpoint.pt", "checkpoint.previous.pt", "predictions.npz")
    ):
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
    for folder in state_folders(root):
        lose_power(folder, dict(tuple(map(int, line.split())) for line in lines))


def falls_back(
    root: Path, spec: specs.ExperimentSpec, train: Callable[[Path], object]
) -> Iterator[tuple[list[str], list[str]]]:
    """With the power lost at each moment of a run but its last: what is said beyond that it goes on, and what differs."""
    done = moments(root / "whole", train_in(root / "whole", train))
    wanted = result(only(root / "whole"))
    for moment in range(1, len(done) - 1):
        lose_power_at(root / str(moment), moment, train_in(root / str(moment), train))
        if not state_folders(root / str(moment)):
            continue  # not begun yet
        folder, said = only(root / str(moment)), list[str]()
        run(root / str(moment), spec, said)
        yield (
            [line for line in said if not line.startswith("continuing")],
            differences(folder, wanted),
        )


def train_in(root: Path, train: Callable[[Path], object]) -> Callable[[], object]:
    return lambda: train(root)


def test_after_a_power_loss_no_checkpoint_is_ahead_of_its_journal(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    assert [
        found
        for found in falls_back(tmp_path, LEAST, lambda root: train_few(root, LEAST)())
        if found != ([], [])
    ] == []


def test_a_run_whose_end_a_power_loss_takes_ends_again(unbroken: Unbroken, tmp_path: Path) -> None:
    def train(root: Path) -> None:
        train_few(root)()
        os.write(os.open(os.devnull, os.O_WRONLY), b"after it")

    done = moments(tmp_path / "whole", train_in(tmp_path / "whole", train))
    lose_power_at(tmp_path / "lost", len(done) - 1, train_in(tmp_path / "lost", train))
    finish(only(tmp_path / "lost"), FEW)
    assert differences(only(tmp_path / "lost"), unbroken(FEW)) == []


def test_what_a_power_loss_leaves_is_less_than_what_was_written(tmp_path: Path) -> None:
    done = moments(tmp_path / "whole", train_few(tmp_path / "whole"))
    before_flush = done.index("fsync", done.index("replace"))
    lose_power_at(tmp_path / "lost", before_flush, train_few(tmp_path / "lost"))
    kill_at(before_flush, train_few(tmp_path / "killed"))
    lost, killed = (
        Recorded(journal.read(only(tmp_path / name).path / "journal")[0]).last
        for name in ("lost", "killed")
    )
    assert lost < killed


# ---- damage


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(folder: StateFolder, kind: str, step: int) -> None:
    """Cut the journal in the midst of a record: that of the steps from `step` on, or of the evaluation there."""
    path, end = folder.path / "journal", 0
    found = [
        (record.kind, record.fields.get("first", record.fields.get("step")))
        for record in journal.read(path)[0]
    ]
    whole = path.read_bytes()
    for _ in range(found.index((kind, step))):
        end += journal.HEAD.size + journal.HEAD.unpack_from(whole, end)[1]
    path.write_bytes(whole[: end + 40])


def alter(folder: StateFolder, step: int) -> None:
    """Change the last bit of a step's recorded loss, and the record's checksum with it."""
    records, _ = journal.read(folder.path / "journal")
    (folder.path / "journal").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fmnist.state.now_ms", lambda: 0)
        written = Journal.resume(folder)
        for record in records:
            arrays = {name: array.copy() for name, array in record.arrays.items()}
            if (
                record.kind == "train"
                and 0 <= (row := step - record.fields["first"]) < record.fields["count"]
            ):
                arrays["loss"].view(np.int32)[row] ^= 1
            written._append(journal.Record(record.kind, record.fields, arrays))
        written.release()


def altered_at_55(root: Path) -> StateFolder:
    """A run killed at step 60 with a checkpoint of step 50, and step 55 altered on record."""
    folder = kill(root, SPEC, 60, save_up_to(50))
    alter(folder, 55)
    return folder


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = kill(tmp_path, SPEC, 40)
    spoil(folder.path / "checkpoint.pt")
    finish(folder, SPEC, said)
    assert said == [
        f"{folder.path / 'checkpoint.pt'} is damaged: its checksum does not fit; what there is before it is taken",
        continued(folder, 30),
    ]
    assert differences(folder, unbroken(SPEC)) == []


def test_a_crafted_checkpoint_gives_way_to_the_one_before(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    for number, change in enumerate(
        ({"step": "40"}, {"parameters": torch.zeros(3)}, {"buffers": {}}, None)
    ):
        said: list[str] = []
        folder = kill(tmp_path / str(number), SPEC, 40)
        path = folder.path / "checkpoint.pt"
        if change is None:
            path.unlink()
            os.mkfifo(path)
        else:
            state = checkpoint.load(path, SPEC)
            checkpoint.save(folder.path / "..", SPEC, {**state, **change})
            (folder.path / ".." / "checkpoint.pt").replace(path)
        finish(folder, SPEC, said)
        assert [line.count("what there is before it is taken") for line in said] == [1, 0]
        assert said[1] == continued(folder, 30)
        assert differences(folder, unbroken(SPEC)) == []


@pytest.mark.parametrize("recipe", ["momentum", "early stopping"])
def test_with_no_whole_checkpoint_all_is_computed_again_and_compared(
    recipe: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    spec, said = RECIPES[recipe], list[str]()
    folder = kill(tmp_path, spec, 40)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        spoil(folder.path / name)
    finish(folder, spec, said)
    assert [line.partition(" is ")[2] for line in said] == [
        "damaged: its checksum does not fit; what there is before it is taken"
    ] * 2 + [""]
    assert said[2] == continued(folder, 0)
    assert differences(folder, unbroken(spec)) == []


@pytest.mark.parametrize(("last", "step"), [(30, 30), (20, 0), (0, 0)])
@pytest.mark.parametrize("recipe", ["momentum", "early stopping"])
def test_a_checkpoint_ahead_of_a_damaged_journal_is_left_alone(
    recipe: str, last: int, step: int, unbroken: Unbroken, tmp_path: Path
) -> None:
    spec, said = RECIPES[recipe], list[str]()
    folder = kill(tmp_path, spec, 40)
    cut(folder, "train", last + 1)
    finish(folder, spec, said)
    ahead = {"checkpoint.pt": 40, "checkpoint.previous.pt": 30}
    assert said == [
        *(
            f"{folder.path / name} is of step {of}; the journal is whole up to step {last}"
            for name, of in ahead.items()
            if of > last
        ),
        continued(folder, step),
    ]
    assert differences(folder, unbroken(spec)) == []


@pytest.mark.parametrize("recipe", ["momentum", "early stopping", "collapse"])
@pytest.mark.parametrize("step", [0, 20, 50])
def test_an_evaluation_lost_where_the_checkpoint_is_is_made_again(
    recipe: str, step: int, unbroken: Unbroken, tmp_path: Path
) -> None:
    folder, said = kill(tmp_path, RECIPES[recipe], step), list[str]()
    cut(folder, "evaluation", step)
    finish(folder, RECIPES[recipe], said)
    assert said == [continued(folder, step)]
    assert differences(folder, unbroken(RECIPES[recipe])) == []


def swap_in_another_checkpoint(root: Path) -> StateFolder:
    folder, other = kill(root, SPEC, 40), kill(root / "other", experiment(seed=1, epochs=3), 40)
    shutil.copy(other.path / "checkpoint.pt", folder.path / "checkpoint.pt")
    return folder


def test_a_checkpoint_of_another_spec_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    folder = swap_in_another_checkpoint(tmp_path)
    before = (folder.path / "journal").read_bytes()
    with pytest.raises(
        StoreError,
        match=r"belongs to another spec: train\.epochs 3 there, 2 here, train\.seed 1 there, 0 here$",
    ):
        run(tmp_path, SPEC)
    assert (folder.path / "journal").read_bytes() == before


def test_a_run_that_was_refused_is_let_go_of(tmp_path: Path) -> None:
    folder = swap_in_another_checkpoint(tmp_path)
    with pytest.raises(StoreError):
        run(tmp_path, SPEC)
    assert not folder.running


def test_a_step_that_comes_out_otherwise_ends_the_run(tmp_path: Path) -> None:
    folder = altered_at_55(tmp_path)
    outcome = finish(folder, SPEC)
    assert (outcome.status, outcome.exit_code, outcome.resumable) == (
        "FAILED",
        Irreproducible.exit_code,
        True,
    )
    assert outcome.reason is not None
    assert "step 55: train/loss was" in outcome.reason
    assert "or start anew with --fresh" in outcome.reason
    assert folder.resumable


def test_a_run_refused_under_another_arithmetic_goes_on_under_its_own(
    unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = kill(tmp_path, SPEC, 60, save_up_to(20)), list[str]()
    before = {name: (folder.path / name).read_bytes() for name in CHECKPOINTS}
    alter(folder, 45)
    with monkeypatch.context() as patched:
        patched.setattr(training, "CHECKPOINT_S", 0)
        patched.setattr(training, "CHECKPOINT_SHARE", 0)
        assert "step 45: train/loss was" in str(finish(folder, SPEC).reason)
    assert {name: (folder.path / name).read_bytes() for name in CHECKPOINTS} == before
    alter(folder, 45)  # back again
    assert finish(folder, SPEC, said).status == "FINISHED"
    assert said == [continued(folder, 20)]
    assert differences(folder, unbroken(SPEC)) == []


# ---- elsewhere


def assert_goes_on_without_comparing(
    folder: StateFolder, spec: specs.ExperimentSpec, change: str
) -> None:
    said: list[str] = []
    before = Recorded(journal.read(folder.path / "journal")[0]).arrays["loss"][:60].tobytes()
    assert finish(folder, spec, said).status == "FINISHED"
    assert said[1:] == [
        f"it began elsewhere, so what is computed from here on may differ in its last bits: {change}"
    ]
    records, _ = journal.read(folder.path / "journal")
    assert Recorded(records).arrays["loss"][:60].tobytes() == before
    assert Recorded(records).last == 68
    [resumed] = [record for record in records if record.kind == "resume"]
    changed = environment.differences(
        environment.facts(folder.environment), resumed.fields["environment"]
    )
    assert " ".join(*changed.items()) == change


def test_with_other_threads_a_run_goes_on_without_comparing_and_says_so(tmp_path: Path) -> None:
    folder = altered_at_55(tmp_path)
    try:
        assert_goes_on_without_comparing(
            folder,
            SPEC.model_copy(update={"compute": specs.Compute(device="cpu", threads=2)}),
            "threads 1 -> 2",
        )
    finally:
        torch.set_num_threads(1)


def began_with(folder: StateFolder, **changed: Any) -> dict[str, Any]:
    """Have a run begun in another environment; returns the one that it was."""
    path = folder.path / "environment.json"
    facts: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, **changed}))
    return facts


@pytest.mark.parametrize("key", ["device", "processor", "instructions", "settings", "code"])
def test_on_another_machine_a_run_goes_on_without_comparing_and_says_so(
    key: str, tmp_path: Path
) -> None:
    folder = altered_at_55(tmp_path)
    facts = began_with(folder, **{key: "another"})
    assert_goes_on_without_comparing(folder, SPEC, f"{key} another -> {facts[key]}")


def test_with_another_torch_a_run_goes_on_without_comparing_and_says_so(tmp_path: Path) -> None:
    folder = altered_at_55(tmp_path)
    facts = began_with(folder)
    began_with(folder, packages={**facts["packages"], "torch": "2.0"})
    assert_goes_on_without_comparing(folder, SPEC, f"torch 2.0 -> {facts['packages']['torch']}")


def test_what_may_change_bits_is_found() -> None:
    def collected(**settings: str) -> dict[str, Any]:
        code = "import json, torch; from fmnist import environment; print(json.dumps(environment.collect('', torch.device('cpu'))))"
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, **settings},
        )
        return dict(json.loads(result.stdout))

    plain = environment.facts(collected())
    other = environment.facts(collected(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE"))
    assert environment.differences(plain, other) == {
        "instructions": f"{plain['instructions']} -> DEFAULT",
        "settings": f"{plain['settings']} -> ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE",
    }


def test_a_change_of_the_code_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "fmnist"
    shutil.copytree(REPOSITORY / "fmnist", copy)
    monkeypatch.setattr(environment, "__file__", str(copy / "environment.py"))
    before = environment._code()
    (copy / "optim.py").write_text((copy / "optim.py").read_text() + "# rounds otherwise\n")
    assert environment._code() != before


def test_what_another_machine_computed_is_not_compared_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(tmp_path, SPEC, 20)
    with monkeypatch.context() as patched:
        facts = environment.collect("", torch.device("cpu"))
        patched.setattr(
            environment, "collect", lambda *arguments: {**facts, "processor": "another"}
        )
        folder = kill(tmp_path, SPEC, 60, save_up_to(20))
    alter(folder, 55)
    assert finish(folder, SPEC).status == "FINISHED"


def test_what_cant_change_a_bit_keeps_nothing_from_being_compared(tmp_path: Path) -> None:
    folder, said = altered_at_55(tmp_path), list[str]()
    began_with(folder, python="3.1", git_commit="abc", platform="Plan 9")
    assert "step 55" in str(finish(folder, SPEC, said).reason)
    assert said == [continued(folder, 50)]
    [resumed] = [
        record for record in journal.read(folder.path / "journal")[0] if record.kind == "resume"
    ]
    changed = environment.differences(
        environment.facts(folder.environment), resumed.fields["environment"]
    )
    assert set(changed) == {"python", "git_commit", "platform"}


# ---- stopped by signals and errors


def outcome_of(
    root: Path, spec: specs.ExperimentSpec, watch: Watch, prepare: Callable[[], None] = save_always
) -> dict[str, Any]:
    """The outcome of a run in a process of its own."""

    def train() -> None:
        prepare()
        outcome = run(root, spec, watch=watch)
        (root / "outcome.json").write_text(json.dumps(vars(outcome)))

    assert in_child(train) == 0
    return dict(json.loads((root / "outcome.json").read_text()))


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 30, 68])
def test_a_run_stopped_by_a_signal_is_killed_and_goes_on_later(
    number: signal.Signals, step: int, unbroken: Unbroken, tmp_path: Path
) -> None:
    outcome = outcome_of(tmp_path, SPEC, at_step(step, lambda: send(number)))
    assert (outcome["status"], outcome["exit_code"], outcome["resumable"]) == (
        "KILLED",
        128 + number,
        True,
    )
    assert outcome["reason"] == f"stopped by {number.name} after step {step}"
    folder, said = only(tmp_path), list[str]()
    last = journal.read(folder.path / "journal")[0][-1]
    assert (last.kind, last.fields["status"], last.fields["resumable"]) == ("end", "KILLED", True)
    assert folder.resumable
    finish(folder, SPEC, said)
    assert said == [continued(folder, step)]
    assert differences(folder, unbroken(SPEC)) == []


def test_a_signal_leaves_a_checkpoint_of_all_that_was_trained(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    def signal_at_30() -> None:
        save_never()
        evaluate = engine.Engine.evaluate

        def evaluated(self: engine.Engine, split: data.Split, member: int) -> engine.Evaluation:
            if self.step == 30:
                send(signal.SIGINT)
            return evaluate(self, split, member)

        engine.Engine.evaluate = evaluated

    assert outcome_of(tmp_path, SPEC, lambda training: None, signal_at_30)["steps"] == 30
    folder, said = only(tmp_path), list[str]()
    finish(folder, SPEC, said)
    assert said == [continued(folder, 30)]
    assert differences(folder, unbroken(SPEC)) == []


def test_a_run_stopped_by_two_signals_ends_without_a_word_and_goes_on_later(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    def train() -> None:
        save_always()
        try:
            run(
                tmp_path,
                SPEC,
                watch=at_step(30, lambda: (send(signal.SIGINT), send(signal.SIGINT))),
            )
        except KeyboardInterrupt:
            os._exit(130)

    assert in_child(train) == 130
    folder = only(tmp_path)
    assert journal.read(folder.path / "journal")[0][-1].kind == "evaluation"
    finish(folder, SPEC)
    assert differences(folder, unbroken(SPEC)) == []


def fail(monkeypatch: pytest.MonkeyPatch, moment: int, times: int) -> None:
    """Have the disk full at that moment, so many times."""
    count = itertools.count()

    def act(real: Callable[..., Any], *arguments: Any) -> Any:
        if moment <= next(count) < moment + times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, functools.partial(act, getattr(os, name)))


@pytest.mark.parametrize("times", [1, 1_000], ids=["for a moment", "for good"])
def test_a_run_that_a_full_disk_stopped_goes_on_later(
    times: int, unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = moments(tmp_path / "whole", train_few(tmp_path / "whole", LEAST))
    for moment in range(PAPERS, len(done), 1 if times == 1 else 4):
        root = tmp_path / str(moment)
        with monkeypatch.context() as patched:
            patched.setattr(training, "CHECKPOINT_S", 0)
            patched.setattr(training, "CHECKPOINT_SHARE", 0)
            fail(patched, moment, times)
            outcome = run(root, LEAST)
        assert (outcome.status, outcome.exit_code, outcome.resumable) == ("FAILED", 3, True)
        assert "No space left on device" in str(outcome.reason)
        assert ("how it ended could not be written" in str(outcome.unsynced)) == (
            times > 1 and outcome.unsynced != "--no-sync was given"
        )
        folder = only(root)
        assert folder.resumable, moment
        finish(folder, LEAST)
        assert differences(folder, unbroken(LEAST)) == [], moment


def test_a_run_that_a_full_disk_keeps_from_beginning_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in range(PAPERS):
        with monkeypatch.context() as patched:
            fail(patched, moment, times=1)
            with pytest.raises(
                StoreError,
                match="mlruns: can't be written: No space left on device; mend that or set FMNIST_HOME",
            ):
                run(tmp_path, LEAST)
        assert list((tmp_path / "mlruns" / "state").iterdir()) == []


def test_a_run_that_broke_by_a_fault_of_its_own_is_not_continued(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    def fault() -> NoReturn:
        raise RuntimeError("a fault")

    outcome = run(tmp_path, SPEC, watch=at_step(30, fault))
    assert (outcome.status, outcome.reason, outcome.resumable) == (
        "FAILED",
        "RuntimeError: a fault",
        False,
    )
    broken = only(tmp_path)
    assert not broken.resumable
    said: list[str] = []
    assert run(tmp_path, SPEC, said).status == "FINISHED"
    assert said == []
    assert differences(state_folders(tmp_path)[-1], unbroken(SPEC)) == []


DIVERGING = experiment(specs.SGD(lr=1.0, weight_decay=10.0))


def test_a_run_that_diverged_is_not_continued(tmp_path: Path) -> None:
    outcome = run(tmp_path, DIVERGING)
    assert (outcome.status, outcome.exit_code, outcome.resumable) == ("FAILED", 3, False)
    assert not only(tmp_path).resumable
    assert run(tmp_path, DIVERGING).key != outcome.key


def test_a_run_killed_as_it_diverged_diverges_again(tmp_path: Path) -> None:
    def die_at_its_end() -> None:
        save_always()
        event = Journal.event
        Journal.event = lambda self, kind, **fields: (
            die() if kind == "end" else event(self, kind, **fields)
        )

    def train() -> None:
        die_at_its_end()
        run(tmp_path, DIVERGING)

    assert in_child(train) == -signal.SIGKILL
    folder = only(tmp_path)
    steps = Recorded(journal.read(folder.path / "journal")[0]).last
    outcome = finish(folder, DIVERGING)
    assert (outcome.status, outcome.steps) == ("FAILED", steps)
    assert "the first that isn't finite" in str(outcome.reason)
    assert Recorded(journal.read(folder.path / "journal")[0]).last == steps


# ---- which run is continued


def test_a_fresh_run_gives_the_interrupted_one_up(unbroken: Unbroken, tmp_path: Path) -> None:
    folder, said = kill(tmp_path, SPEC, 40), list[str]()
    outcome = run(tmp_path, SPEC, said, fresh=True)
    assert said == [f"giving up {folder.path.name}, which stopped at step 40"]
    last = journal.read(folder.path / "journal")[0][-1]
    assert (last.kind, last.fields["status"], last.fields["reason"]) == (
        "end",
        "KILLED",
        "given up for a fresh run",
    )
    assert not folder.resumable
    assert not folder.running
    fresh = state_folders(tmp_path)[-1]
    assert fresh.path.name == outcome.key != folder.path.name
    assert differences(fresh, unbroken(SPEC)) == []
    assert run(tmp_path, SPEC, said).key not in (outcome.key, folder.path.name)
    assert len(said) == 1


def two_interrupted(root: Path) -> list[StateFolder]:
    first = kill(root / "elsewhere", SPEC, 20)
    kill(root, SPEC, 40)
    first.path.rename(root / "mlruns" / "state" / first.path.name)
    return state_folders(root)


def test_of_several_interrupted_runs_the_last_is_continued(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    first, second = two_interrupted(tmp_path)
    finish(second, SPEC)
    assert (first.resumable, second.resumable) == (True, False)
    finish(first, SPEC)
    for folder in (first, second):
        assert differences(folder, unbroken(SPEC)) == []


def test_an_interrupted_run_is_continued_that_was_asked_for(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    first, second = two_interrupted(tmp_path)
    assert run(tmp_path, SPEC, resume=first).key == first.path.name
    assert (first.resumable, second.resumable) == (False, True)
    assert differences(first, unbroken(SPEC)) == []


def test_a_fresh_run_gives_all_interrupted_ones_up(tmp_path: Path) -> None:
    folders, said = two_interrupted(tmp_path), list[str]()
    run(tmp_path, SPEC, said, fresh=True)
    assert said == [
        f"giving up {folder.path.name}, which stopped at step {step}"
        for folder, step in zip(folders, (20, 40), strict=True)
    ]
    assert [folder.resumable for folder in folders] == [False, False]


def test_an_interrupted_run_of_another_spec_is_left_alone(tmp_path: Path) -> None:
    folder, said = kill(tmp_path, SPEC, 40), list[str]()
    for fresh in (False, True):
        assert run(tmp_path, experiment(seed=1), said, fresh=fresh).key != folder.path.name
    assert said == []
    assert folder.resumable
    with pytest.raises(
        SpecError,
        match=f"^{folder.path.name} can't be continued with another spec: train\\.seed 0 there, 1 here$",
    ):
        run(tmp_path, experiment(seed=1), resume=folder)


def test_a_name_or_a_question_may_change_meanwhile(unbroken: Unbroken, tmp_path: Path) -> None:
    folder = kill(tmp_path, SPEC, 40)
    finish(folder, SPEC.model_copy(update={"name": "another", "question": "Why?"}))
    assert differences(folder, unbroken(SPEC)) == []


def test_beside_a_run_that_is_going_on_another_one_is_begun(tmp_path: Path) -> None:
    folder, said = kill(tmp_path, SPEC, 40), list[str]()
    held = Journal.resume(folder)
    assert run(tmp_path, SPEC, said).key != folder.path.name
    assert said == [
        f"{folder.path.name} has the same spec and is being trained by {folder.holder}; this is another run beside it"
    ]
    with pytest.raises(StoreError, match="is being trained by process"):
        run(tmp_path, SPEC, resume=folder)
    held.release()


def test_what_an_older_version_left_keeps_no_run_from_being_trained(tmp_path: Path) -> None:
    folder = kill(tmp_path, SPEC, 40)
    old = {key: value for key, value in folder.run.items() if key not in ("fingerprint", "extends")}
    (folder.path / "run.json").write_text(json.dumps(old))
    assert run(tmp_path, SPEC).status == "FINISHED"


@pytest.mark.parametrize("name", ["environment.json", "spec.yaml"])
def test_a_run_whose_papers_are_lost_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = kill(tmp_path, SPEC, 40)
    for harm in (lambda: (folder.path / name).write_text(""), (folder.path / name).unlink):
        harm()
        with pytest.raises(UserError, match=name):
            run(tmp_path, SPEC, resume=StateFolder.at(folder.path))


# ---- mutants: what the comparisons above are worth


def restored(
    change: Callable[[engine.Engine, dict[str, Any]], None],
) -> Callable[[pytest.MonkeyPatch], None]:
    """Restoring a state, and then that."""

    def mutate(patched: pytest.MonkeyPatch) -> None:
        load_state = engine.Engine.load_state

        def mutant(self: engine.Engine, state: dict[str, Any], member: int) -> None:
            load_state(self, state, member)
            change(self, state)

        patched.setattr(engine.Engine, "load_state", mutant)

    return mutate


def lose_buffers(restored: engine.Engine, state: dict[str, Any]) -> None:
    for buffer in restored.update.buffers.values():
        buffer.zero_()


def keep_step(step: Callable[[int], int]) -> Callable[[engine.Engine, dict[str, Any]], None]:
    def change(restored: engine.Engine, state: dict[str, Any]) -> None:
        restored.step = step(state["step"])

    return change


def append_again(patched: pytest.MonkeyPatch) -> None:
    train = Journal.train

    def mutant(self: Journal, *arguments: Any) -> None:
        self.recorded = Recorded([])
        train(self, *arguments)

    patched.setattr(Journal, "train", mutant)


def evaluate_again(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(
        Journal,
        "evaluation",
        lambda self, step, measured: self.event("evaluation", step=step, **measured),
    )


def forget_best(patched: pytest.MonkeyPatch) -> None:
    load = checkpoint.load
    patched.setattr(checkpoint, "load", lambda *arguments: {**load(*arguments), "best": None})


def forget_evaluations(patched: pytest.MonkeyPatch) -> None:
    def mutant(self: Training, state: dict[str, Any] | None) -> None:
        if state:
            self.engine.load_state(state, self.member)
            self.step, self.best_weights = self.engine.step, state["best"]

    patched.setattr(Training, "go_on_from", mutant)


def forget_curves(patched: pytest.MonkeyPatch) -> None:
    go_on_from = Training.go_on_from

    def mutant(self: Training, state: dict[str, Any] | None) -> None:
        go_on_from(self, state)
        self.outcome.collapsed_at = None

    patched.setattr(Training, "go_on_from", mutant)


SCHEDULED = RECIPES["warm-up and steps"]
MUTANTS: dict[str, tuple[specs.ExperimentSpec, Callable[[pytest.MonkeyPatch], None]]] = {
    "no momentum": (SPEC, restored(lose_buffers)),
    "no adamw means": (RECIPES["adamw"], restored(lose_buffers)),
    "step 0": (SPEC, restored(keep_step(lambda step: 0))),
    "the step before": (SPEC, restored(keep_step(lambda step: step - 1))),
    "the step after": (SPEC, restored(keep_step(lambda step: step + 1))),
    "the step before, scheduled": (SCHEDULED, restored(keep_step(lambda step: step - 1))),
    "steps appended again": (SPEC, append_again),
    "evaluations appended again": (SPEC, evaluate_again),
    "no best weights": (STOPPING, forget_best),
    "no patience": (STOPPING, forget_evaluations),
    "no collapse": (RECIPES["collapse"], forget_curves),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_continuation_that_does_it_wrong_is_seen(
    mutant: str, unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, mutate = MUTANTS[mutant]
    last = 60 if mutant == "no collapse" else 40

    folder = kill(tmp_path, spec, last, save_up_to(last - 1))
    mutate(monkeypatch)
    outcome = run(tmp_path, spec)
    monkeypatch.undo()
    if outcome.status == "FINISHED":
        assert differences(folder, unbroken(spec)) != []
    else:
        assert "though nothing known differs" in str(outcome.reason)


def checkpoint_first(self: Training) -> None:
    checkpoint.save(
        self.journal.folder,
        self.spec,
        {**self.engine.state(self.member), "best": self.best_weights},
    )
    self.journal.flush()


def flush_no_checkpoint() -> None:
    files.os = SimpleNamespace(**{**vars(os), "fsync": lambda file: None})


def flush_no_journal() -> None:
    Journal.flush = lambda self: None


def save_checkpoint_first() -> None:
    Training.save = checkpoint_first


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (save_checkpoint_first, "the journal is whole up to step"),
        (flush_no_journal, "the journal is whole up to step"),
        (flush_no_checkpoint, "is damaged"),
    ],
    ids=["checkpoint before journal", "journal not flushed", "checkpoint not flushed"],
)
def test_a_checkpoint_that_a_power_loss_leaves_ahead_is_seen(
    mutate: Callable[[], None], message: str, tmp_path: Path
) -> None:
    def train(root: Path) -> None:
        mutate()
        train_few(root, LEAST)()

    assert any(message in line for said, _ in falls_back(tmp_path, LEAST, train) for line in said)


# ---- trained on


def artifacts(folder: StateFolder, to: Path) -> Path:
    """The folder with a run's artifacts, as MLflow gives them."""
    to.mkdir()
    for name in ("spec.yaml", "environment.json", "checkpoint.pt"):
        if (folder.path / name).exists():
            shutil.copy(folder.path / name, to / name)
    journal.curves(folder.spec, journal.read(folder.path / "journal")[0]).to_parquet(
        to / "curves.parquet", index=False
    )
    return to


def extend(
    root: Path,
    origin: Path,
    epochs: int,
    said: list[str] | None = None,
    watch: Watch = lambda training: None,
) -> Outcome:
    context = runner.Context(
        root, sync=False, say=print if said is None else said.append, watch=watch
    )
    return runner.extend(origin, "0123abc", "small", epochs, context)


def lengthened(spec: specs.ExperimentSpec, epochs: int) -> specs.ExperimentSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update={"epochs": epochs})})


PATIENT = specs.EarlyStopping(
    patience=4, metric="accuracy", min_delta=0.3
)  # nothing later improves on step 17 by that, on any processor
EXTENDED = {
    "momentum": SPEC,
    "adamw": RECIPES["adamw"],
    "warm-up and steps": SCHEDULED,
    "collapse": RECIPES["collapse"],
    "evaluated where it ends": experiment(eval_every=17),
    "early stopping": experiment(stopping=PATIENT, eval_every=17),
}


@pytest.mark.parametrize("recipe", EXTENDED)
def test_a_finished_run_trained_on_is_the_longer_run(
    recipe: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    spec, said = EXTENDED[recipe], list[str]()
    assert run(tmp_path / "first", spec).status == "FINISHED"
    first = only(tmp_path / "first")
    outcome = extend(tmp_path, artifacts(first, tmp_path / "artifacts"), 4, said)
    folder = only(tmp_path)
    assert (outcome.status, outcome.key) == ("FINISHED", folder.path.name)
    assert said == ["extending run 0123abc from step 68 to 136"]
    assert folder.run["extends"] == "0123abc"
    assert folder.spec == lengthened(spec, 4)
    assert differences(folder, unbroken(lengthened(spec, 4))) == []
    assert differences(first, unbroken(spec)) == []


def test_the_longer_runs_are_what_they_are_here_for(unbroken: Unbroken) -> None:
    evaluations = unbroken(lengthened(SPEC, 4))["evaluations"]
    assert [json.loads(text.replace("None", "null"))[0] for text in evaluations] == [
        *range(0, 136, 10),
        136,
    ]
    stopped = unbroken(lengthened(EXTENDED["early stopping"], 4))
    assert 68 < stopped["step"] < 136
    assert "'best'" in str(stopped["results"])


def test_a_run_trained_on_twice_is_the_longer_run(unbroken: Unbroken, tmp_path: Path) -> None:
    run(tmp_path / "2", SPEC)
    extend(tmp_path / "3", artifacts(only(tmp_path / "2"), tmp_path / "2" / "artifacts"), 3)
    extend(tmp_path / "4", artifacts(only(tmp_path / "3"), tmp_path / "3" / "artifacts"), 4)
    assert differences(only(tmp_path / "4"), unbroken(lengthened(SPEC, 4))) == []


def test_only_the_steps_beyond_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "first", SPEC)
    found, train, first = (
        artifacts(only(tmp_path / "first"), tmp_path / "artifacts"),
        engine.Engine.train,
        list[int](),
    )

    def noted(self: engine.Engine, stop: int) -> list[engine.Curves]:
        first.append(self.step + 1)
        return train(self, stop)

    monkeypatch.setattr(engine.Engine, "train", noted)
    extend(tmp_path, found, 4)
    assert first == [69, *range(71, 136, 10)]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a finished run; not to be changed."""
    root = tmp_path_factory.mktemp("origin")
    run(root, SPEC)
    return artifacts(only(root), root / "artifacts")


def test_a_run_that_was_killed_while_it_was_trained_on_goes_on(
    origin: Path, unbroken: Unbroken, tmp_path: Path
) -> None:
    longer = lengthened(SPEC, 4)
    for step in (70, 100, 136):
        root, said = tmp_path / str(step), list[str]()

        def train(root: Path = root, step: int = step) -> None:
            save_always()
            extend(root, origin, 4, watch=at_step(step, die))

        assert in_child(train) == -signal.SIGKILL
        finish(only(root), longer, said)
        assert said == [continued(only(root), step, longer)]
        assert differences(only(root), unbroken(longer)) == []


def ended(root: Path, spec: specs.ExperimentSpec) -> Path:
    """The artifacts of a run of this spec."""
    run(root / "run", spec)
    return artifacts(only(root / "run"), root / "artifacts")


def test_a_power_loss_while_a_run_is_trained_on_leaves_no_checkpoint_ahead(tmp_path: Path) -> None:
    few = ended(tmp_path / "few", LEAST)
    found = falls_back(tmp_path, lengthened(LEAST, 3), lambda root: extend(root, few, 3))
    assert [one for one in found if one != ([], [])] == []


SCHEDULES = [specs.Cosine(), specs.Linear(warmup_steps=5), specs.OneCycle()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=[schedule.type for schedule in SCHEDULES])
def test_a_schedule_that_knows_its_end_is_not_trained_on(
    schedule: specs.Schedule, tmp_path: Path
) -> None:
    found = ended(tmp_path, experiment(schedule=schedule))
    with pytest.raises(
        SpecError,
        match=rf"^run 0123abc can't be extended to 4 epochs: its schedule \({schedule.type}\) .*: --set train\.epochs=4$",
    ):
        extend(tmp_path, found, 4)
    assert state_folders(tmp_path) == []


def test_a_schedule_is_refused_rightly(unbroken: Unbroken) -> None:
    for schedule in SCHEDULES:
        short, long = (
            unbroken(experiment(schedule=schedule, epochs=epochs))["lr"] for epochs in (2, 4)
        )
        assert not long.startswith(short)


@pytest.mark.parametrize("epochs", [-1, 0, 1, 2])
def test_a_run_is_not_trained_on_for_no_more_epochs(
    epochs: int, origin: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        SpecError,
        match=f"^run 0123abc can't be extended to {epochs} epochs: it has 2 already; give more$",
    ):
        extend(tmp_path, origin, epochs)
    assert state_folders(tmp_path) == []


def test_a_run_is_not_trained_on_for_more_epochs_than_a_spec_may_have(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_train", lambda *arguments: pytest.fail("it would be trained"))
    with pytest.raises(SpecError, match="epochs"):
        extend(tmp_path, origin, 100_001)


@pytest.mark.parametrize(
    "spec",
    [STOPPING, experiment(stopping=specs.EarlyStopping(patience=50))],
    ids=["it stopped early", "it was evaluated at its end alone"],
)
def test_a_run_that_early_stopping_ended_is_not_trained_on(
    spec: specs.ExperimentSpec, tmp_path: Path
) -> None:
    found = ended(tmp_path, spec)
    with pytest.raises(
        SpecError,
        match=r"^run 0123abc can't be extended to 4 epochs: early stopping ended it, or looked at its last step",
    ):
        extend(tmp_path, found, 4)
    assert state_folders(tmp_path) == []


def copied(origin: Path, to: Path) -> Path:
    return Path(shutil.copytree(origin, to))


def test_a_run_whose_checkpoint_is_damaged_is_not_trained_on(origin: Path, tmp_path: Path) -> None:
    found = copied(origin, tmp_path / "artifacts")
    spoil(found / "checkpoint.pt")
    with pytest.raises(
        StoreError,
        match=r"^run 0123abc can't be extended to 4 epochs: .*checkpoint\.pt is damaged: its checksum does not fit$",
    ):
        extend(tmp_path, found, 4)
    assert state_folders(tmp_path) == []


def test_a_run_whose_checkpoint_is_another_specs_is_not_trained_on(
    origin: Path, tmp_path: Path
) -> None:
    found = copied(origin, tmp_path / "artifacts")
    shutil.copy(
        ended(tmp_path / "other", experiment(seed=1)) / "checkpoint.pt", found / "checkpoint.pt"
    )
    with pytest.raises(StoreError, match=r"belongs to another spec: .*seed 1 there, 0 here$"):
        extend(tmp_path, found, 4)
    assert state_folders(tmp_path) == []


def test_a_run_that_did_not_finish_is_not_trained_on(tmp_path: Path) -> None:
    found = artifacts(kill(tmp_path / "killed", SPEC, 40), tmp_path / "artifacts")
    with pytest.raises(UserError, match=r"^run 0123abc can't be extended to 4 epochs: "):
        extend(tmp_path, found, 4)
    assert state_folders(tmp_path) == []


# ---- verified


def verified(found: Path, steps: int | None = None) -> verify.Verification:
    return verify.verify(found, found, steps, lambda text: None)


def assert_equal(
    found: Path, steps: int, evaluations: int, weights: bool, first: int | None = None
) -> None:
    assert verified(found, first) == verify.Verification(steps, evaluations, weights, [], {})


def change(found: Path, step: int, column: str) -> None:
    """Change the last bit of a value in the curves."""
    frame = pd.read_parquet(found / "curves.parquet")
    row = frame.index[frame["step"] == step][0]
    values = frame[column].to_numpy().copy()
    values[row] = np.nextafter(values[row], values.dtype.type(9))
    frame[column] = values
    frame.to_parquet(found / "curves.parquet", index=False)


def test_an_honest_run_is_equal(origin: Path) -> None:
    assert_equal(origin, 68, 8, True)
    assert_equal(origin, 68, 8, True, 1_000)


@pytest.mark.parametrize(
    ("steps", "evaluations", "weights"),
    [(1, 1, False), (9, 1, False), (10, 2, False), (25, 3, False), (68, 8, True)],
)
def test_the_first_steps_of_an_honest_run_are_equal(
    steps: int, evaluations: int, weights: bool, origin: Path
) -> None:
    assert_equal(origin, steps, evaluations, weights, steps)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "momentum"])
def test_an_honest_run_of_any_recipe_is_equal(recipe: str, tmp_path: Path) -> None:
    found = verified(ended(tmp_path, RECIPES[recipe]))
    assert (found.steps, found.weights, found.unequal) == (
        50 if recipe == "early stopping" else 68,
        True,
        [],
    )


def test_a_continued_run_and_one_trained_on_are_equal(origin: Path, tmp_path: Path) -> None:
    folder = kill(tmp_path / "killed", SPEC, 40, save_never)
    finish(folder, SPEC)
    assert_equal(artifacts(folder, tmp_path / "continued"), 68, 8, True)
    extend(tmp_path / "longer", origin, 4)
    assert_equal(artifacts(only(tmp_path / "longer"), tmp_path / "extended"), 136, 15, True)


def test_a_killed_run_is_equal_up_to_where_it_came(tmp_path: Path) -> None:
    assert_equal(artifacts(kill(tmp_path / "killed", SPEC, 40), tmp_path / "saved"), 40, 5, True)


def test_a_run_killed_before_it_was_evaluated_is_equal_up_to_where_it_came(tmp_path: Path) -> None:
    def die_before_the_evaluation_at_40() -> None:
        save_always()
        evaluation = Journal.evaluation
        Journal.evaluation = lambda self, step, measured: (
            die() if step == 40 else evaluation(self, step, measured)
        )

    found = verified(
        artifacts(
            kill(tmp_path / "killed", SPEC, 99, die_before_the_evaluation_at_40), tmp_path / "saved"
        )
    )
    assert (found.steps, found.unequal) == (40, [])


def test_a_run_that_diverged_is_equal(tmp_path: Path) -> None:
    def train() -> None:
        save_always()
        run(tmp_path, DIVERGING)

    assert in_child(train) == 0
    found = artifacts(only(tmp_path), tmp_path / "artifacts")
    assert np.isnan(pd.read_parquet(found / "curves.parquet")["train/loss"].iloc[-1])
    assert verified(found).unequal == []


@pytest.mark.parametrize(
    ("step", "column"),
    [
        (1, "train/loss"),
        (33, "train/loss"),
        (33, "train/lr"),
        (68, "train/accuracy"),
        (0, "val/loss"),
        (60, "val/accuracy"),
    ],
)
def test_one_altered_value_is_named_with_its_step(
    step: int, column: str, origin: Path, tmp_path: Path
) -> None:
    found = copied(origin, tmp_path / "altered")
    change(found, step, column)
    [unequal] = verified(found).unequal
    assert (unequal.step, unequal.key) == (step, column)
    assert str(unequal).startswith(f"step {step}: {column} was ")
    assert unequal.recorded > unequal.computed
    if step > 30:
        assert verified(found, 30).unequal == []


def test_several_altered_values_are_told_in_order(origin: Path, tmp_path: Path) -> None:
    found = copied(origin, tmp_path / "altered")
    for step, column in ((60, "val/loss"), (35, "train/loss"), (33, "train/lr"), (5, "train/loss")):
        change(found, step, column)
    unequal = verified(found).unequal
    assert [(one.step, one.key) for one in unequal] == [
        (5, "train/loss"),
        (33, "train/lr"),
        (35, "train/loss"),
        (60, "val/loss"),
    ]
    assert verify.largest(unequal) == max(unequal, key=lambda one: abs(one.recorded - one.computed))
    gone = journal.Unequal(7, "train/loss", float("nan"), 1.0)
    assert verify.largest([*unequal, gone]) == gone


def resave(found: Path, harm: Callable[[dict[str, Any]], None]) -> None:
    spec = experiments.parse((found / "spec.yaml").read_text(), "spec.yaml")
    state = checkpoint.load(found / "checkpoint.pt", spec)
    harm(state)
    checkpoint.save(found, spec, state)


def harm_weight(parameters: torch.Tensor) -> None:
    parameters[7] = torch.nextafter(parameters[7], torch.tensor(9.0))


def test_altered_weights_are_told(origin: Path, tmp_path: Path) -> None:
    found = copied(origin, tmp_path / "altered")
    resave(found, lambda state: harm_weight(state["parameters"]))
    result = verified(found)
    assert result.weights
    [unequal] = result.unequal
    assert (unequal.step, unequal.key) == (68, "parameter 7")
    assert verified(found, 60).unequal == []


def test_altered_best_weights_are_told(tmp_path: Path) -> None:
    found = ended(tmp_path, STOPPING)
    resave(found, lambda state: harm_weight(state["best"]["parameters"]))
    [unequal] = verified(found).unequal
    assert unequal.step == 20


def test_a_damaged_or_another_checkpoint_is_refused_in_one_line(
    origin: Path, tmp_path: Path
) -> None:
    found = copied(origin, tmp_path / "altered")
    spoil(found / "checkpoint.pt")
    with pytest.raises(StoreError, match=r"checkpoint\.pt is damaged: its checksum does not fit$"):
        verified(found)
    shutil.copy(
        ended(tmp_path / "other", experiment(seed=1)) / "checkpoint.pt", found / "checkpoint.pt"
    )
    with pytest.raises(StoreError, match=r"belongs to another spec: .*seed 1 there, 0 here$"):
        verified(found)


def test_what_differs_of_the_environment_is_listed(origin: Path, tmp_path: Path) -> None:
    found = copied(origin, tmp_path / "elsewhere")
    facts = json.loads((found / "environment.json").read_text())
    there = {
        **facts,
        "processor": "abacus",
        "git_diff": "-",
        "command": "other",
        "packages": {**facts["packages"], "torch": "2.0", "six": "0"},
    }
    (found / "environment.json").write_text(json.dumps(there))
    result = verified(found)
    assert result.unequal == []
    assert result.environment == {
        "processor": f"abacus -> {facts['processor']}",
        "git_diff": result.environment["git_diff"],
        "torch": f"2.0 -> {facts['packages']['torch']}",
    }
