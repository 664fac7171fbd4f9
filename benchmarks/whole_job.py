"""The whole job, from the command to everything stored, by this package and by what one would use instead; in turn, medians.

    make bench                                                   # n = 3; some half an hour on two quiet cores
    .venv-bench/bin/python benchmarks/whole_job.py --repeats 1 --only ours jax

The job: 37,500 steps of the notebook's MLP, loss and accuracy of every step and of 39 evaluations in an MLflow store (SQLite, made
beforehand), the model as an artifact. The slow ones stop after fewer steps, and what they trained is scaled up: whole = wall +
training x (37,500 / steps - 1). Writes reports/whole_job.md and reports/whole_job.png.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from whole_run import stop_sidecar

from fmnist import tracking

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = 37_500
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


@dataclass(frozen=True)
class Contestant:
    label: str
    script: str
    steps: int = STEPS
    options: tuple[str, ...] = ()
    one_thread: bool = False


CONTESTANTS = {
    "ours": Contestant("this package", "ours"),
    "jax": Contestant("JAX lax.scan, log_batch", "jax_program.py"),
    "jax-1": Contestant("JAX lax.scan, log_batch, one thread", "jax_program.py", one_thread=True),
    "engineer": Contestant("a good engineer's PyTorch loop", "engineer.py"),
    "notebook": Contestant(
        "the notebook's loop, no MLflow", "notebook.py", 3_000, ("--no-logging",)
    ),
    "notebook-log": Contestant("the notebook's loop, log_metric each step", "notebook.py", 1_500),
    "lightning": Contestant("Lightning + MLFlowLogger, every step", "lightning_program.py", 1_500),
    "keras": Contestant("Keras 3 (JAX) + MlflowCallback, every step", "keras_program.py", 1_000),
    "skorch": Contestant("skorch + MlflowLogger, every step", "skorch_program.py", 1_000),
    "ours-50": Contestant(
        "this package, log_every 50", "ours", options=("--set=tracking.log_every=50",)
    ),
    "lightning-50": Contestant(
        "Lightning, its default: every 50 steps", "lightning_program.py", 3_000, ("--log-every=50",)
    ),
    "keras-epoch": Contestant(
        "Keras 3 (JAX), its default: every epoch", "keras_program.py", 3_750, ("--log-every=1875",)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template"
        tracking.connect(template, create=True)
        for repeat in range(arguments.repeats):
            for name, results in found.items():
                home = Path(folder) / f"{name}-{repeat}"
                results.append(time_one(CONTESTANTS[name], home, template))
                print(
                    f"{name:<14} whole {results[-1]['whole']:7.1f} s, training {results[-1]['training']:7.1f} s",
                    flush=True,
                )
                shutil.rmtree(home)
    write(found)


def time_one(contestant: Contestant, home: Path, template: Path) -> dict[str, float]:
    """Seconds of the whole job and of its training, scaled up to all steps, and the accuracy it ended with."""
    shutil.copytree(REPOSITORY / "experiments", home / "experiments")
    (home / "data").symlink_to(REPOSITORY / "data")
    (home / "mlruns").mkdir()
    shutil.copy(tracking.database(template), tracking.database(home))
    if contestant.script == "ours":
        command = [sys.executable, "-m", "fmnist", "run", "baseline", "--json", *contestant.options]
    else:
        script = str(REPOSITORY / "benchmarks" / "peers" / contestant.script)
        command = [
            sys.executable,
            script,
            f"--store=sqlite:///{tracking.database(home)}",
            f"--steps={contestant.steps}",
            *contestant.options,
        ]
    environment = {
        **os.environ,
        "FMNIST_HOME": str(home),
        "PYTHONPATH": str(REPOSITORY),
        **(ONE_THREAD if contestant.one_thread else {}),
    }
    began = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    wall = time.perf_counter() - began
    if result.returncode:
        sys.exit(f"{contestant.label} failed:\n{result.stderr}")
    told = json.loads(
        result.stdout.splitlines()[-1] if contestant.script != "ours" else result.stdout
    )
    if contestant.script == "ours":
        os.environ["FMNIST_HOME"] = str(home)
        stop_sidecar(home)
        assert (told["status"], told["unsynced"]) == ("FINISHED", None), told
        told["accuracy"] = told["metrics"]["last/val_accuracy"]
    scale = STEPS / told["steps"]
    return {
        "whole": wall + told["training_s"] * (scale - 1),
        "training": told["training_s"] * scale,
        "accuracy": told["accuracy"],
        "steps": told["steps"],
    }


def write(found: dict[str, list[dict[str, float]]]) -> None:
    """The table, printed and as reports/whole_job.md, and the bars."""
    import matplotlib.pyplot as plt

    packages = ", ".join(
        f"{package} {version(package)}"
        for package in ("torch", "mlflow", "lightning", "keras", "jax", "skorch")
    )
    repeats = len(next(iter(found.values())))
    lines = [
        f"{STEPS:,} steps; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()};"
        f" {packages}; medians (range), n = {repeats}, in turn.",
        "",
        "| | whole job, s | times ours | training alone, s | steps run | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    medians = {}
    for name, results in found.items():
        whole, training = ([result[key] for result in results] for key in ("whole", "training"))
        medians[name] = statistics.median(whole)
        base = found.get("ours-50" if name.endswith(("-50", "-epoch")) else "ours")
        times = (
            f"{statistics.median(a / b['whole'] for a, b in zip(whole, base, strict=True)):.1f}"
            if base
            else ""
        )
        lines.append(
            f"| {CONTESTANTS[name].label} | {medians[name]:.0f} ({min(whole):.0f} to {max(whole):.0f}) | {times} |"
            f" {statistics.median(training):.0f} | {results[0]['steps']:,.0f} | {results[0]['accuracy']:.3f} |"
        )
    print("\n" + "\n".join(lines))
    folder = REPOSITORY / "reports"
    folder.mkdir(exist_ok=True)
    (folder / "whole_job.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(medians) + 1.2), layout="constrained")
    names = sorted(medians, key=lambda name: -medians[name])
    bars = axes.barh([CONTESTANTS[name].label for name in names], [medians[name] for name in names])
    for bar, name in zip(bars, names, strict=True):
        bar.set_color("C1" if name.startswith("ours") else "C0")
    axes.bar_label(bars, fmt="%.0f s", padding=3)
    axes.set_xlabel(f"seconds from the command to everything stored, median of {repeats}")
    axes.margins(x=0.1)
    figure.savefig(folder / "whole_job.png", dpi=150)


if __name__ == "__main__":
    main()
