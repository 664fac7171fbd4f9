"""Groups, intervals, tests and verdicts against scipy, statsmodels and slow obvious code."""

import dataclasses
import gc
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, Fmnist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower

from fmnist import compare, tracking
from fmnist.errors import UserError

RNG = np.random.default_rng(20)


def table(
    n: int, images: int, accuracy: float = 0.88, rng: np.random.Generator = RNG
) -> np.ndarray:
    """[n, images] right or not: images of all difficulties, runs of differing skill."""
    easy = np.clip(rng.normal(accuracy, 0.3, images), 0, 1)
    return rng.random((n, images)) < np.clip(easy + rng.normal(0, 0.01, (n, 1)), 0, 1)


def predictions(correct: np.ndarray, first: int = 0, split: str = "val") -> list[pd.DataFrame]:
    """What runs [n, N] that got these images right would have stored, the images in some order of their own."""
    labels = np.random.default_rng(1).integers(0, 10, correct.shape[1])
    frames = []
    for seed, right in enumerate(correct):
        logits = np.eye(10)[np.where(right, labels, (labels + 3) % 10)]
        frame = pd.DataFrame(
            {"split": split, "index": np.arange(first, first + len(labels)), "label": labels}
        )
        frames.append(
            frame.join(pd.DataFrame(logits).add_prefix("logit_")).sample(frac=1, random_state=seed)
        )
    return frames


def sample(label: str, correct: np.ndarray, seeds: tuple[int, ...] | None = None) -> compare.Sample:
    return compare.Sample.of(label, seeds or tuple(range(len(correct))), predictions(correct))


def shown_only(sample: compare.Sample) -> compare.Sample:
    """The same with accuracies alone."""
    return dataclasses.replace(sample, correct=None, index=None)


# ---- estimates


def test_paired_without_an_image_term_is_the_paired_t_test() -> None:
    before, after = RNG.normal(0.88, 0.003, (2, 5, 1))
    estimate, known = compare.paired(before, after), stats.ttest_rel(after[:, 0], before[:, 0])
    assert (estimate.df, estimate.image_variance) == (4, 0)
    assert estimate.p == pytest.approx(known.pvalue, rel=1e-9)
    assert estimate.interval == pytest.approx(tuple(known.confidence_interval(0.95)), rel=1e-9)


def test_images_alike_in_the_mean_add_nothing_to_the_interval() -> None:
    before = np.zeros((4, 12), bool)
    after = np.array(
        [np.roll([True] * (3 + seed) + [False] * (9 - seed), 3 * seed) for seed in range(4)]
    )
    after[:, :] = [
        [(image + seed) % 4 == 0 for image in range(12)] for seed in range(4)
    ]  # each image once, each seed thrice
    after[0, 1] = True
    estimate = compare.paired(before, after)
    assert estimate.image_variance == 0
    assert estimate.p == pytest.approx(
        stats.ttest_rel(after.mean(1), before.mean(1)).pvalue, rel=1e-9
    )


def test_variance_is_the_two_way_layouts() -> None:
    before, after = table(4, 25), table(4, 25)
    n, size = before.shape
    rows = [
        (seed, image, float(after[seed, image]) - float(before[seed, image]))
        for seed in range(n)
        for image in range(size)
    ]
    anova = anova_lm(
        ols("d ~ C(seed) + C(image)", pd.DataFrame(rows, columns=["seed", "image", "d"])).fit()
    )
    mean_square = anova["mean_sq"]
    estimate = compare.paired(before, after)
    assert estimate.seed_variance == pytest.approx(mean_square["C(seed)"] / (n * size), rel=1e-9)
    assert estimate.image_variance == pytest.approx(
        max(0, mean_square["C(image)"] - mean_square["Residual"]) / (n * size), rel=1e-9
    )
    assert estimate.image_variance > 0


def test_variance_is_the_issues_formula_in_loops() -> None:
    before, after = table(3, 40), table(3, 40)
    d = [
        [float(a) - float(b) for a, b in zip(*rows, strict=True)]
        for rows in zip(after, before, strict=True)
    ]
    n, size = 3, 40
    by_seed, by_image = (
        [sum(row) / size for row in d],
        [sum(column) / n for column in zip(*d, strict=True)],
    )
    mean = sum(by_seed) / n
    residual = sum(
        (d[s][i] - by_seed[s] - by_image[i] + mean) ** 2 for s in range(n) for i in range(size)
    ) / ((n - 1) * (size - 1))
    seeds = sum((value - mean) ** 2 for value in by_seed) / (n - 1) / n
    images = max(
        0,
        sum((value - mean) ** 2 for value in by_image) / (size - 1) / size - residual / (n * size),
    )
    estimate = compare.paired(before, after)
    assert estimate.error == pytest.approx(math.sqrt(seeds + images), rel=1e-12)
    half = stats.t.ppf(0.975, n - 1) * math.sqrt(seeds + images)
    assert estimate.interval == pytest.approx((mean - half, mean + half), rel=1e-12)
    assert images > 0


def test_unpaired_without_an_image_term_is_welchs_test() -> None:
    before, after = RNG.normal(0.88, 0.003, (4, 1)), RNG.normal(0.885, 0.008, (6, 1))
    estimate, known = (
        compare.unpaired(before, after),
        stats.ttest_ind(after[:, 0], before[:, 0], equal_var=False),
    )
    assert (estimate.p, estimate.df) == pytest.approx((known.pvalue, known.df), rel=1e-9)
    assert estimate.interval == pytest.approx(tuple(known.confidence_interval(0.95)), rel=1e-9)


def test_unpaired_takes_each_settings_own_residual_off_the_image_term() -> None:
    before, after = table(3, 30), table(5, 30, 0.6)

    def residual(right: np.ndarray) -> float:
        values = right.astype(float)
        left = (
            values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
        )
        return float((left**2).sum() / ((len(values) - 1) * (values.shape[1] - 1)))

    expected = (after.mean(0) - before.mean(0)).var(ddof=1) / 30 - (
        residual(before) / 3 + residual(after) / 5
    ) / 30
    estimate = compare.unpaired(before, after)
    assert estimate.image_variance == pytest.approx(expected, rel=1e-9)
    assert expected > 0
    assert estimate.seed_variance == pytest.approx(
        before.mean(1).var(ddof=1) / 3 + after.mean(1).var(ddof=1) / 5
    )


@pytest.mark.parametrize("estimator", [compare.paired, compare.unpaired])
def test_many_draws_at_once_are_each_by_itself(estimator: object) -> None:
    before, after = RNG.random((2, 6, 4, 50)) < 0.8
    together = estimator(before, after)
    for draw in range(6):
        alone = estimator(before[draw], after[draw])
        assert [together.p[draw], *(end[draw] for end in together.interval)] == pytest.approx(
            [alone.p, *alone.interval], rel=1e-12
        )


def test_no_difference_at_all_has_p_1() -> None:
    same = table(3, 20)
    assert compare.paired(same, same).p == 1
    assert compare.paired(np.full((3, 1), 0.1), np.full((3, 1), 0.1)).p == 1
    assert compare.unpaired(np.full((3, 1), 0.1), np.full((4, 1), 0.1)).p == 1
    assert compare.unpaired(np.full((3, 1), 0.1), np.full((4, 1), 0.2)).p == 0


# ---- tests


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_statsmodels(p: list[float]) -> None:
    gc.freeze()  # multipletests collects garbage each time it is called: 0.7 s in a process that has imported as much as a test's
    assert compare.holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_statsmodels(lost: int, gained: int) -> None:
    known = mcnemar([[100, lost], [gained, 20]], exact=True).pvalue if lost + gained else 1.0
    assert compare.mcnemar(lost, gained) == pytest.approx(known, rel=1e-9)


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=9))
def test_sign_flip_is_every_sign_tried(counts: list[int]) -> None:
    flipped = [
        abs(sum(sign * count for sign, count in zip(signs, counts, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(counts))
    ]
    assert compare.sign_flip(np.array(counts)) == pytest.approx(
        np.mean([each >= abs(sum(counts)) for each in flipped]), rel=1e-12
    )


def test_sign_flip_is_scipys() -> None:
    counts = np.array([12, 31, -4, 18, 25, 9, 14])
    known = stats.permutation_test(
        (counts.astype(float),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert compare.sign_flip(counts) == pytest.approx(known.pvalue, rel=1e-12)


def test_sign_flip_stays_exact_for_many_seeds() -> None:
    counts = np.arange(60) - 10
    # By the characteristic function of the sum of signs times counts, at as many points as the sum has values.
    size = 2 * np.abs(counts).sum() + 1
    frequencies = 2 * np.pi * np.arange(size) / size
    probabilities = np.fft.ifft(np.prod(np.cos(np.outer(counts, frequencies)), axis=0)).real
    sums = np.where(np.arange(size) <= size // 2, np.arange(size), np.arange(size) - size)
    assert compare.sign_flip(counts) == pytest.approx(
        probabilities[np.abs(sums) >= abs(counts.sum())].sum(), rel=1e-6
    )


# ---- power


@pytest.mark.parametrize(
    ("detect", "deviation"), [(0.002, 0.003), (0.004, 0.003), (0.002, 0.0008), (0.001, 0.004)]
)
def test_seeds_needed_of_pairs_is_statsmodels(detect: float, deviation: float) -> None:
    needed, *_ = compare.seeds_needed([deviation**2], 4, 0.0, detect)
    assert needed == math.ceil(TTestPower().solve_power(detect / deviation, power=0.8, alpha=0.05))


@pytest.mark.parametrize("level", [0.05, 0.025])
def test_seeds_needed_of_two_settings_is_statsmodels(level: float) -> None:
    needed, *_ = compare.seeds_needed([0.003**2, 0.003**2], 8, 0.0, 0.002, level)
    assert needed == math.ceil(TTestIndPower().solve_power(0.002 / 0.003, power=0.8, alpha=level))


def test_range_of_seeds_needed_is_the_standard_deviations_interval() -> None:
    ends = 0.003 * np.sqrt(4 / stats.chi2.ppf([0.975, 0.025], 4))
    _, fewest, most = compare.seeds_needed([0.003**2], 4, 0.0, 0.003)
    assert [fewest, most] == [
        math.ceil(TTestPower().solve_power(0.003 / end, power=0.8, alpha=0.05)) for end in ends
    ]


def test_seeds_needed_heeds_what_seeds_cannot_give() -> None:
    few, *_ = compare.seeds_needed([0.003**2], 4, 0.0, 0.003)
    more, *_ = compare.seeds_needed([0.003**2], 4, 0.0008**2, 0.003)
    assert few < more
    assert compare.seeds_needed([0.003**2], 4, 0.0015**2, 0.003) == (
        None,
        None,
        None,
    )  # 2.8 standard errors are needed
    assert compare.seeds_needed([0.05**2], 4, 0.0, 0.0001) == (None, None, None)
    assert compare.seeds_needed([0.0], 4, 0.0, 0.002, least=3) == (3, 3, 3)


def test_power_of_unequal_spreads_is_that_of_simulated_experiments() -> None:
    spreads, detect = (0.001, 0.005), 0.003
    needed, *_ = compare.seeds_needed(np.square(spreads).tolist(), 5, 0.0, detect)
    rng = np.random.default_rng(3)

    def power(n: int) -> float:
        before, after = (
            rng.normal(mean, spread, (20_000, n, 1))
            for mean, spread in zip((0, detect), spreads, strict=True)
        )
        return float((compare.unpaired(before, after).p < 0.05).mean())

    assert power(needed - 2) - 0.01 < 0.8 < power(needed + 2) + 0.01


# ---- verdicts


def test_comparison_is_the_estimates_and_the_verdict_its_test() -> None:
    before, after = table(5, 2_000), table(5, 2_000, 0.95)
    [found] = compare.compare([sample("a", before), sample("b", after)])
    estimate = compare.paired(before, after)
    assert (found.difference, found.low, found.high, found.df) == pytest.approx(
        (estimate.difference, *estimate.interval, 4)
    )
    assert (found.p, found.adjusted_p) == pytest.approx((estimate.p, estimate.p))
    assert (found.se_seeds**2 + found.se_images**2) == pytest.approx(estimate.error**2)
    assert (found.design, found.n, found.seeds[0], found.smallest_p) == (
        "paired",
        (5, 5),
        (0, 1, 2, 3, 4),
        2 / 2**5,
    )
    counts = np.rint((after.mean(1) - before.mean(1)) * 2_000).astype(int)
    assert found.sign_flip_p == compare.sign_flip(counts)
    assert (found.verdict, found.low > 0) == ("better", True)
    assert found.sentence.startswith(
        f"b is better than a: validation accuracy {found.difference:+.4f}, 95 % interval {found.low:+.4f} to"
    )
    assert "over new seeds and new images (5 pairs of seeds, p" in found.sentence
    assert any(
        "exact sign flip of the pairs" in note and "at least 0.062" in note for note in found.notes
    )
    [back] = compare.compare([sample("b", after), sample("a", before)])
    assert (back.verdict, back.low, back.high, back.p) == pytest.approx(
        ("worse", -found.high, -found.low, found.p)
    )
    assert back.sentence.startswith("a is worse than b: ")


def test_seeds_that_only_one_has_are_left_out_and_named() -> None:
    before, after = table(5, 500), table(4, 500)
    [found] = compare.compare(
        [sample("a", before, (0, 1, 2, 3, 4)), sample("b", after, (9, 3, 2, 1))]
    )
    assert (found.design, found.seeds, found.left_out) == (
        "paired",
        ((1, 2, 3), (1, 2, 3)),
        (0, 4, 9),
    )
    assert found.difference == pytest.approx(after[[3, 2, 1]].mean() - before[1:4].mean())
    assert "paired by seed; left out are those that only one of the two has: 0, 4, 9" in found.notes


def test_fewer_than_three_seeds_in_common_are_not_paired() -> None:
    before, after = table(4, 500), table(3, 500)
    [found] = compare.compare([sample("a", before, (0, 1, 2, 3)), sample("b", after, (2, 3, 4))])
    estimate = compare.unpaired(before, after)
    assert (found.design, found.n, found.left_out, found.sign_flip_p, found.smallest_p) == (
        "unpaired",
        (4, 3),
        (),
        None,
        None,
    )
    assert (found.p, found.low, found.df) == pytest.approx(
        (estimate.p, estimate.interval[0], estimate.df)
    )
    assert "4 and 3 seeds" in found.sentence
    assert "not paired, which takes 3 seeds in common: there are 2" in found.notes
    spreads = [before.mean(1).var(ddof=1), after.mean(1).var(ddof=1)]
    needed, *ends = compare.seeds_needed(spreads, estimate.df, estimate.image_variance, 0.002)
    assert (found.seeds_needed, found.seeds_range) == (needed, tuple(ends))


def test_without_predictions_the_interval_is_over_seeds_alone_and_says_so() -> None:
    before, after = sample("a", table(4, 500)), sample("b", table(4, 500))
    for pair in ([shown_only(before), after], [before, shown_only(after)]):
        [found] = compare.compare(pair)
        assert found.p == pytest.approx(stats.ttest_rel(after.accuracy, before.accuracy).pvalue)
        assert found.se_images is None
        assert "over new seeds (4 pairs" in found.sentence
        assert any("images are not in it" in note for note in found.notes)


def test_several_comparisons_are_judged_by_holm_and_intervals_stay() -> None:
    spread, shifts = (
        0.0012 * np.array([-1.2, -0.5, 0, 0.5, 1.2]),
        (0.00147, 0.00162, 0.02),
    )  # p of 0.04, 0.03, 0.000002
    means = [np.full(5, 0.88), *(0.88 + shift + spread for shift in shifts)]
    samples = [compare.Sample(f"s{k}", (0, 1, 2, 3, 4), mean) for k, mean in enumerate(means)]
    found = compare.compare(samples)
    alone = [compare.compare([samples[0], other])[0] for other in samples[1:]]
    assert [each.other for each in found] == ["s1", "s2", "s3"]
    assert [(each.low, each.high, each.p) for each in found] == [
        (each.low, each.high, each.p) for each in alone
    ]
    assert [each.adjusted_p for each in found] == pytest.approx(
        multipletests([each.p for each in alone], method="holm")[1]
    )
    assert [each.verdict for each in found] == [
        "better" if each.adjusted_p < 0.05 else "cannot tell" for each in found
    ]
    stricter = compare.seeds_needed(
        [spread.var(ddof=1)], 4, 0.0, 0.002, level=0.05 / 3, least=3
    )  # than Holm can ask for
    assert found[0].seeds_needed == stricter[0] > alone[0].seeds_needed
    assert {each.verdict for each in alone} == {"better"}
    assert [each.verdict for each in found] == ["cannot tell", "cannot tell", "better"]
    assert [
        any("leaves out 0, as one of 3 may" in note for note in each.notes) for each in found
    ] == [True, True, False]
    assert all(
        "the interval is a 95 % one by itself; the verdicts of the 3 comparisons hold together (Holm)"
        in each.notes
        for each in found
    )
    assert "by Holm over 3 comparisons" in found[0].sentence


def test_single_runs_among_several_do_not_count_as_tests() -> None:
    a, b, one = sample("a", table(3, 300)), sample("b", table(3, 300)), sample("one", table(1, 300))
    found = compare.compare([a, one, b])
    assert found[0].p is None
    assert found[1].adjusted_p == found[1].p


def outlook(spread: float, detect: float, seeds: int = 5) -> str:
    differences = spread * stats.norm.ppf((np.arange(seeds) + 0.5) / seeds)
    a, b = (
        compare.Sample(label, tuple(range(seeds)), 0.88 + values)
        for label, values in (("a", 0 * differences), ("b", differences))
    )
    [found] = compare.compare([a, b], detect)
    assert found.verdict == "cannot tell"
    assert found.sentence.startswith(
        "cannot tell b from a: validation accuracy +0.0000, 95 % interval "
    )
    return found.sentence.partition("); ")[2]


def test_cannot_tell_says_what_more_seeds_would_give() -> None:
    spread = (0.003 * stats.norm.ppf((np.arange(5) + 0.5) / 5)).std(ddof=1)
    needed, fewest, most = compare.seeds_needed([spread**2], 4, 0.0, 0.002, least=3)
    ends = f"({max(0, fewest - 5)} to {most - 5}: the spread itself is uncertain)"
    assert (
        outlook(0.003, 0.002)
        == f"about {needed - 5} more seeds of each would resolve a difference of 0.002 {ends}"
    )
    assert "to more than 995: the spread" in outlook(0.02, 0.002)
    assert (
        outlook(0.3, 0.002)
        == "to resolve a difference of 0.002 takes more than 1,000 seeds of each"
    )
    assert (
        outlook(0.003, 0.02)
        == "so many seeds resolve a difference of 0.02 in 4 of 5 cases; more are of use only for smaller ones"
    )


def test_where_images_are_the_limit_no_seeds_are_asked_for() -> None:
    right = np.tile(np.arange(400) % 8 != 0, (3, 1))
    other = np.roll(right, 1, axis=1)  # every seed alike, an eighth of the images otherwise
    right[0, 1], other[1, 5] = False, False
    [found] = compare.compare([sample("a", right), sample("b", other)])
    assert found.seeds_needed is None
    assert (
        f"no number of seeds would resolve a difference of 0.002: these images alone leave a standard error of {found.se_images:.4f}"
        in found.sentence
    )


def test_two_single_runs_get_mcnemar_and_no_verdict() -> None:
    before, after = table(1, 3_000), table(1, 3_000, 0.95)
    [found] = compare.compare([sample("a", before, (3,)), sample("b", after, (3,))])
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    assert (found.design, found.verdict, found.p, found.low, found.seeds_needed) == (
        "single",
        "cannot tell",
        None,
        None,
        None,
    )
    assert found.mcnemar_p == compare.mcnemar(lost, gained) < 0.05
    assert found.difference == pytest.approx(after.mean() - before.mean())
    assert found.sentence.startswith(
        "these two trained models differ on these images: validation accuracy +"
    )
    assert (
        f"b alone is right on {gained:,} and a alone on {lost:,} (exact McNemar, p"
        in found.sentence
    )
    assert "; one seed each: cannot tell about the settings." in found.sentence
    [same] = compare.compare([sample("a", before), sample("b", before)])
    assert same.sentence.startswith("these two trained models can't be told apart on these images")
    assert "; one seed each: cannot tell about the settings." in same.sentence
    [shown] = compare.compare([shown_only(sample("a", before)), sample("b", after)])
    assert shown.mcnemar_p is None
    assert shown.sentence.startswith("two trained models: validation accuracy +")
    assert "; one seed each: cannot tell about the settings." in shown.sentence


@pytest.mark.parametrize("swapped", [False, True])
def test_one_seed_against_several_cannot_tell_and_says_what_to_run(swapped: bool) -> None:
    pair = [sample("several", table(3, 100), (0, 4, 7)), sample("one", table(1, 100), (4,))]
    [found] = compare.compare(pair[::-1] if swapped else pair)
    assert (found.design, found.verdict, found.p, found.mcnemar_p) == (
        "single",
        "cannot tell",
        None,
        None,
    )
    assert found.sentence.startswith(
        "cannot tell: one has one seed, and how far seeds move it is not known (validation accuracy "
    )
    assert found.sentence.endswith("; train it with SEEDS=0,4,7")


def test_diverged_runs_stand_in_every_sentence() -> None:
    whole, some, none = (
        sample(label, table(n, 200)) for label, n in (("whole", 3), ("some", 3), ("none", 1))
    )
    some = dataclasses.replace(some, diverged=(8,))
    none = dataclasses.replace(
        none, seeds=(), accuracy=np.empty(0), correct=None, index=None, diverged=(0, 1)
    )
    first, second = compare.compare([whole, some, none])
    told = "some: n = 4, of which 1 diverged (seeds 8); compared are those that finished"
    assert told in first.sentence
    assert told in first.notes
    assert second.sentence.startswith(
        "cannot tell: none has no finished run with a validation accuracy"
    )
    assert "none: n = 2, of which 2 diverged (seeds 0, 1)" in second.sentence
    assert (second.difference, second.verdict) == (None, "cannot tell")


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(bool, st.tuples(st.just(2), st.integers(3, 5), st.integers(2, 12))),
    st.randoms(use_true_random=False),
    st.sampled_from(["paired", "unpaired"]),
)
def test_what_must_not_matter_does_not(tables: np.ndarray, random: object, design: str) -> None:
    before, after = tables
    seeds = tuple(range(len(before)))
    others = seeds if design == "paired" else tuple(seed + 100 for seed in seeds)
    [found] = compare.compare([sample("a", before, seeds), sample("b", after, others)])
    images, order = list(range(before.shape[1])), list(seeds)
    random.shuffle(images)
    random.shuffle(order)
    [again] = compare.compare(
        [
            sample("x", before[order][:, images], tuple(seeds[k] for k in order)),
            sample("y", after[order][:, images], tuple(others[k] for k in order)),
        ]
    )
    [back] = compare.compare([sample("b", after, others), sample("a", before, seeds)])
    assert found.design == again.design == back.design == design
    assert (again.difference, again.low, again.high, again.p) == pytest.approx(
        (found.difference, found.low, found.high, found.p), abs=1e-12
    )
    assert (back.difference, back.low, back.high, back.p) == pytest.approx(
        (-found.difference, -found.high, -found.low, found.p), abs=1e-12
    )
    assert again.verdict == found.verdict
    assert {found.verdict, back.verdict} in ({"cannot tell"}, {"better", "worse"})
    assert (found.verdict == "cannot tell") == (
        found.low <= 0 <= found.high
    ) or found.p == pytest.approx(0.05)


def test_sample_is_what_was_predicted_in_the_order_of_the_files() -> None:
    correct = table(3, 60)
    made = compare.Sample.of(
        "a",
        (4, 5, 6),
        [
            pd.concat([frame, frame.assign(split="test", label=0)])
            for frame in predictions(correct, 100)
        ],
    )
    assert np.array_equal(made.correct, correct)
    assert np.array_equal(made.index, np.arange(100, 160))
    assert (made.seeds, made.accuracy.tolist(), made.diverged) == (
        (4, 5, 6),
        correct.mean(1).tolist(),
        (),
    )


def test_what_cannot_be_compared_is_told_in_a_line() -> None:
    a, other = (
        sample("a", table(3, 50)),
        compare.Sample.of("b", (0, 1, 2), predictions(table(3, 60), first=40)),
    )
    with pytest.raises(
        UserError,
        match=r"a and b were validated on different images \(50 and 60, 10 of them in common\); compare runs with the same",
    ):
        compare.compare([a, other])
    frames = [*predictions(table(1, 50)), *predictions(table(1, 50), first=1)]
    with pytest.raises(
        UserError, match=r"b s3 and b s4 were validated on different images \(50 and 50, 49 of them"
    ):
        compare.Sample.of("b", (3, 4), frames)
    with pytest.raises(
        UserError, match=r"a comparison needs two settings or more, given 1; name another"
    ):
        compare.compare([a])
    for wrong in (0, -0.1, 1.0, math.nan):
        with pytest.raises(
            UserError,
            match=rf"detect: given {wrong}; allowed is a difference in accuracy above 0 and below 1",
        ):
            compare.compare([a, a], wrong)


# ---- groups


def runs(*rows: dict) -> pd.DataFrame:
    """A frame as the store gives it, a minute between the starts."""
    common = {
        "experiment_id": "1",
        "status": "FINISHED",
        "t/kind": "run",
        "p/optimizer.type": "sgd",
        "p/optimizer.lr": "0.001",
    }
    return pd.DataFrame(
        [{**common, "run_id": f"id{k}", "start": 60_000 * k} | row for k, row in enumerate(rows)]
    )


def run(seed: int, name: str = "baseline", group: str = "g1", **more: object) -> dict:
    return {
        "name": f"{name} s{seed}" if seed else name,
        "t/group": group,
        "t/seed": str(seed),
        "p/train.seed": str(seed),
        **more,
    }


def test_groups_are_the_runs_that_differ_in_their_seed_alone() -> None:
    frame = runs(run(1), run(0, "other", "g2"), run(2), run(0), run(1, "other", "g2"))
    first, second = compare.groups(frame)
    assert (first.label, first.key, first.seeds, first.n, first.size) == (
        "baseline",
        "g1",
        (0, 1, 2),
        3,
        "3",
    )
    assert first.members["run_id"].tolist() == ["id3", "id0", "id2"]
    assert (second.label, second.seeds) == ("other", (0, 1))
    assert (first.duplicates, first.diverged, first.warnings) == ((), (), [])
    assert compare.groups(frame[::-1])[0].key == "g1"  # oldest first, in whatever order they come


def test_a_seed_counts_once_the_newest_finished_run() -> None:
    failed = {"status": "FAILED", "t/outcome": "diverged"}
    [group] = compare.groups(
        runs(
            run(0),
            run(1),
            run(0),
            run(1, **failed),
            run(2, **failed),
            run(2, **failed),
            run(3, **failed),
            run(3),
        )
    )
    assert group.members["run_id"].tolist() == ["id2", "id1", "id5", "id7"]
    assert group.members["diverged"].tolist() == [False, False, True, False]
    assert group.duplicates == ("id0", "id3", "id4", "id6")
    assert (group.diverged, group.size, group.finished["seed"].tolist()) == (
        (2,),
        "4, of which 1 diverged",
        [0, 1, 3],
    )
    assert group.warnings == [
        "baseline: of seeds 1, 3 another run diverged; the one that finished counts"
    ]


def test_only_what_finished_or_diverged_is_a_member() -> None:
    reason = "the training loss is nan at step 7, the first that isn't finite; try a smaller optimizer.lr"
    [group] = compare.groups(
        runs(
            run(0, **{"t/outcome": "finished"}),
            run(1, status="KILLED", **{"t/outcome": "interrupted"}),
            run(2, status="KILLED", **{"t/outcome": "pruned"}),
            run(3, status="RUNNING"),
            run(4, status="FAILED", **{"t/outcome": "failed"}),
            run(5, status="FAILED", **{"t/reason": reason}),  # of before the tag
            run(6, status="FAILED", **{"t/reason": "OSError: disk full"}),
            run(7, status="KILLED"),
            run(8, **{"t/kind": "group"}),
            run(9),
        )
    )
    assert (group.seeds, group.diverged) == ((0, 5, 9), (5,))


def test_runs_of_other_programs_are_groups_of_their_own() -> None:
    foreign = {
        "name": "theirs",
        "t/kind": np.nan,
        "t/group": np.nan,
        "p/optimizer.type": np.nan,
        "p/optimizer.lr": np.nan,
    }
    found = compare.groups(
        runs(run(0), foreign, foreign | {"p/train.seed": "5"}, foreign | {"status": "RUNNING"})
    )
    assert [(group.label, group.key, group.seeds) for group in found] == [
        ("baseline", "g1", (0,)),
        ("theirs (id1)", "id1", (-1,)),
        ("theirs (id2)", "id2", (5,)),
    ]
    bare = pd.DataFrame(
        {
            "run_id": ["a"],
            "experiment_id": ["0"],
            "name": ["x"],
            "status": ["FINISHED"],
            "start": [1],
        }
    )
    assert [group.key for group in compare.groups(bare)] == ["a"]
    assert compare.groups(bare[:0]) == []


def test_labels_are_the_commonest_name_and_tell_groups_apart() -> None:
    first, second = compare.groups(
        runs(
            run(0, "lr-0.01"),
            run(1, "baseline lr=0.01"),
            run(2, "baseline lr=0.01"),
            run(0, "baseline lr=0.01", "abcdefgh"),
        )
    )
    assert (first.label, second.label) == ("baseline lr=0.01 (g1)", "baseline lr=0.01 (abcdef)")


def test_stated_never_leaves_out_how_many() -> None:
    metric = "m/last/val_accuracy"
    diverged = {"status": "FAILED", "t/outcome": "diverged"}
    [group] = compare.groups(
        runs(run(0, **{metric: 0.87}), run(1, **{metric: 0.88}), run(2, **diverged))
    )
    assert (
        group.stated()
        == f"0.8750 ± {np.std([0.87, 0.88], ddof=1):.4f} (n = 3, of which 1 diverged)"
    )
    assert group.stated("last/val_loss") == "no result (n = 3, of which 1 diverged)"
    [single] = compare.groups(runs(run(0, **{metric: 0.87})))
    assert single.stated() == "0.8700 (n = 1)"
    without = compare.Sample.without_images(group)
    assert (without.label, without.seeds, without.accuracy.tolist(), without.diverged) == (
        "baseline",
        (0, 1),
        [0.87, 0.88],
        (2,),
    )
    assert compare.Sample.without_images(compare.groups(runs(run(0)))[0]).n == 0
    assert compare.Sample.of(group, (0, 1), predictions(table(2, 9))).diverged == (2,)
    assert compare.Sample.of(group, (), []).n == 0


def test_mean_curves_are_means_of_the_members_that_have_the_step() -> None:
    first = pd.DataFrame(
        {
            "step": [0, 1, 2, 3],
            "val/accuracy": [0.1, np.nan, 0.8, 0.9],
            "val/loss": [2.3, np.nan, 0.5, 0.4],
            "train/loss": 1.0,
        }
    )
    second = pd.DataFrame(
        {"step": [0, 2, 4], "val/accuracy": [0.2, 0.7, 0.6], "val/loss": [2.5, 0.7, 0.9]}
    )
    means = compare.mean_curves([first, second])
    assert means.index.tolist() == [0, 2, 3, 4]
    assert means["n"].tolist() == [2, 2, 1, 1]
    assert means["val/accuracy"].tolist() == pytest.approx([0.15, 0.75, 0.9, 0.6])
    assert means.loc[0, "val/accuracy_std"] == pytest.approx(stats.tstd([0.1, 0.2]))
    assert means.loc[2, "val/loss_std"] == pytest.approx(stats.tstd([0.5, 0.7]))
    assert means["val/loss_std"].isna().tolist() == [False, False, True, True]
    assert (
        list(compare.mean_curves([]))
        == list(means)
        == ["val/accuracy", "val/accuracy_std", "val/loss", "val/loss_std", "n"]
    )


def test_differing_shows_the_parameters_that_differ_and_no_others() -> None:
    sgd = {
        "p/optimizer.momentum": "0.9",
        "p/train.precision": np.nan,
        "p/compute.device": "cpu",
        "p/tracking.log_every": "1",
    }
    adam = {
        "p/optimizer.type": "adam",
        "p/optimizer.eps": "1e-08",
        "p/train.precision": "float32",
        "p/compute.device": "cuda",
    }
    found = compare.groups(
        runs(
            run(0, **sgd),
            run(1, **sgd),
            run(
                0, "slow", "g2", **{**sgd, "p/optimizer.lr": "0.0003", "p/tracking.log_every": "9"}
            ),
            run(0, "adam", "g3", **adam),
        )
    )
    assert compare.differing(found[:1]).shape == (1, 0)
    slow = compare.differing(found[:2])
    assert slow.to_dict("index") == {
        "baseline": {"optimizer.lr": "0.001"},
        "slow": {"optimizer.lr": "0.0003"},
    }
    both = compare.differing([found[0], found[2]])
    assert both.to_dict("index") == {
        "baseline": {"optimizer.type": "sgd", "optimizer.momentum": "0.9", "optimizer.eps": "-"},
        "adam": {"optimizer.type": "adam", "optimizer.momentum": "-", "optimizer.eps": "1e-08"},
    }
    assert not any(
        "more than one" in line for line in compare.cautions([found[0], found[2]])
    )  # the fields come with the type


def test_cautions_name_what_would_mislead() -> None:
    test_set, held_out = {"p/data.holdout": "null"}, {"p/data.holdout": "10000"}
    a, b = compare.groups(
        runs(
            run(0, **held_out),
            run(1, **held_out),
            run(0, "longer", "g2", **held_out, **{"p/train.epochs": "40"}),
        )
    )
    assert compare.cautions([a, b]) == []
    assert compare.cautions([a]) == []
    diverged = {"status": "FAILED", "t/outcome": "diverged"}
    a, b = compare.groups(
        runs(
            run(
                0,
                **test_set,
                **{"t/torch": "2.10.0", "t/weights": "best", "t/git_commit": "a" * 40},
            ),
            run(1, **test_set, **diverged, **{"t/torch": "2.11.0", "t/git_commit": "b" * 40}),
            run(
                0,
                "lr",
                "g2",
                **held_out,
                **{
                    "t/torch": "2.11.0",
                    "p/optimizer.lr": "0.01",
                    "t/git_commit": "a" * 40,
                    "t/threads": "2",
                },
            ),
        )
    )
    assert compare.cautions([a, b]) == [
        "validation was the test set (baseline): a choice made by these figures is made on it; set data.holdout",
        "the best evaluation was selected on the same images (baseline): its accuracy is too high by that choice",
        "lr was validated on other images than baseline",
        "lr differs from baseline in more than one parameter: optimizer.lr, data.holdout",
        "baseline: n = 2, of which 1 diverged (seeds 1)",
        "the runs differ in torch: 2.10.0 (1 of baseline); 2.11.0 (1 of baseline, 1 of lr)",
        "the runs differ in threads: unknown (2 of baseline); 2 (1 of lr)",
        "the runs differ in git commit: aaaaaaaa (1 of baseline, 1 of lr); bbbbbbbb (1 of baseline)",
    ]
    assert a.warnings == [
        "the runs differ in torch: 2.10.0 (1 of baseline); 2.11.0 (1 of baseline)",
        "the runs differ in git commit: aaaaaaaa (1 of baseline); bbbbbbbb (1 of baseline)",
    ]
    switched = {"p/train.early_stopping.metric": "loss", "p/train.early_stopping.patience": "5"}
    a, b = compare.groups(
        runs(
            run(0, **held_out, **{"p/train.early_stopping": "null"}),
            run(0, "stopped", "g2", **held_out, **switched),
        )
    )
    assert compare.cautions([a, b]) == []  # one switch


@pytest.mark.slow
def test_real_runs_of_a_real_store_are_grouped_and_read(fmnist: Fmnist, home: Path) -> None:
    result = fmnist(*SMALL, "--seeds", "3")
    assert result.returncode == 0, result.stderr
    store = tracking.connect(home)
    [group] = compare.groups(store.runs(status=None))
    assert (group.label, group.seeds) == ("baseline epochs=1 batch_size=1000", (0, 1, 2))
    assert [line[:27] for line in compare.cautions([group])] == ["validation was the test set"]
    made = compare.Sample.of(
        group, group.seeds, [store.predictions(run_id) for run_id in group.members["run_id"]]
    )
    assert made.correct.shape == (3, 10_000)
    assert made.accuracy.tolist() == pytest.approx(
        group.members["m/last/val_accuracy"].tolist(), abs=1e-12
    )
    assert compare.Sample.without_images(group).accuracy.tolist() == pytest.approx(
        made.accuracy.tolist(), abs=1e-12
    )
    curves = compare.mean_curves([store.curves(run_id) for run_id in group.members["run_id"]])
    assert curves["val/accuracy"].iloc[-1] == pytest.approx(made.accuracy.mean(), abs=1e-12)
    assert curves["n"].tolist() == [3] * len(curves)
