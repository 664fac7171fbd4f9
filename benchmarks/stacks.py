"""What it costs to train K models in the same steps instead of one after the other, on this machine's CPU or CUDA device.

    python benchmarks/stacks.py --repeats 5

Prints microseconds per model and step for each size of model and of stack, in turn, one thread: medians, and the gain over one by one.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from fmnist import data, engine
from fmnist import spec as specs

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = ((300, 100), (128,), (32,), (8,))
STEPS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args()
    device = engine.device(specs.Compute())
    if device.type == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    dataset = data.load(specs.Data(), REPOSITORY, device)
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}, torch {torch.__version__}, n = {arguments.repeats}"
    )
    for hidden in MODELS:
        engines = {
            n: engine.Engine([member(hidden, seed) for seed in range(n)], dataset)
            for n in arguments.stacks
        }
        found: dict[int, list[float]] = {n: [] for n in engines}
        for _ in range(arguments.repeats + 1):  # the first warms up
            for n, trainer in engines.items():
                began = time.perf_counter()
                trainer.train(trainer.step + STEPS)
                found[n].append((time.perf_counter() - began) / STEPS / n * 1e6)
        medians = {n: statistics.median(times[1:]) for n, times in found.items()}
        told = [
            f"K={n}: {medians[n]:.0f} us, gain {medians[min(medians)] / medians[n]:.2f}"
            for n in medians
        ]
        print(f"hidden {list(hidden)}: " + "; ".join(told))


def member(hidden: tuple[int, ...], seed: int) -> specs.ExperimentSpec:
    train = specs.Train(seed=seed)
    return specs.ExperimentSpec(
        name="stacks",
        model=specs.MLP(hidden=hidden),
        optimizer=specs.SGD(momentum=0.9),
        train=train,
    )


if __name__ == "__main__":
    main()
