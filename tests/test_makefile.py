"""The Makefile: what its targets pass on and what `clean` spares."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY


def make(folder: Path, *arguments: str) -> str:
    command = ["make", "--no-print-directory", "-f", str(REPOSITORY / "Makefile"), *arguments]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # these tests may run below `make test`
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_alone_it_prints_every_target(tmp_path: Path) -> None:
    shown = make(tmp_path)
    for target in ("setup", "data", "run", "ui", "report", "test", "check", "clean"):
        assert f"\n{target} " in f"\n{shown}"


def test_fields_become_overrides(tmp_path: Path) -> None:
    shown = make(
        tmp_path, "-n", "run", "EXP=epochs-40", "SET=optimizer.lr=0.01 model.hidden=[64,32]"
    )
    assert (
        ".venv/bin/fmnist run epochs-40 --set 'optimizer.lr=0.01' --set 'model.hidden=[64,32]'"
        in shown
    )


def test_seeds_and_fresh_are_passed_on(tmp_path: Path) -> None:
    assert ".venv/bin/fmnist run baseline  --seeds '3,7'" in make(
        tmp_path, "-n", "run", "SEEDS=3,7"
    )
    assert make(tmp_path, "-n", "run", "FRESH=1").rstrip().endswith("run baseline   --fresh")


def test_set_up_comes_first(tmp_path: Path) -> None:
    for target in (
        "data",
        "run",
        "show",
        "list",
        "ui",
        "report",
        "sync",
        "test",
        "check",
        "bench",
        "bench-step",
    ):
        assert "tools/bootstrap.py" in make(tmp_path, "-n", target).splitlines()[0]


def test_clean_cut_short_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (".venv", ".venv-bench", ".venv-services"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "stamp").touch()
    cut_short = tmp_path / "tools" / "rm"
    cut_short.parent.mkdir()
    cut_short.write_text(
        '#!/bin/sh\n[ "$1" = -f ] && exec /bin/rm "$@"\n/bin/rm -r .venv/bin; exit 137\n'
    )
    cut_short.chmod(0o755)
    monkeypatch.setenv("PATH", f"{cut_short.parent}:{os.environ['PATH']}")
    with pytest.raises(subprocess.CalledProcessError):
        make(tmp_path, "clean")
    assert sorted(path.name for path in tmp_path.glob(".venv*/*")) == ["bin", "bin"]


def test_clean_spares_runs_and_data(tmp_path: Path) -> None:
    for folder in (
        ".venv/bin",
        "mlruns/artifacts",
        "data/FashionMNIST",
        "fmnist/__pycache__",
        "mlruns/__pycache__",
        ".pytest_cache",
    ):
        (tmp_path / folder).mkdir(parents=True)
    make(tmp_path, "clean")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {
        "mlruns",
        "mlruns/artifacts",
        "mlruns/__pycache__",
        "data",
        "data/FashionMNIST",
        "fmnist",
    }
