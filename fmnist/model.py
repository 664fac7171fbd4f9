"""The models: plain nn.Modules to initialise, train, export and serve; and the MLP's explicit gradient.

Shapes: K models, B batch, P = 784 pixels, H units of a layer, C = 10 classes.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from fmnist import spec as specs

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


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
        return torch.softmax(self.network(((images.float() - self.shift) * self.scale).unsqueeze(1)), dim=1)


class MLPGradient:
    """The MLP's forward and backward pass written out, for K models at once and one batch size, on memory allocated once.

    Autograd records, allocates and frees for every batch, which costs about as much as the arithmetic of layers
    this small. `parameters` and `gradients` are in the order of MLP.parameters(): weight [K, H, H'], bias [K, H], ...
    The hidden activations and errors belong to this object and are overwritten by each call; a gradient is added to `carry` times what is there.
    """

    def __init__(self, activation: str, parameters: list[Tensor], gradients: list[Tensor], batch: int, carry: float) -> None:
        self.weights, self.biases = parameters[::2], [bias.unsqueeze(1) for bias in parameters[1::2]]
        self.weight_gradients, self.bias_gradients = gradients[::2], [gradient.unsqueeze(1) for gradient in gradients[1::2]]
        self.ones, self.carry = self.biases[0].new_ones(len(self.biases[0]), 1, batch), carry
        self.errors = [weight.new_empty(len(weight), batch, weight.shape[1]) for weight in self.weights]
        self.transposed = [weight.mT for weight in self.weights]  # views made once: to make one costs a tenth of a small product
        self.errors_transposed = [error.mT for error in self.errors]
        self.hidden = [torch.empty_like(error) for error in self.errors[:-1]]
        self.batch = batch
        self.activate, self.backward = _IN_PLACE[activation]

    def __call__(self, x: Tensor, targets: Tensor, logits: Tensor) -> None:
        """Write the logits [K, B, C] and add the gradients of each mean cross-entropy, given x [K, B, P] and one-hot targets [K, B, C]."""
        inputs = [x, *self.hidden]
        for layer, hidden in enumerate(self.hidden):
            self.activate(torch.baddbmm(self.biases[layer], inputs[layer], self.transposed[layer], out=hidden))
        torch.baddbmm(self.biases[-1], inputs[-1], self.transposed[-1], out=logits)
        torch.softmax(logits, -1, out=self.errors[-1]).sub_(targets)
        for layer in range(len(self.weights) - 1, -1, -1):
            error = self.errors[layer]
            self.weight_gradients[layer].baddbmm_(self.errors_transposed[layer], inputs[layer], beta=self.carry, alpha=1 / self.batch)
            self.bias_gradients[layer].baddbmm_(self.ones, error, beta=self.carry, alpha=1 / self.batch)
            if layer:
                below = torch.bmm(error, self.weights[layer], out=self.errors[layer - 1])
                self.backward(below, inputs[layer])


def _relu_backward(error: Tensor, output: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(error, output, 0, grad_input=error)


def _tanh_backward(error: Tensor, output: Tensor) -> None:
    torch.ops.aten.tanh_backward.grad_input(error, output, grad_input=error)


def _sigmoid_backward(error: Tensor, output: Tensor) -> None:
    torch.ops.aten.sigmoid_backward.grad_input(error, output, grad_input=error)


# Each activation in place, and its derivative as a function of its own output.
_IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None]]] = {
    "relu": (torch.relu_, _relu_backward),
    "tanh": (torch.tanh_, _tanh_backward),
    "sigmoid": (torch.sigmoid_, _sigmoid_backward),
}
