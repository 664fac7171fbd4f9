"""The training engine: steps, evaluation, state in and out.

Shapes: S steps of a segment, K models, B batch, N images, P = 784 pixels, C = 10 classes.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fmnist import data, model, optim
from fmnist import spec as specs
from fmnist.capture import CaptureError, Chunks, CudaGraphs, Recorder, Steps, upload
from fmnist.errors import SpecError

if TYPE_CHECKING:
    from fmnist.fused import FusedMLP

log = logging.getLogger(__name__)
EVALUATION_BATCH = 1_000
"""Images that a CPU evaluates at once: their layers stay in its cache."""
PIECE = 80_000
"""Parameters, at most, of the first layer that a CPU updates at once.

With their velocity they take 0.6 MB, which its cache holds (benchmarks/step.py).
"""
CUDA_STACK = 64


@dataclass(frozen=True)
class Curves:
    """A segment's measurements, each [S]: of the batch before its update, and the update's rate."""

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
    """The device a spec asks for, with the thread count set; raises SpecError if there is none."""
    torch.set_num_threads(compute.threads)
    if compute.device != "cpu" and torch.cuda.is_available():
        return _cuda_device(compute.device)
    if compute.device not in ("cpu", "auto"):
        raise SpecError(
            f"compute.device: {compute.device} was asked for and this machine has no usable CUDA"
            f" device ({why_no_cuda()}); give cpu or auto"
        )
    if precision == "tf32":
        raise SpecError(
            "train.precision: tf32 is an arithmetic of CUDA devices and this run is on the CPU;"
            " give float32 or bf16"
        )
    return torch.device("cpu")


def _cuda_device(asked: str) -> torch.device:
    """A CUDA device whose operations give the same bits each time; `auto`: the current one."""
    device = torch.device("cuda" if asked == "auto" else asked)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise SpecError(
            f"compute.device: given {asked}; this machine has cuda:0 to cuda:{count - 1}"
        )
    # read when cuBLAS starts: with a work space for each stream its sums keep their order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # else a kernel fills each new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def take_turn(worker: int) -> None:
    """Let `auto` and `cuda` be the next visible CUDA device in each next worker's process."""
    if torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())


def why_no_cuda() -> str:
    """Why no CUDA device can be used, as CUDA says it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return "no reason given"


def stack_size(compute: specs.Compute, device: torch.device) -> int:
    """How many runs to train in the same steps; one on the CPU, see benchmarks/stacks.py."""
    if isinstance(compute.stack, int):
        return compute.stack
    return CUDA_STACK if compute.stack == "auto" and device.type == "cuda" else 1


class Engine:
    """Trains K models of one shape in the same steps on a dataset; {step, parameters, buffers} is
    the whole state of each.

    Model k is what an engine of its spec alone would train, but for the rounding of sums: no
    operation mixes two of them, so that one that diverges leaves the others alone. Raises
    ValueError where the specs differ in shape.
    """

    def __init__(self, members: Sequence[specs.ExperimentSpec], dataset: data.Dataset) -> None:
        self.specs, self.dataset, self.step = tuple(members), dataset, 0
        if len({spec.shape for spec in members}) != 1:
            raise ValueError(
                "these specs can't be trained in the same steps:"
                " they differ in more than seeds, rates and decays"
            )
        device = dataset.train.images.device
        self.modules = [model.build(spec.model, spec.train.seed) for spec in members]
        shapes = [parameter.shape for parameter in self.modules[0].parameters()]
        rows = [
            torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
            for module in self.modules
        ]
        self.parameters = _padded(torch.stack(rows).to(device))
        widths = _block_widths(self.modules[0], device)
        self.update = optim.Update([spec.optimizer for spec in members], self.parameters, widths)
        self._views = _views(self.parameters, shapes)
        self._gradient_views = _views(self.update.gradients, shapes)
        for k, module in enumerate(self.modules):
            for parameter, view, gradient in zip(
                module.parameters(), self._views, self._gradient_views, strict=True
            ):
                # the modules and the flat tensors are the same memory
                parameter.data = view[k]
                parameter.grad = gradient[k]
            module.to(device)  # what else it holds
        self.batch = members[0].train.batch_size
        sizes = {self.batch, len(dataset.train) % self.batch} - {0}
        self.inputs = {
            size: self.parameters.new_empty(len(members) * size, specs.PIXELS) for size in sizes
        }
        self.passes = {
            size: self._gradient(x.view(len(members), size, -1)) for size, x in self.inputs.items()
        }
        self._orders: dict[
            int, Tensor
        ] = {}  # of this epoch, and of the next where it is prefetched
        self.changing = [self.parameters, self.update.gradients, *self.update.buffers.values()]
        self._chunks: Chunks | None = None
        self._fused: dict[int, FusedMLP] = {}
        if device.type == "cuda":
            self.fuse_steps()
            self.replay_steps(CudaGraphs())

    def fuse_steps(self, wanted: bool = True) -> None:
        """Do steps by kernels made for such models from here on, if there are any that compile."""
        spec = self.specs[0]
        self._fused = {}
        if not (wanted and self.explicit):
            return
        try:
            from fmnist import fused
        except ImportError as error:  # PyTorch brings Triton on most platforms
            log.warning("Triton is missing, so steps take longer: %s", error)
            return
        if not fused.fits(spec.model, self.batch):
            return
        images, carry = self.dataset.train.images, self.update.carry
        tensors = (self._views, self._gradient_views)
        made = {
            size: fused.FusedMLP(
                spec.model.activation, images, size, *tensors, carry, self.precision
            )
            for size in self.inputs
        }
        with self.undone(), torch.inference_mode():
            why_not = fused.failure(made.values())
        if why_not:
            log.warning("the kernels of the step don't compile, so steps take longer: %s", why_not)
        else:
            self._fused = made

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Put back what steps in here change."""
        saved = [tensor.clone() for tensor in self.changing]
        try:
            yield
        finally:
            for tensor, before in zip(self.changing, saved, strict=True):
                tensor.copy_(before)

    @property
    def fused(self) -> bool:
        """Whether steps are done by kernels made for them."""
        return bool(self._fused)

    def replay_steps(self, recorder: Recorder | None) -> None:
        """Train by replaying chunks of steps, recorded by this; None: step by step."""
        self._chunks = None if recorder is None else Chunks(recorder, self.changing)

    @property
    def captured(self) -> bool:
        """Whether steps are replayed."""
        return self._chunks is not None

    def train(self, stop: int) -> list[Curves]:
        """Do the updates self.step + 1 to `stop`; nothing reaches the host before the last."""
        first = self.step + 1
        rates = self._learning_rates(first, stop)
        steps, labels, sizes = self._gather(first, stop, rates)
        # without autograd's bookkeeping an operation costs 2 us less
        with self._arithmetic(), torch.inference_mode(self.explicit):
            self._do(steps, sizes)
        self.step = stop
        if self.parameters.is_cuda:
            self._prefetch()  # while the device is at work
        loss, accuracy = _measure(steps.logits, labels, sizes)
        return [Curves(loss[:, k], accuracy[:, k], rates[:, k]) for k in range(len(self.specs))]

    def gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Compute a step's gradients, and no update; returns its logits and targets [K, B, C]."""
        steps, _, [size] = self._gather(step, step, self._learning_rates(step, step))
        rows, targets, logits = _shortened(steps.rows[0], steps.targets[0], steps.logits[0], size)
        with self._arithmetic(), torch.inference_mode(self.explicit):
            self.update.prepare()
            if self._fused:
                blocks = self._fused[size].gradients(rows, targets, logits)
            else:
                blocks = self._differentiate(rows.flatten(), targets, logits, size)
            for _ in blocks:
                pass  # each is done by then
        return logits, targets

    def apply(self, step: int) -> None:
        """Update the parameters with the gradients that there are, as this step does."""
        coefficients = self.update.coefficients(self._learning_rates(step, step), step)
        with self._arithmetic(), torch.no_grad():
            for block in range(len(self.update.blocks)):
                self.update(coefficients[0].unbind(), block)

    def _learning_rates(self, first: int, stop: int) -> np.ndarray:
        """[S, K] the learning rates of these updates."""
        steps = np.arange(first, stop + 1)
        return np.stack([optim.learning_rates(spec, steps) for spec in self.specs], axis=1)

    def _gather(self, first: int, stop: int, rates: np.ndarray) -> tuple[Steps, Tensor, list[int]]:
        """What these updates need, their labels [S, K, B], and how many images each has."""
        rows, sizes = self._batches(first, stop)
        labels = self.dataset.train.labels[rows]
        logits = self.parameters.new_zeros(*rows.shape, specs.CLASSES)
        classes = torch.arange(specs.CLASSES, device=labels.device)
        targets = (labels.unsqueeze(-1) == classes).to(logits.dtype)
        return Steps(rows, targets, self.update.coefficients(rates, first), logits), labels, sizes

    def _do(self, steps: Steps, sizes: list[int]) -> None:
        if self._chunks is not None:
            try:
                self._chunks.run(self._loop, steps, sizes)
                return
            except CaptureError as error:
                log.warning(
                    "the steps of this model can't be captured, they are launched one by one: %s",
                    error,
                )
                self._chunks = None
        self._loop(steps, sizes)

    def _loop(self, steps: Steps, sizes: Sequence[int]) -> None:
        """Do steps one after the other."""
        if self._fused:
            self._fused_loop(steps, sizes)
            return
        # flat and cut up before: to do that in each step costs as much as a small operation
        rows, tensors = steps.rows.flatten(1), (steps.targets.unbind(), steps.logits.unbind())
        numbers = [coefficients.unbind() for coefficients in steps.coefficients.unbind()]
        for row, targets, logits, size, number in zip(
            rows.unbind(), *tensors, sizes, numbers, strict=True
        ):
            if size < self.batch:
                shape = (-1, self.batch)
                row, targets, logits = _shortened(row.view(shape), targets, logits, size)
                row = row.flatten()
            self.update.prepare()
            for block in self._differentiate(row, targets, logits, size):
                self.update(number, block)

    def _fused_loop(self, steps: Steps, sizes: Sequence[int]) -> None:
        tensors = (steps.rows.unbind(), steps.targets.unbind(), steps.logits.unbind())
        each = zip(*tensors, sizes, steps.coefficients.unbind(), strict=True)
        for rows, targets, logits, size, numbers in each:
            rows, targets, logits = _shortened(rows, targets, logits, size)
            self.update.prepare()
            if self.update.plain:
                self._fused[size].step(rows, targets, logits, numbers[0])
            else:
                for block in self._fused[size].gradients(rows, targets, logits):
                    self.update(numbers.unbind(), block)

    def _differentiate(
        self, rows: Tensor, targets: Tensor, logits: Tensor, size: int
    ) -> Iterator[int]:
        """Compute the gradients of the images `rows` [K * B]; yields each block that is done."""
        torch.index_select(self.dataset.train.images, 0, rows, out=self.inputs[size])
        return self.passes[size](targets, logits)

    @torch.no_grad()
    def evaluate(self, split: data.Split, member: int = 0) -> Evaluation:
        """Loss, accuracy and logits of one model over a whole split."""
        module = self.modules[member].eval()
        with self._arithmetic(), _autocast(self.precision, self.parameters.device):
            batch = len(split) if split.images.is_cuda else EVALUATION_BATCH
            chunks = [module(images.view(-1, 1, 28, 28)) for images in split.images.split(batch)]
        module.train()
        [evaluation] = _evaluations(torch.cat(chunks).float()[None], split.labels)
        return evaluation

    def evaluate_all(self, split: data.Split) -> list[Evaluation]:
        """Evaluate every model: on a CUDA device those of a stack in the same products."""
        if len(self.specs) > 1 and self.explicit and split.images.is_cuda:
            with self._arithmetic(), torch.inference_mode():
                return _evaluations(self._logits(split.images), split.labels)
        return [self.evaluate(split, member) for member in range(len(self.specs))]

    def _logits(self, images: Tensor) -> Tensor:
        """[K, N, C]: what all MLPs make of the same images."""
        activation = model.ACTIVATIONS[self.specs[0].model.activation]()
        weights, biases = self._views[::2], self._views[1::2]
        chunks = []
        for chunk in images.split(EVALUATION_BATCH):
            x = chunk.expand(len(self.specs), -1, -1)
            for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                x = torch.baddbmm(bias.unsqueeze(1), x if layer == 0 else activation(x), weight.mT)
            chunks.append(x)
        return torch.cat(chunks, dim=1)

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
        """Round float32 matrix products on a CUDA device to TF32 where the spec says so, and only
        there; take numbers below 1e-38 as zero.

        The velocities of dead units decay to such numbers, with which a processor takes up to 7
        times as long.
        """
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        kinds = (torch.backends.cuda.matmul, convolutions)
        before = [kind.fp32_precision for kind in kinds]
        for kind in kinds:
            kind.fp32_precision = "tf32" if self.precision == "tf32" else "ieee"
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            for kind, precision in zip(kinds, before, strict=True):
                kind.fp32_precision = precision
            torch.set_flush_denormal(False)  # it holds for all that this process computes

    def _batches(self, first: int, stop: int) -> tuple[Tensor, list[int]]:
        """The images [S, K, B] of these updates, short batches padded with 0, and their sizes."""
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
        """[steps per epoch, K, B]: each model's order, copied to the device by the epoch."""
        if epoch not in self._orders:
            images = len(self.dataset.train)
            order = torch.stack([data.order(images, spec.train.seed, epoch) for spec in self.specs])
            padded = functional.pad(order, (0, -images % self.batch))
            batches = padded.view(len(self.specs), -1, self.batch).transpose(0, 1).contiguous()
            self._orders = {near: self._orders[near] for near in self._orders if near == epoch - 1}
            self._orders[epoch] = upload(batches, self.parameters.device)
        return self._orders[epoch]

    def _prefetch(self) -> None:
        """Make the order of the epoch after that of the next step."""
        spec = self.specs[0]
        epoch = self.step // spec.steps_per_epoch + 1
        if epoch < spec.train.epochs:
            self._epoch_batches(epoch)

    def _gradient(self, x: Tensor) -> "model.MLPGradient | AutogradGradient":
        match self.modules[0]:
            case model.MLP(activation=activation) if self.precision != "bf16":
                tensors = (x, self._views, self._gradient_views)
                pieces = len(self.update.blocks)
                return model.MLPGradient(activation, *tensors, self.update.carry, pieces)
            case _:
                return AutogradGradient(self.modules, x, self.update, self.precision)


class AutogradGradient:
    """MLPGradient's contract for any nn.Modules, one after the other.

    Their parameters' .grad are views of the update's gradients.
    """

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
    """bf16: products of bfloat16 factors; weights, sums and updates stay float32."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


def _shortened(
    rows: Tensor, targets: Tensor, logits: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `size` images of a batch [K, B] for which there may be room for more."""
    return rows[:, :size], targets[:, :size], logits[:, :size]


def _padded(rows: Tensor) -> Tensor:
    """The same rows, on a CUDA device each at a multiple of 64 bytes, which is read fastest."""
    if not rows.is_cuda:
        return rows
    models, count = rows.shape
    padded = rows.new_zeros(models, -(-count // 16) * 16)[:, :count]
    return padded.copy_(rows)


def _block_widths(module: nn.Module, device: torch.device) -> list[int]:
    """How many parameters are updated at once: pieces of the first layer; the last and the rest."""
    sizes = [parameter.numel() for parameter in module.parameters()]
    first = next(module.parameters())
    count = 1 if device.type == "cuda" else -(-first.numel() // PIECE)
    pieces = [piece.numel() for piece in first.chunk(count)]
    return [*pieces[:-1], pieces[-1] + sum(sizes[1:])]


def _views(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The rows of `flat` [K, P] as one tensor [K, ...] for each of a model's parameters."""
    pieces = flat.split([shape.numel() for shape in shapes], dim=1)
    return [piece.view(len(flat), *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _evaluations(logits: Tensor, labels: Tensor) -> list[Evaluation]:
    """Evaluations of the logits [K, N, C] of K models, with one copy to the host for all."""
    losses = torch.stack([functional.cross_entropy(of_one.double(), labels) for of_one in logits])
    right = (logits.argmax(2) == labels).sum(1)
    numbers = torch.stack([losses, right.double()]).tolist()
    on_host = logits.cpu().numpy()
    return [
        Evaluation(loss, count / len(labels), of_one)
        for loss, count, of_one in zip(*numbers, on_host, strict=True)
    ]


def _measure(logits: Tensor, labels: Tensor, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """[S, K] losses and accuracies from the logits [S, K, B, C]; padding counts for nothing."""
    count = upload(torch.tensor(sizes), logits.device)[:, None]
    real = (torch.arange(logits.shape[2], device=logits.device) < count)[:, None]
    losses = functional.cross_entropy(
        logits.flatten(0, 2), labels.flatten(), reduction="none"
    ).view(labels.shape)
    loss = (losses * real).sum(2) / count
    accuracy = ((logits.argmax(3) == labels) & real).sum(2) / count
    both = torch.stack([loss, accuracy]).cpu().numpy()
    return both[0], both[1]
