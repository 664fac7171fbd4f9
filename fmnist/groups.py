"""Groups of runs in the store: named by experiment, label or id; their predictions; the MLflow run that stands for each."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fmnist import compare, experiments, files
from fmnist.compare import Group
from fmnist.errors import StoreError, UserError
from fmnist.journal import Point
from fmnist.tracking import Derived, Store

LEAST_OF_AN_ID = 4


def find(runs: pd.DataFrame, wanted: Sequence[str], root: Path) -> list[Group]:
    """One group for each text: an experiment (the settings that its file has now), a group's name, or the start of a run's id.

    `runs` is a frame of all of the store's; raises UserError where a text fits none or several.
    """
    everything = compare.groups(runs)
    found = [_find(everything, runs, text, root) for text in wanted]
    ids = Counter(run_id for group in found for run_id in group.members["run_id"])
    if twice := [group.label for group in found if ids[group.members["run_id"].iloc[0]] > 1]:
        raise UserError(
            f"{', '.join(dict.fromkeys(twice))}: named twice; the same runs can't be compared with themselves"
        )
    shared = Counter(group.label for group in found)
    return [
        replace(group, label=f"{group.label} ({group.members['run_id'].iloc[0][:6]})")
        if shared[group.label] > 1
        else group
        for group in found
    ]


def _find(everything: list[Group], runs: pd.DataFrame, text: str, root: Path) -> Group:
    if text in experiments.names(root):
        key = experiments.load(text, root=root).spec.group
        if of_now := [group for group in everything if group.key == key]:
            return of_now[0]
        older = runs[runs["t/experiment"] == text] if "t/experiment" in runs else runs[:0]
        if older.empty:
            raise UserError(
                f"{text}: no run of it is finished yet; start some with: make run EXP={text} SEEDS=5"
            )
        ids = ", ".join(
            f"{run_id[:8]} ({name})"
            for run_id, name in zip(older["run_id"], older["name"], strict=True)
        )
        raise UserError(
            f"{text}: no run of what experiments/{text}.yaml says now is finished; of other settings there are {ids}: name those by id,"
            f" or make run EXP={text} SEEDS=5"
        )
    if named := [group for group in everything if group.label == text or group.key == text]:
        return named[0]
    is_id = len(text) >= LEAST_OF_AN_ID
    rows = runs[
        runs["run_id"].map(lambda run_id: is_id and run_id.startswith(text))
        | (runs["name"] == text)
    ]
    if len(rows) == 1:
        if compare.groups(rows):
            return alone(runs, rows["run_id"].iloc[0])
        raise UserError(
            f"{text!r} is run {rows['run_id'].iloc[0]}, which is {rows['status'].iloc[0]}: it has no result to compare"
        )
    known = ", ".join(group.label for group in everything) or "none"
    raise UserError(
        f"{text!r} fits {len(rows)} runs; give an experiment, the start of a run's id (4 letters or more), or a group: {known}"
    )


def alone(runs: pd.DataFrame, run_id: str) -> Group:
    """One finished or diverged run as a group of its own, by its name."""
    row = runs[runs["run_id"] == run_id]
    [group] = compare.groups(row)
    return replace(group, label=str(row["name"].iloc[0]))


def sample(store: Store, group: Group) -> compare.Sample:
    """What a group's finished runs predicted on the validation images; their accuracies alone where not all predictions are stored."""
    try:
        predictions = [store.predictions(run_id) for run_id in group.finished["run_id"]]
    except StoreError:  # a run of another program, or one that lost them
        return compare.Sample.without_images(group)
    return compare.Sample.of(group, group.finished["seed"].tolist(), predictions)


def write(store: Store, key: str | None = None) -> None:
    """Write the run of a group, or of each, once it has two seeds, in each experiment that holds some of it: its members' means and spreads."""
    runs = store.runs(status=None, group=key)
    with_run = set()
    for _, there in runs.groupby("experiment_id"):
        for group in compare.groups(there):
            with_run |= {group.key} if group.n > 1 else set()
            made_from = hashlib.sha256(" ".join(group.members["run_id"]).encode()).hexdigest()
            before = (
                store.derived(group.members["experiment_id"].iloc[0], "group", group.key)
                if group.n > 1
                else {}
            )
            if group.n > 1 and [*before.values()] != [made_from]:
                _write(store, group, made_from)
    for run in store.half_written():
        tags = run.data.tags
        if (
            tags["kind"] == "group"
            and key in (None, tags["group"])
            and tags["group"] not in with_run
        ):
            store.client.delete_run(run.info.run_id)  # begun, and now no two seeds are there


def _write(store: Store, group: Group, made_from: str) -> None:
    from fmnist import plots  # matplotlib is slow to import, and only this needs it

    members = group.members
    curves = [store.curves(run_id) for run_id in group.finished["run_id"]]
    parameters = members.filter(regex="^p/").rename(columns=lambda column: column[2:])
    shared = {
        str(path): values.iloc[0] for path, values in parameters.items() if values.nunique() == 1
    }
    told = {
        name: list(members.get(f"t/{name}", pd.Series(dtype=object)).dropna())
        for name in ("experiment", "question", "command")
    }
    command = [
        f"{re.sub(' --set train.seed=[0-9]+', '', text)} --seeds {','.join(map(str, group.seeds))},"
        for text in told["command"][:1]
    ]
    note = [
        *told["question"][:1],
        "",
        *_in_words(group),
        "",
        *(f"Repeat: `{text}`" for text in command),
    ]
    tags = {
        "experiment": told["experiment"][0],
        "command": "".join(command),
        "n": group.size,
        "seeds": ", ".join(map(str, group.seeds)),
    }
    tags["outcome"] = "diverged" if group.finished.empty else "finished"
    with files.scratch() as folder:
        figures = folder / "figures"
        figures.mkdir()
        plots.groups({group.label: curves}).savefig(figures / "group.png")
        tags["mlflow.note.content"] = "\n".join(note)
        points = _points(group, compare.mean_curves(curves))
        new = Derived(
            members["experiment_id"].iloc[0], "group", group.key, f"{group.label} ({group.n} seeds)", tags, shared, points, list(members["run_id"]),
            int(members["start"].min()), int(members["end"].max()), "FAILED" if group.finished.empty else "FINISHED", made_from,
        )  # fmt: skip
        store.replace(new, folder)


def _points(group: Group, by_step: pd.DataFrame) -> Iterator[Point]:
    """Means and standard deviations at each evaluation, and of the results at the end."""
    ended = int(group.members["end"].max())
    for key, column in by_step.items():
        yield from (
            Point(str(key), float(value), ended, step)
            for step, value in zip(column.index, column, strict=True)
            if value == value
        )
    results = group.finished.filter(regex="^m/(last/|test/|best/val)").rename(
        columns=lambda column: column[2:]
    )
    for values in (results.mean(), results.std().add_suffix("_std")):
        yield from (
            Point(str(key), float(value), ended, 0) for key, value in values.dropna().items()
        )


def _in_words(group: Group) -> list[str]:
    accuracy, loss = group.stated(), group.stated("last/val_loss")
    lines = [
        f"Validation accuracy after the last step {accuracy}, loss {loss}, mean ± standard deviation over seeds."
    ]
    lines += (
        [f"Seeds {', '.join(map(str, group.diverged))} diverged: no mean holds them."]
        if group.diverged
        else []
    )
    return [*lines, *group.warnings]
