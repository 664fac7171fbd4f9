"""Runs that end well, through the real command into a real store: what is recorded is what was trained."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, command, give_store, make_home, stop_sidecar
from matplotlib import image as images

from fmnist import experiments, state, tracking
from fmnist import report as reports
from fmnist.errors import UserError

SMALL = ("-s", "train.epochs=2", "-s", "train.batch_size=500", "-s", "train.eval_every=50")
STEPS = 240


class Recorded:
    """A home with runs in it, made once for this file, and its store opened."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.first = self._run("baseline", *SMALL)
        self.again = self._run("baseline", *SMALL)
        stopping = (
            "-s",
            "train.early_stopping.patience=1",
            "-s",
            "train.early_stopping.min_delta=0.5",
            "-s",
            "tracking.log_every=7",
        )
        self.stopped = self._run("holdout", *SMALL, *stopping)
        self.collapsed = self._run(
            "lr-0.1",
            "-s",
            "optimizer.lr=1.0",
            *SMALL,
            "-s",
            "train.epochs=3",
            "-s",
            "train.batch_size=300",
        )
        self.store = tracking.connect(home)

    def _run(self, *arguments: str) -> dict:
        result = command(self.home, "run", *arguments, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def artifact(self, run: dict, name: str, into: Path) -> Path:
        return self.store.download(run["run_id"], name, into)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Recorded:
    home = make_home(tmp_path_factory.mktemp("runs"))
    give_store(home, empty_store)
    patch = pytest.MonkeyPatch()
    patch.setenv("FMNIST_HOME", str(home))
    yield Recorded(home)
    stop_sidecar(home)
    shutil.rmtree(home)
    patch.undo()


def test_finished_run_says_so_everywhere(recorded: Recorded) -> None:
    run = recorded.store.client.get_run(recorded.first["run_id"])
    assert (recorded.first["status"], run.info.status) == ("FINISHED", "FINISHED")
    assert recorded.first["steps"] == STEPS
    assert run.info.end_time > run.info.start_time
    assert run.info.run_name == "baseline epochs=2 batch_size=500 eval_every=50"
    assert recorded.first["unsynced"] is None


def test_every_step_is_in_the_store_bit_for_bit(recorded: Recorded, tmp_path: Path) -> None:
    curves = pd.read_parquet(recorded.artifact(recorded.first, "curves.parquet", tmp_path))
    for key in ("train/loss", "train/accuracy"):
        history = recorded.store.client.get_metric_history(recorded.first["run_id"], key)
        assert [point.step for point in history] == list(range(1, STEPS + 1))
        assert np.array_equal(
            [point.value for point in history], curves[key].dropna().to_numpy().astype(float)
        )
    for key in ("val/loss", "val/accuracy", "epoch"):
        history = recorded.store.client.get_metric_history(recorded.first["run_id"], key)
        assert [point.step for point in history] == [0, 50, 100, 150, 200, STEPS]
        if key != "epoch":
            assert [point.value for point in history] == curves[key].dropna().tolist()


def test_show_foretells_the_points(recorded: Recorded) -> None:
    with sqlite3.connect(tracking.database(recorded.home)) as connection:
        for run, arguments in (
            (recorded.first, ("baseline", *SMALL)),
            (
                recorded.collapsed,
                ("lr-0.1", *SMALL, "-s", "train.epochs=3", "-s", "train.batch_size=300"),
            ),
        ):
            stored = connection.execute(
                "SELECT count(*) FROM metrics WHERE run_uuid = ?", (run["run_id"],)
            ).fetchone()[0]
            foretold = json.loads(command(recorded.home, "show", *arguments, "--json").stdout)[
                "plan"
            ]["points_logged"]
            assert stored == foretold


def test_log_every_thins_mlflow_and_not_the_curves(recorded: Recorded, tmp_path: Path) -> None:
    history = recorded.store.client.get_metric_history(recorded.stopped["run_id"], "train/loss")
    curves = pd.read_parquet(
        recorded.artifact(recorded.stopped, "curves.parquet", tmp_path)
    ).set_index("step")
    assert [point.step for point in history] == list(range(7, recorded.stopped["steps"] + 1, 7))
    assert len(curves) == recorded.stopped["steps"] + 1
    assert [point.value for point in history] == [
        float(curves.loc[point.step, "train/loss"]) for point in history
    ]


def test_same_spec_and_seed_give_the_same_bits(recorded: Recorded, tmp_path: Path) -> None:
    frames = [
        pd.read_parquet(recorded.artifact(run, "curves.parquet", tmp_path / run["key"]))
        for run in (recorded.first, recorded.again)
    ]
    columns = [
        "step",
        "epoch",
        "train/loss",
        "train/accuracy",
        "train/lr",
        "val/loss",
        "val/accuracy",
    ]
    pd.testing.assert_frame_equal(frames[0][columns], frames[1][columns], check_exact=True)
    predictions = [
        recorded.artifact(run, "predictions.parquet", tmp_path / run["key"]).read_bytes()
        for run in (recorded.first, recorded.again)
    ]
    assert predictions[0] == predictions[1]


def test_parameters_and_tags_tell_what_was_run(recorded: Recorded) -> None:
    data = recorded.store.client.get_run(recorded.first["run_id"]).data
    spec = experiments.load("baseline", SMALL[1::2], recorded.home).spec
    assert data.params == {
        key: "null" if value is None else str(value)
        for key, value in spec.flat().items()
        if key not in ("name", "question")
    }
    expected = {
        "kind": "run",
        "experiment": "baseline",
        "seed": "0",
        "fingerprint": spec.fingerprint,
        "group": spec.group,
        "weights": "final",
    }
    assert expected.items() <= data.tags.items()
    assert data.tags["run_key"] == recorded.first["key"]
    assert set(data.tags) >= {
        "data_digest",
        "git_commit",
        "git_dirty",
        "device",
        "threads",
        "torch",
        "manifest_sha256",
    }
    assert (
        f"{recorded.first['metrics']['best/val_accuracy']:.4f}" in data.tags["mlflow.note.content"]
    )


def test_datasets_are_linked(recorded: Recorded) -> None:
    def contexts(run: dict) -> dict[str, str]:
        inputs = recorded.store.client.get_run(run["run_id"]).inputs.dataset_inputs
        assert all(len(entry.dataset.digest) == 36 for entry in inputs)
        return {entry.tags[0].value: entry.dataset.name for entry in inputs}

    assert contexts(recorded.first) == {
        "train": "fashion-mnist-train-60000",
        "validation": "fashion-mnist-test",
    }
    assert contexts(recorded.stopped) == {
        "train": "fashion-mnist-train-50000",
        "validation": "fashion-mnist-train-held-out",
        "test": "fashion-mnist-test",
    }


def test_experiment_opens_as_training(recorded: Recorded) -> None:
    tags = recorded.store.client.get_experiment_by_name("fashion-mnist").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.experiment.primaryMetric.name"] == "last/val_accuracy"


def test_artifacts_are_whole(recorded: Recorded, tmp_path: Path) -> None:
    folder = recorded.artifact(recorded.first, "", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {
        "spec.yaml", "environment.json", "checkpoint.pt", "curves.parquet", "predictions.parquet",
        "figures/learning_curves.png", "figures/confusion_matrix.png",
    }  # fmt: skip
    for name, digest in manifest.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    tag = recorded.store.client.get_run(recorded.first["run_id"]).data.tags["manifest_sha256"]
    assert hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() == tag
    spec = experiments.parse((folder / "spec.yaml").read_text(), "spec.yaml")
    assert (
        spec.fingerprint
        == experiments.load("baseline", SMALL[1::2], recorded.home).spec.fingerprint
    )
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["threads"] == 1
    assert {"torch", "mlflow", "pydantic"} <= set(environment["packages"])
    for figure in ("learning_curves", "confusion_matrix"):
        pixels = images.imread(folder / "figures" / f"{figure}.png")
        assert pixels.shape[0] > 400
        assert pixels[..., :3].std() > 0.05  # something is drawn


def test_predictions_give_the_logged_accuracy(recorded: Recorded, tmp_path: Path) -> None:
    for run in (recorded.first, recorded.stopped):
        frame = pd.read_parquet(
            recorded.artifact(run, "predictions.parquet", tmp_path / run["key"])
        )
        right = frame.filter(like="logit_").to_numpy().argmax(1) == frame["label"].to_numpy()
        by_split = {
            split: right[frame["split"] == split].mean() for split in frame["split"].unique()
        }
        assert by_split["val"] == run["metrics"]["last/val_accuracy"]
        assert by_split.get("test") == run["metrics"].get("test/accuracy")
        assert (frame.groupby("split").size() == 10_000).all()


def test_early_stopping_restores_the_best_weights(recorded: Recorded) -> None:
    run = recorded.stopped
    history = {
        point.step: point.value
        for point in recorded.store.client.get_metric_history(run["run_id"], "val/loss")
    }
    assert run["weights"] == "best"
    assert (
        run["stopped_early_at"] == max(history) < 2 * 100
    )  # 50,000 images / 500 = 100 steps an epoch
    assert run["metrics"]["best/step"] < run["stopped_early_at"]
    assert run["metrics"]["last/val_loss"] == pytest.approx(
        history[run["metrics"]["best/step"]], abs=1e-12
    )
    assert recorded.store.client.get_run(run["run_id"]).data.tags["weights"] == "best"


def test_collapse_is_reported_and_the_run_finishes(recorded: Recorded) -> None:
    run = recorded.collapsed
    assert run["status"] == "FINISHED"
    assert run["collapsed_at"] > 200  # an interval wholly behind the first epoch
    tags = recorded.store.client.get_run(run["run_id"]).data.tags
    assert tags["collapsed_at"] == str(run["collapsed_at"])
    assert "COLLAPSED" in tags["mlflow.note.content"]
    assert recorded.first["collapsed_at"] is None


def test_state_folders_go_when_their_runs_are_stored(recorded: Recorded) -> None:
    assert command(recorded.home, "sync").returncode == 0
    assert state.state_folders(recorded.home) == []


def test_store_is_wal_and_has_statistics(recorded: Recorded) -> None:
    with sqlite3.connect(tracking.database(recorded.home)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert (
            connection.execute(
                "SELECT count(*) FROM sqlite_stat1 WHERE tbl = 'metrics'"
            ).fetchone()[0]
            > 0
        )


def test_report_draws_and_tells_the_differences(recorded: Recorded) -> None:
    result = command(recorded.home, "report", "--json")
    assert result.returncode == 0, result.stderr
    written = json.loads(result.stdout)
    first = next(
        row for row in written["runs"] if row["run"].endswith(recorded.first["run_id"][:6])
    )
    assert set(first) == {
        "run", "data.holdout", "optimizer.lr", "train.epochs", "train.batch_size", "train.early_stopping", "train.early_stopping.metric",
        "train.early_stopping.min_delta", "train.early_stopping.patience", "tracking.log_every",
        "last val acc", "best val acc", "at step", "last val loss", "test acc",
    }  # fmt: skip
    assert first["last val acc"] == f"{recorded.first['metrics']['last/val_accuracy']:.4f}"
    assert {Path(file).name for file in written["files"]} == {
        *("learning_curves.png", "confusion_matrix.png", "runs.md", "report.html"),
        *("overlay.png", "overlay_epoch.png", "overlay_examples.png", "overlay_seconds.png"),
        *(
            "confusion_difference.png",
            "reliability.png",
            "reliability_2.png",
        ),  # of two sets of validation images
    }
    assert all(Path(file).stat().st_size > 0 for file in written["files"])
    assert any("validation was the test set" in note for note in written["notes"])
    assert (recorded.home / "reports" / "runs.md").read_text().count("\n") == 2 + 4


def test_report_of_named_runs(recorded: Recorded, tmp_path: Path) -> None:
    assert (
        len(reports.write(recorded.store, tmp_path, [recorded.first["run_id"][:8], "holdout"]).rows)
        == 2
    )
    with pytest.raises(UserError, match="no run fits 'no-such-run'"):
        reports.write(recorded.store, tmp_path, ["no-such-run"])


def test_verify_finds_the_same_bits_and_names_what_differs(recorded: Recorded) -> None:
    result = command(recorded.home, "verify", recorded.stopped["run_id"], "--json")
    found = json.loads(result.stdout)
    assert (result.returncode, found["unequal"], found["weights"]) == (0, [], True)
    assert found["steps"] == recorded.stopped["steps"]
    part = command(recorded.home, "verify", recorded.first["run_id"], "--steps", "60")
    assert part.returncode == 0
    assert "60 steps, 2 evaluations trained again\nequal, bit for bit" in part.stdout
    several = command(recorded.home, "verify", "baseline")
    assert (several.returncode, len(several.stderr.splitlines())) == (2, 1)
    one, other = (
        f"{run['run_id'][:8]} ({run['name']})" for run in (recorded.first, recorded.again)
    )
    assert f"fits 2 runs; give the id of one: {one}, {other}" in several.stderr


@pytest.mark.slow
def test_extend_continues_a_finished_run_as_a_new_one(recorded: Recorded, tmp_path: Path) -> None:
    result = command(recorded.home, "extend", recorded.first["run_id"], "--epochs", "3", "--json")
    longer = json.loads(result.stdout)
    try:
        assert (longer["status"], longer["name"], longer["steps"]) == (
            "FINISHED",
            "baseline batch_size=500 eval_every=50 epochs=3",
            360,
        )
        assert (
            recorded.store.client.get_run(longer["run_id"]).data.tags["extends"]
            == recorded.first["run_id"]
        )
        frames = [
            recorded.store.curves(run["run_id"]).drop(columns="elapsed_s")
            for run in (recorded.first, longer)
        ]
        both = [
            frame[(frame["step"] <= STEPS) & (frame["step"] % 50 != STEPS % 50)] for frame in frames
        ]
        pd.testing.assert_frame_equal(*both, check_exact=True)
        assert pd.isna(
            frames[1].set_index("step")["val/loss"][STEPS]
        )  # three epochs in one go aren't evaluated there
        history = recorded.store.client.get_metric_history(longer["run_id"], "train/loss")
        assert [point.step for point in history] == list(range(1, 361))
        times = [point.timestamp for point in history]
        assert times == sorted(times)
    finally:
        recorded.store.client.delete_run(longer["run_id"])
    refused = command(recorded.home, "extend", recorded.first["run_id"], "--epochs", "2")
    assert refused.returncode == 2
    assert "it has 2 already; give more" in refused.stderr


def test_report_imports_no_torch(recorded: Recorded) -> None:
    code = "import sys; from fmnist.cli import report; report([], False); assert 'torch' not in sys.modules and 'mlflow' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_trainer_imports_no_mlflow(home: Path) -> None:
    code = (
        "import sys; from fmnist import experiments, runner, spec; r = experiments.load('baseline', ['train.epochs=1', 'train.batch_size=5000']);"
        "[o] = runner.run([r], runner.Context(spec.home()));"
        "assert o.status == 'FINISHED' and o.run_id, o; assert not {'mlflow', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", experiments.names(REPOSITORY))
def test_every_experiment_runs(name: str, home: Path) -> None:
    from fmnist import runner

    resolved = experiments.load(name, ["train.epochs=1", "train.batch_size=2000"], home)
    [outcome] = runner.run([resolved], runner.Context(home, sync=False))
    assert (outcome.status, outcome.steps) == ("FINISHED", resolved.spec.steps)
    assert ("test/accuracy" in outcome.metrics) == (resolved.spec.data.holdout is not None)
