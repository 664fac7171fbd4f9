"""The models: plain nn.Modules to initialise, train, export and serve; and the MLP's explicit gradient.

Shapes: K models, B batch, P = 784 pixels, H units of a layer, C = 10 classes.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from fmnist import spec as specs

aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class MLP(nn.Module):
    """Flatten, then Linear layers with an activation between them; images [B, 1, 28, 28] to logits [B, C]."""

    def __init__(self, spec: specs.MLP) -> None:
        super().__init__()
        self.activation = spec.activation
        widths = [specs.PIXELS, *spec.hidden, specs.CLASSES]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[spec.activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images.flatten(1))
        return logits


def build(spec: specs.Model, seed: int) -> nn.Module:
    """The model of a spec, initialised as its modules initialise themselves after torch.manual_seed(seed)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match spec:
            case specs.MLP():
                return MLP(spec)


class Servable(nn.Module):
    """Raw uint8 images [B, 28, 28] to class probabilities [B, C]: what is exported, so that no caller has to normalise."""

    def __init__(self, network: nn.Module, shift: float, scale: float) -> None:
        super().__init__()
        self.network = network
        self.shift, self.scale = shift, scale

    def forward(self, images: Tensor) -> Tensor:
        return torch.softmax(
            self.network(((images.float() - self.shift) * self.scale).unsqueeze(1)), dim=1
        )


class MLPGradient:
    """The MLP's forward and backward pass written out, for K models at once and one batch size, on memory allocated once.

    Autograd records, allocates and frees for every batch, which costs about as much as the arithmetic of layers this small.
    Hidden layers and errors lie with the units first, [K, H, B]: the weights, the larger factor, are then multiplied as they lie, a seventh faster.
    `x` [K, B, P] is the memory of the batch; `parameters` and `gradients` are in the order of MLP.parameters(): weight [K, H, H'], bias [K, H], ...
    A gradient is added to `carry` times what is there. The first layer's, the largest, is made in `pieces`, which stay in a processor's cache.
    """

    def __init__(
        self,
        activation: str,
        x: Tensor,
        parameters: list[Tensor],
        gradients: list[Tensor],
        carry: float,
        pieces: int,
    ) -> None:
        self.weights, self.biases = (
            parameters[::2],
            [bias.unsqueeze(2) for bias in parameters[1::2]],
        )
        self.weight_gradients, self.bias_gradients = (
            gradients[::2],
            [gradient.unsqueeze(2) for gradient in gradients[1::2]],
        )
        models, batch, _ = x.shape
        self.ones, self.factors = x.new_ones(models, batch, 1), {"beta": carry, "alpha": 1 / batch}
        self.output_error = x.new_empty(models, batch, specs.CLASSES)
        self.errors = [
            x.new_empty(models, weight.shape[1], batch) for weight in self.weights[:-1]
        ] + [self.output_error.mT]
        self.hidden = [torch.empty_like(error) for error in self.errors[:-1]]
        # views are made once: to make one costs a tenth of a small product
        self.layers, self.rows = [x.mT, *self.hidden], [x, *(hidden.mT for hidden in self.hidden)]
        self.output_bias, self.transposed = (
            self.biases[-1].mT,
            [weight.mT for weight in self.weights],
        )
        self.pieces = [
            *zip(
                self.weight_gradients[0].chunk(pieces, 1),
                self.errors[0].chunk(pieces, 1),
                strict=True,
            )
        ]
        self.activate, self.backward = _IN_PLACE[activation]

    def __call__(self, targets: Tensor, logits: Tensor) -> Iterator[int]:
        """Write the logits [K, B, C] and add the gradients of each mean cross-entropy, given one-hot targets [K, B, C].

        Yields the index of each piece of the first layer's gradient as it is done, the last first; with that, those of the layers above are.
        """
        for layer, hidden in enumerate(self.hidden):
            self.activate(
                torch.baddbmm(
                    self.biases[layer], self.weights[layer], self.layers[layer], out=hidden
                )
            )
        torch.baddbmm(self.output_bias, self.rows[-1], self.transposed[-1], out=logits)
        torch.softmax(logits, -1, out=self.output_error).sub_(targets)
        for layer in range(len(self.weights) - 1, -1, -1):
            error = self.errors[layer]
            self.bias_gradients[layer].baddbmm_(error, self.ones, **self.factors)
            if layer:
                self.weight_gradients[layer].baddbmm_(error, self.rows[layer], **self.factors)
                below = torch.bmm(self.transposed[layer], error, out=self.errors[layer - 1])
                self.backward(below, self.hidden[layer - 1])
        for piece in range(len(self.pieces) - 1, -1, -1):
            gradient, error = self.pieces[piece]
            gradient.baddbmm_(error, self.rows[0], **self.factors)
            yield piece


# Each activation in place, and its derivative as a function of its own output, with which it multiplies an error in place.
_IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (
        torch.relu_,
        lambda error, output: aten.threshold_backward.grad_input(
            error, output, 0, grad_input=error
        ),
    ),
    "tanh": (
        torch.tanh_,
        lambda error, output: aten.tanh_backward.grad_input(error, output, grad_input=error),
    ),
    "sigmoid": (
        torch.sigmoid_,
        lambda error, output: aten.sigmoid_backward.grad_input(error, output, grad_input=error),
    ),
}
