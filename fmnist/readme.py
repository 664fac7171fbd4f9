"""What the README and the experiments' headers say of results, written from the record so that it can't rot."""

import json
import re
import textwrap
from pathlib import Path

import pandas as pd

from fmnist import compare, experiments, sweeps
from fmnist import spec as specs
from fmnist.compare import Group
from fmnist.errors import UserError

MARKERS = "<!-- results -->", "<!-- /results -->"
PLACE = re.compile(f"({MARKERS[0]}).*?({MARKERS[1]})", re.DOTALL)
MEASURED = re.compile(r"^# Measured:.*\n(?:#  +.*\n)*", re.MULTILINE)
HEAD = (
    "| experiment | what differs | validated on | accuracy | loss | command |",
    "|---|---|---|---|---|---|",
)


def update(root: Path, runs: pd.DataFrame, notes: list[str]) -> list[Path]:
    """Rewrite the table of results in README.md, and `# Measured:` in each experiment's file, by the runs of what the files say now.

    Runs of a search are left out: the best of them was picked for its accuracy, which is no measurement of it.
    Returns the files, and adds to `notes` what could not be written. Raises UserError where the README has no place for the table.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if not PLACE.search(text):
        raise UserError(
            f"{readme}: the lines {MARKERS[0]} and {MARKERS[1]} are missing, between which the results go; put them there"
        )
    searches = [name for name in sweeps.names(root) if sweeps.load(name, root).spec.search]
    measured = runs[~runs["t/sweep"].isin(searches)] if "t/sweep" in runs else runs
    by_key, rows, files = {group.key: group for group in compare.groups(measured)}, list(HEAD), {}
    for name in experiments.names(root):
        spec, path = experiments.load(name, root=root).spec, root / "experiments" / f"{name}.yaml"
        if (group := by_key.get(spec.group)) is None:
            continue
        images = (
            f"{spec.data.holdout:,} held-out images"
            if spec.data.holdout
            else "the 10,000 test images"
        )
        accuracy, loss = group.stated(), group.stated("last/val_loss").partition(" (n")[0]
        rows.append(
            f"| `{name}` | {_changed(spec)} | {images} | {accuracy} | {loss} | `make run EXP={name} SEEDS={_seeds(group)}` |"
        )
        told = f"# Measured: accuracy {accuracy}, loss {loss} after the last step on {images}"
        told += (
            f"; on the test images, read once, accuracy {group.stated('test/accuracy')}"
            if spec.data.holdout
            else ""
        )
        told += f" (mean ± standard deviation over the seeds {', '.join(map(str, group.seeds))})."
        lines = (
            textwrap.fill(told, 140, subsequent_indent="#           ", break_on_hyphens=False)
            + "\n"
        )
        header = path.read_text(encoding="utf-8")
        notes += (
            []
            if MEASURED.search(header)
            else [f"{path}: left as it is, as no comment line in it begins with '# Measured:'"]
        )
        files[path] = MEASURED.sub(lines.replace("\\", r"\\"), header, count=1)
    files[readme] = PLACE.sub("\n".join([r"\1", *rows, r"\2"]), text)
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return list(files)


def _seeds(group: Group) -> str:
    """What `make run SEEDS=` takes for these."""
    seeds = group.seeds
    return (
        str(group.n)
        if seeds == tuple(range(group.n))
        else f"{','.join(map(str, seeds))}{',' * (group.n == 1)}"
    )


def _changed(spec: specs.ExperimentSpec) -> str:
    """The defining fields that are off their defaults, in words."""
    defaults = specs.ExperimentSpec(name="any").flat()
    return ", ".join(
        f"{path} {json.dumps(value)}" for path, value in spec.flat().items()
        if path.partition(".")[0] in specs.DEFINING and value != defaults.get(path)
    )  # fmt: skip
