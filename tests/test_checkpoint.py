"""Checkpoints: whole or not there, the run's own or refused, and never code."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from fmnist import checkpoint, data, engine
from fmnist import spec as specs

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
    )


def trained(spec: specs.ExperimentSpec, dataset: data.Dataset) -> dict[str, Any]:
    trainer = engine.Engine(spec, dataset)
    trainer.train(7)
    return trainer.state()


def assert_same_bits(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    assert found["step"] == wanted["step"]
    assert torch.equal(found["parameters"], wanted["parameters"])
    assert set(found["buffers"]) == set(wanted["buffers"])
    assert all(torch.equal(found["buffers"][name], buffer) for name, buffer in wanted["buffers"].items())


SPECS = [experiment(lr=0.1), experiment(lr=0.1, momentum=0.9), experiment()]


@pytest.mark.parametrize("spec", SPECS, ids=["sgd", "momentum", "adamw"])
def test_a_state_comes_back_bit_for_bit(spec: specs.ExperimentSpec, tmp_path: Path, dataset: data.Dataset) -> None:
    state = trained(spec, dataset)
    checkpoint.save(tmp_path / "checkpoint.pt", spec, state)
    loaded = checkpoint.load(tmp_path / "checkpoint.pt", spec)
    assert_same_bits(loaded, state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_another_specs_checkpoint_is_refused(tmp_path: Path, dataset: data.Dataset) -> None:
    spec, path = experiment(), tmp_path / "checkpoint.pt"
    checkpoint.save(path, spec, trained(spec, dataset))
    with pytest.raises(ValueError, match="another spec"):
        checkpoint.load(path, experiment(seed=1))
    renamed = spec.model_copy(update={"name": "the-same-run-by-another-name"})
    assert checkpoint.load(path, renamed)["step"] == 7


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_file_with_code_in_it_is_refused_and_not_run(form: str, tmp_path: Path, dataset: data.Dataset) -> None:
    spec, path, trap = experiment(), tmp_path / "checkpoint.pt", tmp_path / "trap"
    content = {"fingerprint": spec.fingerprint, **trained(spec, dataset), "more": Bait(trap)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["more"], protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(path, spec)
    assert not trap.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is no checkpoint, but is unpickled before that is seen
        torch.load(path, weights_only=False)
    assert trap.exists(), "the bait does nothing, so its refusal proves nothing"


def test_a_stale_partial_file_changes_nothing(tmp_path: Path, dataset: data.Dataset) -> None:
    spec, path = experiment(), tmp_path / "checkpoint.pt"
    state = trained(spec, dataset)
    checkpoint.save(path, spec, state)
    partial = tmp_path / "checkpoint.pt.partial"
    partial.write_bytes(path.read_bytes()[:500])
    assert_same_bits(checkpoint.load(path, spec), state)
    later = {**state, "step": 8}
    checkpoint.save(path, spec, later)
    assert_same_bits(checkpoint.load(path, spec), later)
    assert not partial.exists()


def test_a_save_that_breaks_off_leaves_the_good_file(tmp_path: Path, dataset: data.Dataset) -> None:
    spec, path = experiment(), tmp_path / "checkpoint.pt"
    state = trained(spec, dataset)
    checkpoint.save(path, spec, state)
    with pytest.raises(Exception, match="lambda"):
        checkpoint.save(path, spec, {**state, "unpicklable": lambda: None})
    assert_same_bits(checkpoint.load(path, spec), state)
