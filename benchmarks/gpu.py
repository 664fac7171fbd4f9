"""Prove and measure training on a CUDA device: one script, at most seven minutes.

    make bench-gpu
    PYTHONPATH=. python benchmarks/gpu.py       # the same, without installing anything
    PYTHONPATH=. python benchmarks/gpu.py --only steps stacks

Each part is a process of its own with a time limit; what it finds is printed at once, a JSON line
for each figure, and all of it again as a table at the end. A part that fails is told, and the next
one starts. Exit 1 if a part failed.

It needs torch (2.10 or newer), numpy, pandas, pydantic, ruamel.yaml, typer and rich, and of the
repository the package, tests/, experiments/ and data/ (55 MB; `make data`); for the part `tests`
also pytest, scikit-learn, scipy, matplotlib and pillow, for `jax` JAX with its CUDA plugin. No
MLflow. Python 3.11 to 3.13. Where a machine has no network, carry wheels of pydantic,
pydantic_core, annotated_types, typing_inspection and ruamel.yaml.

Traps: JAX takes 3/4 of the memory unless XLA_PYTHON_CLIENT_PREALLOCATE=false, and rounds float32
products to TF32 unless told otherwise (jax_default_matmul_precision), which is why it is timed both
ways. A Triton kernel is compiled on its first call, with a C compiler. Timings are medians over
repeats in one process; of two cards, or of two days, they can't be compared.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS, EPOCHS = 37_500, 20
HIDDEN = (300, 100)
BATCH, LR, MOMENTUM = 32, 0.001, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        PARTS[arguments.here][0]()
        return
    figures: list[dict[str, Any]] = []
    failed = [part for part in arguments.only if not run_part(part, PARTS[part][1], figures)]
    print_table(figures)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run_part(part: str, limit_s: int, figures: list[dict[str, Any]]) -> bool:
    """Run one part in a process of its own; whether it ended well."""
    command = [sys.executable, "-u", __file__, "--here", part]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    limit = threading.Timer(limit_s, process.kill)
    limit.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            figures.append(json.loads(line))
    limit.cancel()
    code = process.wait()
    ended = {"part": part, "what": "ended", "value": code, "unit": "exit code"}
    print(json.dumps({**ended, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return code == 0


def print_table(figures: list[dict[str, Any]]) -> None:
    for figure in figures:
        value = figure["value"]
        text = f"{value:,.4g}" if isinstance(value, float) else str(value)
        spread = (
            f"({figure['low']:,.4g} to {figure['high']:,.4g}, n = {figure['n']})"
            if "n" in figure
            else ""
        )
        print(
            f"{figure['part']:<10} {figure['what']:<58} {text:>12} {figure.get('unit', ''):<10} {spread}"
        )


def tell(part: str, what: str, value: Any, unit: str = "") -> None:
    print(json.dumps({"part": part, "what": what, "value": value, "unit": unit}), flush=True)


def tell_times(part: str, what: str, times: list[float], unit: str) -> None:
    """Print the median and range of some repeats."""
    figure = {"part": part, "what": what, "value": statistics.median(times), "unit": unit}
    print(
        json.dumps({**figure, "low": min(times), "high": max(times), "n": len(times)}), flush=True
    )


# ---- what is shared by the parts


def spec(seed: int = 0, hidden: tuple[int, ...] = HIDDEN, **train: Any):  # type: ignore[no-untyped-def]
    """Give the recipe of experiments/baseline.yaml, or one that differs in this."""
    from fmnist import spec as specs

    return specs.ExperimentSpec(
        name="gpu",
        model=specs.MLP(hidden=hidden),
        optimizer=specs.SGD(lr=LR, momentum=MOMENTUM),
        train=specs.Train(**{"seed": seed, "epochs": EPOCHS, "batch_size": BATCH, **train}),
        compute=specs.Compute(device="cuda"),
    )


def load():  # type: ignore[no-untyped-def]
    from fmnist import data, engine
    from fmnist import spec as specs

    return data.load(specs.Data(), REPOSITORY, engine.device(specs.Compute(device="cuda")))


def engine_of(count: int, dataset: Any, **given: Any):  # type: ignore[no-untyped-def]
    from fmnist import engine

    return engine.Engine([spec(seed, **given) for seed in range(count)], dataset)


def per_step(train: Callable[[int], object], steps: int, repeats: int = 5) -> list[float]:
    """Microseconds per step of `train(steps)`, several times, after one to warm up."""
    import torch

    train(steps)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        train(steps)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / steps * 1e6)
    return times


# ---- the parts


def machine() -> None:
    import platform

    import torch

    tell("machine", "card", torch.cuda.get_device_name())
    tell("machine", "capability", ".".join(map(str, torch.cuda.get_device_capability())))
    tell("machine", "torch, CUDA", f"{torch.__version__}, {torch.version.cuda}")
    tell("machine", "Python, processors", f"{platform.python_version()}, {os.cpu_count()}")
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    tell("machine", "driver, memory", subprocess.check_output(query, text=True).strip())
    began = time.perf_counter()
    torch.zeros(1, device="cuda").item()
    tell("machine", "CUDA initialised after", time.perf_counter() - began, "s")


def tests() -> None:
    files = [f"tests/test_{name}.py" for name in ("capture", "devices", "engine")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", *files]
    command += ["-p", "no:cacheprovider", "--tb=short", "--durations=5"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    print(result.stdout)
    tell("tests", "gpu tests", (result.stdout.strip().splitlines() or ["nothing"])[-1])
    sys.exit(result.returncode)


def check() -> None:
    """How long the check of a device takes, once CUDA is initialised and the data is there."""
    import torch

    from fmnist import devices

    dataset = load()
    torch.zeros(1, device="cuda").item()
    for count in (1, 64):
        for again in ("first", "second"):
            devices._passed.clear()
            began = time.perf_counter()
            found = devices._checked([spec(seed) for seed in range(count)], dataset)
            seconds = time.perf_counter() - began
            tell("check", f"the check of {count} models, {again} in the process", seconds, "s")
        tell("check", f"found of {count} models", found)


def steps() -> None:
    """A step by fused kernels and by PyTorch's operations, captured and launched one by one."""
    dataset = load()
    for count, precision in ((1, "float32"), (1, "tf32"), (64, "float32"), (64, "tf32")):
        name = f"{count} model{'s' if count > 1 else ''}, {precision}"
        trainer = engine_of(count, dataset, precision=precision)
        time_captured(f"fused, {name}", trainer)
        if precision == "float32":
            trainer.replay_steps(None)
            tell_times(
                "steps",
                f"fused, launched one by one, {name}",
                per_step(trained_by(trainer), 300, 3),
                "us",
            )
            trainer = engine_of(count, dataset, precision=precision)
            trainer.fuse_steps(False)
            time_captured(f"PyTorch's operations, {name}", trainer)
            trainer.replay_steps(None)
            tell_times(
                "steps",
                f"PyTorch's operations, one by one, {name}",
                per_step(trained_by(trainer), 300, 3),
                "us",
            )
    for hidden, batch in (((1_024, 1_024), 128), ((1_024, 1_024), 32), ((300, 100), 128)):
        for wanted in (True, False):
            trainer = engine_of(1, dataset, hidden=hidden, batch_size=batch)
            trainer.fuse_steps(wanted)
            name = "fused" if wanted else "PyTorch's operations"
            tell_times(
                "steps",
                f"{name}, {list(hidden)}, batch {batch}",
                per_step(trained_by(trainer), 400, 3),
                "us",
            )


def trained_by(trainer: Any) -> Callable[[int], object]:
    return lambda steps: trainer.train(trainer.step + steps)


def time_captured(name: str, trainer: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    train = trained_by(trainer)
    tell_times("steps", f"{name}", per_step(train, 1_000), "us")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        train(1_000)
    events = [e for e in profiled.key_averages() if e.count >= 1_000]
    tell(
        "steps",
        f"{name}: sum of its kernels",
        sum(e.self_device_time_total for e in events) / 1_000,
        "us",
    )
    tell("steps", f"{name}: kernels in a step", sum(e.count for e in events) / 1_000)
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:8]:
        print(f"  {e.self_device_time_total / 1_000:8.2f} us {e.count / 1_000:6.2f} x {e.key[:90]}")


def train_whole(count: int, dataset: Any) -> tuple[float, float]:
    """Train 20 epochs with every model's evaluations; seconds, the first model's accuracy."""
    import torch

    from fmnist import spec as specs

    trainer = engine_of(count, dataset)
    torch.cuda.synchronize()
    began, accuracy = time.perf_counter(), 0.0
    for segment in specs.plan(trainer.specs[0]):
        if segment.stop > segment.start:
            trainer.train(segment.stop)
        if segment.evaluate:
            accuracy = trainer.evaluate_all(dataset.validation)[0].accuracy
    return time.perf_counter() - began, accuracy


def whole() -> None:
    dataset = load()
    for count, repeats in ((1, 5), (64, 3)):
        found = [train_whole(count, dataset) for _ in range(repeats)]
        times = [seconds for seconds, _ in found]
        tell_times("whole", f"20 epochs with evaluations, {count} models", times, "s")
        tell("whole", "accuracy of the first", found[0][1])


def stacks() -> None:
    """Models trained in the same steps; microseconds per model and step."""
    dataset = load()
    for count in (1, 8, 64, 256):
        train = trained_by(engine_of(count, dataset))
        times = [value / count for value in per_step(train, 1_000, 3)]
        tell_times("stacks", f"per model and step, stack of {count}", times, "us")


def run() -> None:
    """The command itself: trained whole, killed and resumed, and verified."""
    home = Path(tempfile.mkdtemp())
    shutil.copytree(REPOSITORY / "experiments", home / "experiments")
    (home / "data").symlink_to(REPOSITORY / "data")
    os.environ["FMNIST_HOME"] = str(home)
    command = [sys.executable, "-m", "fmnist", "run", "baseline", "--no-sync", "--json"]
    times = []
    for _ in range(2):
        began = time.perf_counter()
        result = subprocess.run([*command, "--fresh"], text=True, stdout=subprocess.PIPE)
        times.append(time.perf_counter() - began)
        outcome = json.loads(result.stdout)
        tell("run", "training_s of fmnist run", outcome["training_s"], "s")
    tell_times("run", "fmnist run baseline --no-sync, the whole command", times, "s")
    unbroken = journals(home)
    # a run of seconds is to have a checkpoint before it is killed
    often = "from fmnist import cli, training; training.CHECKPOINT_S = 0.3; cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", often, *command[3:], "--fresh"], stdout=subprocess.DEVNULL
    )
    while len(journals(home)) == len(unbroken) or not (newest(home) / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tell("run", "killed at step", trained(newest(home)))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tell("run", "resumed", "bit for bit" if same(unbroken[0], newest(home)) else "OTHER BITS")
    tell("run", "repeated", "bit for bit" if same(*unbroken) else "OTHER BITS")
    verify(newest(home), home)


def journals(home: Path) -> list[Path]:
    return sorted((home / "mlruns" / "state").glob("[!.]*"), key=lambda path: path.stat().st_ctime)


def newest(home: Path) -> Path:
    return max((home / "mlruns" / "state").glob("[!.]*"), key=lambda path: path.name)


def records(folder: Path):  # type: ignore[no-untyped-def]
    from fmnist import journal

    return journal.read(folder / "journal")[0]


def trained(folder: Path) -> int:
    return max(
        (r.fields["first"] + r.fields["count"] - 1 for r in records(folder) if r.kind == "train"),
        default=0,
    )


def same(first: Path, second: Path) -> bool:
    """Whether two runs have the same curves, evaluations and weights, bit for bit."""
    from fmnist.journal import Recorded

    one, two = Recorded(records(first)), Recorded(records(second))
    arrays = all((one.arrays[name] == two.arrays[name]).all() for name in one.arrays)

    def measured(recorded: Any) -> list[tuple[float, float]]:
        return [(e["val/loss"], e["val/accuracy"]) for e in recorded.evaluations.values()]

    return arrays and measured(one) == measured(two) and one.metrics == two.metrics


def verify(folder: Path, home: Path) -> None:
    """Train a run again from what it left: `fmnist verify` without a store."""
    from fmnist import experiments, journal
    from fmnist import verify as verification

    scratch = Path(tempfile.mkdtemp())
    for name in ("spec.yaml", "environment.json", "checkpoint.pt"):
        shutil.copy(folder / name, scratch)
    of = experiments.parse((folder / "spec.yaml").read_text(), "spec.yaml")
    journal.curves(of, records(folder)).to_parquet(scratch / "curves.parquet")
    result = verification.verify(scratch, home, None, print)
    told = "equal, bit for bit" if not result.unequal else f"NOT equal: {result.unequal[0]}"
    tell("run", f"verified {result.steps} steps and {result.evaluations} evaluations", told)


# ---- what one would use instead, on the same card


def jax() -> None:
    """lax.scan of the same step, for one model, and under vmap for 64, in both arithmetics."""
    import jax as jx
    import jax.numpy as jnp
    import numpy as np
    import torch
    from jax import lax

    from fmnist import data
    from fmnist import spec as specs

    split = data.load(specs.Data(), REPOSITORY, torch.device("cpu")).train
    images, labels = jnp.asarray(split.images.numpy()), jnp.asarray(split.labels.numpy())
    tell("jax", "JAX", f"{jx.__version__} on {jx.devices()[0].device_kind}")

    def initial(key: Any) -> Any:
        found = []
        for i, o in zip((784, *HIDDEN), (*HIDDEN, 10), strict=True):
            key, one, two = jx.random.split(key, 3)
            bound = i**-0.5
            found.append(
                (
                    jx.random.uniform(one, (i, o), minval=-bound, maxval=bound),
                    jx.random.uniform(two, (o,), minval=-bound, maxval=bound),
                )
            )
        return found, jx.tree.map(jnp.zeros_like, found)

    def loss_and_accuracy(parameters: Any, x: Any, y: Any) -> Any:
        for weight, bias in parameters[:-1]:
            x = jx.nn.relu(x @ weight + bias)
        weight, bias = parameters[-1]
        logits = x @ weight + bias
        loss = -jnp.take_along_axis(jx.nn.log_softmax(logits), y[:, None], 1).mean()
        return loss, (logits.argmax(1) == y).mean()

    def step(state: Any, batch: Any) -> Any:
        parameters, velocities = state
        measured, gradients = jx.value_and_grad(loss_and_accuracy, has_aux=True)(
            parameters, images[batch], labels[batch]
        )
        velocities = jx.tree.map(lambda v, g: MOMENTUM * v + g, velocities, gradients)
        return (jx.tree.map(lambda p, v: p - LR * v, parameters, velocities), velocities), measured

    generator = np.random.default_rng(0)
    for precision in ("highest", "default"):
        for count in (1, 64):
            keys = jx.random.split(jx.random.key(0), count)
            state = initial(keys[0]) if count == 1 else jx.vmap(initial)(keys)
            one = step if count == 1 else jx.vmap(step)
            with jx.default_matmul_precision(precision):
                program = jx.jit(
                    lambda state, rows, one=one: lax.scan(one, state, rows), donate_argnums=0
                )
                shape = (1_000, BATCH) if count == 1 else (1_000, count, BATCH)
                rows = jnp.asarray(generator.integers(0, len(labels), shape))
                times = []
                for _ in range(5):
                    began = time.perf_counter()
                    state, (loss, _) = program(state, rows)
                    loss.block_until_ready()
                    times.append((time.perf_counter() - began) / 1_000 * 1e6)
            told = "float32" if precision == "highest" else "JAX's default rounding"
            tell_times("jax", f"lax.scan, a step, {count} models, {told}", times[1:], "us")


def module() -> None:
    """A PyTorch module's step (autograd, fused SGD, metrics kept) captured in a CUDA graph."""
    import torch
    from torch import nn
    from torch.nn import functional

    dataset = load().train
    torch.use_deterministic_algorithms(False)
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    network = nn.Sequential(*layers).cuda()
    optimizer = torch.optim.SGD(network.parameters(), LR, MOMENTUM, fused=True)
    rows = torch.zeros(BATCH, dtype=torch.int64, device="cuda")

    def step() -> tuple[Any, Any]:
        optimizer.zero_grad(set_to_none=True)
        labels = dataset.labels[rows]
        logits = network(dataset.images[rows])
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).float().mean()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, accuracy = step()

    def train(steps: int) -> None:
        order = torch.randperm(len(dataset), device="cuda").split(BATCH)[:steps]
        found = torch.empty(steps, 2, device="cuda")
        for number, batch in enumerate(order):
            rows.copy_(batch)
            graph.replay()
            found[number, 0], found[number, 1] = loss, accuracy
        found.cpu()

    tell_times("module", "a module's step in a CUDA graph, 1 model", per_step(train, 1_000), "us")


def notebook() -> None:
    """The notebook's loop with its tensors moved to the device."""
    import torch
    from sklearn.metrics import accuracy_score
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets
    from torchvision.transforms import ToTensor

    images = datasets.FashionMNIST(REPOSITORY / "data", train=True, transform=ToTensor())
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    network, loss_function = nn.Sequential(nn.Flatten(), *layers).cuda(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)
    batches = iter(DataLoader(images, batch_size=BATCH, shuffle=True))

    def train(steps: int) -> None:
        for _ in range(steps):
            x, labels = (tensor.cuda() for tensor in next(batches))
            optimizer.zero_grad()
            logits = network(x)
            loss = loss_function(logits, labels)
            loss.backward()
            optimizer.step()
            loss.item()
            accuracy_score(labels.cpu().numpy(), logits.argmax(axis=-1).cpu().numpy())

    tell_times("notebook", "the notebook's step on the device", per_step(train, 300, 3), "us")


PARTS: dict[str, tuple[Callable[[], None], int]] = {
    "machine": (machine, 60),
    "tests": (tests, 120),
    "check": (check, 40),
    "steps": (steps, 60),
    "whole": (whole, 60),
    "run": (run, 90),
    "stacks": (stacks, 60),
    "jax": (jax, 90),
    "module": (module, 30),
    "notebook": (notebook, 30),
}
"""Each part with its time limit in seconds."""


if __name__ == "__main__":
    main()
