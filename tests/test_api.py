"""The Python API, by the example that is shipped, run as it stands in a home whose experiments are short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from fmnist import api
from fmnist.errors import SpecError

SHORT = "train: {epochs: 1, batch_size: 2000}\n"


@pytest.mark.slow
@pytest.mark.usefixtures("with_store")
def test_the_example_trains_and_compares(home: Path) -> None:
    path = home / "experiments" / "baseline.yaml"  # the parent of both
    path.write_text(path.read_text().partition("\ntrain:")[0] + f"\n{SHORT}")
    command = [sys.executable, str(REPOSITORY / "examples" / "compare_learning_rates.py")]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "FMNIST_HOME": str(home)},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "25 steps of SGD(lr=0.001" in result.stdout
    assert "holdout-lr-0.01: 5 trained, 0 there before" in result.stdout
    assert result.stdout.count("holdout s") == 5
    assert "holdout-lr-0.01 is better than holdout: validation accuracy +0." in result.stdout
    assert result.stdout.splitlines()[-1].startswith("better: +0.")


def test_mistakes_are_the_command_lines(home: Path) -> None:
    with pytest.raises(SpecError, match="unknown experiment 'holdaut', did you mean 'holdout'"):
        api.load("holdaut")
    with pytest.raises(SpecError, match=r"optimizer\.lr: given 'fast'"):
        api.run("baseline", "optimizer.lr=fast")
