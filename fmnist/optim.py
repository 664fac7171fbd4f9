"""Update rules and learning-rate schedules: functions of tensors and of the step, for K models at once.

Shapes: S steps, K models, P the parameters of one.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fmnist import spec as specs
from fmnist.capture import upload

Optimizer = specs.SGD | specs.Adam | specs.AdamW


class Update:
    """The update of K models' flat parameters [K, P], in place, and the buffers that it carries from step to step.

    The rules are those of torch.optim's classes of the same names. The optimizers are of one type; their numbers may
    differ, and enter as tensors [K, 1], which costs nothing: an elementwise pass is bound by memory.

    A step is `prepare`, then `gradients` [K, P] become `carry` * gradients + the step's gradient, then the call for each block of
    columns, whose `widths` are given, best while its gradient is in the processor's cache. Where the gradient is wanted for nothing
    but SGD's velocity, `gradients` are the velocity: the matrix product that makes the gradient adds it, which saves a pass.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], parameters: Tensor, widths: list[int]
    ) -> None:
        self.optimizers, self.parameters = optimizers, parameters
        names = {name for optimizer in optimizers for name in buffer_names(optimizer)}
        self.buffers = {name: _zeros_beside(parameters) for name in sorted(names)}
        self.decays = any(optimizer.weight_decay for optimizer in optimizers)
        self.decay = self._column([optimizer.weight_decay for optimizer in optimizers])
        momenta = [getattr(optimizer, "momentum", 0.0) for optimizer in optimizers]
        self.momentum, self.nesterov = (
            self._column(momenta),
            getattr(optimizers[0], "nesterov", False),
        )
        adds = "momentum" in self.buffers and not self.nesterov
        self.gradients = self.buffers["momentum"] if adds else _zeros_beside(parameters)
        self.mixes = adds and (self.decays or len(set(momenta)) > 1)
        self.carry = momenta[0] if adds and not self.mixes else float(adds)
        self._rule: Callable[..., None] = (
            Update._sgd
        )  # chosen once; unbound, as that circle would keep the tensors
        if isinstance(optimizer := optimizers[0], specs.Adam | specs.AdamW):
            self._rule, self.betas, self.eps = Update._adam, optimizer.betas, optimizer.eps
        whole = {"parameters": parameters, "gradients": self.gradients, **self.buffers}
        self.blocks = [
            dict(zip(whole, parts, strict=True))
            for parts in zip(*(t.split(widths, 1) for t in whole.values()), strict=True)
        ]

    @property
    def plain(self) -> bool:
        """Whether the update of a block is: parameters less rate * gradients."""
        sgd = isinstance(self.optimizers[0], specs.SGD)
        return sgd and not self.nesterov and (self.mixes or not self.decays)

    def prepare(self) -> None:
        """What has to be done before the gradient: all that a matrix product can't, which multiplies by one number."""
        if self.mixes:
            self.gradients.mul_(self.momentum).addcmul_(self.parameters, self.decay)

    def __call__(self, coefficients: Sequence[Tensor], block: int) -> None:
        """One update of a block of columns, with a step's `coefficients`."""
        self._rule(self, **self.blocks[block], coefficients=coefficients)

    def _sgd(
        self,
        parameters: Tensor,
        gradients: Tensor,
        coefficients: Sequence[Tensor],
        momentum: Tensor | None = None,
    ) -> None:
        if self.decays and not self.mixes:
            gradients.addcmul_(parameters, self.decay)
        if self.nesterov and momentum is not None:
            torch.addcmul(gradients, momentum, self.momentum, out=momentum)
            gradients.addcmul_(momentum, self.momentum)
        parameters.addcmul_(gradients, coefficients[0], value=-1)

    def _adam(
        self,
        parameters: Tensor,
        gradients: Tensor,
        mean: Tensor,
        square: Tensor,
        coefficients: Sequence[Tensor],
    ) -> None:
        if len(coefficients) > 2:  # AdamW's decay
            parameters.mul_(coefficients[2])
        elif self.decays:
            gradients.addcmul_(parameters, self.decay)
        mean.lerp_(gradients, 1 - self.betas[0])
        square.mul_(self.betas[1]).addcmul_(gradients, gradients, value=1 - self.betas[1])
        denominator = torch.sqrt(square, out=gradients).div_(coefficients[1]).add_(self.eps)
        parameters.addcdiv_(mean * coefficients[0], denominator, value=-1)

    def coefficients(self, rates: np.ndarray, first: int) -> Tensor:
        """What changes from step to step, [S, N, K, 1]: N numbers for each of the steps from `first` on, given their learning rates [S, K]."""
        columns = [rates]
        if isinstance(optimizer := self.optimizers[0], specs.Adam | specs.AdamW):
            steps = np.arange(first, first + len(rates))[:, None]
            columns = [
                rates / (1 - optimizer.betas[0] ** steps),
                np.sqrt(1 - optimizer.betas[1] ** steps) + 0 * rates,
            ]
        if isinstance(optimizer, specs.AdamW):
            columns += [1 - rates * np.array([each.weight_decay for each in self.optimizers])]
        table = torch.from_numpy(np.stack(columns, axis=1)[..., None])
        return upload(table.to(self.parameters.dtype), self.parameters.device)

    def _column(self, values: list[float]) -> Tensor:
        return self.parameters.new_tensor(values)[:, None]


def _zeros_beside(parameters: Tensor) -> Tensor:
    """Zeros that lie as the parameters do, their rows as far apart."""
    return torch.empty_strided(
        parameters.shape, parameters.stride(), dtype=parameters.dtype, device=parameters.device
    ).zero_()


def buffer_names(optimizer: Optimizer) -> tuple[str, ...]:
    """The buffers that an optimizer needs, each of the size of the parameters."""
    match optimizer:
        case specs.SGD(momentum=momentum):
            return ("momentum",) if momentum else ()
        case specs.Adam() | specs.AdamW():
            return ("mean", "square")


def learning_rates(spec: specs.ExperimentSpec, steps: np.ndarray) -> np.ndarray:
    """[S] the learning rates of these updates (1 to spec.steps).

    The schedules are those of torch.optim.lr_scheduler (StepLR, CosineAnnealingLR, LinearLR, OneCycleLR), stepped per update.
    """
    warmup = spec.schedule.warmup_steps
    scheduled = _scheduled(spec, np.maximum(steps - 1 - warmup, 0), spec.steps - warmup)
    return scheduled * np.minimum(steps / warmup, 1.0) if warmup else scheduled


def _scheduled(spec: specs.ExperimentSpec, done: np.ndarray, total: int) -> np.ndarray:
    """The rates of the updates after `done` of the schedule's `total` ones."""
    peak = spec.optimizer.lr
    match spec.schedule:
        case specs.Constant():
            return np.full(len(done), peak)
        case specs.Step(every_epochs=every, factor=factor):
            return peak * factor ** (done // (every * spec.steps_per_epoch))
        case specs.Cosine(final_fraction=final):
            return _anneal(peak, peak * final, done / total)
        case specs.Linear(final_fraction=final):
            return peak * (1 + (final - 1) * done / total)
        case specs.OneCycle(rise=rise, initial_divisor=initial, final_divisor=final):
            top = rise * total - 1
            up = _anneal(peak / initial, peak, done / top if top else np.ones(len(done)))
            down = _anneal(peak, peak / initial / final, (done - top) / (total - 1 - top))
            return np.where(done <= top, up, down)


def _anneal(start: float, end: float, fraction: np.ndarray) -> np.ndarray:
    return end + (start - end) * (1 + np.cos(np.pi * fraction)) / 2
