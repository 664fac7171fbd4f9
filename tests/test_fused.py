"""The Triton kernels of a step against PyTorch's operations, by Triton's interpreter: the arithmetic, and every index of it."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_engine import HOLDOUT, STACKS, experiment, members

from fmnist import data, engine
from fmnist import spec as specs

if torch.cuda.is_available():
    pytest.skip("the kernels run on the device there", allow_module_level=True)
pytest.importorskip("triton")

from fmnist import fused, kernels


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    spec = specs.Data(holdout=HOLDOUT)
    return data.load(spec, REPOSITORY, engine.device(specs.Compute(device="cpu")))


def assert_equal_steps(ours: engine.Engine, plain: engine.Engine, stop: int) -> None:
    """Equal but for the rounding of sums, in what is measured, in the parameters and in the buffers."""
    for found, wanted in zip(ours.train(stop), plain.train(stop), strict=True):
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-4)
        np.testing.assert_allclose(found.accuracy, wanted.accuracy)
    for name in plain.update.buffers:
        buffers = (each.update.buffers[name] for each in (ours, plain))
        torch.testing.assert_close(*buffers, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.parameters, plain.parameters, rtol=1e-3, atol=1e-5)


def small(stack: str) -> list[specs.ExperimentSpec]:
    """Two models that the interpreter is done with in a second; 42 steps an epoch, the last of 16 images."""
    sections = {
        "model": specs.MLP(hidden=(6, 5)),
        "train": specs.Train(batch_size=24, epochs=5),
    }
    return [spec.model_copy(update=sections) for spec in members(stack)[:2]]


@pytest.mark.parametrize("stack", STACKS)
def test_every_optimizer(stack: str, dataset: data.Dataset) -> None:
    """The first step, and a short batch's after it."""
    ours, plain = (engine.Engine(small(stack), dataset) for _ in range(2))
    ours.fuse_steps()
    assert ours.fused
    assert_equal_steps(ours, plain, 1)
    ours.step = plain.step = 41
    assert_equal_steps(ours, plain, 42)


@pytest.mark.parametrize(
    ("hidden", "activation"),
    [((), "relu"), ((17,), "tanh"), ((9, 33), "sigmoid"), ((6, 65, 7), "relu")],
)
def test_every_shape(hidden: tuple[int, ...], activation: str, dataset: data.Dataset) -> None:
    """No hidden layer, widths that fill no tile or several; and a batch of more than one tile."""
    model = specs.MLP(hidden=hidden, activation=activation)
    train = specs.Train(batch_size=37, epochs=5)
    ours, plain = (engine.Engine([experiment(model=model, train=train)], dataset) for _ in range(2))
    ours.fuse_steps()
    assert ours.fused
    assert_equal_steps(ours, plain, 1)


def test_many_models(dataset: data.Dataset) -> None:
    """More than FEW, which have tiles and a product of their own."""
    optimizer = specs.SGD(lr=0.05, momentum=0.9)
    train = specs.Train(batch_size=20, epochs=5)
    chosen = [
        experiment(
            model=specs.MLP(hidden=(6, 5)),
            optimizer=optimizer,
            train=train.model_copy(update={"seed": seed}),
        )
        for seed in range(fused.FEW + 1)
    ]
    ours, plain = (engine.Engine(chosen, dataset) for _ in range(2))
    ours.fuse_steps()
    assert ours.fused
    assert_equal_steps(ours, plain, 1)


def test_a_gradient_without_its_update_leaves_the_parameters(dataset: data.Dataset) -> None:
    ours, plain = (engine.Engine(small("momentum"), dataset) for _ in range(2))
    ours.fuse_steps()
    before = ours.parameters.clone()
    for _ in range(2):  # the second adds to the velocity of the first
        (logits, _), (wanted, _) = ours.gradients(1), plain.gradients(1)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-6)
    gradients = (ours.update.gradients, plain.update.gradients)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours.parameters, before)


@pytest.mark.parametrize(
    ("batch", "hidden", "fits"),
    [
        (32, (300, 100), True),
        (128, (300, 100), True),
        (32, (1_024, 1_024), True),
        (128, (1_024, 1_024), False),
        (129, (10,), False),
        (1, (), True),
    ],
)
def test_large_models_are_left_to_the_library(
    batch: int, hidden: tuple[int, ...], fits: bool
) -> None:
    assert fused.fits(specs.MLP(hidden=hidden), batch) == fits


def test_kernels_that_do_not_compile_are_told_and_not_used(
    dataset: data.Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(
                "Failed to find C compiler.\nPlease specify via CC environment variable."
            )

    monkeypatch.setattr(kernels, "output", Broken())
    ours, plain = (engine.Engine([experiment()], dataset) for _ in range(2))
    ours.fuse_steps()
    assert not ours.fused
    [line] = caplog.messages
    assert "don't compile, so steps take longer: Failed to find C compiler. Please specify" in line
    for stop in (1, 10):
        np.testing.assert_array_equal(ours.train(stop)[0].loss, plain.train(stop)[0].loss)
    assert torch.equal(ours.parameters, plain.parameters)
