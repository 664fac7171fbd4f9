"""The check of a device against the CPU, its faults injected on the CPU; what a run does about each; and the same on a real device."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Fmnist
from test_capture import record
from test_engine import HOLDOUT, STACKS, experiment, members

from fmnist import capture, data, devices, engine, environment, runner
from fmnist import spec as specs
from fmnist.errors import DeviceError, SpecError
from fmnist.state import StateFolder, state_folders

NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    spec = specs.Data(holdout=HOLDOUT)
    return data.load(spec, REPOSITORY, engine.device(specs.Compute(device="cpu")))


def both(chosen: list[specs.ExperimentSpec], dataset: data.Dataset) -> tuple[Any, Any]:
    """Make an engine that stands for a device's, and the reference."""
    trained, reference = (engine.Engine(chosen, dataset) for _ in range(2))
    trained.replay_steps(record)
    return trained, reference


# ---- what the check sees


@pytest.mark.parametrize("stack", STACKS)
def test_a_sound_device_passes(stack: str, dataset: data.Dataset) -> None:
    found = devices.check(*both(members(stack), dataset))
    assert (
        found
        == "agrees with the CPU to 0e+00 (float32, PyTorch's operations); captured steps equal single ones"
    )


def test_only_some_members_of_a_large_stack_are_checked(
    dataset: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [experiment(seed) for seed in range(devices.MEMBERS + 3)]
    monkeypatch.setattr(devices, "_passed", {})
    monkeypatch.setattr(devices, "check", lambda *both: str([len(each.specs) for each in both]))
    assert devices._checked(chosen, dataset) == str([devices.MEMBERS] * 2)


def test_a_spec_in_bf16_has_a_tolerance_of_its_own(dataset: data.Dataset) -> None:
    train = specs.Train(batch_size=48, epochs=5, precision="bf16")
    trained, reference = both([experiment(train=train)], dataset)
    assert "(bf16, " in devices.check(trained, reference)


def scaled(call: Callable[..., Any], tensor: Callable[[], torch.Tensor]) -> Callable[..., Any]:
    """Do what `call` does, with one entry in ten of a tensor off by a hundredth afterwards."""

    def faulty(*arguments: Any, **options: Any) -> Any:
        result = call(*arguments, **options)
        if not isinstance(result, (engine.Evaluation, list, type(None))):
            result = list(result)  # the blocks of a gradient: done before what they made is altered
        tensor().view(-1)[::10] *= 1.01
        return iter(result) if isinstance(result, list) else result

    return faulty


def wrong_gradient(trained: engine.Engine) -> None:
    size = trained.batch
    trained.passes[size] = scaled(trained.passes[size], lambda: trained.update.gradients)


def wrong_short_batch(trained: engine.Engine) -> None:
    size = min(trained.passes)
    assert size < trained.batch
    trained.passes[size] = scaled(trained.passes[size], lambda: trained.update.gradients)


def wrong_logits(trained: engine.Engine) -> None:
    size = trained.batch
    plain = trained.passes[size]

    def faulty(targets: torch.Tensor, logits: torch.Tensor) -> Iterator[int]:
        yield from plain(targets, logits)
        logits.mul_(1.001)

    trained.passes[size] = faulty


def wrong_loss(trained: engine.Engine) -> None:
    train = trained.train

    def faulty(stop: int) -> list[engine.Curves]:
        return [engine.Curves(c.loss * 1.01, c.accuracy, c.lr) for c in train(stop)]

    trained.train = faulty


def wrong_update(trained: engine.Engine) -> None:
    rule = trained.update._rule

    def faulty(update: Any, parameters: torch.Tensor, *arguments: Any, **options: Any) -> None:
        rule(update, parameters, *arguments, **options)
        parameters[:, :5] += 1e-3

    trained.update._rule = faulty


def wrong_buffer(trained: engine.Engine) -> None:
    rule = trained.update._rule

    def faulty(update: Any, *arguments: Any, **options: Any) -> None:
        rule(update, *arguments, **options)
        trained.update.buffers["square"].mul_(1.01)

    trained.update._rule = faulty


def unit_at_the_edge(trained: engine.Engine) -> None:
    """Only the first batch's gradients are off."""
    plain, calls = trained.passes[trained.batch], itertools.count()

    def faulty(targets: torch.Tensor, logits: torch.Tensor) -> Iterator[int]:
        blocks = list(plain(targets, logits))
        if next(calls) < 2:  # looked at, and then trained on
            trained.update.gradients[0, :300] += 1e-3
        yield from blocks

    trained.passes[trained.batch] = faulty


def not_a_number(trained: engine.Engine) -> None:
    size = trained.batch
    plain = trained.passes[size]

    def faulty(targets: torch.Tensor, logits: torch.Tensor) -> Iterator[int]:
        yield from plain(targets, logits)
        trained.update.gradients[0, 3] = torch.nan

    trained.passes[size] = faulty


def wrong_evaluation(trained: engine.Engine) -> None:
    evaluate = trained.evaluate

    def faulty(split: data.Split, member: int = 0) -> engine.Evaluation:
        found = evaluate(split, member)
        return engine.Evaluation(found.loss, found.accuracy, found.logits * np.float32(1.01))

    trained.evaluate = faulty


def wrong_accuracy(trained: engine.Engine) -> None:
    evaluate = trained.evaluate

    def faulty(split: data.Split, member: int = 0) -> engine.Evaluation:
        found = evaluate(split, member)
        return engine.Evaluation(found.loss, found.accuracy + 0.01, found.logits)

    trained.evaluate = faulty


def wrong_capture(trained: engine.Engine) -> None:
    def forgetful(work: Callable[[], None]) -> capture.Replay:
        replay = record(work)
        calls = replay.__self__.calls  # type: ignore[attr-defined]
        if sum("index_select" in str(call[0]) for call in calls) == 2:
            calls.pop()
        return replay

    trained.replay_steps(forgetful)


WRONG = {
    wrong_gradient: "the gradients of step 43 differ",
    wrong_short_batch: "the gradients of step 63 differ",
    wrong_logits: "the logits of step 1 differ",
    wrong_loss: "the losses of step 1 differ",
    wrong_update: "the parameters after step 1 differ",
    wrong_buffer: "the square after step 1 differ",
    not_a_number: "differ from the CPU's by nan",
    wrong_evaluation: "the logits of an evaluation differ",
    wrong_accuracy: "an evaluation's accuracy is",
    wrong_capture: "captured steps differ from the same steps launched one by one",
}


@pytest.mark.parametrize(
    ("damage", "message"), WRONG.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_device_that_computes_something_else_is_found(
    damage: Callable[[engine.Engine], None], message: str, dataset: data.Dataset
) -> None:
    trained, reference = both([experiment(optimizer=specs.Adam(lr=1e-3))], dataset)
    damage(trained)
    with pytest.raises(devices.Disagreement, match=message):
        devices.check(trained, reference)


def test_a_unit_at_the_edge_of_its_activation_is_no_fault(dataset: data.Dataset) -> None:
    """Rounding puts it on the other side, which shows in the gradients of one batch, not in those of every epoch's first."""
    trained, reference = both([experiment(optimizer=specs.Adam(lr=1e-3))], dataset)
    trained.replay_steps(None)
    unit_at_the_edge(trained)
    assert "agrees" in devices.check(trained, reference)


def test_steps_that_can_not_be_captured_are_no_fault(dataset: data.Dataset) -> None:
    def refuse(work: Callable[[], None]) -> capture.Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    trained, reference = both([experiment()], dataset)
    trained.replay_steps(refuse)
    assert devices.check(trained, reference).endswith("steps are not captured")


# ---- what a run does about it: the device is the CPU under the name of a CUDA device


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `compute.device: auto` and `cuda` be a device of the host, which is checked as a CUDA device is."""
    asked_for_cpu = engine.device

    def device(compute: specs.Compute, precision: str = "float32") -> torch.device:
        if compute.device == "cpu":
            return asked_for_cpu(compute, precision)
        return PRETENDED

    load = data.load

    def loaded(spec: specs.Data, root: Path, device: Any, say: Any = print) -> data.Dataset:
        return load(spec, root, torch.device("cpu"), say)

    monkeypatch.setattr(engine, "device", device)
    monkeypatch.setattr(data, "load", loaded)
    monkeypatch.setattr(devices, "_passed", {})
    monkeypatch.setattr(devices, "_name", lambda device: "Pretended GPU")
    collect = environment.collect
    on_cpu = torch.device("cpu")
    monkeypatch.setattr(
        environment, "collect", lambda command, device, *rest: collect(command, on_cpu, *rest)
    )


PRETENDED = torch.device("cuda")
TINY = ("train.batch_size=30000", "train.epochs=1", "train.eval_every=2")


def train(home: Path, device: str, lines: list[str]) -> "runner.Outcome":
    from fmnist import experiments

    resolved = experiments.load("baseline", [*TINY, f"compute.device={device}"], home)
    return runner.run([resolved], runner.Context(home, sync=False, say=lines.append))[0]


def no_kernel(*arguments: Any, **options: Any) -> None:
    raise RuntimeError(
        f"{NO_KERNEL}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    )


def no_memory(*arguments: Any, **options: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 180.00 MiB")


def disagree(*arguments: Any, **options: Any) -> None:
    raise devices.Disagreement("the gradients of step 1 differ from the CPU's by 1.0e-02")


FAULTS = {
    no_kernel: "this PyTorch has no code for this card; install one that has",
    no_memory: "or train fewer runs at once (compute.stack)",
    disagree: "the gradients of step 1 differ",
}


@pytest.mark.parametrize("where", ["_checked", "on_host", "check"])
@pytest.mark.parametrize(
    ("fault", "message"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_auto_trains_on_the_cpu_and_says_why(
    where: str,
    fault: Any,
    message: str,
    home: Path,
    pretended: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = train(home, "cpu", [])
    monkeypatch.setattr(devices, where, fault)
    lines: list[str] = []
    outcome = train(home, "auto", lines)
    assert (outcome.status, outcome.metrics) == ("FINISHED", wanted.metrics)
    [told] = [line for line in lines if "is not used" in line]
    assert told.startswith("Pretended GPU is not used: ")
    assert message in told
    assert "training on the CPU" in told
    assert "\n" not in told
    [_, folder] = state_folders(home)
    assert message in folder.environment["device_check"]


@pytest.mark.parametrize(
    ("fault", "message"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_device_that_was_named_is_refused(
    fault: Any, message: str, home: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "check", fault)
    with pytest.raises(DeviceError, match=r"^compute\.device: cuda can't be used: ") as refused:
        train(home, "cuda", [])
    assert message in str(refused.value)
    assert "give compute.device: cpu" in str(refused.value)
    assert refused.value.exit_code == 2
    assert not state_folders(home)  # nothing was begun


def test_a_device_without_room_for_the_stack_is_refused(
    home: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_checked", lambda members, dataset: "agrees")
    monkeypatch.setattr(engine, "Engine", no_memory)
    with pytest.raises(DeviceError, match="the CUDA device fails: CUDA out of memory") as refused:
        train(home, "cuda", [])
    assert "compute.stack" in str(refused.value)


def test_what_was_found_is_recorded_and_found_once(
    home: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []

    def counted(*engines: engine.Engine) -> str:
        checks.append(engines)
        return "agrees with the CPU"

    monkeypatch.setattr(devices, "check", counted)
    for _ in range(2):
        assert train(home, "auto", []).status == "FINISHED"
    assert len(checks) == 1
    assert {folder.environment["device_check"] for folder in state_folders(home)} == {
        "agrees with the CPU"
    }


def test_a_driver_that_can_not_be_used_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.setattr(devices, "DRIVER", tmp_path)
    lines: list[str] = []
    assert train(home, "auto", lines).status == "FINISHED"
    assert any(
        line.startswith("no CUDA device is used: ") and "training on the CPU" in line
        for line in lines
    )
    assert (
        "no CUDA device is used"
        in StateFolder.at(state_folders(home)[0].path).environment["device_check"]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("asked", ["cuda", "cuda:1"])
def test_a_missing_device_is_refused_by_the_command(asked: str, fmnist: Fmnist) -> None:
    result = fmnist("run", "baseline", "--no-sync", "-s", f"compute.device={asked}")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert (
        f"compute.device: {asked} was asked for and this machine has no usable CUDA device ("
        in line
    )
    assert line.endswith("; give cpu or auto")


def test_a_device_past_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SpecError, match=r"given cuda:2; this machine has cuda:0 to cuda:1"):
        engine.device(specs.Compute(device="cuda:2"))


def test_workers_take_turns_at_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for worker in range(5):
        engine.take_turn(worker)
    assert chosen == [0, 1, 2, 0, 1]


# ---- on a CUDA device


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_cuda_device_agrees(stack: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(devices, "_passed", {})  # some of these stacks are of one shape
    train = specs.Train(batch_size=48, epochs=5, precision=precision)
    chosen = [spec.model_copy(update={"train": train}) for spec in members(stack)]
    lines: list[str] = []
    place = devices.choose(chosen, REPOSITORY, lines.append)
    assert (place.device.type, lines) == ("cuda", [])
    assert place.finding is not None
    assert place.finding.endswith("captured steps equal single ones")
