"""Groups of seeds, intervals, tests and verdicts: pure functions of frames and arrays.

Shapes: n seeds, N images, leading axes `...` for many draws at once.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import special  # whose names are terse, but scipy.stats takes half a second to import

from fmnist import spec as specs
from fmnist.errors import UserError

LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 1_000
"""More seeds than this are not counted out: they are 'more than 1,000'."""
PROVENANCE = {
    "torch": "torch",
    "device": "device",
    "threads": "threads",
    "git_commit": "git commit",
    "git_dirty": "uncommitted changes",
}
"""Tags that the runs of a comparison should share, in words."""
COMMIT = re.compile(r"^([0-9a-f]{8})[0-9a-f]{32}$")
NOT_COMPARED = re.compile(r"train\.seed$|tracking\.|compute\.|name$|question$")
UNKNOWN = "-"


# ---- groups


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    """The commonest run name without its seed; with the start of the key where two groups share it."""
    key: str
    """The tag `group`, or the run's id where another program made it."""
    members: pd.DataFrame
    """Finished and diverged runs, one per seed, by seed: rows of the runs' frame with `seed` (-1 where none is known) and `diverged`."""
    duplicates: tuple[str, ...] = ()
    """Ids of runs of a seed that has a newer finished one: listed, not counted."""
    rerun: tuple[int, ...] = ()
    """Seeds of which such a run diverged."""

    @property
    def n(self) -> int:
        return len(self.members)

    @property
    def finished(self) -> pd.DataFrame:
        return self.members[~self.members["diverged"]]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.members["seed"].tolist())

    @property
    def diverged(self) -> tuple[int, ...]:
        return tuple(self.members.loc[self.members["diverged"], "seed"].tolist())

    @property
    def size(self) -> str:
        return _size(self.n, len(self.diverged))

    @property
    def warnings(self) -> list[str]:
        """What the members should share and don't, a line each."""
        return _mixtures([self])

    def stated(self, metric: str = "last/val_accuracy") -> str:
        """Mean ± standard deviation of a metric over the finished members, never without the number of seeds."""
        values = (
            self.finished[f"m/{metric}"].dropna()
            if f"m/{metric}" in self.finished
            else pd.Series(dtype=float)
        )
        spread = f" ± {values.std():.4f}" if len(values) > 1 else ""
        return (
            f"{values.mean():.4f}{spread} (n = {self.size})"
            if len(values)
            else f"no result (n = {self.size})"
        )


def _size(n: int, diverged: int) -> str:
    return f"{n}, of which {diverged} diverged" if diverged else str(n)


def groups(runs: pd.DataFrame) -> list[Group]:
    """The groups among runs (a frame of tracking.Store.runs), oldest first; interrupted, failed, pruned and running ones are left out."""
    needed = ["t/kind", "t/group", "t/seed", "p/train.seed", "t/outcome", "t/reason"]
    runs = runs.reindex(columns=runs.columns.union(needed, sort=False)).sort_values(
        "start", kind="stable"
    )
    runs = runs.astype(dict.fromkeys(needed, object))
    told = (
        runs["status"].map({"FINISHED": "finished"}).astype(object)
    )  # what older runs and other programs' have no tag for
    told[
        (runs["status"] == "FAILED")
        & runs["t/reason"].fillna("").str.startswith("the training loss is")
    ] = "diverged"
    outcome, key = runs["t/outcome"].fillna(told), runs["t/group"].fillna(runs["run_id"])
    seed = (
        pd.to_numeric(runs["t/seed"].fillna(runs["p/train.seed"]), errors="coerce")
        .fillna(-1)
        .astype(int)
    )
    counted = outcome.isin(["finished", "diverged"]) & ~runs["t/kind"].isin(["group", "sweep"])
    rows = runs.assign(seed=seed, diverged=outcome == "diverged")[counted]
    found = [_group(str(name), part) for name, part in rows.groupby(key[counted], sort=False)]
    shared = Counter(group.label for group in found)
    return [
        replace(group, label=f"{group.label} ({group.key[:6]})")
        if shared[group.label] > 1
        else group
        for group in found
    ]


def _group(key: str, rows: pd.DataFrame) -> Group:
    """One group's rows, oldest first: of each seed the newest finished run counts, or the newest diverged one if none finished."""
    [(label, _)] = Counter(re.sub(r" s\d+$", "", str(name)) for name in rows["name"]).most_common(1)
    members = rows.sort_values("diverged", ascending=False, kind="stable").drop_duplicates(
        "seed", keep="last"
    )
    others = rows[~rows["run_id"].isin(members["run_id"])]
    rerun = {*others.loc[others["diverged"], "seed"]} & {*members.loc[~members["diverged"], "seed"]}
    return Group(
        label,
        key,
        members.sort_values("seed", ignore_index=True),
        tuple(others["run_id"]),
        tuple(sorted(rerun)),
    )


def _mixtures(groups: Sequence[Group]) -> list[str]:
    members = pd.concat([group.members.assign(label=group.label) for group in groups])
    rerun = [group for group in groups if group.rerun]
    lines = [
        f"{group.label}: of seeds {_listed(group.rerun)} another run diverged; the one that finished counts"
        for group in rerun
    ]
    for tag, name in PROVENANCE.items():
        if (column := f"t/{tag}") in members:
            counts = Counter(
                zip(
                    members[column].fillna("unknown").str.replace(COMMIT, r"\1", regex=True),
                    members["label"],
                    strict=True,
                )
            )
            values = dict.fromkeys(value for value, _ in counts)
            told = [
                f"{value} ({', '.join(f'{n} of {label}' for (of, label), n in counts.items() if of == value)})"
                for value in values
            ]
            lines += [f"the runs differ in {name}: {'; '.join(told)}"] if len(values) > 1 else []
    return lines


def mean_curves(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean and standard deviation (ddof = 1) of members' evaluations by step; n is how many have that step.

    Index step; columns val/accuracy, val/accuracy_std, val/loss, val/loss_std, n.
    """
    metrics = ["val/accuracy", "val/loss"]
    rows = [
        curve.reindex(columns=["step", *metrics]).dropna(subset=metrics, how="all")
        for curve in curves
    ]
    by_step = (
        pd.concat(rows) if rows else pd.DataFrame(columns=["step", *metrics], dtype=float)
    ).groupby("step")[metrics]
    table = by_step.mean().join(by_step.std().add_suffix("_std")).assign(n=by_step.size())
    return table[["val/accuracy", "val/accuracy_std", "val/loss", "val/loss_std", "n"]]


def differing(groups: Sequence[Group]) -> pd.DataFrame:
    """The parameters in which groups differ: a row per label, a column per dotted path, '-' where a group has no such parameter."""
    # A run from before a parameter was there has its default; of optimizer, schedule and model another type may have no such field.
    defaults = {
        path: str(value)
        for path, value in specs.ExperimentSpec(name="any").flat().items()
        if value is not None and path.startswith(("data.", "train."))
    }
    rows = {}
    for group in groups:
        first = group.members.filter(regex="^p/").bfill().iloc[0].dropna()
        known = {str(column).removeprefix("p/"): value for column, value in first.items()}
        rows[group.label] = (defaults if "optimizer.type" in known else {}) | known
    table = pd.DataFrame.from_dict(rows, orient="index").fillna(UNKNOWN)
    return table[
        [path for path in table if table[path].nunique() > 1 and not NOT_COMPARED.match(str(path))]
    ]


def cautions(groups: Sequence[Group]) -> list[str]:
    """What anyone who reads a comparison of these groups, the first being the reference, has to know: a line each."""
    members = pd.concat(
        [group.members.assign(label=group.label) for group in groups], ignore_index=True
    )
    lines = []
    if on_test := _labels(members, "p/data.holdout", "null"):
        lines.append(
            f"validation was the test set ({on_test}): a choice made by these figures is made on it; set data.holdout"
        )
    if selected := _labels(members, "t/weights", "best"):
        lines.append(
            f"the best evaluation was selected on the same images ({selected}): its accuracy is too high by that choice"
        )
    for group in groups[1:]:
        changed = _changed(differing([groups[0], group]))
        if {"data.holdout", "data.split_seed"} & set(changed):
            lines.append(f"{group.label} was validated on other images than {groups[0].label}")
        if len(changed) > 1:
            lines.append(
                f"{group.label} differs from {groups[0].label} in more than one parameter: {', '.join(changed)}"
            )
    lines += [
        f"{group.label}: n = {group.size} (seeds {_listed(group.diverged)})"
        for group in groups
        if group.diverged
    ]
    return lines + _mixtures(groups)


def _labels(members: pd.DataFrame, column: str, value: str) -> str:
    return (
        ", ".join(dict.fromkeys(members.loc[members[column] == value, "label"]))
        if column in members
        else ""
    )


def _changed(pair: pd.DataFrame) -> list[str]:
    """The choices in which two groups differ: fields that only one has come with its type, or with what was switched on."""

    def implied(path: str) -> bool:
        section = path.rpartition(".")[0]
        return UNKNOWN in set(pair[path]) and (section in pair or f"{section}.type" in pair)

    return [path for path in map(str, pair) if not implied(path)]


# ---- estimates and tests


@dataclass(frozen=True)
class Estimate:
    """A difference in accuracy (other - reference) with its variance; floats, or arrays of one shape for many draws."""

    difference: Any
    seed_variance: Any
    """Of the difference, by the choice of seeds."""
    image_variance: Any
    """Of the difference, by the choice of images."""
    df: Any

    @property
    def error(self) -> Any:
        """The standard error."""
        return np.sqrt(self.seed_variance + self.image_variance)

    @property
    def interval(self) -> tuple[Any, Any]:
        """The 95 % interval over new seeds and new images."""
        half = special.stdtrit(self.df, 1 - LEVEL / 2) * self.error
        return self.difference - half, self.difference + half

    @property
    def p(self) -> Any:
        """Of the two-sided t test that belongs to the interval; 1 where nothing differs at all."""
        # What rounding leaves of equal accuracies is no difference.
        difference, error = np.round([np.abs(self.difference), self.error], 12)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(2 * special.stdtr(self.df, -difference / error), nan=1.0)


def paired(reference: np.ndarray, other: np.ndarray) -> Estimate:
    """The estimate from tables [..., n, N] (right or not; N = 1: accuracies, and no image term) whose rows are the same seeds.

    The variance of the mean of a two-way crossed random-effects table d = other - reference with one observation in each cell, by the method
    of moments: (MS_seeds + MS_images - MS_residual) / (nN) (Searle, Casella & McCulloch, Variance Components, 1992, ch. 4). The image term
    is kept at 0 or above and the t quantile is that of n - 1 degrees of freedom, as if all of it were the seeds': both are conservative.
    """
    seeds, images, residual = _moments(
        np.subtract(other, reference, dtype=np.result_type(reference, other, np.int8))
    )
    n = seeds.shape[-1]
    return Estimate(
        seeds.mean(-1), seeds.var(-1, ddof=1) / n, _image_variance(images, residual / n), n - 1
    )


def unpaired(reference: np.ndarray, other: np.ndarray) -> Estimate:
    """The estimate from tables [..., n_reference, N] and [..., n_other, N] of whatever seeds.

    Welch's test (Biometrika 34, 1947) on the seeds' accuracies, with Satterthwaite's degrees of freedom, and the image term of `paired`.
    """
    (before, images_before, residual_before), (after, images_after, residual_after) = (
        _moments(reference),
        _moments(other),
    )
    n, m = before.shape[-1], after.shape[-1]
    v, w = before.var(-1, ddof=1) / n, after.var(-1, ddof=1) / m
    with np.errstate(invalid="ignore"):
        df = np.nan_to_num((v + w) ** 2 / (v**2 / (n - 1) + w**2 / (m - 1)), nan=n + m - 2)
    images = _image_variance(images_after - images_before, residual_before / n + residual_after / m)
    return Estimate(after.mean(-1) - before.mean(-1), v + w, images, df)


def _moments(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Of tables [..., n, N]: the seeds' means [..., n], the images' means [..., N], the residual mean square [...] of the two-way layout."""
    n, size = table.shape[-2:]
    seeds, images = table.mean(-1), table.mean(-2)
    squares = (table * table).sum((-2, -1), dtype=float)
    squares -= size * (seeds**2).sum(-1) + n * (images**2).sum(-1) - n * size * seeds.mean(-1) ** 2
    return seeds, images, squares / max(1, (n - 1) * (size - 1))


def _image_variance(images: np.ndarray, residual: Any) -> Any:
    """What the images [..., N] add to the variance of their mean, less what the seeds' variance holds of it already."""
    size = images.shape[-1]
    return (
        np.maximum(0, images.var(-1, ddof=1) - residual) / size
        if size > 1
        else np.zeros(images.shape[:-1])
    )


def sign_flip(counts: np.ndarray) -> float:
    """The exact two-sided p-value of differences [n], whole numbers, under exchange of the two settings of any pair."""
    sums, shares = np.zeros(1, int), np.ones(1)
    for count in counts:  # equal sums are merged: there are few, so that it stays exact for any n
        sums, place = np.unique(np.concatenate([sums + count, sums - count]), return_inverse=True)
        shares = np.bincount(place, np.tile(shares, 2)) / 2
    return float(shares[np.abs(sums) >= abs(counts.sum())].sum())


def mcnemar(only_reference: int, only_other: int) -> float:
    """The exact p-value of two models' disagreements: images that one gets right and the other wrong (McNemar, Psychometrika 12, 1947)."""
    return min(
        1.0,
        2 * float(special.bdtr(min(only_reference, only_other), only_reference + only_other, 0.5)),
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted so that all of a family hold together (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(np.arange(len(p), 0, -1) * np.asarray(p, float)[order])
    return [float(value) for value in np.minimum(1, adjusted)[np.argsort(order)]]


def seeds_needed(
    variances: Sequence[float],
    df: float,
    image_variance: float,
    detect: float,
    level: float = LEVEL,
    least: int = 2,
) -> tuple[int | None, int | None, int | None]:
    """How many seeds each setting needs to find a difference of `detect` with 80 % power, and the range of that; None: more than 1,000.

    `variances`: of one seed's difference (paired) or of one seed's accuracy in each setting. The power is the noncentral t's, with equal n: more
    seeds shrink their part of the variance, the images' stays. The range is that of the chi-square interval (95 %) of the variance on its df.
    """
    total = float(np.sum(variances))
    rate = (
        total**2 / float(np.sum(np.square(variances))) if total else 1.0
    )  # degrees of freedom that a seed of each setting adds

    def first(variance: float) -> int | None:
        def power(n: int) -> float:
            df = rate * (n - 1)
            shift = detect / max(
                np.sqrt(variance / n + image_variance), detect / 30
            )  # the power is 1 long before 30
            critical = special.stdtrit(df, 1 - level / 2)
            return float(
                1 - special.nctdtr(df, shift, critical) + special.nctdtr(df, shift, -critical)
            )

        found = bisect_left(range(MOST_SEEDS + 1), POWER, lo=least, key=power)
        return found if found <= MOST_SEEDS else None

    low, high = df / special.chdtri(df, [LEVEL / 2, 1 - LEVEL / 2])
    return first(total), first(total * low), first(total * high)


# ---- verdicts


@dataclass(frozen=True, eq=False)
class Sample:
    """What a setting's runs got right on the validation images."""

    label: str
    seeds: tuple[int, ...]
    accuracy: np.ndarray
    """[n] of each run."""
    correct: np.ndarray | None = None
    """[n, N] whether each image was got right; None where not all predictions are stored."""
    index: np.ndarray | None = None
    """[N] position of each image in its original file, ascending."""
    diverged: tuple[int, ...] = ()
    """Seeds that have no accuracy because their run diverged."""

    @classmethod
    def of(
        cls, group: Group | str, seeds: Sequence[int], predictions: Sequence[pd.DataFrame]
    ) -> "Sample":
        """The sample of these seeds' predictions: frames with the columns split, index, label, logit_0 to logit_9.

        Raises UserError where the runs were not validated on the same images.
        """
        label, diverged = (group, ()) if isinstance(group, str) else (group.label, group.diverged)
        frames = [frame[frame["split"] == "val"].sort_values("index") for frame in predictions]
        if not frames:
            return cls(label, (), np.empty(0), diverged=diverged)
        indices = [frame["index"].to_numpy() for frame in frames]
        for seed, index in zip(seeds, indices, strict=True):
            _check_images(f"{label} s{seeds[0]}", indices[0], f"{label} s{seed}", index)
        correct = np.array(
            [frame.filter(like="logit_").to_numpy().argmax(1) == frame["label"] for frame in frames]
        )
        return cls(label, tuple(seeds), correct.mean(1), correct, indices[0], diverged)

    @classmethod
    def without_images(cls, group: Group) -> "Sample":
        """The sample of a group whose predictions are not all stored: its runs' last validation accuracies."""
        known = group.finished.reindex(columns=["seed", "m/last/val_accuracy"]).dropna()
        return cls(
            group.label,
            tuple(known["seed"].tolist()),
            known["m/last/val_accuracy"].to_numpy(float),
            diverged=group.diverged,
        )

    @property
    def n(self) -> int:
        return len(self.seeds)

    def table(self, seeds: Sequence[int], images: bool) -> np.ndarray:
        """[n, N] right or not of these seeds, or their accuracies as [n, 1]."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return (
            self.correct[rows] if images and self.correct is not None else self.accuracy[rows, None]
        )


def _check_images(one: str, index: np.ndarray, another: str, other: np.ndarray) -> None:
    if not np.array_equal(index, other):
        shared = len(np.intersect1d(index, other))
        raise UserError(
            f"{one} and {another} were validated on different images ({len(index):,} and {len(other):,}, {shared:,} of them in common);"
            " compare runs with the same data.holdout and data.split_seed"
        )


Design = Literal["paired", "unpaired", "single"]
Verdict = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Comparison:
    """Of one setting with the reference: difference = other - reference, accuracy as a fraction; None where it can't be told."""

    reference: str
    other: str
    design: Design
    """single: one of the two has fewer than two seeds."""
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    """Those used, of the reference and of the other."""
    left_out: tuple[int, ...] = ()
    """Seeds that only one of the two has, where the rest are paired."""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    """The ends of the 95 % interval."""
    df: float | None = None
    se_seeds: float | None = None
    se_images: float | None = None
    """The two parts of the standard error; se_images is None where images are not in the interval."""
    p: float | None = None
    """Of the test that belongs to the interval."""
    adjusted_p: float | None = None
    """The same by Holm, over all comparisons with the reference: the verdict's."""
    sign_flip_p: float | None = None
    """Exact, of paired seeds; it stands beside and never decides."""
    smallest_p: float | None = None
    """The least that sign_flip_p can be with so many pairs."""
    mcnemar_p: float | None = None
    """Exact, of two single models on these images; it tells nothing about the settings."""
    seeds_needed: int | None = None
    """Seeds of each setting that would find a difference of `detect` with 80 % power; None: more than 1,000, or not known."""
    seeds_range: tuple[int | None, int | None] | None = None
    """The same at the ends of the standard deviation's interval; None: not known."""
    verdict: Verdict = "cannot tell"
    sentence: str = ""
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> tuple[int, int]:
        return len(self.seeds[0]), len(self.seeds[1])


def compare(samples: Sequence[Sample], detect: float = 0.002) -> list[Comparison]:
    """Each sample after the first compared with the first, on validation accuracy over new seeds and new images.

    The verdicts hold together (Holm), the intervals are 95 % each; `detect` is the difference that more seeds should resolve. Raises
    UserError where there is nothing to compare, or where the images differ.
    """
    if len(samples) < 2:
        raise UserError(
            f"a comparison needs two settings or more, given {len(samples)}; name another experiment, group or run"
        )
    if not 0 < detect < 1:
        raise UserError(
            f"detect: given {detect}; allowed is a difference in accuracy above 0 and below 1, such as 0.002"
        )
    reference, *others = samples
    for other in others:
        if reference.index is not None and other.index is not None:
            _check_images(reference.label, reference.index, other.label, other.index)
    tested = sum(min(reference.n, other.n) > 1 for other in others)
    found = [_compared(reference, other, detect, LEVEL / max(1, tested)) for other in others]
    adjusted = iter(holm([each.p for each in found if each.p is not None]))
    told = [
        each if each.p is None else _told(each, next(adjusted), tested, detect) for each in found
    ]
    return [
        _with_diverged(each, (reference, other)) for each, other in zip(told, others, strict=True)
    ]


def _compared(reference: Sample, other: Sample, detect: float, level: float) -> Comparison:
    """The figures of one comparison; `level` is the strictest that Holm can ask of its p-value."""
    if min(reference.n, other.n) < 2:
        return _single(reference, other)
    images = reference.correct is not None and other.correct is not None
    common = tuple(sorted({*reference.seeds} & {*other.seeds}))
    if pairs := len(common) >= 3:
        seeds, left_out = (common, common), tuple(sorted({*reference.seeds} ^ {*other.seeds}))
    else:
        seeds, left_out = (reference.seeds, other.seeds), ()
    tables = reference.table(seeds[0], images), other.table(seeds[1], images)
    before, after = (table.mean(1) for table in tables)
    estimate = paired(*tables) if pairs else unpaired(*tables)
    variances = [(after - before).var(ddof=1)] if pairs else [before.var(ddof=1), after.var(ddof=1)]
    needed, fewest, most = seeds_needed(
        variances, estimate.df, estimate.image_variance, detect, level, 3 if pairs else 2
    )
    counts = (
        np.rint((after - before) * (tables[0].shape[1] if images else 1_000_000)).astype(int)
        if pairs
        else None
    )
    low, high = estimate.interval
    return Comparison(
        reference.label, other.label, "paired" if pairs else "unpaired", seeds, left_out, float(estimate.difference), float(low), float(high),
        df=float(estimate.df), p=float(estimate.p), se_seeds=float(np.sqrt(estimate.seed_variance)),
        se_images=float(np.sqrt(estimate.image_variance)) if images else None, seeds_needed=needed, seeds_range=(fewest, most),
        sign_flip_p=None if counts is None else sign_flip(counts), smallest_p=2.0 ** (1 - len(common)) if pairs else None,
    )  # fmt: skip


def _single(reference: Sample, other: Sample) -> Comparison:
    """What can be said where a setting has one seed or none: nothing about settings, and what to run."""
    few, many = sorted((reference, other), key=lambda each: each.n)
    difference = float(other.accuracy.mean() - reference.accuracy.mean()) if few.n else None
    shown, p = f"validation accuracy {difference:+.4f}" if few.n else "", None
    if not few.n:
        sentence = f"cannot tell: {few.label} has no finished run with a validation accuracy; see its runs, then train it again"
    elif many.n > 1:
        seeds = ",".join(map(str, many.seeds))
        sentence = f"cannot tell: {few.label} has one seed, and how far seeds move it is not known ({shown}); train it with SEEDS={seeds}"
    else:
        sentence = f"two trained models: {shown}"
        if reference.correct is not None and other.correct is not None:
            before, after = reference.correct[0], other.correct[0]
            lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
            p = mcnemar(lost, gained)
            answer = "differ" if p < LEVEL else "can't be told apart"
            sentence = f"these two trained models {answer} on these images: {shown}, {other.label} alone is right on {gained:,}"
            sentence += f" and {reference.label} alone on {lost:,} (exact McNemar, {_p(p)})"
        sentence += "; one seed each: cannot tell about the settings. Train both with the same seeds, such as SEEDS=5"
    seeds_used = reference.seeds, other.seeds
    return Comparison(
        reference.label,
        other.label,
        "single",
        seeds_used,
        difference=difference,
        mcnemar_p=p,
        sentence=sentence,
    )


def _told(found: Comparison, adjusted_p: float, tested: int, detect: float) -> Comparison:
    """With its verdict, which is its adjusted p-value's, in words."""
    assert found.p is not None
    assert found.difference is not None
    verdict: Verdict = (
        "cannot tell" if adjusted_p >= LEVEL else "better" if found.difference > 0 else "worse"
    )
    sampled = "new seeds" if found.se_images is None else "new seeds and new images"
    seeds = (
        f"{found.n[0]} pairs of seeds"
        if found.design == "paired"
        else f"{found.n[0]} and {found.n[1]} seeds"
    )
    family = f", {_p(adjusted_p)} by Holm over {tested} comparisons" if tested > 1 else ""
    evidence = f"validation accuracy {found.difference:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f} over {sampled}"
    evidence += f" ({seeds}, {_p(found.p)}{family})"
    sentence = f"{found.other} is {verdict} than {found.reference}: {evidence}"
    if verdict == "cannot tell":
        sentence = f"cannot tell {found.other} from {found.reference}: {evidence}; {_outlook(found, tested, detect)}"
    return replace(
        found,
        adjusted_p=adjusted_p,
        verdict=verdict,
        sentence=sentence,
        notes=_notes(found, adjusted_p, tested),
    )


def _notes(found: Comparison, adjusted_p: float, tested: int) -> tuple[str, ...]:
    """What was done and left out, a line each."""
    common, notes = len({*found.seeds[0]} & {*found.seeds[1]}), []
    if found.se_images is None:
        notes.append(
            "the interval is over new seeds alone: not all predictions are stored, so images are not in it"
        )
    if found.left_out:
        notes.append(
            f"paired by seed; left out are those that only one of the two has: {_listed(found.left_out)}"
        )
    if found.design == "unpaired":
        notes.append(f"not paired, which takes 3 seeds in common: there are {common}")
    if found.sign_flip_p is not None:
        least = f"with {common} pairs it is at least {found.smallest_p:.2g}, and it never decides"
        notes.append(f"exact sign flip of the pairs: {_p(found.sign_flip_p)}; {least}")
    if tested > 1:
        notes.append(
            f"the interval is a 95 % one by itself; the verdicts of the {tested} comparisons hold together (Holm)"
        )
    if (found.p or 0) < LEVEL <= adjusted_p:
        notes.append(
            f"the interval leaves out 0, as one of {tested} may well do by chance: hence no verdict"
        )
    return tuple(notes)


def _outlook(found: Comparison, tested: int, detect: float) -> str:
    """What more seeds would give."""
    now, needed, ends = min(found.n), found.seeds_needed, found.seeds_range or (None, None)
    if (found.se_images or 0) * (
        special.ndtri(1 - LEVEL / 2 / tested) + special.ndtri(POWER)
    ) >= detect:
        return f"no number of seeds would resolve a difference of {detect:g}: these images alone leave a standard error of {found.se_images:.4f}"
    if needed is None:
        return f"to resolve a difference of {detect:g} takes more than {MOST_SEEDS:,} seeds of each"
    if needed <= now:
        return f"so many seeds resolve a difference of {detect:g} in 4 of 5 cases; more are of use only for smaller ones"
    few, many = (
        f"{max(0, end - now):,}" if end else f"more than {MOST_SEEDS - now:,}" for end in ends
    )
    return f"about {needed - now:,} more seeds of each would resolve a difference of {detect:g} ({few} to {many}: the spread itself is uncertain)"


def _with_diverged(found: Comparison, samples: Sequence[Sample]) -> Comparison:
    """No result of a setting of which runs diverged stands without saying so."""
    hit = [each for each in samples if each.diverged]
    sizes = [
        f"{each.label}: n = {_size(each.n + len(each.diverged), len(each.diverged))} (seeds {_listed(each.diverged)})"
        for each in hit
    ]
    lines = tuple(f"{size}; compared are those that finished" for size in sizes)
    return replace(
        found, sentence=". ".join([found.sentence, *lines]), notes=(*lines, *found.notes)
    )


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def _listed(seeds: Sequence[int]) -> str:
    """Numbers in ascending order, three or more in a row by their ends: '3, 7 to 9'."""
    rows = [
        [seed for _, seed in row]
        for _, row in groupby(enumerate(seeds), lambda place: place[1] - place[0])
    ]
    return ", ".join(
        f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows
    )
