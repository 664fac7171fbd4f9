"""Chunks of steps recorded once and replayed, with a stand-in for CUDA graphs: the bits of the plain loop, wherever it is cut."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_engine import HOLDOUT, STACKS, assert_same_bits, experiment, joined, members
from test_optim import OPTIMIZERS, SCHEDULES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmnist import capture, data, engine, model
from fmnist import spec as specs

EPOCHS = 5


class Tape(TorchDispatchMode):
    """Notes each operation with its arguments and results, as a CUDA graph does: the numbers that Python gave stay as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = operation(*arguments, **(options or {}))
        self.calls.append((operation, arguments, options or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operation, arguments, options, result in self.calls:
            again = operation(*arguments, **options)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # a graph's results are always in the same memory


def record(work: Callable[[], None]) -> capture.Replay:
    """Stand in for capture.CudaGraphs on the CPU."""
    tape = Tape()
    with tape:
        work()
    return tape.replay


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    spec = specs.Data(holdout=HOLDOUT)
    return data.load(spec, REPOSITORY, engine.device(specs.Compute(device="cpu")))


def pair(
    specs_: list[specs.ExperimentSpec], dataset: data.Dataset
) -> tuple[engine.Engine, engine.Engine]:
    """Make an engine that replays its steps, and one that does them one after the other."""
    replayed, plain = (engine.Engine(specs_, dataset) for _ in range(2))
    replayed.replay_steps(record)
    return replayed, plain


def assert_same_training(
    replayed: engine.Engine, plain: engine.Engine, stops: tuple[int, ...]
) -> None:
    """Both train to each of the stops, and are the same bits there."""
    for stop in stops:
        for found, wanted in zip(replayed.train(stop), plain.train(stop), strict=True):
            assert_same_bits(found, wanted)
        for found, wanted in zip(replayed.changing, plain.changing, strict=True):
            np.testing.assert_array_equal(found.numpy(), wanted.numpy())  # NaN equals NaN
    assert replayed.captured


def sized(batch: int) -> specs.Train:
    return specs.Train(batch_size=batch, epochs=EPOCHS)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_schedule(optimizer: str, schedule: str, dataset: data.Dataset) -> None:
    spec = experiment(optimizer=OPTIMIZERS[optimizer], schedule=SCHEDULES[schedule])
    assert_same_training(*pair([spec], dataset), stops=(1, 3, 21, 42, 105))


@pytest.mark.parametrize("batch", [1_000, 500, 333, 64, 50, 48, 7])
@pytest.mark.parametrize("count", [1, 5])
def test_every_batch_size(count: int, batch: int, dataset: data.Dataset) -> None:
    """Some divide the 1,000 images, some leave a short last batch of one image or more; one model, and five."""
    optimizer = specs.SGD(lr=0.05, momentum=0.9)
    chosen = [
        experiment(seed, optimizer=optimizer, train=sized(batch).model_copy(update={"seed": seed}))
        for seed in range(count)
    ]
    last = chosen[0].steps
    cuts = sorted({1, last // 7 + 1, last // 2 + 1, last})
    assert_same_training(*pair(chosen, dataset), stops=tuple(cuts))


@pytest.mark.parametrize("stack", STACKS)
def test_stacks_with_rates_of_their_own(stack: str, dataset: data.Dataset) -> None:
    assert_same_training(*pair(members(stack), dataset), stops=(40, 63, 100))


@pytest.mark.parametrize("stop", [0, 1, 20, 21, 22, 42, 50, 104])
def test_a_resumed_run(stop: int, dataset: data.Dataset) -> None:
    """At the start, in mid-epoch, before, at and after a short batch, a step before the end."""
    spec = experiment(optimizer=specs.AdamW(lr=1e-3), schedule=specs.Cosine(warmup_steps=10))
    replayed, plain = pair([spec], dataset)
    if stop:
        plain.train(stop)
        replayed.load_state(plain.state())
    assert_same_training(replayed, plain, stops=tuple(sorted({min(stop + 30, 105), 105})))


def test_a_longer_run_continues_the_same_recordings(dataset: data.Dataset) -> None:
    """What `extend` does: another engine, of a longer spec, from the state of the shorter one's end."""
    short, long = (
        experiment(train=specs.Train(batch_size=48, epochs=epochs)) for epochs in (2, EPOCHS)
    )
    first, _ = pair([short], dataset)
    first.train(short.steps)
    replayed, plain = pair([long], dataset)
    plain.train(short.steps)
    replayed.load_state(first.state())
    assert_same_training(replayed, plain, stops=(70, 105))


def test_a_diverging_run(dataset: data.Dataset) -> None:
    """What infinite logits leave in the static memory is not read by the short batch behind them."""
    wild = experiment(optimizer=specs.SGD(lr=1_000.0, weight_decay=100.0))
    replayed, plain = pair([wild], dataset)
    assert_same_training(replayed, plain, stops=(60,))
    assert not np.isfinite(plain.evaluate(dataset.validation).loss)


def test_bf16(dataset: data.Dataset) -> None:
    train = sized(48).model_copy(update={"precision": "bf16"})
    assert_same_training(*pair([experiment(train=train)], dataset), stops=(5, 42))


def test_other_modules(dataset: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def convolutional(spec: specs.MLP, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
        return nn.Sequential(*layers)

    monkeypatch.setattr(model, "build", convolutional)  # a spec can't ask for such a model yet
    assert_same_training(*pair(members("momentum"), dataset), stops=(5, 42, 60))


def test_what_can_not_be_recorded_is_done_step_by_step(
    dataset: data.Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(work: Callable[[], None]) -> capture.Replay:
        work()  # some of it may have been done
        raise RuntimeError("operation not permitted when\nstream is capturing")

    spec = experiment(optimizer=specs.Adam(lr=1e-3))
    refused, plain = (engine.Engine([spec], dataset) for _ in range(2))
    refused.replay_steps(refuse)
    with caplog.at_level(logging.WARNING):
        for stop in (30, 60):
            assert_same_bits(refused.train(stop)[0], plain.train(stop)[0])
    assert torch.equal(refused.parameters, plain.parameters)
    assert not refused.captured
    [line] = caplog.messages  # once, and no more
    assert "one by one: operation not permitted when stream is capturing" in line


def test_a_recording_that_fails_late_leaves_no_step_done_twice(dataset: data.Dataset) -> None:
    """The second kind of chunk fails after the first was recorded, and before anything was replayed."""
    calls = itertools.count()

    def refuse_the_second(work: Callable[[], None]) -> capture.Replay:
        if next(calls):
            raise RuntimeError("out of memory")
        return record(work)

    refused, plain = (engine.Engine([experiment()], dataset) for _ in range(2))
    refused.replay_steps(refuse_the_second)
    assert_same_bits(refused.train(70)[0], plain.train(70)[0])
    assert torch.equal(refused.parameters, plain.parameters)


def test_recordings_are_few_and_used_again(dataset: data.Dataset) -> None:
    recordings = []

    def counted(work: Callable[[], None]) -> capture.Replay:
        recordings.append(work)
        return record(work)

    replayed = engine.Engine([experiment(train=sized(10))], dataset)  # 100 steps an epoch
    replayed.replay_steps(counted)
    for stop in (100, 200, 300):
        replayed.train(stop)
    assert len(recordings) == 1
    replayed.train(387)  # 50 + 20 + 10 + 5 + 2
    assert len(recordings) == 6


def test_memory_of_large_batches_is_bounded(
    monkeypatch: pytest.MonkeyPatch, dataset: data.Dataset
) -> None:
    monkeypatch.setattr(capture, "MOST_IMAGES", 48 * 20)
    lengths = []

    def noted(work: Callable[[], None]) -> capture.Replay:
        tape = Tape()
        with tape:
            work()
        lengths.append(sum(str(call[0]).startswith("aten.index_select") for call in tape.calls))
        return tape.replay

    replayed, plain = (engine.Engine([experiment()], dataset) for _ in range(2))
    replayed.replay_steps(noted)
    assert_same_bits(replayed.train(60)[0], plain.train(60)[0])
    assert max(lengths) == 20


def every_short_division() -> Iterator[list[int]]:
    yield from (list(sizes) for n in range(1, 9) for sizes in itertools.product((48, 40), repeat=n))
    yield from ([48] * n + [40] + [48] * (n // 3) for n in (99, 100, 101, 999, 1_000))


def test_division_has_every_step_once() -> None:
    for sizes in every_short_division():
        chunks = list(capture.divide(sizes))
        steps = [step for c in chunks for step in range(c.start, c.start + c.length)]
        assert steps == list(range(len(sizes)))
        assert all(set(sizes[c.start : c.start + c.length]) == {c.size} for c in chunks)
        assert {c.length for c in chunks} <= set(capture.LENGTHS)


def test_joined_segments_are_one_segment(dataset: data.Dataset) -> None:
    replayed, plain = pair([experiment(optimizer=specs.SGD(lr=0.1, momentum=0.9))], dataset)
    parts = [replayed.train(stop)[0] for stop in (17, 60, 105)]
    assert_same_bits(joined(*parts), plain.train(105)[0])
