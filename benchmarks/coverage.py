"""How often compare's intervals hold the true difference, and how often its verdicts see one that is not there, by simulation.

    python benchmarks/coverage.py                                             # models (a) and (b), and looking: some minutes
    python benchmarks/coverage.py --bank reports/bank.npz --collect holdout   # (c) as well, from the recorded runs of that group

Writes reports/coverage.md and prints it. Every random seed was fixed before the first look at a result.

A draw is two tables of right or not, [n, 10,000]: other seeds and other images each time. Image i has a margin x_i, uniform over 10 units, and
is got right with probability x_i + g + a, cut to 0 and 1: most images by all runs, a tenth by some. a is the run's own; the standard deviation
of its accuracy is 0.003, of which variance the runs of a pair share half. Where settings differ by image, g is +0.3 or -0.3 for each image and
setting, else 0. Accuracy is linear in g + a, so that the true difference over all seeds and images is known exactly.

(a) a is normal. (b) The same, and one run in ten is 0.01 of accuracy low. (c) Both settings are disjoint draws, without replacement, from one
bank of real runs, paired arbitrarily: the true difference is 0, and the difference of two such means has the variance of two independent ones
(what a finite bank takes from each variance, the covariance gives back). New images are the bank's, drawn with replacement.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np

from fmnist import compare, groups, tracking
from fmnist import spec as specs

SEED = 5
IMAGES, SIZES, TRUTH = 10_000, (3, 5, 10), 0.005
UNITS, HARDEST = 10, -0.7  # margins from -0.7 to 9.3: an accuracy of 0.88
SPREAD, SHARED, BY_IMAGE = 0.003, 0.5, 0.3
LOW_BY, LOW_SHARE = 0.01, 0.1
CHUNK = 500_000
"""Cells of a table at once: they stay in the processor's cache."""
DESIGNS = {"paired": compare.paired, "unpaired": compare.unpaired}
HEAD = "| n | design | settings differ by image | coverage | false calls | median half-width | found |\n|---|---|---|---|---|---|---|"

Tables = tuple[np.ndarray, np.ndarray]
"""Of the reference and of the other, each [draws, n, images]."""
Draw = Callable[[np.random.Generator, int], Tables]
"""A generator and a number of draws to their tables."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument(
        "--bank",
        type=Path,
        help="an .npz with `correct` [runs, images], or the folder of a bank.npz",
    )
    parser.add_argument(
        "--collect", metavar="GROUP", help="first fill the bank with this group's recorded runs"
    )
    arguments = parser.parse_args()
    draws, bank, began = arguments.draws, arguments.bank, time.perf_counter()
    bank = bank / "bank.npz" if bank and bank.is_dir() else bank
    if arguments.collect:
        collect(arguments.collect, bank := bank or specs.home() / "reports" / "bank.npz")
    runs = np.load(bank)["correct"] if bank else np.empty((0, 0), bool)
    if bank and len(runs) < 2 * max(SIZES):
        raise SystemExit(
            f"{bank} holds {len(runs)} runs; two disjoint draws of {max(SIZES)} take {2 * max(SIZES)} or more"
        )
    error = (0.05 * 0.95 / draws) ** 0.5
    lines = [
        f"# Coverage of compare's 95 % intervals\n\n{draws:,} draws a figure; its standard error at 95 % is {error:.1%}. The true"
    ]
    lines[0] += (
        f" difference is {TRUTH} for coverage and found (the verdict is 'better'), 0 for false calls (it is not 'cannot tell')."
    )
    for number, (title, low_by) in enumerate(
        {"(a) normal seeds": 0.0, "(b) one run in ten a point low": LOW_BY}.items()
    ):
        cells = list(model_cells(number, low_by, draws))
        lines += [f"\n## {title}\n\n{HEAD}", *map(row, cells)]
        if not low_by:
            lines.append(f"\n{required(cells)}")
    if bank:
        lines += [
            f"\n## (c) disjoint draws of {len(runs)} real runs ({bank.name})\n\n{HEAD}",
            *map(row, bank_cells(runs, draws)),
        ]
    lines += [
        "\n## Looking at 3, 5 and 10 seeds, stopping at the first verdict: false calls in (a)\n",
        *looking(draws),
    ]
    report = specs.home() / "reports" / "coverage.md"
    report.parent.mkdir(exist_ok=True)
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n\n{report}: {time.perf_counter() - began:.0f} s")


def collect(wanted: str, bank: Path) -> None:
    """Write which images a group's runs got right."""
    store = tracking.connect(specs.home())
    [group] = groups.find(store.runs(status=None), [wanted], specs.home())
    sample = groups.sample(store, group)
    if sample.correct is None:
        raise SystemExit(
            f"{wanted}: not all of its runs have predictions, which the bank is made of"
        )
    bank.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(bank, correct=sample.correct, index=sample.index)
    print(
        f"{bank}: {sample.n} runs, accuracy {sample.accuracy.mean():.4f} ± {sample.accuracy.std(ddof=1):.4f}"
    )


def simulated(n: int, paired: bool, by_image: bool, low_by: float, truth: float) -> Draw:
    """Draws of models (a) and (b)."""

    def draw(rng: np.random.Generator, draws: int) -> Tables:
        normal = rng.standard_normal((3, draws, n, 1), np.float32)
        own, shared = normal[:2], normal[2]
        run = SPREAD * (SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own if paired else own)
        run -= low_by * (rng.random((2, draws, n, 1)) < LOW_SHARE)
        run[1] += truth
        margin = HARDEST + UNITS * rng.random((draws, 1, IMAGES), np.float32)
        sign = (
            rng.integers(0, 2, (2, draws, 1, IMAGES), np.int8) * np.float32(2) - 1
            if by_image
            else np.zeros(2, np.float32)
        )
        before, after = (
            rng.random((draws, n, IMAGES), np.float32)
            < UNITS * run[k].astype(np.float32) + (margin + BY_IMAGE * sign[k])
            for k in range(2)
        )
        return before, after

    return draw


def resampled(n: int, bank: np.ndarray) -> Draw:
    """Draws of model (c)."""

    def draw(rng: np.random.Generator, draws: int) -> Tables:
        runs = rng.permuted(np.tile(np.arange(len(bank)), (draws, 1)), axis=1)[:, : 2 * n]
        images = rng.integers(0, bank.shape[1], (draws, 1, bank.shape[1]))
        return bank[runs[:, :n, None], images], bank[runs[:, n:, None], images]

    return draw


def estimates(
    draw: Draw, design: str, draws: int, seed: tuple[int, ...], sizes: tuple[int, ...]
) -> np.ndarray:
    """[looks, 4, draws] difference, low, high and p, by each draw's first seeds: as many as `sizes` tell."""
    rng, found = np.random.Generator(np.random.SFC64((SEED, *seed))), []
    step = max(1, CHUNK // (IMAGES * max(sizes)))
    for first in range(0, draws, step):
        before, after = draw(rng, min(step, draws - first))
        looks = [DESIGNS[design](before[:, :n], after[:, :n]) for n in sizes]
        found.append([[look.difference, *look.interval, look.p] for look in looks])
    return np.concatenate(found, axis=2)


Cell = tuple[int, str, str, float, float, float, float | None]
"""n, design, whether settings differ by image, coverage, false calls, median half-width, found."""


def model_cells(model: int, low_by: float, draws: int) -> Iterator[Cell]:
    for number, (n, design, by_image) in enumerate(product(SIZES, DESIGNS, (False, True))):
        null, real = (
            estimates(
                simulated(n, design == "paired", by_image, low_by, truth),
                design,
                draws,
                (model, number, k),
                (n,),
            )[0]
            for k, truth in enumerate((0.0, TRUTH))
        )
        difference, low, high, p = real
        coverage, found = (
            np.mean((low <= TRUTH) & (high >= TRUTH)),
            np.mean((p < compare.LEVEL) & (difference > 0)),
        )
        yield (
            n,
            design,
            "yes" if by_image else "no",
            coverage,
            np.mean(null[3] < compare.LEVEL),
            np.median(high - low) / 2,
            found,
        )


def bank_cells(bank: np.ndarray, draws: int) -> Iterator[Cell]:
    for number, (n, design) in enumerate(product(SIZES, DESIGNS)):
        _, low, high, p = estimates(resampled(n, bank), design, draws, (2, number), (n,))[0]
        yield (
            n,
            design,
            "no",
            np.mean((low <= 0) & (high >= 0)),
            np.mean(p < compare.LEVEL),
            np.median(high - low) / 2,
            None,
        )


def row(cell: Cell) -> str:
    n, design, by_image, coverage, false_calls, half_width, found = cell
    return f"| {n} | {design} | {by_image} | {coverage:.1%} | {false_calls:.1%} | {half_width:.4f} | {'-' if found is None else f'{found:.0%}'} |"


def required(cells: list[Cell]) -> str:
    """Whether what (a) has to reach is reached."""
    least, most = (
        min(cell[3] for cell in cells),
        max(cell[3] for cell in cells if cell[0] == max(SIZES)),
    )
    false_calls = max(cell[4] for cell in cells)
    met = least >= 0.94 and false_calls <= 0.06 and most <= 0.98
    told = f"coverage at least {least:.1%} (94 %), at n = {max(SIZES)} at most {most:.1%} (98 %), false calls at most {false_calls:.1%} (6 %)"
    return f"Required in every cell of (a): {'met' if met else 'NOT MET'}: {told}."


def looking(draws: int) -> Iterator[str]:
    yield "| design | settings differ by image | at 3 | by 5 | by 10 | at 10 alone |\n|---|---|---|---|---|---|"
    for number, (design, by_image) in enumerate(product(DESIGNS, (False, True))):
        draw = simulated(max(SIZES), design == "paired", by_image, 0.0, 0.0)
        called = estimates(draw, design, draws, (3, number), SIZES)[:, 3] < compare.LEVEL
        rates = [*np.maximum.accumulate(called).mean(1), called[-1].mean()]
        yield f"| {design} | {'yes' if by_image else 'no'} | {' | '.join(f'{rate:.1%}' for rate in rates)} |"


if __name__ == "__main__":
    main()
