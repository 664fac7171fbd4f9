"""The training engine: steps, evaluation, state in and out; the only file that knows threads and devices.

Shapes: S steps of a segment, B batch, N images, P = 784 pixels, C = 10 classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fmnist import data, model, optim
from fmnist import spec as specs

EVALUATION_BATCH = 1_000


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


def device(compute: specs.Compute) -> torch.device:
    """The device a spec asks for, with the thread count set; raises ValueError where there is no such device."""
    torch.set_num_threads(compute.threads)
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device: cuda was asked for and this machine has no usable CUDA device; give cpu or auto")
    return torch.device("cuda" if compute.device != "cpu" and torch.cuda.is_available() else "cpu")


class Engine:
    """Trains one model of one spec on a dataset; {step, parameters, buffers} is its whole state."""

    def __init__(self, spec: specs.ExperimentSpec, dataset: data.Dataset) -> None:
        self.spec, self.dataset = spec, dataset
        self.module = model.build(spec.model, spec.train.seed).to(dataset.train.images.device)
        self.step = 0
        self.parameters, views = _flatten([parameter.detach() for parameter in self.module.parameters()])
        self.gradients, gradient_views = _flatten([torch.zeros_like(view) for view in views])
        for parameter, view, gradient in zip(self.module.parameters(), views, gradient_views, strict=True):
            parameter.data, parameter.grad = view, gradient  # the module and the flat tensors are the same memory
        self.buffers = optim.buffers(spec.optimizer, self.parameters)
        self.passes = {size: self._gradient(size, views, gradient_views) for size in self._batch_sizes()}
        self._epoch, self._order = -1, torch.empty(0)

    def train(self, stop: int) -> Curves:
        """Do the updates self.step + 1 to `stop`, at least one; nothing reaches the host before the last of them."""
        first, batch = self.step + 1, self.spec.train.batch_size
        images = self.dataset.train.images
        rows = [self._rows(step) for step in range(first, stop + 1)]
        rates = [optim.learning_rate(self.spec, step) for step in range(first, stop + 1)]
        logits = images.new_zeros(len(rows), batch, specs.CLASSES)
        labels = torch.stack([functional.pad(self.dataset.train.labels[r], (0, batch - len(r))) for r in rows])
        targets = functional.one_hot(labels, specs.CLASSES).to(images.dtype)
        x = images.new_empty(batch, specs.PIXELS)
        for s, (chosen, lr) in enumerate(zip(rows, rates, strict=True)):
            size = len(chosen)
            torch.index_select(images, 0, chosen, out=x[:size])
            self.passes[size](x[:size], targets[s, :size], logits[s, :size])
            optim.update(self.spec.optimizer, self.parameters, self.gradients, self.buffers, lr, first + s)
        self.step = stop
        return _measure(logits, labels, [len(r) for r in rows], rates)

    @torch.no_grad()
    def evaluate(self, split: data.Split) -> Evaluation:
        """Loss, accuracy and logits over a whole split."""
        self.module.eval()
        chunks = [self.module(images.view(-1, 1, 28, 28)) for images in split.images.split(EVALUATION_BATCH)]
        self.module.train()
        logits = torch.cat(chunks)
        loss = functional.cross_entropy(logits.double(), split.labels).item()
        accuracy = (logits.argmax(1) == split.labels).sum().item() / len(split)
        return Evaluation(loss, accuracy, logits.cpu().numpy())

    def state(self) -> dict[str, Any]:
        """A copy of the whole state, on the host."""
        copied = {name: buffer.cpu().clone() for name, buffer in self.buffers.items()}
        return {"step": self.step, "parameters": self.parameters.cpu().clone(), "buffers": copied}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.parameters.copy_(state["parameters"])
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name])

    def _batch_sizes(self) -> set[int]:
        batch, images = self.spec.train.batch_size, len(self.dataset.train)
        return {batch, images % batch} - {0}

    def _rows(self, step: int) -> Tensor:
        """The training images of update `step`."""
        epoch, batch = divmod(step - 1, self.spec.steps_per_epoch)
        if epoch != self._epoch:
            self._order = data.order(len(self.dataset.train), self.spec.train.seed, epoch).to(self.parameters.device)
            self._epoch = epoch
        return self._order[batch * self.spec.train.batch_size : (batch + 1) * self.spec.train.batch_size]

    def _gradient(self, batch: int, parameters: list[Tensor], gradients: list[Tensor]) -> "model.MLPGradient | AutogradGradient":
        match self.module:
            case model.MLP(activation=activation):
                return model.MLPGradient(activation, parameters, gradients, batch)
            case module:
                return AutogradGradient(module, self.gradients)


class AutogradGradient:
    """The same contract as MLPGradient for any nn.Module whose parameters' .grad are views of `gradients`."""

    def __init__(self, module: nn.Module, gradients: Tensor) -> None:
        self.module, self.gradients = module, gradients

    def __call__(self, x: Tensor, targets: Tensor, logits: Tensor) -> None:
        self.gradients.zero_()
        outputs = self.module(x.view(-1, 1, 28, 28))
        functional.cross_entropy(outputs, targets).backward()
        logits.copy_(outputs.detach())


def _flatten(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One contiguous vector that holds all of them, and a view of it for each."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return flat, [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def _measure(logits: Tensor, labels: Tensor, sizes: list[int], rates: list[float]) -> Curves:
    """Per-step loss and accuracy from the stored logits [S, B, C]; rows past a step's size are padding and count for nothing."""
    count = torch.tensor(sizes, device=logits.device)[:, None]
    real = torch.arange(logits.shape[1], device=logits.device) < count
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    loss = (losses * real).sum(1) / count[:, 0]
    accuracy = ((logits.argmax(2) == labels) & real).sum(1) / count[:, 0]
    return Curves(loss.cpu().numpy(), accuracy.cpu().numpy(), np.array(rates))
