"""Steps of MLPs on a CUDA device by the Triton kernels of kernels.py: the same arithmetic as
model.MLPGradient and optim.Update.

Shapes: K models, B batch, D inputs and H outputs of a layer, C = 10 classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fmnist import kernels
from fmnist import spec as specs

FEW = 4
"""Models, at most, whose tiles are small, so that there are enough to occupy the device."""
MOST_BATCH = 128
MOST_UNITS = 40_000
"""Outputs of the widest hidden layer for a batch. At 131,072 the library's products win."""


def fits(spec: specs.MLP, batch_size: int) -> bool:
    """Whether a model is so small that the number of kernels is what counts."""
    widest = max(spec.hidden, default=0)
    return batch_size <= MOST_BATCH and batch_size * widest <= MOST_UNITS


class Layer(NamedTuple):
    """A linear layer of all models, its inputs, and the error in its outputs."""

    inputs: int
    outputs: int
    weight: Tensor
    bias: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor
    x: Tensor
    """[K, B, D], or for the first layer all images [N, D], of which a batch is gathered."""
    error: Tensor
    """[K, B, H]."""


class FusedMLP:
    """The gradient and the update of K models for one batch size, on memory allocated once.

    `parameters` and `gradients` are as MLPGradient's, the models `stride` numbers apart; `carry` is
    optim.Update's. Products of float32 are made of three TF32 ones each where that is faster, which
    errs no more than float32 sums do (3e-7 beside 5e-7).
    """

    def __init__(
        self,
        activation: str,
        images: Tensor,
        batch: int,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        carry: float,
        precision: str,
    ) -> None:
        self.activation, self.batch, self.carry = activation, batch, carry
        self.models = len(parameters[0])
        self.stride = parameters[0].stride(0)
        self.product = "tf32" if precision == "tf32" else "tf32x3"
        self.outer = "tf32" if precision == "tf32" else "ieee"
        self.layers: list[Layer] = []
        x, inputs = images, specs.PIXELS
        for number in range(0, len(parameters), 2):
            weight, bias = parameters[number], parameters[number + 1]
            outputs = weight.shape[1]
            error = images.new_empty(self.models, batch, outputs)
            layer = Layer(
                inputs, outputs, weight, bias, gradients[number], gradients[number + 1], x, error
            )
            self.layers.append(layer)
            x, inputs = torch.empty_like(error), outputs

    def gradients(self, rows: Tensor, targets: Tensor, logits: Tensor) -> Iterator[int]:
        """Write the logits [K, B, C] and add the gradients of the images `rows` [K, B], given
        one-hot targets [K, B, C].

        Yields the only block of the update once it is done, as MLPGradient does each of its own.
        """
        self._errors(rows, targets, logits)
        for number in range(len(self.layers) - 1, -1, -1):
            self._gradient(number, rows, None, keeps=True)
        yield 0

    def step(self, rows: Tensor, targets: Tensor, logits: Tensor, rates: Tensor) -> None:
        """Write the logits, and update the parameters by plain SGD at the rates [K, 1]."""
        self._errors(rows, targets, logits)
        for number in range(len(self.layers) - 1, -1, -1):
            self._gradient(number, rows, rates, keeps=self.carry != 0)

    def _errors(self, rows: Tensor, targets: Tensor, logits: Tensor) -> None:
        last = len(self.layers) - 1
        for number in range(last):
            self._forward(number, rows)
        self._output(rows, targets, logits)
        for number in range(last - 1, 0, -1):
            self._backward(number)

    @property
    def _few(self) -> bool:
        return self.models <= FEW

    def _grid(self, width: int, tile: int, height: int, rows: int) -> tuple[int, int, int]:
        return triton.cdiv(width, tile), triton.cdiv(height, rows), self.models

    def _forward(self, number: int, rows: Tensor) -> None:
        layer, below = self.layers[number], self.layers[number + 1]
        tensors = (layer.x, rows, rows.stride(0), layer.weight, layer.bias, below.x)
        given: dict[str, Any] = {
            "batch": self.batch, "stride": self.stride,
            "inputs": layer.inputs, "outputs": layer.outputs,
            "gathered": number == 0, "activation": self.activation,
        }  # fmt: skip
        if self._few and self.product != "tf32":
            tile_d = 256 if layer.inputs > 256 else 128
            grid = self._grid(layer.outputs, 4, self.batch, 8)
            kernels.forward_sum[grid](*tensors, **given, TILE_B=8, TILE_H=4, TILE_D=tile_d)
            return
        tiles = (16, 16, 64, 3) if self._few else (32, 64, 32, 4)
        tile_b, tile_h, tile_d, stages = tiles
        grid = self._grid(layer.outputs, tile_h, self.batch, tile_b)
        kernels.forward[grid](
            *tensors, **given, precision=self.product,
            TILE_B=tile_b, TILE_H=tile_h, TILE_D=tile_d, num_stages=stages,
        )  # fmt: skip

    def _output(self, rows: Tensor, targets: Tensor, logits: Tensor) -> None:
        layer, below = self.layers[-1], self.layers[max(0, len(self.layers) - 2)]
        kernels.output[(triton.cdiv(self.batch, 16), self.models)](
            layer.x, rows, rows.stride(0), layer.weight, layer.bias,
            targets, targets.stride(0), logits, logits.stride(0), layer.error, below.error,
            self.batch, self.stride, layer.inputs, len(self.layers) == 1,
            self.activation, self.product, TILE_B=16, TILE_D=128,
        )  # fmt: skip

    def _backward(self, number: int) -> None:
        layer, below = self.layers[number], self.layers[number - 1]
        tile_b, tile_h, tile_d = (16, 128, 32) if self._few else (32, 32, 64)
        kernels.backward[self._grid(layer.inputs, tile_d, self.batch, tile_b)](
            layer.error, layer.weight, layer.x, below.error, self.batch, self.stride,
            layer.inputs, layer.outputs, self.activation, self.product,
            TILE_B=tile_b, TILE_H=tile_h, TILE_D=tile_d, num_stages=2,
        )  # fmt: skip

    def _gradient(self, number: int, rows: Tensor, rates: Tensor | None, keeps: bool) -> None:
        layer = self.layers[number]
        tile_d = 256 if layer.inputs > 512 and not self._few else 64
        kernels.gradient[self._grid(layer.inputs, tile_d, layer.outputs, 16)](
            layer.error, layer.x, rows, rows.stride(0), layer.weight, layer.bias,
            layer.weight_gradient, layer.bias_gradient, layer.bias if rates is None else rates,
            self.batch, self.stride, self.carry, 1 / self.batch,
            layer.inputs, layer.outputs, number == 0,
            self.carry != 0, keeps, rates is not None, self.outer,
            TILE_B=32, TILE_H=16, TILE_D=tile_d, num_stages=1,
        )  # fmt: skip


def failure(made: Iterable[FusedMLP]) -> str | None:
    """Compile kernels in a step on zeros; returns a line on what keeps them from working."""
    for step in made:
        like = step.layers[0].weight
        rows = torch.zeros(step.models, step.batch, dtype=torch.int64, device=like.device)
        targets = like.new_zeros(step.models, step.batch, specs.CLASSES)
        try:
            step.step(rows, targets, torch.zeros_like(targets), like.new_zeros(step.models, 1))
        except Exception as error:  # Triton's own, a C compiler's, or the device's
            return " ".join(str(error).split())[:200] or type(error).__name__
    return None
