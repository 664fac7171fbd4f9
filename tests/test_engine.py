"""The engine against the obvious PyTorch loop, and its promises: the same bits however a run is cut, and a state that is whole."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from sklearn import metrics
from test_optim import OPTIMIZERS, SCHEDULES, torchs_optimizer, torchs_scheduler
from torch import nn
from torch.nn import functional

from fmnist import data, engine, model, plots
from fmnist import spec as specs
from fmnist.errors import SpecError

STEPS = 60
HOLDOUT = 59_000
CURVES = {"loss": np.float32, "accuracy": np.float32, "lr": np.float64}
BATCH, EPOCHS = 48, 5  # of 1,000 images: 21 steps an epoch, the last of them 40 images


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    whole = data.load(
        specs.Data(holdout=HOLDOUT), REPOSITORY, engine.device(specs.Compute(device="cpu"))
    )
    n = 2_345  # the last of the chunks that evaluation goes by is a short one
    held_out = whole.validation
    return data.Dataset(
        whole.train, data.Split(held_out.images[:n], held_out.labels[:n], held_out.index[:n]), None
    )


@pytest.fixture
def precise(dataset: data.Dataset) -> Iterator[data.Dataset]:
    """The data set, and all that is made of it, in float64: there an equivalence holds to the last digits on any processor.

    In float32 an activation that is 0 but for its rounding may be on in one of the two and off in the other.
    """
    torch.set_default_dtype(torch.float64)
    train, held_out = (
        data.Split(split.images.double(), split.labels, split.index)
        for split in (dataset.train, dataset.validation)
    )
    yield data.Dataset(train, held_out, None)
    torch.set_default_dtype(torch.float32)


def experiment(seed: int = 0, **sections: Any) -> specs.ExperimentSpec:
    settled = {
        "data": specs.Data(holdout=HOLDOUT),
        "model": specs.MLP(hidden=(24, 16)),
        "train": specs.Train(batch_size=BATCH, epochs=EPOCHS, seed=seed),
    }
    return specs.ExperimentSpec(name="engine", **(settled | sections))


def loop(
    spec: specs.ExperimentSpec, dataset: data.Dataset, module: nn.Module, steps: int = STEPS
) -> engine.Curves:
    """Train the module for some steps as anyone would write it."""
    optimizer = torchs_optimizer(spec.optimizer, list(module.parameters()))
    scheduler = torchs_scheduler(spec, optimizer, spec.steps)
    batches = (
        batch for epoch in range(EPOCHS) for batch in dataset.batches(BATCH, spec.train.seed, epoch)
    )
    rows = []
    for images, labels in itertools.islice(batches, steps):
        logits = module(images)
        loss = functional.cross_entropy(logits, labels)
        rows.append(
            (
                loss.item(),
                metrics.accuracy_score(labels, logits.argmax(1)),
                scheduler.get_last_lr()[0],
            )
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return engine.Curves(*np.array(rows, float).T)


def assert_same_training(
    ours: engine.Engine, found: engine.Curves, module: nn.Module, wanted: engine.Curves
) -> None:
    """Equal but for the rounding of sums, which the steps carry along."""
    exact = ours.parameters.dtype == torch.float64
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-12 if exact else 1e-5)
    np.testing.assert_array_equal(found.accuracy, wanted.accuracy.astype(found.accuracy.dtype))
    np.testing.assert_allclose(found.lr, wanted.lr, rtol=1e-12)
    torch.testing.assert_close(
        ours.parameters[0],
        flat(module),
        rtol=1e-9 if exact else 1e-5,
        atol=1e-11 if exact else 1e-6,
    )


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def assert_same_bits(found: engine.Curves, wanted: engine.Curves) -> None:
    for name in CURVES:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), strict=True)


def joined(*curves: engine.Curves) -> engine.Curves:
    return engine.Curves(
        *(np.concatenate([getattr(part, name) for part in curves]) for name in CURVES)
    )


# ---- against the loop


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_obvious_loop(optimizer: str, schedule: str, precise: data.Dataset) -> None:
    spec = experiment(optimizer=OPTIMIZERS[optimizer], schedule=SCHEDULES[schedule])
    ours, module = engine.Engine([spec], precise), model.build(spec.model, spec.train.seed)
    assert_same_training(ours, ours.train(STEPS)[0], module, loop(spec, precise, module))


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("hidden", [(), (300, 100), (32, 24, 16)])
def test_every_mlp_trains_as_in_the_loop(
    hidden: tuple[int, ...], activation: str, precise: data.Dataset
) -> None:
    spec = experiment(
        seed=3, model=specs.MLP(hidden=hidden, activation=activation), optimizer=specs.SGD(lr=0.1)
    )
    ours, module = engine.Engine([spec], precise), model.build(spec.model, spec.train.seed)
    assert_same_training(ours, ours.train(STEPS)[0], module, loop(spec, precise, module))


def record_gradients(trainer: engine.Engine) -> None:
    """Let autograd make the gradients that the engine would write out."""
    count = len(trainer.modules)
    inputs = {size: x.view(count, size, -1) for size, x in trainer.inputs.items()}
    trainer.passes = {
        size: engine.AutogradGradient(trainer.modules, x, trainer.update)
        for size, x in inputs.items()
    }


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_an_engine_that_is_let_go_frees_its_tensors_at_once(
    optimizer: str, dataset: data.Dataset
) -> None:
    gc.disable()  # many runs in a row would wait for it with all of their tensors
    try:
        trainer = engine.Engine([experiment(optimizer=OPTIMIZERS[optimizer])], dataset)
        trainer.train(3)
        kept = [
            weakref.ref(tensor)
            for tensor in (trainer.parameters, trainer.update.gradients, *trainer.inputs.values())
        ]
        del trainer
        assert [each() for each in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_autograd_trains_as_the_explicit_gradient(dataset: data.Dataset) -> None:
    spec = experiment(optimizer=specs.SGD(lr=0.1, momentum=0.9))
    explicit, recorded = engine.Engine([spec], dataset), engine.Engine([spec], dataset)
    record_gradients(recorded)
    assert_same_training(
        explicit, explicit.train(STEPS)[0], recorded.modules[0], recorded.train(STEPS)[0]
    )


def test_another_kind_of_module_trains_as_in_the_loop(
    dataset: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convolutional(spec: specs.MLP, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        )

    monkeypatch.setattr(model, "build", convolutional)  # a spec can't ask for such a model yet
    spec = experiment(optimizer=specs.SGD(lr=0.1))
    ours, module = engine.Engine([spec], dataset), convolutional(spec.model, spec.train.seed)
    curves = ours.train(STEPS)[0]
    assert_same_training(ours, curves, module, loop(spec, dataset, module))
    assert curves.loss[-10:].mean() < 0.8 * curves.loss[:10].mean()


# ---- its promises


def test_a_run_may_be_cut_anywhere(dataset: data.Dataset) -> None:
    spec = experiment(optimizer=specs.AdamW(lr=1e-3), schedule=specs.Cosine(warmup_steps=10))
    whole, cut = engine.Engine([spec], dataset), engine.Engine([spec], dataset)
    parts = []
    for stop in (1, 21, 40, 42, 100):
        parts.append(cut.train(stop)[0])
        cut.evaluate(dataset.validation)
        assert cut.step == stop
    assert_same_bits(joined(*parts), whole.train(100)[0])
    assert torch.equal(cut.parameters, whole.parameters)
    assert torch.equal(flat(cut.modules[0]), cut.parameters[0])


def test_the_seed_decides_the_run(dataset: data.Dataset) -> None:
    engines = [engine.Engine([experiment(seed)], dataset) for seed in (1, 1, 2)]
    assert torch.equal(engines[0].parameters, engines[1].parameters)
    assert not torch.equal(engines[0].parameters, engines[2].parameters)
    first, again, other = (trained.train(STEPS)[0] for trained in engines)
    assert_same_bits(again, first)
    assert torch.equal(engines[0].parameters, engines[1].parameters)
    assert not np.array_equal(other.loss, first.loss)


@pytest.mark.parametrize("into", ["a fresh engine", "itself"])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_a_state_is_whole(optimizer: str, into: str, dataset: data.Dataset) -> None:
    spec = experiment(optimizer=OPTIMIZERS[optimizer], schedule=SCHEDULES["one_cycle"])
    ours = engine.Engine([spec], dataset)
    ours.train(30)
    state = ours.state()
    wanted, parameters = ours.train(90)[0], ours.parameters.clone()
    other = ours if into == "itself" else engine.Engine([spec], dataset)
    other.load_state(state)
    assert other.step == 30
    assert_same_bits(other.train(90)[0], wanted)
    assert torch.equal(other.parameters, parameters)


def test_evaluation_is_the_full_batch_computation(dataset: data.Dataset) -> None:
    split = dataset.validation
    ours = engine.Engine([experiment(optimizer=specs.Adam(lr=0.01))], dataset)
    ours.train(STEPS)
    found = ours.evaluate(split)
    with torch.no_grad():
        logits = ours.modules[0](split.images.view(-1, 1, 28, 28))
    labels, predicted = split.labels.numpy(), found.logits.argmax(1)
    np.testing.assert_allclose(found.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert found.loss == pytest.approx(
        functional.cross_entropy(logits.double(), split.labels).item(), rel=1e-6
    )
    assert found.accuracy == metrics.accuracy_score(labels, predicted) > 0.5
    axes = plots.confusion_matrix(labels, predicted, "title").axes[0]
    drawn = np.zeros((10, 10), int)
    for text in axes.texts:
        column, row = text.get_position()
        drawn[row, column] = int(text.get_text())
    np.testing.assert_array_equal(
        drawn, metrics.confusion_matrix(labels, predicted, labels=range(10))
    )


def test_a_diverging_run_shows_in_its_curves(dataset: data.Dataset) -> None:
    ours = engine.Engine([experiment(optimizer=specs.SGD(lr=1_000.0, weight_decay=100.0))], dataset)
    loss = ours.train(STEPS)[0].loss
    assert np.isfinite(loss[0])
    assert not np.isfinite(loss[-1])
    assert not np.isfinite(ours.evaluate(dataset.validation).loss)


@pytest.mark.parametrize("stop", [1, STEPS])
def test_curves_have_a_value_per_step(stop: int, dataset: data.Dataset) -> None:
    curves = engine.Engine([experiment()], dataset).train(stop)[0]
    assert [(getattr(curves, name).shape, getattr(curves, name).dtype) for name in CURVES] == [
        ((stop,), t) for t in CURVES.values()
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_refused() -> None:
    with pytest.raises(SpecError, match=r"compute\.device"):
        engine.device(specs.Compute(device="cuda"))


def test_velocities_that_decay_to_nothing_become_zero(dataset: data.Dataset) -> None:
    """The corner pixel is dark in these images, so that its weights have no gradient; a number below 1e-38 costs a processor dearly."""
    ours = engine.Engine([experiment(optimizer=specs.SGD(lr=0.1, momentum=0.9))], dataset)
    corner = ours.update.buffers["momentum"][0, :1]
    corner.fill_(1.2e-38)
    ours.train(1)
    assert corner.item() == 0
    assert (torch.tensor([1.2e-38]) * 0.5).item() > 0  # so it is in training alone


# ---- many models in the same steps

LONG_RUN = 300
STACKS = {
    "sgd": [specs.SGD(lr=0.1), specs.SGD(lr=0.1), specs.SGD(lr=0.02, weight_decay=0.01)],
    "momentum": [
        specs.SGD(lr=0.02),
        specs.SGD(lr=0.05, momentum=0.9),
        specs.SGD(lr=0.02, momentum=0.5, weight_decay=0.01),
    ],
    "nesterov": [
        specs.SGD(lr=lr, momentum=momentum, nesterov=True)
        for lr, momentum in ((0.05, 0.9), (0.02, 0.5))
    ],
    "adam": [specs.Adam(lr=1e-3), specs.Adam(lr=3e-3, weight_decay=0.01)],
    "adamw": [
        specs.AdamW(lr=1e-3),
        specs.AdamW(lr=3e-3, weight_decay=0.1),
        specs.AdamW(lr=3e-3, weight_decay=0.0),
    ],
}
SCHEDULED = [
    specs.Constant(),
    specs.Cosine(warmup_steps=20),
    specs.Step(every_epochs=2, factor=0.5),
]


def members(stack: str) -> list[specs.ExperimentSpec]:
    return [
        experiment(seed, optimizer=optimizer, schedule=SCHEDULED[seed])
        for seed, optimizer in enumerate(STACKS[stack])
    ]


@pytest.mark.parametrize("stack", STACKS)
def test_a_member_of_a_stack_is_the_run_of_its_spec_alone(
    stack: str, dataset: data.Dataset
) -> None:
    """To 1e-3 of the loss over 300 steps of SGD: the order of sums differs, and training carries the rounding along."""
    together = engine.Engine(members(stack), dataset)
    trained = [together.train(stop) for stop in (100, LONG_RUN)]
    for k, spec in enumerate(together.specs):
        alone = engine.Engine([spec], dataset)
        [wanted] = alone.train(LONG_RUN)
        found = joined(*(curves[k] for curves in trained))
        np.testing.assert_array_equal(found.lr, wanted.lr)
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-3, atol=1e-4)
        assert (found.accuracy != wanted.accuracy).sum() <= 3
        together_state, alone_state = together.state(k), alone.state()
        assert together_state["step"] == alone_state["step"] == LONG_RUN
        assert together_state["buffers"].keys() == alone_state["buffers"].keys()
        torch.testing.assert_close(
            together_state["parameters"], alone_state["parameters"], rtol=1e-3, atol=1e-3
        )
        together_evaluation, alone_evaluation = (
            together.evaluate(dataset.validation, k),
            alone.evaluate(dataset.validation),
        )
        assert together_evaluation.loss == pytest.approx(alone_evaluation.loss, rel=1e-3)
    assert len({float(curves.loss[-1]) for curves in trained[-1]}) == len(together.specs)


def test_a_member_that_diverges_leaves_the_others_as_they_are(dataset: data.Dataset) -> None:
    calm = [experiment(seed, optimizer=specs.SGD(lr=0.05)) for seed in (1, 2)]
    wild = experiment(optimizer=specs.SGD(lr=1_000.0, weight_decay=100.0))
    tame = experiment(optimizer=specs.SGD(lr=0.01, weight_decay=1e-4))
    together, beside = (
        engine.Engine([calm[0], wild, calm[1]], dataset),
        engine.Engine([calm[0], tame, calm[1]], dataset),
    )
    found, wanted = together.train(STEPS), beside.train(STEPS)
    assert not np.isfinite(found[1].loss[-1])
    for k in (0, 2):
        assert_same_bits(found[k], wanted[k])
        assert torch.equal(together.parameters[k], beside.parameters[k])


def test_a_member_goes_on_alone_from_its_state(dataset: data.Dataset) -> None:
    together = engine.Engine(members("momentum"), dataset)
    together.train(40)
    states = [together.state(k) for k in range(3)]
    wanted = together.train(90)
    again = engine.Engine(members("momentum"), dataset)
    for k, state in enumerate(states):
        again.load_state(state, k)
    for found, expected in zip(again.train(90), wanted, strict=True):
        assert_same_bits(found, expected)
    alone = engine.Engine([together.specs[2]], dataset)
    alone.load_state(states[2])
    np.testing.assert_allclose(alone.train(90)[0].loss, wanted[2].loss, rtol=1e-4)


def test_modules_of_another_kind_are_stacked_too(dataset: data.Dataset) -> None:
    explicit, recorded = (engine.Engine(members("momentum"), dataset) for _ in range(2))
    record_gradients(recorded)
    for found, wanted in zip(recorded.train(STEPS), explicit.train(STEPS), strict=True):
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"model": specs.MLP(hidden=(24, 17))},
        {"optimizer": specs.Adam(lr=0.1)},
        {"train": specs.Train(batch_size=BATCH, epochs=EPOCHS + 1)},
        {"train": specs.Train(batch_size=BATCH, epochs=EPOCHS, precision="bf16")},
        {"data": specs.Data(holdout=HOLDOUT, split_seed=1)},
    ],
    ids=["model", "optimizer", "length", "precision", "data"],
)
def test_specs_of_other_shapes_are_not_stacked(
    other: dict[str, Any], dataset: data.Dataset
) -> None:
    with pytest.raises(ValueError, match="can't be trained in the same steps"):
        engine.Engine([experiment(), experiment(**other)], dataset)


@pytest.mark.parametrize(
    ("stack", "sizes"), [("auto", (1, engine.CUDA_STACK)), ("off", (1, 1)), (3, (3, 3))]
)
def test_how_many_runs_are_a_stack_on_the_cpu_and_on_cuda(
    stack: int | str, sizes: tuple[int, int]
) -> None:
    assert engine.CUDA_STACK > 1
    assert (
        tuple(
            engine.stack_size(specs.Compute(stack=stack), torch.device(kind))
            for kind in ("cpu", "cuda")
        )
        == sizes
    )


# ---- precision


def test_bf16_rounds_the_products_and_keeps_the_weights(dataset: data.Dataset) -> None:
    precise, rounded = (
        engine.Engine(
            [experiment(train=specs.Train(batch_size=BATCH, epochs=EPOCHS, precision=precision))],
            dataset,
        )
        for precision in ("float32", "bf16")
    )
    exact, found = precise.train(STEPS)[0], rounded.train(STEPS)[0]
    assert rounded.parameters.dtype == torch.float32
    assert not np.array_equal(found.loss, exact.loss)
    np.testing.assert_allclose(found.loss, exact.loss, rtol=0.02)
    assert rounded.evaluate(dataset.validation).loss == pytest.approx(
        precise.evaluate(dataset.validation).loss, rel=0.02
    )


@pytest.mark.parametrize(
    "asked",
    [
        "cpu",
        pytest.param("auto", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")),
    ],
)
def test_tf32_is_refused_on_the_cpu(asked: str) -> None:
    with pytest.raises(SpecError, match=r"train\.precision: tf32 .* give float32 or bf16"):
        engine.device(specs.Compute(device=asked), "tf32")


# ---- on a CUDA device


@pytest.fixture(scope="module")
def on_cuda() -> data.Dataset:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return data.load(
        specs.Data(holdout=HOLDOUT), REPOSITORY, engine.device(specs.Compute(device="cuda"))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("stack", STACKS)
def test_a_cuda_device_trains_as_the_cpu_does(stack: str, on_cuda: data.Dataset) -> None:
    on_cpu = data.load(
        specs.Data(holdout=HOLDOUT), REPOSITORY, engine.device(specs.Compute(device="cpu"))
    )
    there, here = engine.Engine(members(stack), on_cuda), engine.Engine(members(stack), on_cpu)
    for found, wanted in zip(there.train(STEPS), here.train(STEPS), strict=True):
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-3, atol=1e-4)
    assert there.evaluate(on_cuda.validation, 1).loss == pytest.approx(
        here.evaluate(on_cpu.validation, 1).loss, rel=1e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("stack", STACKS)
def test_no_step_waits_for_the_device(
    stack: str, on_cuda: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its steps are captured, a segment reaches the host only with what it measured."""
    trainer, measure = engine.Engine(members(stack), on_cuda), engine._measure
    trainer.train(STEPS)
    before = trainer.state()

    def measured(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return measure(*arguments)

    monkeypatch.setattr(engine, "_measure", measured)
    trainer.step = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train(STEPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.captured
    assert not torch.equal(trainer.state()["parameters"], before["parameters"])


def convolutional(spec: specs.MLP, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    return nn.Sequential(*layers)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
@pytest.mark.parametrize("stack", STACKS)
def test_captured_steps_have_the_bits_of_single_ones(
    stack: str, kind: str, precision: str, on_cuda: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, resumed, with a short last batch; and again the same bits from another engine."""
    if kind == "convolutional":
        monkeypatch.setattr(model, "build", convolutional)
    train = specs.Train(batch_size=BATCH, epochs=EPOCHS, precision=precision)
    chosen = [spec.model_copy(update={"train": train}) for spec in members(stack)]
    captured, again, single = (engine.Engine(chosen, on_cuda) for _ in range(3))
    single.replay_steps(None)
    for stop in (1, 40, 42, 100):
        wanted = single.train(stop)
        for trained in (captured, again):
            for found, expected in zip(trained.train(stop), wanted, strict=True):
                assert_same_bits(found, expected)
            assert torch.equal(trained.parameters, single.parameters)
        states = [captured.state(member) for member in range(len(chosen))]
        captured = engine.Engine(chosen, on_cuda)
        for member, state in enumerate(states):
            captured.load_state(state, member)
    assert again.captured


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("hidden", [(), (17,), (33, 40), (300, 100)])
@pytest.mark.parametrize("optimizer", ["momentum", "sgd", "adam"])
def test_fused_steps_are_the_librarys(
    optimizer: str, hidden: tuple[int, ...], count: int, on_cuda: data.Dataset
) -> None:
    """Equal but for the rounding of sums: widths that fill no tile, few models and many, with the update in the kernel or behind it."""
    chosen = [
        experiment(seed, model=specs.MLP(hidden=hidden), optimizer=OPTIMIZERS[optimizer])
        for seed in range(count)
    ]
    fused, plain = (engine.Engine(chosen, on_cuda) for _ in range(2))
    plain.fuse_steps(False)
    assert fused.fused
    assert not plain.fused
    # at these rates some models leap about, so that the rounding of 60 steps would grow to a fifth of a loss
    for found, wanted in zip(fused.train(15), plain.train(15), strict=True):
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fused.parameters, plain.parameters, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["momentum", "adam"])
def test_a_stack_is_evaluated_as_its_members_are(stack: str, on_cuda: data.Dataset) -> None:
    trainer = engine.Engine(members(stack), on_cuda)
    trainer.train(STEPS)
    for member, found in enumerate(trainer.evaluate_all(on_cuda.validation)):
        wanted = trainer.evaluate(on_cuda.validation, member)
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert found.accuracy == pytest.approx(wanted.accuracy, abs=1e-3)


@pytest.mark.gpu
def test_products_are_rounded_to_tf32_only_where_the_spec_says_so(on_cuda: data.Dataset) -> None:
    losses = {}
    for precision in ("float32", "tf32"):
        train = specs.Train(batch_size=BATCH, epochs=EPOCHS, precision=precision)
        losses[precision] = engine.Engine([experiment(train=train)], on_cuda).train(STEPS)[0].loss
    assert not np.array_equal(losses["float32"], losses["tf32"])
    np.testing.assert_allclose(losses["tf32"], losses["float32"], rtol=0.02)
