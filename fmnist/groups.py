"""Groups of runs in the store: named by experiment, label or id; their predictions; the MLflow run that stands for each."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fmnist import compare, experiments, plots
from fmnist.compare import Group
from fmnist.errors import StoreError, UserError
from fmnist.journal import Point
from fmnist.tracking import Store

LEAST_OF_AN_ID = 4


def find(runs: pd.DataFrame, wanted: Sequence[str], root: Path) -> list[Group]:
    """One group for each text: an experiment (the settings that its file has now), a group's name, or the start of a run's id.

    `runs` is a frame of all of the store's; raises UserError where a text fits none or several.
    """
    everything = compare.groups(runs)
    found = [_find(everything, runs, text, root) for text in wanted]
    if repeated := {group.label for group in found if sum(group.key == other.key for other in found) > 1 and group.n > 1}:
        raise UserError(f"{', '.join(sorted(repeated))}: named twice; the same runs can't be compared with themselves")
    return found


def _find(everything: list[Group], runs: pd.DataFrame, text: str, root: Path) -> Group:
    if text in experiments.names(root):
        key = experiments.load(text, root=root).spec.group
        if of_now := [group for group in everything if group.key == key]:
            return of_now[0]
        older = runs[runs.get("t/experiment", pd.Series(dtype=object)) == text]
        if older.empty:
            raise UserError(f"{text}: no run of it is finished yet; start some with: make run EXP={text} SEEDS=5")
        ids = ", ".join(f"{run.run_id[:8]} ({run.name})" for run in older.rename(columns={"name": "title"}).itertuples())
        raise UserError(
            f"{text}: experiments/{text}.yaml was changed since its runs; name those by id ({ids}), or make run EXP={text} SEEDS=5"
        )
    if named := [group for group in everything if group.label == text or group.key == text]:
        return named[0]
    is_id = len(text) >= LEAST_OF_AN_ID
    rows = runs[runs["run_id"].map(lambda run_id: is_id and run_id.startswith(text)) | (runs["name"] == text)]
    if len(rows) == 1:
        if single := compare.groups(rows):
            return single[0]
        raise UserError(f"{text!r} is run {rows['run_id'].iloc[0]}, which is {rows['status'].iloc[0]}: it has no result to compare")
    known = ", ".join(group.label for group in everything) or "none"
    raise UserError(f"{text!r} fits {len(rows)} runs; give an experiment, the start of a run's id (4 letters or more), or a group: {known}")


def alone(runs: pd.DataFrame, run_id: str) -> Group:
    """One finished run as a group of its own."""
    [group] = compare.groups(runs[runs["run_id"] == run_id])
    return group


def sample(store: Store, group: Group) -> compare.Sample:
    """What a group's finished runs predicted on the validation images; their accuracies alone where not all predictions are stored."""
    try:
        predictions = [store.predictions(run_id) for run_id in group.finished["run_id"]]
    except StoreError:  # a run of another program, or one that lost them
        return compare.Sample.without_images(group)
    return compare.Sample.of(group, group.finished["seed"].tolist(), predictions)


def write(store: Store, key: str) -> None:
    """Write the run of a group, once it has two seeds, in each experiment that holds some of it: means and spreads of its members."""
    runs = store.runs(status=None, group=key)
    for _, there in runs.groupby("experiment_id"):
        for group in compare.groups(there):
            if group.n > 1:
                _write(store, group)


def _write(store: Store, group: Group) -> None:
    members, finished = group.members, group.finished
    curves = {f"s{run.seed}": store.curves(run.run_id) for run in finished.itertuples()}
    ended = int(members["end"].max())
    by_step = compare.mean_curves(list(curves.values()))
    found = [Point(str(key), value, ended, int(step)) for step, row in by_step.iterrows() for key, value in row.dropna().items()]
    for column in finished.filter(regex="^m/(last|best|test)/"):
        values = {"": finished[column].mean(), "_std": finished[column].std()}
        found += [Point(f"{column[2:]}{suffix}", float(value), ended, 0) for suffix, value in values.items() if value == value]
    shared = {column[2:]: members[column].iloc[0] for column in members.filter(regex="^p/") if members[column].nunique() == 1}
    command = re.sub(r" --set train\.seed=\d+", "", str(members["t/command"].iloc[0]))
    command += f" --seeds {','.join(map(str, group.seeds))},"
    question = members["t/question"].dropna() if "t/question" in members else []
    note = [*question[:1], "", *_in_words(group), "", f"Repeat: `{command}`"]
    tags = {"experiment": members["t/experiment"].iloc[0], "n": group.size, "seeds": ", ".join(map(str, group.seeds)), "command": command}
    with tempfile.TemporaryDirectory(prefix="fmnist-") as folder:
        figures = Path(folder) / "figures"
        figures.mkdir()
        plots.groups({group.label: list(curves.values())}).savefig(figures / "group.png")
        tags["mlflow.note.content"] = "\n".join(note)
        store.replace_group(members, f"{group.label} ({group.n} seeds)", tags, shared, found, Path(folder))


def _in_words(group: Group) -> list[str]:
    lines = [
        f"Validation accuracy after the last step {group.stated()}, loss {group.stated('last/val_loss')}, mean ± standard deviation over seeds."
    ]
    lines += [f"Seeds {', '.join(map(str, group.diverged))} diverged: no mean holds them."] if group.diverged else []
    return [*lines, *group.warnings]
