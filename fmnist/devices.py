"""The device that runs are trained on: chosen, checked against the CPU, and given up where the two
disagree.

`compute.device: auto` takes a CUDA device. Whoever has one must not get other numbers from it, or a
traceback where it can't compute: before a process first trains on a device, a few steps of the very
spec are done there and on the CPU, and compared.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fmnist import data
from fmnist import engine as engines
from fmnist import spec as specs
from fmnist.errors import DeviceError

LOGITS = {"float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Of each precision: the largest |device - CPU| / |CPU| (2-norms) of logits.

Sums of 784 products in another order differ by some 1e-6; TF32 products, of 11 bits, by some 1e-3;
bf16 ones, of 8 bits, by some 1e-2.
"""
GRADIENTS = {"float32": 1e-4, "tf32": 0.2, "bf16": 0.2}
"""The same of gradients, which jump where rounding puts a unit across its activation's edge."""
UPDATES = 1e-3
"""The same of what an update changes, given the same gradients: all updates are float32."""
ROUNDING = 2.0**-22
"""What the rounding of a sum may add to that, as a share of the sum."""
TRIES = 3
"""How many epochs' batches may be tried until one has no unit at the edge of its activation."""
MEMBERS = 8
"""Models of a stack that are checked: all share its kernels, and each takes the CPU time."""
EVALUATED = 1_000
DRIVER = Path("/proc/driver/nvidia/version")


class Place(NamedTuple):
    """Where runs are trained."""

    device: torch.device
    dataset: data.Dataset
    finding: str | None
    """What the check of the device found; None on the CPU, where none was wanted."""


class Disagreement(RuntimeError):
    """A device that computes something else than the CPU."""


class WrongGradients(Disagreement):
    """Gradients that differ: of a fault, or of a unit at the edge of its activation."""


_passed: dict[tuple[torch.device, str, int], str] = {}
"""What was found of a device, kind of model and number of models, for this process."""


def choose(wanted: list[specs.ExperimentSpec], root: Path, say: Callable[[str], None]) -> Place:
    """Load the data onto the device that specs of one shape ask for, once it is shown to compute
    what the CPU does.

    `auto` falls back to the CPU, and says why. Raises SpecError where there is no such device,
    DataError where there is no data, DeviceError where the device that was named fails.
    """
    first = wanted[0]
    device = engines.device(first.compute, first.train.precision)
    if device.type == "cpu":
        finding = None
        if first.compute.device == "auto" and DRIVER.exists():
            finding = f"no CUDA device is used: {engines.why_no_cuda()}"
            say(f"{finding}; training on the CPU")
        return Place(device, data.load(first.data, root, device, say), finding)
    data.ensure(root, say)
    try:
        dataset = data.load(first.data, root, device, say)
        members = wanted[: engines.stack_size(first.compute, device)]
        return Place(device, dataset, _checked(members, dataset))
    except RuntimeError as error:
        reason = explain(error)
    if first.compute.device != "auto":
        raise DeviceError(
            f"compute.device: {first.compute.device} can't be used: {reason};"
            " mend that, or give compute.device: cpu"
        )
    name = _name(device)
    say(
        f"{name} is not used: {reason};"
        " training on the CPU (compute.device: cpu says so from the start)"
    )
    on_cpu = first.compute.model_copy(update={"device": "cpu"})
    device = engines.device(on_cpu, first.train.precision)
    dataset = data.load(first.data, root, device, say)
    return Place(device, dataset, f"{name} was not used: {reason}")


def explain(error: RuntimeError) -> str:
    """One line on what a CUDA device raised, with what can be done where that is known."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".;")
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text}; end what else uses the device, or train fewer runs at once (compute.stack)"
    if "no kernel image" in text:
        return f"{text}: this PyTorch has no code for this card; install one that has"
    return text


@contextlib.contextmanager
def failures(device: torch.device) -> Iterator[None]:
    """Raise what a CUDA device raises in here as a DeviceError of one line."""
    try:
        yield
    except RuntimeError as error:
        if device.type == "cpu":
            raise
        raise DeviceError(
            f"the CUDA device fails: {explain(error)}; or give compute.device: cpu"
        ) from None


def _name(device: torch.device) -> str:
    try:
        return torch.cuda.get_device_name(device)
    except RuntimeError:
        return str(device)


def _checked(members: list[specs.ExperimentSpec], dataset: data.Dataset) -> str:
    """Check a stack's device, unless it was checked in this process before; what was found."""
    chosen = members[:MEMBERS]
    key = (dataset.train.images.device, chosen[0].shape, len(chosen))
    if key not in _passed:
        reference = engines.Engine(chosen, on_host(dataset))
        _passed[key] = check(engines.Engine(chosen, dataset), reference)
    return _passed[key]


def on_host(dataset: data.Dataset) -> data.Dataset:
    """A copy of a dataset in the host's memory."""

    def copied(split: data.Split) -> data.Split:
        return dataclasses.replace(split, images=split.images.cpu(), labels=split.labels.cpu())

    test = None if dataset.test is None else copied(dataset.test)
    return data.Dataset(copied(dataset.train), copied(dataset.validation), test)


# ---- the check


def check(trained: engines.Engine, reference: engines.Engine) -> str:
    """Compare an engine on a device with one of the same specs on the CPU, and captured steps with
    single ones; what was found.

    Compared are the first batch of an epoch and the last, a short one, from the same state: logits,
    gradients, and what an update with these gradients makes of parameters and buffers; and an
    evaluation. Raises Disagreement, and whatever the device raises.
    """
    per_epoch = trained.specs[0].steps_per_epoch
    largest = max(_compare_batch(trained, reference, step) for step in sorted({1, per_epoch}))
    largest = max(largest, _compare_evaluation(trained, reference))
    kernels = "fused kernels" if trained.fused else "PyTorch's operations"
    steps = (
        "captured steps equal single ones"
        if _compare_captured(trained)
        else "steps are not captured"
    )
    return f"agrees with the CPU to {largest:.0e} ({trained.precision}, {kernels}); {steps}"


def _compare_batch(trained: engines.Engine, reference: engines.Engine, step: int) -> float:
    """The largest error of a step, or of a later epoch's where only the gradients differ."""
    spec = trained.specs[0]
    epochs = range(min(TRIES, spec.train.epochs))
    for epoch in epochs:
        try:
            return _compare_step(trained, reference, step + epoch * spec.steps_per_epoch)
        except WrongGradients:
            if epoch == epochs[-1]:
                raise
    raise AssertionError("there is at least one epoch")


def _compare_step(trained: engines.Engine, reference: engines.Engine, step: int) -> float:
    """The largest error of one step's logits and gradients; both do its update."""
    before = [tensor.clone() for tensor in trained.changing]
    logits, _ = trained.gradients(step)
    expected, targets = reference.gradients(step)
    allowed = LOGITS[trained.precision]
    error = _require(f"the logits of step {step}", logits.cpu(), expected, allowed)
    gradients = trained.update.gradients.clone().cpu()
    wanted = reference.update.gradients.clone()
    reference.update.gradients.copy_(gradients)
    reference_before = [tensor.clone() for tensor in _updated(reference)]
    reference.apply(step)
    for tensor, saved in zip(trained.changing, before, strict=True):
        tensor.copy_(saved)
    trained.step = step - 1
    losses = torch.tensor([curves.loss[0] for curves in trained.train(step)])
    _require(f"the losses of step {step}", losses, _losses(expected, targets), allowed)
    names = ("parameters", *trained.update.buffers)
    triples = zip(names, _updated(trained), _updated(reference), reference_before, strict=True)
    for name, found, target, start in triples:
        _require_change(f"the {name} after step {step}", found.cpu(), target, start)
    allowed = GRADIENTS[trained.precision]
    what = f"the gradients of step {step}"
    return max(error, _require(what, gradients, wanted, allowed, WrongGradients))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[K] the mean cross-entropies of a batch."""
    pairs = zip(logits, targets, strict=True)
    return torch.stack([functional.cross_entropy(*pair) for pair in pairs])


def _updated(engine: engines.Engine) -> list[Tensor]:
    return [engine.parameters, *engine.update.buffers.values()]


def _compare_evaluation(trained: engines.Engine, reference: engines.Engine) -> float:
    allowed = LOGITS[trained.precision]
    found = trained.evaluate(_first(trained.dataset.validation))
    wanted = reference.evaluate(_first(reference.dataset.validation))
    logits, expected = torch.from_numpy(found.logits), torch.from_numpy(wanted.logits)
    error = _require("the logits of an evaluation", logits, expected, allowed)
    for name in ("loss", "accuracy"):
        value, on_cpu = getattr(found, name), getattr(wanted, name)
        if abs(value - on_cpu) > max(allowed, 2 / EVALUATED):
            raise Disagreement(f"an evaluation's {name} is {value:.4f}, {on_cpu:.4f} on the CPU")
    return error


def _first(split: data.Split) -> data.Split:
    return data.Split(split.images[:EVALUATED], split.labels[:EVALUATED], split.index[:EVALUATED])


def _compare_captured(trained: engines.Engine) -> bool:
    """Tell whether steps can be captured; raise Disagreement if that changes a bit."""
    if not trained.captured:
        return False
    with trained.undone():
        captured = _few_steps(trained)
    if not trained.captured:
        return False
    trained.replay_steps(None)
    with trained.undone():
        single = _few_steps(trained)
    if not all(torch.equal(*pair) for pair in zip(captured, single, strict=True)):
        raise Disagreement("captured steps differ from the same steps launched one by one")
    return True


def _few_steps(trained: engines.Engine) -> list[Tensor]:
    """Train an epoch's first three steps and its last; all that they leave, and their losses."""
    last = trained.specs[0].steps_per_epoch
    losses = []
    for start, stop in ((0, min(3, last)), (last - 1, last)):
        trained.step = start
        losses += [torch.from_numpy(curves.loss) for curves in trained.train(stop)]
    return [*losses, *(tensor.clone() for tensor in trained.changing)]


def _require(
    what: str,
    found: Tensor,
    wanted: Tensor,
    allowed: float,
    error: type[Disagreement] = Disagreement,
) -> float:
    """The relative error of a tensor; raises `error` if it is more than allowed, or NaN."""
    size = _norm(wanted)
    off = _norm(found.double() - wanted.double()) / (size or 1.0)
    if not off <= allowed:
        raise error(
            f"{what} differ from the CPU's by {off:.1e} of their size, allowed are {allowed:.0e}"
        )
    return off


def _require_change(what: str, found: Tensor, wanted: Tensor, before: Tensor) -> None:
    """Raise Disagreement where a tensor is not what the CPU made of the one before."""
    change = _norm(wanted.double() - before.double())
    off = _norm(found.double() - wanted.double())
    if not off <= UPDATES * change + ROUNDING * _norm(wanted):
        share = off / change if change else off
        raise Disagreement(
            f"{what} differ from the CPU's by {share:.1e} of the change, allowed are {UPDATES:.0e}"
        )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))
