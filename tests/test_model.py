"""The models: the notebook's network bit for bit, the explicit gradient against autograd, and what is served."""

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor, nn
from torch.nn import functional

from fmnist import data, engine, model
from fmnist import spec as specs

HIDDEN = [(), (16,), (300, 100), (32, 24, 16)]


@pytest.fixture(scope="module")
def images() -> data.Split:
    return data.load(
        specs.Data(), REPOSITORY, engine.device(specs.Compute(device="cpu"))
    ).validation


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """The same images as they come, uint8 [N, 28, 28]."""
    return torch.from_numpy(data.raw_images(REPOSITORY, 1_000))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_default_model_is_the_notebooks(seed: int, images: data.Split) -> None:
    ours = model.build(specs.MLP(), seed)
    torch.manual_seed(seed)
    layers = (
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    theirs = nn.Sequential(*layers)
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(our, their)
    batch = images.images[:9].view(-1, 1, 28, 28)
    assert torch.equal(ours(batch), theirs(batch))


@pytest.mark.parametrize(
    ("activation", "module"), [("relu", nn.ReLU), ("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)]
)
def test_the_activation_lies_between_the_layers(activation: str, module: type[nn.Module]) -> None:
    layers = model.build(specs.MLP(hidden=(5, 4), activation=activation), 0).layers
    assert [type(layer) for layer in layers] == [nn.Linear, module, nn.Linear, module, nn.Linear]


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model.build(specs.MLP(), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_parameter_count_is_the_modules(hidden: tuple[int, ...]) -> None:
    spec = specs.MLP(hidden=hidden)
    assert spec.parameters == sum(
        parameter.numel() for parameter in model.build(spec, 0).parameters()
    )


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float64, 1e-12, 1e-16), (torch.float32, 1e-5, 5e-7)],
    ids=["double", "single"],
)
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(
    ("batch", "carry", "pieces"), [(1, 0.0, 1), (32, 0.0, 3), (32, 0.7, 1), (5, 0.7, 3)]
)
def test_the_explicit_gradient_is_autograds(
    batch: int,
    carry: float,
    pieces: int,
    hidden: tuple[int, ...],
    activation: str,
    dtype: torch.dtype,
    rtol: float,
    atol: float,
    images: data.Split,
) -> None:
    modules = [
        model.build(specs.MLP(hidden=hidden, activation=activation), seed).to(dtype)
        for seed in range(3)
    ]
    parameters = [
        torch.stack([parameter.detach() for parameter in same])
        for same in zip(*(m.parameters() for m in modules), strict=True)
    ]
    gradients = [
        torch.full_like(parameter, 0.01 if carry else torch.nan) for parameter in parameters
    ]
    x = torch.empty(3, batch, 784, dtype=dtype)
    explicit = model.MLPGradient(activation, x, parameters, gradients, carry, pieces)
    modules = [
        module.double() for module in modules
    ]  # autograd in double precision, so that its own rounding is not in the difference
    # The second and third batch meet what the one before left in the memory that is kept; each model has images of its own.
    for first in (0, batch, 2 * batch):
        chosen = [slice(first + 100 * k, first + 100 * k + batch) for k in range(3)]
        x.copy_(torch.stack([images.images[rows] for rows in chosen]))
        y = torch.stack([images.labels[rows] for rows in chosen])
        logits, before = (
            torch.full((3, batch, 10), torch.nan, dtype=dtype),
            [gradient.clone() for gradient in gradients],
        )
        assert list(explicit(functional.one_hot(y, 10).to(dtype), logits)) == [*range(pieces)][::-1]
        for k, module in enumerate(modules):
            expected = module(x[k].double())
            torch.testing.assert_close(logits[k].double(), expected, rtol=rtol, atol=10 * atol)
            wanted = torch.autograd.grad(
                functional.cross_entropy(expected, y[k]), list(module.parameters())
            )
            for ours, theirs, old in zip(gradients, wanted, before, strict=True):
                total = theirs + carry * old[k].double() if carry else theirs
                torch.testing.assert_close(ours[k].double(), total, rtol=rtol, atol=atol)
                assert (
                    ours[k].double() - total
                ).norm() <= rtol / 10 * total.norm()  # a single number near zero may be off by more


@pytest.mark.parametrize("normalization", ["unit", "standard"])
@pytest.mark.parametrize("batch", [1, 3, 257])
def test_served_probabilities_are_the_networks(
    batch: int, normalization: str, pixels: Tensor
) -> None:
    network = model.build(specs.MLP(), 0)
    served = model.Servable(network, *data.normalization(specs.Data(normalization=normalization)))
    given = pixels[:batch]
    probabilities = served(given)
    unit = given.double() / 255
    normalised = unit if normalization == "unit" else (unit - data.MEAN) / data.STD
    logits = network.double()(normalised.unsqueeze(1))
    assert probabilities.shape == (batch, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(batch), rtol=0, atol=1e-6)
    assert torch.equal(probabilities.argmax(1), logits.argmax(1))
    torch.testing.assert_close(probabilities.double(), logits.softmax(1), rtol=0, atol=1e-6)
