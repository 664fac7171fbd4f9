"""The report, of real runs in a real store: what it says, what it leaves out, and that it says so."""

import hashlib
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command, give_store, make_home, stop_sidecar
from matplotlib import image as images

from fmnist import compare, experiments, plots, readme, tracking
from fmnist import report as reports
from fmnist.errors import StoreError, UserError

TINY = """\
# Question: Is it small?
# Measured: accuracy 0.1 ± 0.1, an older line
#           that goes on here.
extends: holdout
question: Is <b>tiny</b> & small enough?
train: {epochs: 1, batch_size: 1000, eval_every: 10}
"""
STEPS = 50


class Recorded:
    """A home with two groups of three seeds and one run of each kind that needs care, made once for this file."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "experiments" / "tiny.yaml").write_text(TINY)
        (home / "experiments" / "tiny-fast.yaml").write_text(
            "# No measurement.\nextends: tiny\noptimizer: {lr: 0.01}\n"
        )
        self.tiny = self._run("tiny", "--seeds", "3")
        self.fast = self._run("tiny-fast", "--seeds", "3")
        self.often = self._run("tiny", "-s", "train.eval_every=7")
        self.bare = self._run("tiny", "-s", "optimizer.momentum=0.5")
        self.slow = self._run("tiny", "-s", "optimizer.lr=0.0001")
        self.diverged = self._run("tiny", "-s", "optimizer.lr=1000", exit_code=3)
        self.on_test = self._run("tiny", "-s", "data.holdout=null")
        self.store = tracking.connect(home)
        self.foreign, self.running = self._foreign(), self._running()
        artifacts = self.store.client.get_run(self.bare).info.artifact_uri.removeprefix("file://")
        (Path(artifacts) / "predictions.parquet").unlink()
        self.folder = home / "reports"
        self.report = reports.write(self.store, self.folder, [])
        self.page = (self.folder / "report.html").read_text()

    def _run(self, *arguments: str, exit_code: int = 0):
        result = command(self.home, "run", *arguments, "--json")
        assert result.returncode == exit_code, result.stderr
        found = json.loads(result.stdout)
        return [run["run_id"] for run in found["runs"]] if "runs" in found else found["run_id"]

    def _foreign(self) -> str:
        run = self.store.client.create_run(self.store.experiment("elsewhere"), run_name="keras")
        for step in range(1, 6):
            self.store.client.log_metric(
                run.info.run_id, "val_accuracy", 0.5 + 0.01 * step, step=step
            )
            self.store.client.log_metric(run.info.run_id, "loss", 1 / step, step=step)
        self.store.client.set_terminated(run.info.run_id)
        return run.info.run_id

    def _running(self) -> str:
        tags = {"kind": "run", "experiment": "tiny", "seed": "9"}
        return self.store.client.create_run(
            self.store.experiment("fashion-mnist"), tags=tags, run_name="tiny s9"
        ).info.run_id

    def write(self, folder: Path, *wanted: str) -> tuple[reports.Report, str]:
        return reports.write(self.store, folder, list(wanted)), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Recorded:
    home = make_home(tmp_path_factory.mktemp("report"))
    give_store(home, empty_store)
    patch = pytest.MonkeyPatch()
    patch.setenv("FMNIST_HOME", str(home))
    yield Recorded(home)
    stop_sidecar(home)
    shutil.rmtree(home)
    patch.undo()


def text(page: str) -> str:
    """What a reader sees, on one line."""
    pieces: list[str] = []
    parser = HTMLParser()
    parser.handle_data = pieces.append
    parser.feed(re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL))
    return " ".join(" ".join(pieces).split())


def data(page: str) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def predictions_of(recorded: Recorded, runs: list[str]) -> list[pd.DataFrame]:
    return [recorded.store.predictions(run) for run in runs]


# ---- what is said


def test_verdict_is_compares_own_with_its_figures(recorded: Recorded) -> None:
    page, read = recorded.page, text(recorded.page)
    samples = [compare.Sample.of(name, (0, 1, 2), predictions_of(recorded, runs)) for name, runs in
               (("tiny", recorded.tiny), ("tiny-fast", recorded.fast))]  # fmt: skip
    [found] = compare.compare(samples)
    assert f"{found.difference:+.4f}" in read
    assert f"{found.low:+.4f} to {found.high:+.4f}" in read
    assert "tiny-fast is better than tiny" in read
    accuracies = samples[0].accuracy
    assert f"{accuracies.mean():.4f} ± {accuracies.std(ddof=1):.4f} (n = 3)" in read
    assert (
        "Is <b>tiny</b> & small enough?" in read
    )  # as text: what a run is named or asks is never markup
    assert "<b>tiny</b>" not in page


def test_parameters_that_differ_are_shown_and_no_others(recorded: Recorded, tmp_path: Path) -> None:
    _, page = recorded.write(tmp_path, *recorded.tiny, *recorded.fast)
    head = re.search(r'<table class="sortable">.*?<thead>(.*?)</thead>', page, re.DOTALL)[1]
    assert re.findall(r'<th scope="col"[^>]*>([^<]+)', head) == [
        "setting", "optimizer.lr", "accuracy", "loss", "verdict", "difference", "95 % interval", "p&nbsp;(Holm)",
    ]  # fmt: skip


def test_page_is_one_file_without_network(recorded: Recorded) -> None:
    assert len(recorded.page) < 5_000_000
    assert "default-src 'none'" in recorded.page
    sources = re.findall(r'(?:src|href)="([^"]*)"', recorded.page)
    assert all(source.startswith(("#", "data:", "http://127.0.0.1:5000/#/")) for source in sources)
    assert (
        f'href="{tracking.page(recorded.store.experiment("fashion-mnist"), recorded.tiny[0])}"'.replace(
            "&", "&amp;"
        )
        in recorded.page
    )


def test_commands_repeat_the_groups(recorded: Recorded) -> None:
    read = text(recorded.page)
    assert "fmnist run tiny --seeds 0,1,2," in read
    assert "fmnist run tiny --set train.eval_every=7 --seeds 0," in read
    found = recorded.store.client.get_run(recorded.tiny[0]).data.tags
    assert all(found[tag] in read for tag in ("git_commit", "torch", "data_digest"))
    assert found["group"][:16] in read


def test_curves_hold_the_runs_points(recorded: Recorded) -> None:
    drawn = {group["label"]: group for group in data(recorded.page)}
    curves = [recorded.store.curves(run).set_index("step") for run in recorded.fast]
    mean = drawn["tiny-fast"]["val/accuracy"]["mean"]
    assert mean["step"] == [0, 10, 20, 30, 40, STEPS]
    values = np.array([curve["val/accuracy"].dropna() for curve in curves])
    np.testing.assert_allclose(mean["value"], values.mean(0), atol=1e-5)
    half = 4.302653 * values.std(0, ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom
    np.testing.assert_allclose(np.subtract(mean["high"], mean["value"]), half, atol=2e-5)
    assert [len(run["value"]) for run in drawn["tiny-fast"]["train/loss"]["runs"]] == [STEPS] * 3
    assert mean["scale"] == {"epoch": pytest.approx(1 / STEPS), "examples": pytest.approx(1000)}
    assert mean["seconds"][0] == 0 < mean["seconds"][-1]


def test_what_changed_is_told_with_pictures_of_the_images(
    recorded: Recorded, tmp_path: Path
) -> None:
    _, page = recorded.write(tmp_path, *recorded.tiny, *recorded.fast)
    before, after = (
        np.sum(
            [
                frame.filter(like="logit_").to_numpy().argmax(1) == frame["label"]
                for frame in predictions_of(recorded, runs)
            ],
            axis=0,
        )
        > 1
        for runs in (recorded.tiny, recorded.fast)
    )
    validation = recorded.store.predictions(recorded.tiny[0])["split"].eq("val").to_numpy()
    gained = int((~before & after & validation).sum())
    assert f'<td class="n">{gained:,}</td>' in page
    shown = [int(index) for index in re.findall(r'alt="image (\d+)"', page)]
    assert len(shown) > 2 * 10
    assert set(shown) <= set(recorded.store.predictions(recorded.tiny[0]).loc[validation, "index"])
    raw = np.fromfile(recorded.home / "data/FashionMNIST/raw/train-images-idx3-ubyte", np.uint8)[
        16:
    ].reshape(-1, 28, 28)
    uri = re.search(rf'src="([^"]+)"[^>]*alt="image {shown[0]}"', page)[1]
    assert uri == plots.data_uri(raw[shown[0]])
    assert text(page).count("Exploratory.") == 1


def test_looks_are_counted_once_per_number_of_seeds(recorded: Recorded, tmp_path: Path) -> None:
    two, three = [*recorded.tiny[:2], *recorded.fast[:2]], [*recorded.tiny, *recorded.fast]
    assert "Also looked at" not in recorded.write(tmp_path, *two)[1]
    assert "Also looked at" not in recorded.write(tmp_path, *two)[1]  # the same look
    assert "Also looked at with n = 2:" in text(recorded.write(tmp_path, *three)[1])
    assert "Also looked at with n = 2:" in text(recorded.write(tmp_path, *three)[1])
    (tmp_path / "looks.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"looks\.json: not what a report wrote; delete it"):
        recorded.write(tmp_path, *three)


def test_figures_are_drawn_and_the_runs_own_are_copied(recorded: Recorded) -> None:
    names = {str(path.relative_to(recorded.folder)) for path in recorded.report.files}
    assert names > {
        "overlay.png",
        "overlay_epoch.png",
        "overlay_examples.png",
        "overlay_seconds.png",
        "reliability.png",
        "report.html",
        "runs.md",
    }
    assert names >= {
        "confusion_difference.png",
        "runs/tiny_s0/learning_curves.png",
        "runs/tiny_s0/confusion_matrix.png",
    }
    for path in recorded.report.files:
        assert path.suffix != ".png" or images.imread(path)[..., :3].std() > 0.02
    copied = recorded.folder / "runs" / "tiny_s0" / "learning_curves.png"
    assert (
        copied.read_bytes()
        == recorded.store.read(recorded.tiny[0], ["figures/learning_curves.png"])[
            "figures/learning_curves.png"
        ]
    )


def test_only_recorded_figures_are_copied(recorded: Recorded, tmp_path: Path) -> None:
    store, secret = recorded.store, tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    folder = Path(store.client.get_run(recorded.slow).info.artifact_uri.removeprefix("file://"))
    own = folder / "figures" / "learning_curves.png"
    whole = own.read_bytes()
    planted = folder / "figures" / "planted.png"
    planted.symlink_to(secret)
    try:
        report, _ = recorded.write(tmp_path / "planted", recorded.slow)
        assert "planted.png" not in {path.name for path in report.files}
        assert "learning_curves.png" in {path.name for path in report.files}
        with pytest.raises(StoreError, match=r"planted\.png is a symbolic link"):
            store.download(recorded.slow, "figures", tmp_path / "download")
        own.unlink()
        own.symlink_to(secret)
        report, _ = recorded.write(tmp_path / "replaced", recorded.slow)
        assert [note for note in report.notes if "learning_curves.png is not as it was" in note]
    finally:
        planted.unlink()
        own.unlink(missing_ok=True)
        own.write_bytes(whole)
    copied = [path for path in tmp_path.rglob("*") if path.is_file() and path != secret]
    assert not [path for path in copied if path.read_bytes() == b"secret"]


@pytest.mark.parametrize("name", ["curves.parquet", "predictions.parquet"])
def test_a_table_with_other_columns_is_told_in_one_line(
    name: str, recorded: Recorded, tmp_path: Path
) -> None:
    store, run_id = recorded.store, recorded.slow
    folder = Path(store.client.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    kept = {path: path.read_bytes() for path in (folder / name, folder / "manifest.json")}
    tag = store.client.get_run(run_id).data.tags["manifest_sha256"]
    whole = pd.read_parquet(folder / name)
    try:
        for frame in (
            pd.DataFrame({"other": [1]}),
            whole.drop(columns=whole.columns[-1]),
            whole.astype({whole.columns[-1]: str}),
        ):
            frame.to_parquet(folder / name)
            manifest = json.loads(kept[folder / "manifest.json"])
            manifest[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            (folder / "manifest.json").write_text(json.dumps(manifest))
            digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
            store.set_tags(run_id, {"manifest_sha256": digest})
            report, _ = recorded.write(tmp_path / "report", run_id)
            [note] = [note for note in report.notes if f"{name} has no numbers in" in note]
            assert "\n" not in note
            for arguments in (("compare", run_id, recorded.fast[0]), ("extend", run_id)):
                more = ("--epochs", "3") if arguments[0] == "extend" else ()
                result = command(recorded.home, *arguments, *more)
                assert "Traceback" not in result.stderr
                assert result.returncode == 2 or name not in result.stderr
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
        store.set_tags(run_id, {"manifest_sha256": tag})


def test_response_is_drawn_where_one_number_differs(recorded: Recorded, tmp_path: Path) -> None:
    report, page = recorded.write(tmp_path, *recorded.tiny, *recorded.fast)
    assert tmp_path / "response.png" in report.files
    assert "Response to optimizer.lr" in text(page)
    assert "response.png" not in {
        path.name
        for path in recorded.write(tmp_path, *recorded.tiny, recorded.often, recorded.bare)[0].files
    }


def test_response_leaves_out_what_differs_in_more(recorded: Recorded, tmp_path: Path) -> None:
    _, page = recorded.write(tmp_path, *recorded.tiny, *recorded.fast, recorded.slow, recorded.bare)
    [drawn] = re.findall(r'data-response="([^"]*)"', page)
    response = json.loads(html.unescape(drawn))
    assert response["parameter"] == "optimizer.lr"
    assert [point["x"] for point in response["points"]] == [0.0001, 0.001, 0.01]


def test_named_runs_alone_the_first_is_the_reference(recorded: Recorded, tmp_path: Path) -> None:
    report, page = recorded.write(tmp_path, "tiny-fast", *recorded.tiny)
    assert len(report.rows) == 6
    assert "tiny is worse than tiny-fast" in text(page)
    with pytest.raises(UserError, match="no run fits 'no-such-run'"):
        recorded.write(tmp_path, "no-such-run")


# ---- what needs care


EVIL = "evil\x1b[2J\x1b]0;x\x07\x9b31m\r\x08\x7f\u202e[red]é"


def test_no_name_of_a_run_reaches_a_terminal_as_it_is(recorded: Recorded) -> None:
    store, run_id = recorded.store, recorded.slow
    before = store.client.get_run(run_id).info.run_name
    store.client.update_run(run_id, name=EVIL)
    store.client.set_tag(recorded.running, "mlflow.runName", EVIL)
    try:
        for arguments in (
            ("runs",),
            ("runs", "--json"),
            ("report", run_id),
            ("report", run_id, "--json"),
            ("compare", run_id, recorded.fast[0]),
            ("compare", run_id, recorded.fast[0], "--json"),
            ("compare", "nonsense", run_id),
            ("predict", run_id, "no.png"),
            ("promote", run_id, "--because", EVIL),
            ("promote", "evil"),
            ("doctor",),
        ):
            result = command(recorded.home, *arguments)
            said = result.stdout + result.stderr
            obeyed = {letter for letter in said if not letter.isprintable()} - {"\n"}
            assert not obeyed, (
                arguments,
                [ascii(line) for line in said.splitlines() if not line.isprintable()],
            )
            if arguments[0] == "runs":
                assert "evil\\u001b[2J" in said
                assert "\\u009b31m" in said
                assert "[red]é" in said
            if arguments == ("runs", "--json"):
                assert EVIL in {row["name"] for row in json.loads(result.stdout)["runs"]}
    finally:
        store.client.update_run(run_id, name=before)
        store.client.set_tag(recorded.running, "mlflow.runName", "tiny s9")


def test_empty_store_is_told_of(home: Path, with_store: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is finished yet; start one with"):
        reports.write(tracking.connect(home), tmp_path / "reports", [])
    assert not (tmp_path / "reports").exists()


def test_one_run_is_a_report(recorded: Recorded, tmp_path: Path) -> None:
    report, page = recorded.write(tmp_path, recorded.tiny[0])
    assert len(report.rows) == 1
    assert "1 setting compared, 1 run " in text(page)
    assert "there is nothing to compare it with" in text(page)
    assert len(data(page)) == 1


def test_run_without_predictions_is_compared_by_its_accuracy(
    recorded: Recorded, tmp_path: Path
) -> None:
    report, page = recorded.write(tmp_path, *recorded.tiny, recorded.bare)
    assert any(recorded.bare in note and "predictions.parquet" in note for note in report.notes)
    assert "momentum=0.5 has one seed" in text(page)
    assert "momentum=0.5 against" not in text(page)  # nothing can be told of its images


def test_running_run_is_in_the_table_and_not_compared(recorded: Recorded, tmp_path: Path) -> None:
    report, page = recorded.write(tmp_path, *recorded.tiny, recorded.running)
    assert [row[report.columns.index("status")] for row in report.rows].count("RUNNING") == 1
    assert "1 setting compared, 4 runs" in text(page)
    alone, page = recorded.write(tmp_path, recorded.running)
    assert alone.notes == [
        "no run is finished yet: there is nothing to compare and nothing to draw"
    ]
    assert "0 settings compared, 1 run " in text(page)


def test_diverged_run_is_counted_aloud(recorded: Recorded, tmp_path: Path) -> None:
    _, page = recorded.write(tmp_path, *recorded.tiny, recorded.diverged)
    assert "n = 1, of which 1 diverged" in text(page)
    assert "FAILED" in text(page)
    json.loads(json.dumps(data(page), allow_nan=False))  # an infinite loss would not be JSON


def test_differing_evaluation_steps_are_drawn_each_as_it_is(
    recorded: Recorded, tmp_path: Path
) -> None:
    _, page = recorded.write(tmp_path, *recorded.tiny, recorded.often)
    steps = [group["val/loss"]["mean"]["step"] for group in data(page)]
    assert steps == [[0, 10, 20, 30, 40, STEPS], [*range(0, STEPS, 7), STEPS]]


def test_runs_validated_on_other_images_are_a_comparison_of_their_own(
    recorded: Recorded, tmp_path: Path
) -> None:
    _, page = recorded.write(tmp_path, *recorded.tiny, recorded.on_test)
    assert "Validated on 10,000 held-out training images" in text(page)
    assert "Validated on the 10,000 test images" in text(page)
    assert "validation was the test set" in text(page)


def test_run_of_another_program_is_shown_by_its_history(recorded: Recorded, tmp_path: Path) -> None:
    report, page = recorded.write(tmp_path, recorded.foreign)
    assert report.notes == []
    assert "0.5500" in report.rows[0]
    [drawn] = data(page)
    assert drawn["val/accuracy"]["mean"]["value"] == pytest.approx([0.51, 0.52, 0.53, 0.54, 0.55])
    assert drawn["val/accuracy"]["mean"]["scale"] == {}  # no epochs are known
    assert "Validated on images that are not on record" in text(page)


def test_run_of_another_program_is_compared_by_its_last_results(recorded: Recorded) -> None:
    result = command(recorded.home, "compare", recorded.foreign, recorded.tiny[0])
    assert result.returncode == 0, result.stderr
    assert "keras: validation accuracy after the last step 0.5500 (n = 1)" in result.stdout
    assert "one seed each: cannot tell about the settings" in result.stdout
    assert "the runs differ in torch: unknown (1 of keras)" in result.stdout


# ---- thinning, the README


def test_thinned_curves_keep_the_extremes() -> None:
    generator = np.random.default_rng(0)
    curve = pd.DataFrame({"step": np.arange(37_500), "value": generator.normal(0, 1, 37_500)})
    curve.loc[20_011, "value"], curve.loc[31, "value"] = 50.0, -50.0
    frame = pd.DataFrame(
        {
            "step": curve["step"],
            "epoch": 0.0,
            "examples": 0.0,
            "elapsed_s": 0.0,
            "val/loss": curve["value"],
        }
    )
    frame[["val/accuracy", "train/loss", "train/accuracy"]] = np.nan
    drawn = plots.traces([frame])["val/loss"].runs[0]
    assert len(drawn) <= 400
    assert {0, 31, 20_011, 37_499} <= set(drawn["step"])
    for stretch in np.array_split(curve["value"].to_numpy(), 20):
        inside = drawn["value"].isin(stretch)
        assert drawn.loc[inside, "value"].min() == stretch.min()
        assert drawn.loc[inside, "value"].max() == stretch.max()


def test_mean_is_of_steps_that_all_runs_have_and_nothing_infinite_is_drawn() -> None:
    def curves(losses: list[float]) -> pd.DataFrame:
        frame = pd.DataFrame(
            {"step": range(len(losses)), "epoch": 0.0, "elapsed_s": 0.0, "val/loss": losses}
        )
        return frame.assign(
            **{"val/accuracy": np.nan, "train/loss": np.nan, "train/accuracy": np.nan}
        )

    short, long, diverged = (
        curves([3.0, 2.0]),
        curves([5.0, 4.0, 1.0]),
        curves([9.0, np.inf, np.nan]),
    )
    drawn = plots.traces([short, long], [diverged])["val/loss"]
    assert drawn.mean[["step", "value"]].to_numpy().tolist() == [[0, 4], [1, 3]]
    assert drawn.mean["low"].isna().all()  # of two runs
    assert [run["value"].tolist() for run in drawn.singles] == [[3, 2], [5, 4, 1], [9]]
    assert plots.traces([short])["val/loss"].singles == []  # it is the mean


def test_readme_and_experiments_are_brought_up_to_date(recorded: Recorded, tmp_path: Path) -> None:
    readme, tiny = recorded.home / "README.md", recorded.home / "experiments" / "tiny.yaml"
    before, group = tiny.read_text(), experiments.load("tiny", root=recorded.home).spec.group
    readme.write_text("Results\n<!-- results -->\nold\n<!-- /results -->\nthe rest\n")
    try:
        report = reports.write(recorded.store, tmp_path, [recorded.foreign], update_readme=True)
        [group_of_tiny] = [
            each for each in compare.groups(recorded.store.runs(None)) if each.key == group
        ]
        lines = readme.read_text().splitlines()
        assert (lines[0], lines[1], lines[-2], lines[-1]) == (
            "Results",
            "<!-- results -->",
            "<!-- /results -->",
            "the rest",
        )
        [row] = [line for line in lines if line.startswith("| `tiny` |")]
        assert f"| {group_of_tiny.stated()} |" in row
        assert "train.batch_size 1000" in row
        assert not any(
            line == "old" or "`baseline`" in line for line in lines
        )  # experiments without runs have no results
        header = tiny.read_text()
        assert f"# Measured: accuracy {group_of_tiny.stated()}" in header
        assert "older line" not in header and "goes on here" not in header  # noqa: PT018
        assert header.endswith(TINY[TINY.index("extends") :])
        assert experiments.load("tiny", root=recorded.home).spec.group == group
        assert any("tiny-fast.yaml: left as it is" in note for note in report.notes)
        again = {path: path.read_text() for path in (readme, tiny)}
        reports.write(recorded.store, tmp_path, [recorded.foreign], update_readme=True)
        assert again == {path: path.read_text() for path in (readme, tiny)}
    finally:
        tiny.write_text(before)


def test_what_a_search_picked_by_its_accuracy_is_no_measurement_of_it(
    recorded: Recorded, tmp_path: Path
) -> None:
    (tmp_path / "experiments" / "sweeps").mkdir(parents=True)
    for name in (
        "experiments/tiny.yaml",
        "experiments/holdout.yaml",
        "experiments/baseline.yaml",
        "experiments/sweeps/search-recipe.yaml",
    ):
        (tmp_path / name).write_text((recorded.home / name).read_text())
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- /results -->")
    runs = recorded.store.runs(None)
    for sweep, n in (("search-recipe", 2), ("sweep-lr", 3)):
        readme.update(
            tmp_path,
            runs.assign(**{"t/sweep": np.where(runs["run_id"] == recorded.tiny[1], sweep, None)}),
            [],
        )
        [row] = [
            line
            for line in (tmp_path / "README.md").read_text().splitlines()
            if line.startswith("| `tiny` |")
        ]
        assert f"(n = {n})" in row


def test_readme_without_a_place_for_results_is_left_alone(
    recorded: Recorded, tmp_path: Path
) -> None:
    readme = recorded.home / "README.md"
    readme.write_text("nothing\n")
    result = command(recorded.home, "report", "--update-readme")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "the lines <!-- results --> and <!-- /results --> are missing" in result.stderr
    assert readme.read_text() == "nothing\n"
