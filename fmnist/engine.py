"""The training engine: steps, evaluation, state in and out; the only file that knows threads and devices.

Shapes: S steps of a segment, K models, B batch, N images, P = 784 pixels, C = 10 classes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fmnist import data, model, optim
from fmnist import spec as specs
from fmnist.errors import SpecError

EVALUATION_BATCH = 1_000
PIECE = 80_000
"""Parameters, at most, of the first layer that a CPU updates at once: 0.6 MB with their velocity, which its cache holds (benchmarks/step.py)."""
CUDA_STACK = 64


@dataclass(frozen=True)
class Curves:
    """What a segment's steps measured, each [S]: the batch before its update, and the learning rate of that update."""

    loss: np.ndarray
    accuracy: np.ndarray
    lr: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy over the images."""
    accuracy: float
    logits: np.ndarray
    """[N, C] float32."""


def device(compute: specs.Compute, precision: str = "float32") -> torch.device:
    """The device a spec asks for, with the thread count set; raises SpecError where there is none that can do it."""
    torch.set_num_threads(compute.threads)
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise SpecError(
            "compute.device: cuda was asked for and this machine has no usable CUDA device; give cpu or auto"
        )
    if compute.device == "cpu" or not torch.cuda.is_available():
        if precision == "tf32":
            raise SpecError(
                "train.precision: tf32 is an arithmetic of CUDA devices and this run is on the CPU; give float32 or bf16"
            )
        return torch.device("cpu")
    return torch.device("cuda")


def stack_size(compute: specs.Compute, device: torch.device) -> int:
    """How many runs to train in the same steps; on the CPU one, where the recipe's model loses by more (benchmarks/stacks.py)."""
    if isinstance(compute.stack, int):
        return compute.stack
    return CUDA_STACK if compute.stack == "auto" and device.type == "cuda" else 1


class Engine:
    """Trains K models of one shape in the same steps on a dataset; {step, parameters, buffers} is the whole state of each.

    Model k is what an engine of its spec alone would train, but for the rounding of sums: no operation mixes two of them,
    so that one that diverges leaves the others alone. Raises ValueError where the specs differ in shape.
    """

    def __init__(self, members: Sequence[specs.ExperimentSpec], dataset: data.Dataset) -> None:
        self.specs, self.dataset, self.step = tuple(members), dataset, 0
        if len({spec.shape for spec in members}) != 1:
            raise ValueError(
                "these specs can't be trained in the same steps: they differ in more than seeds, rates and decays"
            )
        self.modules = [
            model.build(spec.model, spec.train.seed).to(dataset.train.images.device)
            for spec in members
        ]
        shapes = [parameter.shape for parameter in self.modules[0].parameters()]
        rows = [
            torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
            for module in self.modules
        ]
        self.parameters = torch.stack(rows)
        first = next(self.modules[0].parameters())
        pieces = [
            piece.numel()
            for piece in first.chunk(1 if first.is_cuda else -(-first.numel() // PIECE))
        ]
        widths = [*pieces[:-1], pieces[-1] + len(rows[0]) - first.numel()]
        self.update = optim.Update([spec.optimizer for spec in members], self.parameters, widths)
        views, gradient_views = (
            _views(self.parameters, shapes),
            _views(self.update.gradients, shapes),
        )
        for k, module in enumerate(self.modules):
            for parameter, view, gradient in zip(
                module.parameters(), views, gradient_views, strict=True
            ):
                parameter.data, parameter.grad = (
                    view[k],
                    gradient[k],
                )  # the modules and the flat tensors are the same memory
        self.batch = members[0].train.batch_size
        sizes = {self.batch, len(dataset.train) % self.batch} - {0}
        self.inputs = {
            size: self.parameters.new_empty(len(members) * size, specs.PIXELS) for size in sizes
        }
        self.passes = {
            size: self._gradient(x.view(len(members), size, -1), views, gradient_views)
            for size, x in self.inputs.items()
        }
        self._epoch, self._order = -1, torch.empty(0)

    def train(self, stop: int) -> list[Curves]:
        """Do the updates self.step + 1 to `stop`, at least one; nothing reaches the host before the last of them."""
        first = self.step + 1
        rates = np.stack(
            [optim.learning_rates(spec, np.arange(first, stop + 1)) for spec in self.specs], axis=1
        )
        rows, sizes = self._batches(first, stop)
        labels = self.dataset.train.labels[rows]
        logits = self.parameters.new_zeros(*rows.shape, specs.CLASSES)
        targets = functional.one_hot(labels, specs.CLASSES).to(logits.dtype)
        with (
            self._arithmetic(),
            torch.inference_mode(self.explicit),
        ):  # without autograd's bookkeeping an operation costs 2 us less
            self._steps(rows, sizes, targets, self.update.coefficients(rates, first), logits)
        self.step = stop
        loss, accuracy = _measure(logits, labels, sizes)
        return [Curves(loss[:, k], accuracy[:, k], rates[:, k]) for k in range(len(self.specs))]

    def _steps(
        self,
        rows: Tensor,
        sizes: list[int],
        targets: Tensor,
        coefficients: list[tuple[Tensor, ...]],
        logits: Tensor,
    ) -> None:
        found = zip(
            rows.flatten(1).unbind(),
            sizes,
            targets.unbind(),
            coefficients,
            logits.unbind(),
            strict=True,
        )
        for row, size, target, numbers, out in found:
            if size < self.batch:
                row, target, out = (
                    row.view(-1, self.batch)[:, :size].flatten(),
                    target[:, :size],
                    out[:, :size],
                )
            torch.index_select(self.dataset.train.images, 0, row, out=self.inputs[size])
            self.update.prepare()
            for block in self.passes[size](target, out):
                self.update(numbers, block)

    @torch.no_grad()
    def evaluate(self, split: data.Split, member: int = 0) -> Evaluation:
        """Loss, accuracy and logits of one model over a whole split."""
        module = self.modules[member].eval()
        with self._arithmetic(), _autocast(self.precision, self.parameters.device):
            chunks = [
                module(images.view(-1, 1, 28, 28))
                for images in split.images.split(EVALUATION_BATCH)
            ]
        module.train()
        logits = torch.cat(chunks).float()
        loss = functional.cross_entropy(logits.double(), split.labels).item()
        accuracy = (logits.argmax(1) == split.labels).sum().item() / len(split)
        return Evaluation(loss, accuracy, logits.cpu().numpy())

    def state(self, member: int = 0) -> dict[str, Any]:
        """A copy of one model's whole state, on the host."""
        names = optim.buffer_names(self.specs[member].optimizer)
        copied = {name: self.update.buffers[name][member].cpu().clone() for name in names}
        return {
            "step": self.step,
            "parameters": self.parameters[member].cpu().clone(),
            "buffers": copied,
        }

    def load_state(self, state: dict[str, Any], member: int = 0) -> None:
        """Take one model's state over; they must all be of the same step before the next one."""
        self.step = state["step"]
        self.parameters[member].copy_(state["parameters"])
        for name, buffer in state["buffers"].items():
            self.update.buffers[name][member].copy_(buffer)

    @property
    def precision(self) -> str:
        return self.specs[0].train.precision

    @property
    def explicit(self) -> bool:
        """Whether the gradient is written out, without autograd."""
        return isinstance(self.passes[self.batch], model.MLPGradient)

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Round float32 matrix products on a CUDA device to TF32 where the spec says so, and only there; take numbers below 1e-38 as zero.

        The velocities of dead units decay to such numbers, with which a processor takes up to 7 times as long.
        """
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
            torch.set_flush_denormal(False)  # it holds for all that this process computes

    def _batches(self, first: int, stop: int) -> tuple[Tensor, list[int]]:
        """The training images [S, K, B] of these updates, and how many each has; a short batch is padded with image 0."""
        per_epoch, found, sizes = self.specs[0].steps_per_epoch, [], []
        images = len(self.dataset.train)
        for epoch in range((first - 1) // per_epoch, (stop - 1) // per_epoch + 1):
            begin, end = (
                max(first - 1 - epoch * per_epoch, 0),
                min(stop - epoch * per_epoch, per_epoch),
            )
            found.append(self._epoch_batches(epoch)[begin:end])
            sizes += [min(self.batch, images - batch * self.batch) for batch in range(begin, end)]
        return torch.cat(found), sizes

    def _epoch_batches(self, epoch: int) -> Tensor:
        """[steps per epoch, K, B]: each model's own order, copied to the device an epoch at a time."""
        if epoch != self._epoch:
            images = len(self.dataset.train)
            order = torch.stack([data.order(images, spec.train.seed, epoch) for spec in self.specs])
            padded = functional.pad(order, (0, -images % self.batch)).view(
                len(self.specs), -1, self.batch
            )
            self._epoch, self._order = (
                epoch,
                padded.transpose(0, 1).contiguous().to(self.parameters.device),
            )
        return self._order

    def _gradient(
        self, x: Tensor, parameters: list[Tensor], gradients: list[Tensor]
    ) -> "model.MLPGradient | AutogradGradient":
        match self.modules[0]:
            case model.MLP(activation=activation) if self.precision != "bf16":
                return model.MLPGradient(
                    activation, x, parameters, gradients, self.update.carry, len(self.update.blocks)
                )
            case _:
                return AutogradGradient(self.modules, x, self.update, self.precision)


class AutogradGradient:
    """The same contract as MLPGradient, for any nn.Modules whose parameters' .grad are views of the update's; one after the other."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        x: Tensor,
        update: optim.Update,
        precision: str = "float32",
    ) -> None:
        self.modules, self.x, self.update, self.precision = modules, x, update, precision

    def __call__(self, targets: Tensor, logits: Tensor) -> Iterator[int]:
        with torch.no_grad():  # backward adds to what is there
            self.update.gradients.mul_(
                self.update.carry
            ) if self.update.carry else self.update.gradients.zero_()
        for k, module in enumerate(self.modules):
            with _autocast(self.precision, self.x.device):
                outputs = module(self.x[k].view(-1, 1, 28, 28))
            functional.cross_entropy(outputs.float(), targets[k]).backward()
            logits[k].copy_(outputs.detach())
        yield from range(len(self.update.blocks))


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16: matrix products of bfloat16 factors; weights, sums and updates stay float32 (torch.autocast)."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def _views(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The rows of `flat` [K, P] as one tensor [K, ...] for each of a model's parameters."""
    pieces = flat.split([shape.numel() for shape in shapes], dim=1)
    return [piece.view(len(flat), *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _measure(logits: Tensor, labels: Tensor, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """[S, K] losses and accuracies from the stored logits [S, K, B, C]; images past a step's size are padding and count for nothing."""
    count = torch.tensor(sizes, device=logits.device)[:, None]
    real = (torch.arange(logits.shape[2], device=logits.device) < count)[:, None]
    losses = functional.cross_entropy(
        logits.flatten(0, 2), labels.flatten(), reduction="none"
    ).view(labels.shape)
    loss = (losses * real).sum(2) / count
    accuracy = ((logits.argmax(3) == labels) & real).sum(2) / count
    both = torch.stack([loss, accuracy]).cpu().numpy()
    return both[0], both[1]
