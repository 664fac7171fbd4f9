"""How cost grows with epochs, with runs and with workers; whole commands, one after the other.

    make bench-scaling        # or: python benchmarks/scaling.py --repeats 1 --only workers

Prints seconds, runs per hour and the trainer's peak memory, and draws reports/scaling.png of epochs and runs.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from whole_run import stop_sidecar

from fmnist import tracking

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCHS, RUNS, WORKER_RUNS = (10, 20, 40, 80), (1, 8, 64), 8


class Measured(NamedTuple):
    seconds: float
    peak_mb: float


def commands(home: Path, *jobs: tuple[str, ...]) -> Measured:
    """Run these `fmnist run baseline` at once, in a new home with a store; the time until the last is done, and the largest peak."""
    shutil.copytree(REPOSITORY / "experiments", home / "experiments")
    (home / "data").symlink_to(REPOSITORY / "data")
    tracking.connect(home, create=True)
    os.environ["FMNIST_HOME"] = str(home)
    began, peaks = time.perf_counter(), []
    command = [sys.executable, "-m", "fmnist", "run", "baseline", "--json"]
    with open(home / "out", "w") as out:
        processes = [
            subprocess.Popen([*command, *job], stdout=out, stderr=subprocess.DEVNULL)
            for job in jobs
        ]
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, f"{' '.join(job for job in jobs[0])}: exit {status}"
            peaks.append(usage.ru_maxrss / 1024)
    seconds = time.perf_counter() - began
    assert '"FAILED"' not in (home / "out").read_text()
    stop_sidecar(home)
    shutil.rmtree(home)
    return Measured(seconds, max(peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("epochs", "runs", "workers"),
        default=("epochs", "runs", "workers"),
    )
    parser.add_argument(
        "--log-every", nargs="+", type=int, default=[10, 1], help="of the workers' runs"
    )
    arguments = parser.parse_args()
    epochs: dict[int, list[Measured]] = {n: [] for n in EPOCHS if "epochs" in arguments.only}
    runs: dict[int, list[Measured]] = {n: [] for n in RUNS if "runs" in arguments.only}
    logged = arguments.log_every if "workers" in arguments.only else []
    workers: dict[tuple[int, int], list[Measured]] = {
        (every, n): [] for every in logged for n in (1, 2)
    }
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        for _ in range(arguments.repeats):
            for n, found in epochs.items():
                found.append(commands(home, ("--no-sync", f"--set=train.epochs={n}")))
                print(f"{n} epochs: {found[-1]}", flush=True)
            for n, found in runs.items():
                found.append(
                    commands(
                        home,
                        ("--set=train.epochs=1", "--set=tracking.log_every=10", f"--seeds={n}"),
                    )
                )
                print(f"{n} runs: {found[-1]}", flush=True)
            for (every, n), found in workers.items():
                common = (f"--set=tracking.log_every={every}",)
                share = WORKER_RUNS // n
                jobs = [
                    (
                        *common,
                        "--seeds="
                        + "".join(f"{seed}," for seed in range(w * share, (w + 1) * share)),
                    )
                    for w in range(n)
                ]
                found.append(commands(home, *jobs))
                print(f"{n} workers, log_every {every}: {found[-1]}", flush=True)
    if epochs or runs:
        draw({"epochs, nothing to MLflow": epochs, "runs of one epoch, log_every 10": runs})
    for every in logged:
        ratios = [
            one.seconds / two.seconds
            for one, two in zip(workers[every, 1], workers[every, 2], strict=True)
        ]
        rate = {
            n: WORKER_RUNS * 3600 / statistics.median(one.seconds for one in workers[every, n])
            for n in (1, 2)
        }
        print(
            f"log_every {every}: {rate[1]:.0f} runs an hour with one worker, {rate[2]:.0f} with two:",
            end=" ",
        )
        print(
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)})"
        )


def draw(measured: dict[str, dict[int, list[Measured]]]) -> None:
    """Print and draw time and memory of each series."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (label, series) in zip(axes, measured.items(), strict=False):
        seconds = {n: [one.seconds for one in found] for n, found in series.items()}
        median = {n: statistics.median(times) for n, times in seconds.items()}
        peak = {n: statistics.median(one.peak_mb for one in found) for n, found in series.items()}
        for n, times in seconds.items():
            print(
                f"{n:>3} {label}: {median[n]:.1f} s ({min(times):.1f} to {max(times):.1f}, n = {len(times)}), peak {peak[n]:,.0f} MB"
            )
        axis.plot(list(median), list(median.values()), marker="o")
        axis.vlines(
            list(median),
            [min(times) for times in seconds.values()],
            [max(times) for times in seconds.values()],
        )
        axis.set(xlabel=label, ylabel="seconds, whole command", xlim=0, ylim=0)
        axis.grid(alpha=0.3)
        axes[2].plot(
            [n / max(peak, default=1) for n in peak], list(peak.values()), marker="o", label=label
        )
    axes[2].set(
        xlabel="share of the most epochs or runs",
        ylabel="trainer's peak memory, MB",
        ylim=(0, 1_200),
    )
    axes[2].legend(loc="lower right")
    folder = REPOSITORY / "reports"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=120)


if __name__ == "__main__":
    main()
