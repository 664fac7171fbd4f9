"""Update rules and learning-rate schedules: functions of tensors and of the step, with no state of their own."""

import math

import torch
from torch import Tensor

from fmnist import spec as specs


def buffers(optimizer: specs.SGD | specs.Adam | specs.AdamW, parameters: Tensor) -> dict[str, Tensor]:
    """The zeroed buffers that `update` carries from step to step, each shaped like the flat parameters."""
    match optimizer:
        case specs.SGD(momentum=0.0):
            return {}
        case specs.SGD():
            return {"momentum": torch.zeros_like(parameters)}
        case specs.Adam() | specs.AdamW():
            return {"mean": torch.zeros_like(parameters), "square": torch.zeros_like(parameters)}


def update(
    optimizer: specs.SGD | specs.Adam | specs.AdamW, parameters: Tensor, gradients: Tensor, carried: dict[str, Tensor], lr: float, step: int
) -> None:
    """Update number `step` (from 1) of the flat parameters, in place; the gradients are used up as scratch memory.

    The rules are those of torch.optim's classes of the same names.
    """
    decay = optimizer.weight_decay
    if decay and isinstance(optimizer, specs.AdamW):
        parameters.mul_(1 - lr * decay)
    elif decay:
        gradients.add_(parameters, alpha=decay)
    match optimizer:
        case specs.SGD(momentum=0.0):
            parameters.add_(gradients, alpha=-lr)
        case specs.SGD(momentum=momentum, nesterov=nesterov):
            # gradients + momentum * buffer, in one pass over memory
            torch.add(gradients, carried["momentum"], alpha=momentum, out=carried["momentum"])
            if nesterov:
                parameters.add_(gradients.add_(carried["momentum"], alpha=momentum), alpha=-lr)
            else:
                parameters.add_(carried["momentum"], alpha=-lr)
        case specs.Adam(betas=betas, eps=eps) | specs.AdamW(betas=betas, eps=eps):
            carried["mean"].lerp_(gradients, 1 - betas[0])
            carried["square"].mul_(betas[1]).addcmul_(gradients, gradients, value=1 - betas[1])
            denominator = torch.sqrt(carried["square"], out=gradients).div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
            parameters.addcdiv_(carried["mean"], denominator, value=-lr / (1 - betas[0] ** step))


def learning_rate(spec: specs.ExperimentSpec, step: int) -> float:
    """The learning rate of update `step` (1 to spec.steps).

    The schedules are those of torch.optim.lr_scheduler (StepLR, CosineAnnealingLR, LinearLR, OneCycleLR), stepped per update.
    """
    warmup = spec.schedule.warmup_steps
    if step <= warmup:
        return _scheduled(spec, 0, spec.steps - warmup) * step / warmup
    return _scheduled(spec, step - 1 - warmup, spec.steps - warmup)


def _scheduled(spec: specs.ExperimentSpec, done: int, total: int) -> float:
    """The rate of the update after `done` of the schedule's `total` ones."""
    peak = spec.optimizer.lr
    match spec.schedule:
        case specs.Constant():
            return peak
        case specs.Step(every_epochs=every, factor=factor):
            return peak * factor ** (done // (every * spec.steps_per_epoch))
        case specs.Cosine(final_fraction=final):
            return _anneal(peak, peak * final, done / total)
        case specs.Linear(final_fraction=final):
            return peak * (1 + (final - 1) * done / total)
        case specs.OneCycle(rise=rise, initial_divisor=initial, final_divisor=final):
            top = rise * total - 1
            if done <= top:
                return _anneal(peak / initial, peak, done / top if top else 1.0)
            return _anneal(peak, peak / initial / final, (done - top) / (total - 1 - top))


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
