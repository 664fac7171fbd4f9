"""Checkpoints: whole or not there, the one before kept, the run's own or refused, and never code."""

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from fmnist import checkpoint, data, engine
from fmnist import spec as specs
from fmnist.errors import StoreError

DATA = specs.Data(holdout=59_900)


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return data.load(DATA, REPOSITORY, engine.device(specs.Compute(device="cpu")))


def experiment(seed: int = 0, **optimizer: Any) -> specs.ExperimentSpec:
    return specs.ExperimentSpec(
        name="saved",
        data=DATA,
        model=specs.MLP(hidden=(8,)),
        optimizer=specs.AdamW() if not optimizer else specs.SGD(**optimizer),
        train=specs.Train(batch_size=32, epochs=3, seed=seed),
        compute=specs.Compute(device="cpu"),
    )


def trained(spec: specs.ExperimentSpec, dataset: data.Dataset) -> dict[str, Any]:
    trainer = engine.Engine([spec], dataset)
    trainer.train(7)
    return trainer.state()


@pytest.fixture(scope="module")
def state(dataset: data.Dataset) -> dict[str, Any]:
    return trained(experiment(), dataset)


def assert_same_bits(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    assert found["step"] == wanted["step"]
    assert torch.equal(found["parameters"], wanted["parameters"])
    assert set(found["buffers"]) == set(wanted["buffers"])
    assert all(
        torch.equal(found["buffers"][name], buffer) for name, buffer in wanted["buffers"].items()
    )


def write(path: Path, content: bytes) -> None:
    """A file as `save` leaves it: the content and its digest."""
    path.write_bytes(content + hashlib.sha256(content).digest())


def pack(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


# ---- saved and loaded


SPECS = [experiment(lr=0.1), experiment(lr=0.1, momentum=0.9), experiment()]


@pytest.mark.parametrize("spec", SPECS, ids=["sgd", "momentum", "adamw"])
def test_a_state_comes_back_bit_for_bit(
    spec: specs.ExperimentSpec, tmp_path: Path, dataset: data.Dataset
) -> None:
    state = trained(spec, dataset)
    checkpoint.save(tmp_path, spec, state)
    assert_same_bits(checkpoint.load(tmp_path / "checkpoint.pt", spec), state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_best_weights_come_back_too(tmp_path: Path, state: dict[str, Any]) -> None:
    best = {"step": 3, "parameters": state["parameters"] + 1}
    for saved in (best, None):
        checkpoint.save(tmp_path, experiment(), {**state, "best": saved})
        loaded = checkpoint.load(tmp_path / "checkpoint.pt", experiment())["best"]
        assert (loaded and loaded["step"]) == (saved and saved["step"])
    checkpoint.save(tmp_path, experiment(), {**state, "best": best})
    assert torch.equal(
        checkpoint.load(tmp_path / "checkpoint.pt", experiment())["best"]["parameters"],
        best["parameters"],
    )


def test_torch_reads_a_saved_file_by_itself(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint.save(tmp_path, experiment(), state)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(content["parameters"], state["parameters"])
    assert (content["spec"], content["fingerprint"]) == (
        experiment().flat(),
        experiment().fingerprint,
    )


def test_a_saved_file_ends_with_the_digest_of_the_rest(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    checkpoint.save(tmp_path, experiment(), state)
    written = (tmp_path / "checkpoint.pt").read_bytes()
    assert written[-32:] == hashlib.sha256(written[:-32]).digest()


# ---- refused


def test_another_specs_checkpoint_is_refused_by_the_fields_that_differ(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(tmp_path, experiment(), state)
    with pytest.raises(StoreError, match=r"another spec: train\.seed 0 there, 1 here$"):
        checkpoint.load(path, experiment(seed=1))
    longer = experiment().train.model_copy(update={"epochs": 4})
    with pytest.raises(
        StoreError, match=r"model\.hidden \[8\] there, \[9\] here, train\.epochs 3 there, 4 here$"
    ):
        checkpoint.load(
            path, experiment().model_copy(update={"train": longer, "model": specs.MLP(hidden=(9,))})
        )
    with pytest.raises(StoreError, match=r"optimizer\.momentum None there, 0\.9 here"):
        checkpoint.load(path, experiment(lr=0.1, momentum=0.9))


def test_what_does_not_define_a_run_may_differ(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint.save(tmp_path, experiment(), state)
    other = {
        "name": "another-name",
        "question": "why?",
        "compute": specs.Compute(device="cpu", threads=2),
    }
    assert (
        checkpoint.load(tmp_path / "checkpoint.pt", experiment().model_copy(update=other))["step"]
        == 7
    )


def places(size: int) -> list[int]:
    """Twenty places in a file, its first and its last byte among them."""
    return [round(i * (size - 1) / 19) for i in range(20)]


def test_a_file_cut_short_anywhere_is_damaged(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(tmp_path, experiment(), state)
    written = path.read_bytes()
    for length in [*places(len(written)), 31, 32, 33, len(written) - 32]:
        path.write_bytes(written[:length])
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.load(path, experiment())
    path.write_bytes(written + b"\0")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(path, experiment())


def test_a_byte_flipped_anywhere_is_damage(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(tmp_path, experiment(), state)
    written = path.read_bytes()
    for place in places(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 0x40]) + written[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.load(path, experiment())
    path.write_bytes(written)
    assert checkpoint.load(path, experiment())["step"] == 7


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_file_with_code_in_it_is_refused_and_not_run(
    form: str, tmp_path: Path, state: dict[str, Any]
) -> None:
    spec, path, trap = experiment(), tmp_path / "checkpoint.pt", tmp_path / "trap"
    content = {"fingerprint": spec.fingerprint, "spec": spec.flat(), **state, "more": Bait(trap)}
    write(path, pack(content) if form == "torch" else pickle.dumps(content["more"], protocol=2))
    with pytest.raises(ValueError, match="is no checkpoint of this program"):
        checkpoint.load(path, spec)
    assert not trap.exists()
    with contextlib.suppress(
        RuntimeError
    ):  # a bare pickle is no checkpoint, but is unpickled before that is seen
        torch.load(path, weights_only=False)
    assert trap.exists(), "the bait does nothing, so its refusal proves nothing"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"text", id="text"),
        pytest.param(pack([1]), id="a list"),
        pytest.param(pack({"step": 1}), id="no spec"),
    ],
)
def test_a_whole_file_of_something_else_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint.pt", content)
    with pytest.raises(ValueError, match="is no checkpoint of this program"):
        checkpoint.load(tmp_path / "checkpoint.pt", experiment())


def crafted(state: dict[str, Any]) -> dict[str, Any]:
    """States that are whole files of the right spec, and not what an engine of it has."""
    parameters, buffers = state["parameters"], state["buffers"]
    return {
        "no step": {key: value for key, value in state.items() if key != "step"},
        "no buffers": {key: value for key, value in state.items() if key != "buffers"},
        "a step of text": {**state, "step": "7"},
        "a step of truth": {**state, "step": True},
        "a step before the first": {**state, "step": -1},
        "a step behind the last": {**state, "step": 13},
        "parameters of another size": {**state, "parameters": parameters[1:]},
        "parameters in rows": {**state, "parameters": parameters[None]},
        "parameters of another type": {**state, "parameters": parameters.double()},
        "sparse parameters": {**state, "parameters": parameters.to_sparse()},
        "no tensor": {**state, "parameters": [0.0] * len(parameters)},
        "a buffer too few": {**state, "buffers": {"mean": buffers["mean"]}},
        "a buffer too many": {**state, "buffers": {**buffers, "momentum": parameters}},
        "a buffer of another size": {**state, "buffers": {**buffers, "mean": parameters[1:]}},
        "buffers in a list": {**state, "buffers": [*buffers.values()]},
        "best weights without a step": {**state, "best": {"parameters": parameters}},
        "best weights of another size": {
            **state,
            "best": {"step": 3, "parameters": parameters[1:]},
        },
        "best weights in words": {**state, "best": "these"},
    }


def test_a_whole_file_with_another_state_is_no_checkpoint(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    for name, wrong in crafted(state).items():
        checkpoint.save(tmp_path, experiment(), wrong)
        with pytest.raises(ValueError, match="is no checkpoint of this program") as raised:
            checkpoint.load(tmp_path / "checkpoint.pt", experiment())
        assert "\n" not in str(raised.value), name
    for spec in ("text", None, ["a"]):
        content = {"fingerprint": "another", "spec": spec, **state}
        write(tmp_path / "checkpoint.pt", pack(content))
        with pytest.raises((ValueError, StoreError)) as raised:
            checkpoint.load(tmp_path / "checkpoint.pt", experiment())
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "checkpoint.pt")
    with pytest.raises(OSError, match="no regular file"):
        checkpoint.load(tmp_path / "checkpoint.pt", experiment())


def test_a_planted_link_is_replaced_and_not_written_through(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    target = tmp_path / "precious"
    target.write_text("as it was")
    (tmp_path / "checkpoint.pt.partial").symlink_to(target)
    checkpoint.save(tmp_path, experiment(), state)
    assert target.read_text() == "as it was"
    assert_same_bits(checkpoint.load(tmp_path / "checkpoint.pt", experiment()), state)
    assert not (tmp_path / "checkpoint.pt").is_symlink()


def test_a_checkpoint_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "checkpoint.pt", experiment())


# ---- replaced


def test_the_one_before_is_kept_and_no_other(tmp_path: Path, state: dict[str, Any]) -> None:
    for step in (7, 8, 9):
        checkpoint.save(tmp_path, experiment(), {**state, "step": step})
    assert checkpoint.load(tmp_path / "checkpoint.pt", experiment())["step"] == 9
    assert checkpoint.load(tmp_path / "checkpoint.previous.pt", experiment())["step"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.previous.pt",
        "checkpoint.pt",
    ]


def test_a_stale_partial_file_changes_nothing(tmp_path: Path, state: dict[str, Any]) -> None:
    spec, path = experiment(), tmp_path / "checkpoint.pt"
    checkpoint.save(tmp_path, spec, state)
    partial = tmp_path / "checkpoint.pt.partial"
    partial.write_bytes(path.read_bytes()[:500])
    assert_same_bits(checkpoint.load(path, spec), state)
    later = {**state, "step": 8}
    checkpoint.save(tmp_path, spec, later)
    assert_same_bits(checkpoint.load(path, spec), later)
    assert not partial.exists()


def test_a_save_that_breaks_off_leaves_the_good_file(tmp_path: Path, state: dict[str, Any]) -> None:
    spec = experiment()
    checkpoint.save(tmp_path, spec, state)
    with pytest.raises(Exception, match="lambda"):
        checkpoint.save(tmp_path, spec, {**state, "unpicklable": lambda: None})
    assert_same_bits(checkpoint.load(tmp_path / "checkpoint.pt", spec), state)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("renames", "newest", "previous"), [(0, 8, 7), (1, None, 8), (2, 9, 8)])
def test_a_kill_at_any_rename_leaves_a_whole_checkpoint(
    renames: int,
    newest: int | None,
    previous: int,
    tmp_path: Path,
    state: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in (7, 8):
        checkpoint.save(tmp_path, experiment(), {**state, "step": step})
    rename, done = Path.replace, iter(range(3))

    def kill_after(path: Path, target: Path) -> Path:
        if next(done) == renames:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", kill_after)
    with pytest.raises(Killed) if renames < 2 else contextlib.nullcontext():
        checkpoint.save(tmp_path, experiment(), {**state, "step": 9})
    monkeypatch.undo()
    if newest is None:
        assert not (tmp_path / "checkpoint.pt").exists()
    else:
        assert checkpoint.load(tmp_path / "checkpoint.pt", experiment())["step"] == newest
    assert checkpoint.load(tmp_path / "checkpoint.previous.pt", experiment())["step"] == previous
    checkpoint.save(tmp_path, experiment(), {**state, "step": 10})
    assert checkpoint.load(tmp_path / "checkpoint.pt", experiment())["step"] == 10


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, experiment(), state)
    done, fsync, rename = [], os.fsync, Path.replace

    def note_fsync(file: int) -> None:
        fsync(file)
        done.append(("on the disk", os.fstat(file).st_ino, os.fstat(file).st_size))

    def note_rename(path: Path, target: Path) -> Path:
        done.append((target.name, path.stat().st_ino, path.stat().st_size))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_rename)
    checkpoint.save(tmp_path, experiment(), {**state, "step": 8})
    flushed, _, named = done
    assert [what for what, *_ in done] == ["on the disk", "checkpoint.previous.pt", "checkpoint.pt"]
    assert (
        flushed[1:]
        == named[1:]
        == ((tmp_path / "checkpoint.pt").stat().st_ino, (tmp_path / "checkpoint.pt").stat().st_size)
    )
