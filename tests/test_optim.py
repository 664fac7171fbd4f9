"""The update rules and the schedules against torch's classes of the same names."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from fmnist import optim
from fmnist import spec as specs

PEAK = 0.02
BATCH, EPOCHS = 6_000, 5
OPTIMIZERS = {
    "sgd": specs.SGD(lr=PEAK),
    "sgd decay": specs.SGD(lr=PEAK, weight_decay=0.1),
    "momentum": specs.SGD(lr=PEAK, momentum=0.9),
    "momentum decay": specs.SGD(lr=PEAK, momentum=0.9, weight_decay=0.1),
    "nesterov": specs.SGD(lr=PEAK, momentum=0.9, nesterov=True),
    "nesterov decay": specs.SGD(lr=PEAK, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": specs.Adam(lr=PEAK),
    "adam decay": specs.Adam(lr=PEAK, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "adamw": specs.AdamW(lr=PEAK),
    "adamw decay": specs.AdamW(lr=PEAK, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3),
}
SCHEDULES = {
    "constant": specs.Constant(),
    "step": specs.Step(every_epochs=2, factor=0.3),
    "cosine": specs.Cosine(final_fraction=0.05),
    "linear": specs.Linear(final_fraction=0.1),
    "one_cycle": specs.OneCycle(rise=0.4, initial_divisor=10.0, final_divisor=100.0),
}


def torchs_optimizer(
    spec: specs.SGD | specs.Adam | specs.AdamW, parameters: list[Tensor]
) -> torch.optim.Optimizer:
    match spec:
        case specs.SGD():
            return torch.optim.SGD(
                parameters,
                spec.lr,
                momentum=spec.momentum,
                nesterov=spec.nesterov,
                weight_decay=spec.weight_decay,
            )
        case specs.Adam():
            return torch.optim.Adam(
                parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
            )
        case specs.AdamW():
            return torch.optim.AdamW(
                parameters, spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
            )


def torchs_scheduler(
    spec: specs.ExperimentSpec, optimizer: torch.optim.Optimizer, steps: int
) -> lr_scheduler.LRScheduler:
    """Torch's scheduler for a spec's schedule over `steps` updates, without the warm-up."""
    peak = spec.optimizer.lr
    match spec.schedule:
        case specs.Constant():
            return lr_scheduler.ConstantLR(optimizer, factor=1.0)
        case specs.Step(every_epochs=every, factor=factor):
            return lr_scheduler.StepLR(optimizer, every * spec.steps_per_epoch, factor)
        case specs.Cosine(final_fraction=final):
            return lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=peak * final)
        case specs.Linear(final_fraction=final):
            return lr_scheduler.LinearLR(
                optimizer, start_factor=1.0, end_factor=final, total_iters=steps
            )
        case specs.OneCycle(rise=rise, initial_divisor=initial, final_divisor=final):
            return lr_scheduler.OneCycleLR(
                optimizer,
                peak,
                steps,
                pct_start=rise,
                div_factor=initial,
                final_div_factor=final,
                cycle_momentum=False,
            )


def torchs_rates(spec: specs.ExperimentSpec, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], spec.optimizer.lr)
    scheduler = torchs_scheduler(spec, optimizer, steps)
    rates = []
    for step in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if step + 1 < steps:  # OneCycleLR refuses to go past its end
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-14)],
    ids=["single", "double"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_torchs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    spec, generator = OPTIMIZERS[name], torch.Generator().manual_seed(1)
    ours = torch.randn(1, 1_000, generator=generator, dtype=dtype)
    theirs = ours.clone().requires_grad_()
    optimizer, update = torchs_optimizer(spec, [theirs]), optim.Update([spec], ours, [300, 700])
    for step in range(1, 31):
        theirs.grad = torch.randn(1, 1_000, generator=generator, dtype=dtype)
        theirs.grad[:, :10] = 0
        lr = spec.lr * (1 + step % 3)
        optimizer.param_groups[0]["lr"] = lr
        [coefficients] = update.coefficients(np.array([[lr]]), step)
        numbers = coefficients.unbind()
        update.prepare()
        update.gradients.mul_(update.carry).add_(theirs.grad)
        for block in (1, 0):
            update(numbers, block)
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_buffers_start_at_zero_beside_the_parameters(name: str) -> None:
    buffers = optim.Update([OPTIMIZERS[name]], torch.ones(1, 7, dtype=torch.float64), [7]).buffers
    assert len(buffers) == (2 if name.startswith("adam") else 0 if name.startswith("sgd") else 1)
    for buffer in buffers.values():
        assert torch.equal(buffer, torch.zeros(1, 7, dtype=torch.float64))


def experiment(schedule: specs.Schedule, warmup: int = 0, **train: int) -> specs.ExperimentSpec:
    return specs.ExperimentSpec(
        name="schedules",
        optimizer=specs.SGD(lr=PEAK),
        schedule=schedule.model_copy(update={"warmup_steps": warmup}),
        train=specs.Train(**({"batch_size": BATCH, "epochs": EPOCHS} | train)),
    )


def rates(spec: specs.ExperimentSpec) -> list[float]:
    return list(optim.learning_rates(spec, np.arange(1, spec.steps + 1)))


@pytest.mark.parametrize("warmup", [0, 1, 7, 48])
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_torchs_after_a_linear_climb(name: str, warmup: int) -> None:
    spec = experiment(SCHEDULES[name], warmup)
    after = torchs_rates(spec, spec.steps - warmup)
    climb = [after[0] * step / warmup for step in range(1, warmup + 1)]
    assert spec.steps == 50
    assert rates(spec) == pytest.approx(climb + after, rel=1e-12)


def test_steps_drop_by_epochs_counted_from_the_end_of_the_warm_up() -> None:
    found = rates(experiment(SCHEDULES["step"], warmup=7))
    assert found[7:27] == [PEAK] * 20
    assert found[27:47] == pytest.approx([0.3 * PEAK] * 20)
    assert found[47:] == pytest.approx([0.09 * PEAK] * 3)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("name", "final"), [("cosine", 0.05), ("linear", 0.1)])
def test_the_rate_after_the_last_step_is_the_final_fraction(
    name: str, final: float, warmup: int
) -> None:
    spec = experiment(SCHEDULES[name], warmup)
    last, after = optim.learning_rates(spec, np.array([spec.steps, spec.steps + 1]))
    assert after == pytest.approx(final * PEAK)
    assert last > final * PEAK


@pytest.mark.parametrize("warmup", [0, 7])
def test_one_cycle_starts_peaks_and_ends_as_it_says(warmup: int) -> None:
    found = rates(experiment(SCHEDULES["one_cycle"], warmup))
    assert found[warmup] == pytest.approx(PEAK / 10)
    assert found[-1] == pytest.approx(PEAK / 10 / 100)
    assert max(found) == pytest.approx(PEAK, rel=0.01)


@pytest.mark.parametrize("rise", [0.01, 0.3, 1 / 3, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_tiny_one_cycle_has_finite_positive_rates(steps: int, rise: float) -> None:
    found = rates(experiment(specs.OneCycle(rise=rise), batch_size=60_000, epochs=steps))
    assert len(found) == steps
    assert all(math.isfinite(rate) and 0 < rate <= PEAK for rate in found)
