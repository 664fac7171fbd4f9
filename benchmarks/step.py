"""One training step on one core: this package's beside autograd, compilation, JAX, and the matrix products alone.

    make bench-step        # or, in .venv-bench: python benchmarks/step.py --repeats 5

Each contestant is a process of its own, pinned to one core, in turn. Prints the median and range of each in microseconds per step,
its ratio to this package's, and where the time of this package's own step goes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH, LR, MOMENTUM = 32, 1e-3, 0.9
WARM, STEPS = 500, 3_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only", choices=CONTESTANTS, help="time this one here and print microseconds per step"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where this package's step spends its time"
    )
    arguments = parser.parse_args()
    if arguments.only:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(CONTESTANTS[arguments.only]())
    elif arguments.profile:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        profile()
        evaluation()
    else:
        compare(arguments.repeats)
        subprocess.run([sys.executable, __file__, "--profile"], check=True)


def compare(repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(repeats):
        for name, found in times.items():
            result = subprocess.run(
                [sys.executable, __file__, "--only", name], capture_output=True, text=True
            )
            if result.returncode == 0:
                found.append(float(result.stdout.split()[-1]))
            else:
                print(f"{name}: {result.stderr.strip().splitlines()[-1]}")
    print(
        f"{'one core, batch 32':<28} {'us per step':>11} {'range':>14}   ratio to ours, round by round: median (range)"
    )
    for name, found in times.items():
        if found:
            ratios = [value / ours for value, ours in zip(found, times["ours"], strict=False)]
            spread = f"{min(found):.0f} to {max(found):.0f}"
            against = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name:<28} {statistics.median(found):>11.0f} {spread:>14}   {against}")


def per_step(train: Callable[[int], object]) -> float:
    """Microseconds per step of `train(steps)`, warm."""
    train(WARM)
    began = time.perf_counter()
    train(STEPS)
    return (time.perf_counter() - began) / STEPS * 1e6


def build_engine():  # type: ignore[no-untyped-def]
    from fmnist import data, engine
    from fmnist import spec as specs

    dataset = data.load(specs.Data(), REPOSITORY, engine.device(specs.Compute(device="cpu")))
    return engine.Engine(
        [specs.ExperimentSpec(name="step", optimizer=specs.SGD(lr=LR, momentum=MOMENTUM))], dataset
    )


def ours() -> float:
    engine = build_engine()

    def train(steps: int) -> None:
        for _ in range(0, steps, 500):  # segments, as a run has them
            engine.train(engine.step + 500)

    return per_step(train)


def products() -> float:
    """The step's eight matrix products alone, on its own memory."""
    import torch

    engine = build_engine()
    gradient, logits = engine.passes[BATCH], torch.empty(1, BATCH, 10)

    def train(steps: int) -> None:
        for _ in range(steps):
            for layer in (0, 1):
                torch.bmm(
                    gradient.weights[layer], gradient.layers[layer], out=gradient.hidden[layer]
                )
            torch.bmm(gradient.rows[2], gradient.transposed[2], out=logits)
            for layer in (2, 1, 0):
                torch.bmm(
                    gradient.errors[layer],
                    gradient.rows[layer],
                    out=gradient.weight_gradients[layer],
                )
                if layer:
                    torch.bmm(
                        gradient.transposed[layer],
                        gradient.errors[layer],
                        out=gradient.errors[layer - 1],
                    )

    with torch.no_grad():
        for tensor in (*gradient.weights, *gradient.errors, *gradient.layers):
            tensor.normal_()
        return per_step(train)


def autograd(compiled: bool = False) -> float:
    """nn.Module, autograd and fused SGD on tensors, with the metrics kept as tensors."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(1)
    dataset = build_engine().dataset.train
    network = nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    optimizer = torch.optim.SGD(network.parameters(), LR, MOMENTUM, fused=not compiled)

    def step(images, labels):  # type: ignore[no-untyped-def]
        optimizer.zero_grad(set_to_none=True)
        logits = network(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).float().mean()

    act = torch.compile(step) if compiled else step

    def train(steps: int) -> None:
        order = torch.cat(
            [torch.randperm(len(dataset)) for _ in range(1 + steps * BATCH // len(dataset))]
        )
        measured = []
        for rows in order.split(BATCH)[:steps]:
            measured.append(act(dataset.images[rows], dataset.labels[rows]))

    return per_step(train)


def compiled() -> float:
    return autograd(compiled=True)


def jax_scan() -> float:
    """The same step as a jitted lax.scan over a segment, metrics of every step included."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import jax_program

    return per_step(jax_program.trainer(build_engine().dataset.train))


def evaluation(repeats: int = 9) -> None:
    """An evaluation on the 10,000 test images beside its matrix products alone, in turn."""
    import torch
    from torch.nn import functional

    from fmnist.engine import EVALUATION_BATCH

    engine = build_engine()
    split, weights = (
        engine.dataset.validation,
        [parameter for parameter in engine.modules[0].parameters() if parameter.ndim == 2],
    )
    whole, products = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        engine.evaluate(split)
        whole.append(time.perf_counter() - began)
        began = time.perf_counter()
        with torch.no_grad():
            for x in split.images.split(EVALUATION_BATCH):
                for weight in weights:
                    x = functional.linear(x, weight)
        products.append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(whole, products, strict=True))
    print(
        f"\nAn evaluation: {statistics.median(whole) * 1e3:.0f} ms, {ratio:.2f} times its matrix products alone (median of {repeats} pairs)"
    )


def profile() -> None:
    import torch

    engine = build_engine()
    engine.train(WARM)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        engine.train(WARM + 1_000)
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    products_us = sum(
        row.self_cpu_time_total
        for row in rows
        if row.key in ("aten::bmm", "aten::baddbmm", "aten::baddbmm_")
    )
    print(
        f"\nThis package's step by operation (torch.profiler, whose own cost is in it); {total / products_us:.2f} times its matrix products:"
    )
    for row in rows[:14]:
        print(
            f"  {row.key:<32} {row.self_cpu_time_total / 1_000:>7.1f} us per step  {row.self_cpu_time_total / total:>4.0%}"
        )


CONTESTANTS = {
    "ours": ours,
    "products": products,
    "autograd": autograd,
    "compiled": compiled,
    "jax_scan": jax_scan,
}

if __name__ == "__main__":
    main()
