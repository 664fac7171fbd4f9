"""What the README tells people to do works as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from fmnist import experiments

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_example_experiment_loads(home: Path) -> None:
    (home / "experiments" / "mine.yaml").write_text(block("yaml"))
    spec = experiments.load("mine", root=home).spec
    assert (spec.optimizer.lr, spec.schedule.type, spec.train.epochs) == (0.01, "cosine", 20)


def apply(diff: str, root: Path) -> None:
    """Apply a diff whose hunks have no line numbers: each hunk's kept and removed lines must stand together, once."""
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        for hunk in body.split("@@\n")[1:]:
            lines = hunk.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] in (" ", "-")) + "\n"
            new = "\n".join(line[1:] for line in lines if line[:1] != "-") + "\n"
            text = (root / name).read_text()
            assert text.count(old) == 1, old
            (root / name).write_text(text.replace(old, new))


def test_ten_lines_add_a_model_that_trains_and_is_recorded(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(
        REPOSITORY / "fmnist", copy / "fmnist", ignore=shutil.ignore_patterns("__pycache__")
    )
    diff = block("diff")
    assert (
        sum(
            line.startswith("+") and not line.startswith("+++") and len(line) > 1
            for line in diff.splitlines()
        )
        <= 10
    )
    apply(diff, copy)
    settings = ["model.type=cnn", "train.epochs=1", "train.batch_size=1000", "optimizer.lr=0.05"]
    command = [
        sys.executable,
        "-m",
        "fmnist",
        "run",
        "baseline",
        *(f"--set={setting}" for setting in settings),
    ]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(copy)},
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"Validation accuracy (0\.\d+)", result.stdout)[1]) > 0.6
    assert "run " in result.stdout
    shown = subprocess.run(
        [*command[:3], "show", *command[4:]],
        env={**os.environ, "PYTHONPATH": str(copy)},
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert re.search(r"parameters +54,170", shown.stdout)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+)", README))))
def test_every_target_that_is_named_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / name).exists(), name
