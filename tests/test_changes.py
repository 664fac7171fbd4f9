"""What changed between groups: against scikit-learn, scipy and obvious loops."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics

from fmnist import changes

IMAGES = 600


def frame(seed: int, skill: float, images: int = IMAGES) -> pd.DataFrame:
    """A run's predictions.parquet: the images are the same for every run, in an order of its own; a test split is there too."""
    labels = np.random.default_rng(7).integers(0, 10, images)
    own = np.random.default_rng(100 + seed)
    logits = own.normal(0, 1, (images, 10)) + np.random.default_rng(8).normal(0, 1, (images, 10))
    logits[np.arange(images), labels] += skill
    table = pd.DataFrame(logits.astype(np.float32)).add_prefix("logit_")
    table.insert(0, "label", labels)
    table.insert(0, "index", np.arange(images) * 3)
    table.insert(0, "split", "val")
    other = table.assign(split="test", label=(labels + 1) % 10)
    return pd.concat([table.sample(frac=1, random_state=seed), other], ignore_index=True)


def group(seeds: tuple[int, ...], skill: float) -> changes.Predictions:
    return changes.Predictions.of(seeds, [frame(seed, skill) for seed in seeds])


REFERENCE, OTHER = group((0, 1, 2), 1.5), group((0, 1, 2), 2.5)


def test_predictions_are_the_validation_images_in_the_order_of_their_file() -> None:
    assert REFERENCE.index.tolist() == [3 * place for place in range(IMAGES)]
    assert REFERENCE.labels.tolist() == np.random.default_rng(7).integers(0, 10, IMAGES).tolist()
    assert REFERENCE.probabilities.shape == (3, IMAGES, 10)
    np.testing.assert_allclose(REFERENCE.probabilities.sum(2), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="different images"):
        changes.Predictions.of((0, 1), [frame(0, 1.0), frame(1, 1.0, IMAGES - 1)])


def test_flips_are_by_majority_as_in_a_loop() -> None:
    table, listed = np.zeros((2, 2), int), {}
    for image in range(IMAGES):
        before, after = (
            [int(one == REFERENCE.labels[image]) for one in runs.predicted[:, image]]
            for runs in (REFERENCE, OTHER)
        )
        was, now = sum(before) >= 2, sum(after) >= 2
        table[int(was), int(now)] += 1
        if was != now:
            listed[3 * image] = now
    assert changes.flip_table(REFERENCE, OTHER).tolist() == table.tolist()
    flips = changes.flips(REFERENCE, OTHER)
    assert dict(zip(flips["index"], flips["gained"], strict=True)) == listed
    assert len(flips) > 50
    for each in (flips, changes.flips(OTHER, REFERENCE)):  # for the better, for the worse
        assert each["change"].abs().is_monotonic_decreasing
    first = flips.iloc[0]
    place = first["index"] // 3
    assert first["before"] == stats.mode(REFERENCE.predicted[:, place]).mode
    label_probabilities = [
        runs.probabilities[:, place, first["label"]].mean() for runs in (REFERENCE, OTHER)
    ]
    assert first["change"] == pytest.approx(label_probabilities[1] - label_probabilities[0])


def test_half_of_the_runs_is_no_majority() -> None:
    probabilities = np.zeros((2, 1, 10), np.float32)
    probabilities[0, 0, 3] = probabilities[1, 0, 4] = 1
    assert not changes.Predictions((0, 1), np.array([0]), np.array([3]), probabilities).right[0]


def test_images_that_no_run_gets_right_are_found_as_in_a_loop() -> None:
    found = changes.never_right([REFERENCE, OTHER])
    runs = [*REFERENCE.predicted, *OTHER.predicted]
    expected = {
        3 * image
        for image in range(IMAGES)
        if all(run[image] != REFERENCE.labels[image] for run in runs)
    }
    assert set(found["index"]) == expected
    assert 5 < len(expected) < IMAGES
    assert found["probability"].is_monotonic_increasing
    guesses = [run[found["index"][0] // 3] for run in runs]
    assert found["agreeing"][0] == max(guesses.count(guess) for guess in guesses) / 6


def test_confusion_is_scikit_learns_mean_over_the_runs() -> None:
    expected = np.mean(
        [metrics.confusion_matrix(REFERENCE.labels, run) for run in REFERENCE.predicted], axis=0
    )
    np.testing.assert_array_equal(changes.confusion(REFERENCE), expected)


def test_per_class_metrics_are_scikit_learns() -> None:
    table = changes.per_class(REFERENCE, OTHER)
    assert len(table) == 10 * 4
    for column, runs in (("reference", REFERENCE), ("other", OTHER)):
        each = [
            metrics.precision_recall_fscore_support(runs.labels, run, zero_division=0)[:3]
            for run in runs.predicted
        ]
        for metric, expected in zip(
            ("precision", "recall", "F1"), np.mean(each, axis=0), strict=True
        ):
            np.testing.assert_allclose(
                table.xs(metric, level="metric")[column], expected, atol=1e-12
            )
        for number in range(10):
            accuracy = np.mean(
                [
                    metrics.accuracy_score(runs.labels == number, run == number)
                    for run in runs.predicted
                ]
            )
            assert table.loc[(number, "accuracy"), column] == pytest.approx(accuracy)
    np.testing.assert_allclose(table["difference"], table["other"] - table["reference"], atol=1e-12)


def test_a_class_that_is_never_predicted_has_precision_zero() -> None:
    probabilities = np.tile(np.eye(10, dtype=np.float32)[0], (3, 20, 1))
    guessing = changes.Predictions((0, 1, 2), np.arange(20), np.arange(20) % 10, probabilities)
    table = changes.per_class(guessing, guessing).xs(4, level="class")
    assert table.loc["precision", "reference"] == table.loc["F1", "reference"] == 0
    assert np.isfinite(table.to_numpy()).all()


def test_interval_of_recall_is_the_one_of_a_verdict_on_its_images() -> None:
    """Recall is linear: its interval is the paired one of the images of the class alone, up to the images' number being drawn too."""
    images = REFERENCE.labels == 6
    right = [(runs.predicted == 6)[:, images].astype(float) for runs in (REFERENCE, OTHER)]
    estimate = changes.compare.paired(*right)
    found = changes.per_class(REFERENCE, OTHER).loc[(6, "recall")]
    assert found["difference"] == pytest.approx(estimate.difference)
    np.testing.assert_allclose(found[["low", "high"]].to_numpy(), estimate.interval, rtol=0.02)


def test_one_run_each_has_an_interval_over_images_which_a_bootstrap_confirms() -> None:
    one, another = group((0,), 1.5), group((1,), 2.5)
    found = changes.per_class(one, another).loc[(3, "F1")]
    draws, generator = [], np.random.default_rng(0)
    for _ in range(2_000):
        chosen = generator.integers(0, IMAGES, IMAGES)
        values = [
            metrics.f1_score(runs.labels[chosen] == 3, runs.predicted[0][chosen] == 3)
            for runs in (one, another)
        ]
        draws.append(values[1] - values[0])
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * np.std(draws), rel=0.08)


def test_unpaired_seeds_give_wider_intervals_than_pairs_of_alike_runs() -> None:
    """Runs of one seed are alike here, so that pairing tells; the centre stays."""
    alike = changes.Predictions(
        REFERENCE.seeds, REFERENCE.index, REFERENCE.labels, REFERENCE.probabilities.copy()
    )
    strangers = changes.Predictions(
        (7, 8, 9), REFERENCE.index, REFERENCE.labels, REFERENCE.probabilities
    )
    pairs, none = changes.per_class(REFERENCE, alike), changes.per_class(REFERENCE, strangers)
    assert (pairs["high"] - pairs["low"]).max() < 1e-12
    assert (none["high"] - none["low"]).min() > 1e-3
    assert none["difference"].abs().max() < 1e-12


def test_calibration_is_that_of_a_loop_and_of_scikit_learn() -> None:
    found = changes.calibration(OTHER)
    for run, ece, nll in zip(OTHER.probabilities, found.ece, found.nll, strict=True):
        assert nll == pytest.approx(
            metrics.log_loss(
                OTHER.labels, run.astype(float) / run.astype(float).sum(1, keepdims=True)
            ),
            rel=1e-5,
        )
        expected, sure = 0.0, run.max(1)
        for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
            inside = (sure > low) & (sure <= high)
            if inside.any():
                expected += inside.mean() * abs(
                    (run.argmax(1) == OTHER.labels)[inside].mean() - sure[inside].mean()
                )
        assert ece == pytest.approx(expected, rel=1e-5)
    assert found.table["images"].sum() == 3 * IMAGES
    low, high = found.table["low"], found.table["high"]
    held = found.table["images"] > 0
    assert ((found.table["confidence"] > low) & (found.table["confidence"] <= high + 1e-6))[
        held
    ].all()
    assert found.table.loc[~held, "accuracy"].isna().all()
