"""Groups of seeds in a real store: how they are written, grown, named, compared and promoted."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import FAST_LABEL, HELD_OUT, QUICK, SLOW_LABEL, command, stop_sidecar, sync, train
from ruamel.yaml import YAML

from fmnist import api, doctor, groups, models, serving, tracking
from fmnist.errors import UserError
from fmnist.promotion import promote, roll_back


@pytest.fixture
def place(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, which a test may change."""
    home = tmp_path / "home"
    shutil.copytree(recorded, home, symlinks=True)
    monkeypatch.setenv("FMNIST_HOME", str(home))
    yield home
    stop_sidecar(home)


def group_runs(store: tracking.Store) -> list:  # type: ignore[type-arg]
    ids = [experiment.experiment_id for experiment in store.client.search_experiments()]
    return list(
        store.client.search_runs(ids, "tags.kind = 'group'", order_by=["attributes.start_time"])
    )


def members(store: tracking.Store, label: str) -> pd.DataFrame:
    runs = store.runs()
    return runs[runs["name"].str.fullmatch(f"{label} s[0-9]+")]


# ---- the run of a group


def test_a_group_is_a_run_that_holds_its_members_means(place: Path) -> None:
    store = tracking.connect(place)
    slow, fast, diverged = group_runs(store)
    assert (slow.info.run_name, fast.info.run_name) == (
        f"{SLOW_LABEL} (3 seeds)",
        f"{FAST_LABEL} (3 seeds)",
    )
    its = members(store, SLOW_LABEL)
    assert its["t/seed"].tolist() == ["0", "1", "2"]
    assert set(its["t/mlflow.parentRunId"]) == {slow.info.run_id}
    curves = pd.concat([store.curves(run_id) for run_id in its["run_id"]])
    for metric in ("val/accuracy", "val/loss"):
        by_step = curves.dropna(subset=[metric]).groupby("step")[metric]
        for key, expected in ((metric, by_step.mean()), (f"{metric}_std", by_step.std())):
            stored = {
                point.step: point.value
                for point in store.client.get_metric_history(slow.info.run_id, key)
            }
            assert list(stored) == [0, 10, 20, 25]
            np.testing.assert_allclose(list(stored.values()), expected.to_numpy(), rtol=1e-12)
        last, name = its[f"m/last/{metric.replace('/', '_')}"], f"last/{metric.replace('/', '_')}"
        assert slow.data.metrics[name] == pytest.approx(last.mean(), rel=1e-12)
        assert slow.data.metrics[f"{name}_std"] == pytest.approx(last.std(), rel=1e-12)
    assert [point.value for point in store.client.get_metric_history(slow.info.run_id, "n")] == [
        3,
        3,
        3,
        3,
    ]
    assert (slow.info.status, slow.data.tags["n"], slow.data.tags["seeds"]) == (
        "FINISHED",
        "3",
        "0, 1, 2",
    )
    assert (slow.data.params["optimizer.lr"], fast.data.params["optimizer.lr"]) == ("0.001", "0.05")
    assert "train.seed" not in slow.data.params
    note = slow.data.tags["mlflow.note.content"]
    assert (
        f"{its['m/last/val_accuracy'].mean():.4f} ± {its['m/last/val_accuracy'].std():.4f} (n = 3)"
        in note
    )
    assert "--seeds 0,1,2,`" in note
    assert [
        artifact.path for artifact in store.client.list_artifacts(slow.info.run_id, "figures")
    ] == ["figures/group.png"]
    assert diverged.data.tags["n"] == "2, of which 2 diverged"
    assert "val/accuracy" not in diverged.data.metrics


def test_groups_stay_out_of_the_runs(place: Path) -> None:
    runs = tracking.connect(place).runs(status=None)
    assert len(runs) == 9
    assert runs["t/outcome"].value_counts().to_dict() == {"finished": 7, "diverged": 2}


def test_a_group_that_grows_is_written_anew_and_nothing_is_left_of_the_one_before(
    place: Path,
) -> None:
    store = tracking.connect(place)
    before = group_runs(store)
    train(place, *HELD_OUT, "--seeds", "3,")
    sync(place)
    after = group_runs(store)
    assert [run.info.run_name for run in after] == [
        f"{SLOW_LABEL} (4 seeds)",
        *(run.info.run_name for run in before[1:]),
    ]
    assert [run.info.run_id for run in after[1:]] == [run.info.run_id for run in before[1:]]
    assert set(members(store, SLOW_LABEL)["t/mlflow.parentRunId"]) == {after[0].info.run_id}
    assert store.standing(before[0].info.run_id).stage == "deleted"


def test_a_group_that_did_not_change_is_left_alone(place: Path) -> None:
    store = tracking.connect(place)
    before = [run.info.run_id for run in group_runs(store)]
    for key in set(store.runs(status=None)["t/group"]):
        groups.write(store, key)
    assert [run.info.run_id for run in group_runs(store)] == before


def test_a_group_run_that_was_cut_short_is_made_again(place: Path) -> None:
    store = tracking.connect(place)
    slow = group_runs(store)[0]
    store.client.delete_tag(slow.info.run_id, "made_from")  # it is set last
    sync(place)  # with nothing to carry it still sees to the groups
    [made] = [run for run in group_runs(store) if run.data.tags["group"] == slow.data.tags["group"]]
    assert made.info.run_id != slow.info.run_id
    assert made.data.metrics == slow.data.metrics


# ---- seeds that are there already


@pytest.mark.slow
def test_only_missing_seeds_are_trained(place: Path) -> None:
    result = command(place, "run", "baseline", *HELD_OUT, "--seeds", "4", "--json")
    assert result.returncode == 0, result.stderr
    assert [run["name"] for run in json.loads(result.stdout)["runs"]] == [f"{SLOW_LABEL} s3"]
    for seed in range(3):
        assert f"s{seed}: finished already, as run " in result.stderr
    stop_sidecar(place)
    again = command(place, "run", "baseline", *HELD_OUT, "--seeds", "4")
    assert (again.returncode, again.stdout) == (
        0,
        "every one of these seeds is there already; `fmnist compare` and `make report` show them\n",
    )


def test_a_diverged_seed_is_there_and_fresh_trains_all(place: Path) -> None:
    diverging = (*QUICK, "-s", "optimizer.lr=500", "-s", "optimizer.weight_decay=10", "--no-sync")
    assert (
        "s1: diverged already"
        in command(place, "run", "baseline", *diverging, "--seeds", "2").stderr
    )
    assert (
        command(place, "run", "baseline", *diverging, "--seeds", "2", "--fresh").stderr.count(
            "the first that isn't finite"
        )
        == 2
    )


@pytest.mark.slow
def test_a_seed_that_waits_on_disk_is_there(place: Path) -> None:
    train(place, *HELD_OUT, "--seeds", "7,")
    assert (
        "s7: on its way into MLflow from baseline-s7-"
        in train(place, *HELD_OUT, "--seeds", "7,").stderr
    )


# ---- naming groups


def found(place: Path, *texts: str) -> list[str]:
    return [
        group.label
        for group in groups.find(
            tracking.connect(place).runs(status=None, foreign=True), texts, place
        )
    ]


def write_experiment(place: Path, name: str, text: str = "") -> None:
    settings = "train: {epochs: 1, batch_size: 2000, eval_every: 10}\ndata: {holdout: 10000}\n"
    (place / "experiments" / f"{name}.yaml").write_text(f"extends: baseline\n{settings}{text}")


def test_a_group_is_named_by_experiment_label_or_run(place: Path) -> None:
    write_experiment(place, "quick")
    first, second, _ = members(tracking.connect(place), FAST_LABEL)["run_id"]
    assert found(place, "quick", FAST_LABEL) == [SLOW_LABEL, FAST_LABEL]
    assert found(place, first[:8], second, "quick") == [
        f"{FAST_LABEL} s0",
        f"{FAST_LABEL} s1",
        SLOW_LABEL,
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["holdout"], "holdout: no run of it is finished yet; start some with: make run EXP=holdout SEEDS=5"),
        (["nonsense"], "'nonsense' fits 0 runs; give an experiment, the start of a run's id (4 letters or more), or a group: baseline"),
        (["baseline"], "baseline: no run of what experiments/baseline.yaml says now is finished; of other settings there are "),
        ([SLOW_LABEL, SLOW_LABEL], "named twice"),
        ([SLOW_LABEL, f"{SLOW_LABEL} s0"], "named twice"),
        ([SLOW_LABEL], "a comparison needs two settings or more, given 1"),
        ([SLOW_LABEL, "baseline epochs=1 batch_size=2000 eval_every=10"], "were validated on different images"),
    ],
)  # fmt: skip
def test_what_can_not_be_compared_is_told_in_a_line(
    texts: list[str], message: str, place: Path
) -> None:
    with pytest.raises(UserError) as error:
        api.compare(*texts)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_predictions_accuracies_are_compared(place: Path) -> None:
    store = tracking.connect(place)
    run_id = members(store, FAST_LABEL)["run_id"].iloc[0]
    for path in (place / "mlruns" / "artifacts").rglob(f"{run_id}/artifacts/predictions.parquet"):
        path.unlink()
    [comparison] = api.compare(SLOW_LABEL, FAST_LABEL).comparisons
    assert (comparison.verdict, comparison.se_images) == ("better", None)
    assert "images are not in it" in comparison.notes[0]


# ---- the command


def test_the_command_compares(place: Path) -> None:
    result = command(place, "compare", SLOW_LABEL, FAST_LABEL)
    assert result.returncode == 0, result.stderr
    store = tracking.connect(place)
    slow, fast = (
        members(store, label)["m/last/val_accuracy"] for label in (SLOW_LABEL, FAST_LABEL)
    )
    assert (
        f"{SLOW_LABEL}: validation accuracy after the last step {slow.mean():.4f} ± {slow.std():.4f} (n = 3)\n"
        in result.stdout
    )
    assert (
        f"{FAST_LABEL} is better than {SLOW_LABEL}: validation accuracy {fast.mean() - slow.mean():+.4f}, 95 % interval"
        in result.stdout
    )
    assert "optimizer.lr" in result.stdout
    value = json.loads(command(place, "compare", SLOW_LABEL, FAST_LABEL, "--json").stdout)
    [comparison] = value["comparisons"]
    assert (comparison["verdict"], comparison["design"], comparison["n"]) == (
        "better",
        "paired",
        [3, 3],
    )
    assert comparison["difference"] == pytest.approx(fast.mean() - slow.mean(), abs=1e-12)
    assert value["differing"] == {
        SLOW_LABEL: {"optimizer.lr": "0.001"},
        FAST_LABEL: {"optimizer.lr": "0.05"},
    }


def test_the_command_lists_runs(place: Path) -> None:
    result = command(place, "runs")
    assert len(result.stdout.splitlines()) == 9
    assert "diverged" in result.stdout
    rows = json.loads(command(place, "runs", "--json").stdout)["runs"]
    assert {row["outcome"] for row in rows} == {"finished", "diverged"}


# ---- the champion


def champion(store: tracking.Store) -> str | None:
    version = store.champion()
    return version and version.run_id


def test_only_a_better_model_becomes_champion(place: Path) -> None:
    store = tracking.connect(place)
    slow, fast = (members(store, label)["run_id"].iloc[0] for label in (SLOW_LABEL, FAST_LABEL))
    assert promote(store, slow).lines[0] == "the first champion"
    assert champion(store) == slow
    better = promote(store, fast)
    assert (better.version, better.champion, champion(store)) == (2, fast, fast)
    assert "these two trained models differ on these images" in better.lines[0]
    tags = store.champion().tags
    assert (tags["replaced"], tags["verdict"]) == ("1", better.lines[0])
    assert tags["fingerprint"] == members(store, FAST_LABEL)["t/fingerprint"].iloc[0]
    worse = promote(store, slow)
    assert (worse.champion, champion(store)) == (None, fast)
    assert worse.lines[1] == 'version 2 stays champion; --because "..." promotes it all the same'
    forced = promote(store, slow, "a drill")
    assert (forced.champion, forced.version, store.champion().tags["because"]) == (
        slow,
        3,
        "a drill",
    )
    assert roll_back(store).lines == ["version 2 is champion again, in place of version 3"]
    assert champion(store) == fast


def test_the_champion_is_the_runs_model(place: Path) -> None:
    store = tracking.connect(place)
    mlflow.set_tracking_uri(tracking.uri(place))
    run_id = members(store, FAST_LABEL)["run_id"].iloc[0]
    promote(store, run_id)
    [output] = store.client.get_run(run_id).outputs.model_outputs
    assert json.loads(
        store.client.get_logged_model(output.model_id).tags["mlflow.modelVersions"]
    ) == [{"name": "fmnist", "version": 1}]
    images = np.zeros((3, 28, 28), np.uint8)
    expected = mlflow.pyfunc.load_model(f"models:/{output.model_id}").predict(images)
    np.testing.assert_array_equal(
        mlflow.pyfunc.load_model(tracking.champion_uri()).predict(images), expected
    )


def model_folder(store: tracking.Store, run_id: str) -> Path:
    [output] = store.client.get_run(run_id).outputs.model_outputs
    location = store.client.get_logged_model(output.model_id).artifact_location
    return Path(location.removeprefix("file://"))


def artifacts_folder(store: tracking.Store, run_id: str) -> Path:
    return Path(store.client.get_run(run_id).info.artifact_uri.removeprefix("file://"))


PLANTED = {
    "a loader of its own": {"loader_module": "planted", "code": "code"},
    "code": {"code": "code"},
    "a model path": {"model_code_path": "planted.py"},
    "a pickled model": {"python_model": "python_model.pkl"},
}


def plant(folder: Path, change: dict[str, str], bait: Path) -> str:
    """Have a model's description name code that makes a folder; the checksums that fit the description."""
    described = YAML(typ="safe").load(folder / "MLmodel")
    described["flavors"]["python_function"] |= change
    YAML(typ="safe").dump(described, folder / "MLmodel")
    noted = models.digests(folder)
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "planted.py").write_text(f"import os; os.mkdir({str(bait)!r})")
    return noted


def uses(store: tracking.Store, run_id: str) -> list[Callable[[], object]]:
    """All that load the model of version 1: as a run's and as the champion's, to be promoted and to come back."""

    def champions() -> None:
        store.make_champion("1")
        try:
            serving.model(store, "champion")
        finally:
            store.make_champion("2")

    return [
        lambda: serving.model(store, run_id),
        champions,
        lambda: promote(store, run_id, "a drill"),
        lambda: roll_back(store),
    ]


@pytest.fixture
def replaced(place: Path) -> tuple[tracking.Store, str]:
    """A store, and a run whose model was champion before another one's."""
    store = tracking.connect(place)
    slow, fast = (members(store, label)["run_id"].iloc[0] for label in (SLOW_LABEL, FAST_LABEL))
    promote(store, slow)
    promote(store, fast, "a drill")
    return store, slow


def test_no_description_of_a_model_runs_code(
    replaced: tuple[tracking.Store, str], tmp_path: Path
) -> None:
    store, run_id = replaced
    folder, bait = model_folder(store, run_id), tmp_path / "sprung"
    whole = (folder / "MLmodel").read_bytes()
    for what, change in PLANTED.items():
        noted = plant(folder, change, bait)
        store.set_tags(run_id, {models.TAG: noted})  # as who may write the record could
        for use in uses(store, run_id):
            with pytest.raises(UserError, match="would run code of the model's own") as error:
                use()
            assert "\n" not in str(error.value), what
        (folder / "MLmodel").write_bytes(whole)
        shutil.rmtree(folder / "code")
    assert not bait.exists()


def test_no_damaged_model_is_used(replaced: tuple[tracking.Store, str]) -> None:
    store, run_id = replaced
    folder = model_folder(store, run_id)
    _, program = serving.model(store, run_id)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    expected = program(images)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {str(path.relative_to(folder)) for path in files} == models.FILES
    for path in files:
        whole = path.read_bytes()
        places = [*range(0, len(whole), max(1, len(whole) // 10))]
        for at in places if path.name == "model.pt2" else places[:2]:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            for use in uses(store, run_id):
                with pytest.raises(UserError, match="is not as it was recorded") as error:
                    use()
                assert f"run {run_id}: its model: " in str(error.value)
        path.unlink()
        with pytest.raises(UserError, match="its model can't be read"):
            serving.model(store, run_id)
        path.write_bytes(whole)
    np.testing.assert_array_equal(serving.model(store, run_id)[1](images), expected)


def test_the_doctor_looks_into_every_file(place: Path) -> None:
    def told() -> list[doctor.Finding]:
        found = list(doctor.findings(place, deep=True))
        return [each for each in found if each.what.startswith(("store: run", "store: artifacts"))]

    assert [each.what for each in told()] == [
        "store: artifacts and model of 9 runs, SHA-256 as recorded"
    ]
    store = tracking.connect(place)
    one, two, three = members(store, SLOW_LABEL)["run_id"]
    for path in (
        model_folder(store, one) / "data" / "model.pt2",
        artifacts_folder(store, two) / "figures" / "learning_curves.png",
    ):
        path.write_bytes(path.read_bytes()[:-1])
    (artifacts_folder(store, three) / "spec.yaml").unlink()
    *wrong, right = told()
    assert sorted(each.what for each in wrong) == sorted(
        [
            f"store: run {one}: its model: data/model.pt2 is not as it was recorded",
            f"store: run {two}: figures/learning_curves.png is not as it was recorded, and not usable",
            next(each.what for each in wrong if "spec.yaml can't be read" in each.what),
        ]
    )
    assert all(each.remedy for each in wrong)
    assert right.what == "store: artifacts and model of 6 runs, SHA-256 as recorded"
    assert command(place, "doctor", "--deep").returncode == 1


def test_a_model_of_another_run_is_not_taken_for_its_own(
    replaced: tuple[tracking.Store, str],
) -> None:
    store, run_id = replaced
    other = members(store, FAST_LABEL)["run_id"].iloc[0]
    copied = (model_folder(store, other) / "data" / "model.pt2").read_bytes()
    (model_folder(store, run_id) / "data" / "model.pt2").write_bytes(copied)
    with pytest.raises(UserError, match=r"model\.pt2 is not as it was recorded"):
        serving.model(store, run_id)
    location = store.client.get_logged_model(
        store.client.get_run(other).outputs.model_outputs[0].model_id
    ).artifact_location
    made = store.client.create_model_version("fmnist", location, run_id)
    store.make_champion(made.version)
    with pytest.raises(UserError, match="holds other files than its run"):
        serving.model(store, "champion")
    store.client.delete_tag(other, models.TAG)
    with pytest.raises(UserError, match="has no checksums, so it is not used"):
        serving.model(store, other)


def test_what_can_not_be_promoted_is_told_in_a_line(place: Path) -> None:
    store = tracking.connect(place)
    [on_test] = store.runs()[store.runs()["p/data.holdout"] == "null"]["run_id"]
    held_out = members(store, SLOW_LABEL)["run_id"].iloc[0]

    def refused(act: Callable[[], object]) -> str:
        with pytest.raises(UserError) as error:
            act()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "was validated on the test images, by which no model may be chosen" in refused(
        lambda: promote(store, on_test)
    )
    assert refused(lambda: roll_back(store)) == "there is no champion; fmnist promote RUN makes one"
    assert refused(lambda: promote(store, "zzzz")) == "'zzzz' fits 0 runs; `fmnist runs` lists them"
    assert "fits 7 runs; give the id of one: " in refused(lambda: promote(store, ""))
    promote(store, held_out)
    assert "is the champion already, as version 1" in refused(lambda: promote(store, held_out))
    assert "is the first champion, there is none before it" in refused(lambda: roll_back(store))
    assert (
        "were validated on different images" in promote(store, on_test, "a drill").lines[0]
    )  # a reason promotes it all the same
    assert champion(store) == on_test
    roll_back(store)
    store.client.delete_run(held_out)
    other = members(store, FAST_LABEL)["run_id"].iloc[0]
    assert "no longer in the store, so nothing can be compared" in promote(store, other).lines[0]


@pytest.mark.slow
def test_the_command_promotes(place: Path) -> None:
    slow, fast = (
        members(tracking.connect(place), label)["run_id"].iloc[0]
        for label in (SLOW_LABEL, FAST_LABEL)
    )
    assert json.loads(command(place, "promote", fast, "--json").stdout)["champion"] == fast
    assert command(place, "promote", slow).returncode == 1
    result = command(place, "promote")
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        "fmnist: give a run to promote, or --rollback to undo the last promotion\n",
    )
