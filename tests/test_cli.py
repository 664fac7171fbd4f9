"""The command as people and scripts meet it: what it prints and where, its exit codes, and what it leaves alone."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, Fmnist, free_port

from fmnist import experiments, journal, state, sweeps
from fmnist import spec as specs

PACKAGE = Path(specs.__file__).parent
NAMES = experiments.names(PACKAGE.parent)
COMMANDS = [
    "run",
    "extend",
    "verify",
    "sweep",
    "show",
    "list",
    "runs",
    "compare",
    "promote",
    "doctor",
    "data",
    "sync",
    "report",
]
COMMANDS += ["ui", "serve", "predict"]
PLAN = {
    "training_images": 60_000,
    "validation_images": 10_000,
    "steps_per_epoch": 1_875,
    "steps": 37_500,
    "evaluations": 39,
    "parameters": 266_610,
    "points_logged": 75_160,
}


def printed_by(code: str) -> "subprocess.CompletedProcess[str]":
    """A fresh interpreter runs this; whatever it does not import itself, it finds not imported."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def refused(result: "subprocess.CompletedProcess[str]", home: Path, *fragments: str) -> None:
    """One line on stderr, nothing on stdout, and nothing begun."""
    assert (result.returncode, result.stdout) == (2, ""), result
    assert re.fullmatch(r"fmnist: .+\n", result.stderr), result.stderr
    assert [fragment for fragment in fragments if fragment not in result.stderr] == [], (
        result.stderr
    )
    assert not (home / "mlruns").exists()


class Failing(BaseHTTPRequestHandler):
    """A tracking server that is there and can't look anything up, as one whose database is down."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of this machine on which something listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "environment", "fragments"),
    [
        (
            ["run", "baselin"],
            {},
            ["unknown experiment 'baselin'", "did you mean 'baseline'?", "epochs-40"],
        ),
        (
            ["run", "../experiments/baseline"],
            {},
            ["'../experiments/baseline'", "no path separators"],
        ),
        (
            ["run", "baseline", "--set", "train.epoch=3"],
            {},
            ["--set train.epoch=3", "did you mean 'epochs'", "batch_size"],
        ),
        (
            ["show", "baselin", "--json"],
            {},
            ["unknown experiment 'baselin'", "did you mean 'baseline'?"],
        ),
        (
            ["run", "baseline"],
            {"MLFLOW_TRACKING_URI": "file://me:secret@/tmp/runs"},
            ["MLFLOW_TRACKING_URI", "http://", "unset it"],
        ),
        (
            ["report"],
            {"MLFLOW_TRACKING_URI": "sqlite:////nowhere/runs.db"},
            ["MLFLOW_TRACKING_URI", "'sqlite:////nowhere/runs.db'", "unset it"],
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy_and_nothing_is_begun(
    fmnist: Fmnist,
    home: Path,
    arguments: list[str],
    environment: dict[str, str],
    fragments: list[str],
) -> None:
    result = fmnist(*arguments, **environment)
    refused(result, home, *fragments)
    assert "secret" not in result.stderr


def test_several_mistakes_are_a_line_each(fmnist: Fmnist) -> None:
    result = fmnist("show", "baseline", "--set", "train.epochs=0", "--set", "optimizer.lr=fast")
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "--set optimizer.lr=fast",
        "--set train.epochs=0",
    ]


def test_a_tracking_server_that_does_not_answer_is_told_within_ten_seconds(
    fmnist: Fmnist, home: Path
) -> None:
    began = time.monotonic()
    fmnist(
        "run", "baseline", MLFLOW_TRACKING_URI="nowhere"
    )  # what the imports alone take, on a machine that may be busy
    server, imported = f"127.0.0.1:{free_port()}", time.monotonic()
    result = fmnist("run", "baseline", MLFLOW_TRACKING_URI=f"http://me:secret@{server}")
    refused(result, home, f"http://{server}", "start it, unset MLFLOW_TRACKING_URI", "--no-sync")
    assert "secret" not in result.stderr
    assert time.monotonic() - imported < 10 + (imported - began)


@pytest.mark.parametrize("arguments", [("run", "baseline", "--seeds", "2"), ("sweep", "sweep-lr")])
def test_nothing_is_trained_where_a_server_cant_say_what_is_there(
    fmnist: Fmnist, home: Path, failing_server: str, arguments: tuple[str, ...]
) -> None:
    result = fmnist(*arguments, MLFLOW_TRACKING_URI=failing_server)
    refused(result, home, "what is recorded already can't be asked", "the same command again")


@pytest.mark.parametrize("file", ["mlruns", "mlruns/state"])
def test_a_sweep_that_cant_write_its_runs_is_one_line(
    fmnist: Fmnist, home: Path, file: str
) -> None:
    (home / file).parent.mkdir(exist_ok=True)
    (home / file).touch()
    result = fmnist("sweep", "sweep-lr", "--jobs", "2")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"fmnist: \S+mlruns: can't be written: .+\n", result.stderr), result.stderr


@pytest.mark.parametrize("arguments", [("show",), ("sweep", "--jobs", "1")])
def test_a_junk_record_of_searches_is_one_line(
    fmnist: Fmnist, home: Path, arguments: tuple[str, ...]
) -> None:
    (home / "mlruns").mkdir()
    (home / "mlruns" / "searches.db").write_text("junk" * 1000)
    result = fmnist(arguments[0], "search-recipe", *arguments[1:])
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"fmnist: \S+searches.db can't be used: .*move it away.*\n", result.stderr)
    assert (home / "mlruns" / "searches.db").read_text() == "junk" * 1000


def test_workers_that_cant_begin_say_so_in_one_line(fmnist: Fmnist, home: Path) -> None:
    (home / "mlruns").mkdir()
    (home / "mlruns" / "claims").mkdir()
    result = fmnist("sweep", "sweep-lr", "--jobs", "2")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"fmnist: the workers can't begin: .*claims.*\n", result.stderr), (
        result.stderr
    )


def test_report_on_an_empty_home_names_the_remedy_and_creates_nothing(
    fmnist: Fmnist, home: Path
) -> None:
    refused(fmnist("report"), home, "no runs are recorded", "make run EXP=baseline")
    assert not (home / "reports").exists()


def test_sync_on_an_empty_home_says_there_is_nothing_and_creates_nothing(
    fmnist: Fmnist, home: Path
) -> None:
    result = fmnist("sync")
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        "nothing to carry over: every run is in MLflow\n",
        "",
    )
    assert not (home / "mlruns").exists()


def test_ui_on_a_taken_port_names_a_free_one_and_the_command(
    fmnist: Fmnist, home: Path, taken: int
) -> None:
    result = fmnist("ui", "--port", str(taken))
    refused(result, home, f"port {taken} on 127.0.0.1 is taken")
    (free,) = re.findall(r"make ui PORT=(\d+)", result.stderr)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(free)))


def test_ui_on_the_last_port_when_taken_is_refused_too(fmnist: Fmnist, home: Path) -> None:
    with socket.socket() as listener:
        with contextlib.suppress(OSError):  # someone else's is as good
            listener.bind(("127.0.0.1", 65535))
        refused(fmnist("ui", "--port", "65535"), home, "port 65535 on 127.0.0.1 is taken")


# ---- show and list


def line_of(start: str) -> int:
    """The line of baseline.yaml that begins so."""
    lines = (REPOSITORY / "experiments" / "baseline.yaml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(start))


def test_show_prints_value_and_origin_of_every_field_and_the_plan(
    fmnist: Fmnist, home: Path
) -> None:
    result = fmnist("show", "baseline", "--set", "optimizer.lr=1e-2")
    assert (result.returncode, result.stderr) == (0, "")
    fields, plan = (part.splitlines() for part in result.stdout.split("\n\n"))
    shown = {
        path: (json.loads(value), origin)
        for path, value, origin in (re.split("  +", line, maxsplit=2) for line in fields)
    }
    resolved = experiments.load("baseline", ["optimizer.lr=1e-2"], home)
    assert {path: value for path, (value, _) in shown.items()} == resolved.spec.flat()
    assert shown["optimizer.lr"] == (0.01, "--set optimizer.lr=1e-2")
    assert shown["optimizer.momentum"] == (
        0.9,
        f"experiments/baseline.yaml:{line_of('  momentum:')}",
    )
    assert shown["optimizer.weight_decay"] == (0.0, "default")
    assert shown["name"] == ("baseline", "the file's name")
    would = dict(re.split("  +", line, maxsplit=1) for line in plan)
    assert (
        would.pop("fingerprint")
        == f"{resolved.spec.fingerprint[:16]}  group {resolved.spec.group[:16]}"
    )
    assert would == {label.replace("_", " "): f"{value:,}" for label, value in PLAN.items()}


def test_show_json_is_one_object_with_spec_origins_fingerprint_and_plan(
    fmnist: Fmnist, home: Path
) -> None:
    result = fmnist("show", "baseline", "--json")
    shown, spec = json.loads(result.stdout), experiments.load("baseline", root=home).spec
    assert (result.returncode, result.stderr, shown["plan"]) == (0, "", PLAN)
    assert (shown["fingerprint"], shown["group"]) == (spec.fingerprint, spec.group)
    assert shown["spec"] == spec.model_dump(mode="json")
    assert shown["origins"]["train.epochs"] == f"experiments/baseline.yaml:{line_of('  epochs:')}"


def test_list_shows_every_experiment_and_a_broken_one_hides_no_other(
    fmnist: Fmnist, home: Path
) -> None:
    (home / "experiments" / "crooked.yaml").write_text("extends: baseline\ntrain: {epoch: 3}\n")
    (home / "experiments" / "no.yaml").write_text("extends: baseline\n")
    plain, as_json = fmnist("list"), fmnist("list", "--json")
    assert (plain.returncode, plain.stderr, as_json.returncode, as_json.stderr) == (0, "", 0, "")
    lines = {line.split()[0]: line for line in plain.stdout.splitlines()}
    rows = {row["name"]: row for row in json.loads(as_json.stdout)["experiments"]}
    assert sorted(rows) == sorted([*NAMES, "crooked", "no"])
    swept = {row["name"]: row["question"] for row in json.loads(as_json.stdout)["sweeps"]}
    assert sorted(swept) == sweeps.names(home)
    assert sorted(lines) == sorted([*rows, *swept])
    assert all(question in lines[name] for name, question in swept.items())
    for name in NAMES:
        spec = experiments.load(name, root=home).spec
        assert f"{spec.steps:,} steps  {spec.question}" in lines[name]
        assert rows[name] == {
            "name": name,
            "steps": spec.steps,
            "question": spec.question,
            "error": None,
        }
    for name, told in (
        ("crooked", "experiments/crooked.yaml:2: train.epoch: unknown key"),
        ("no", "experiment name"),
    ):
        assert f"BROKEN: {told}" in lines[name]
        assert rows[name]["error"].startswith(told)


# ---- what is imported and printed


def test_show_imports_neither_torch_nor_mlflow() -> None:
    code = "import sys; from fmnist import cli; cli.show('baseline'); cli.list_experiments(); heavy = {'torch', 'mlflow', 'pandas', 'matplotlib'};"
    result = printed_by(code + "print(sorted(heavy & set(sys.modules)))")
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_importing_prints_nothing_and_only_what_trains_imports_torch() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    trains = {
        "capture",
        "checkpoint",
        "data",
        "devices",
        "doctor",
        "engine",
        "environment",
        "exported",
        "fused",
        "kernels",
        "model",
        "optim",
        "runner",
        "training",
        "verify",
    }
    assert trains < modules
    lines = [f"import fmnist.{name}" for name in sorted(modules - trains)]
    result = printed_by(
        "\n".join(
            [*lines, "import sys", "assert not {'torch', 'mlflow'} & set(sys.modules), 'imported'"]
        )
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_every_command(fmnist: Fmnist, arguments: list[str]) -> None:
    result = fmnist(*arguments)
    assert result.returncode == 0 or not arguments
    # Click gives help that was not asked for on stderr.
    text = result.stdout if arguments else result.stdout + result.stderr
    assert "Usage:" in text
    assert re.findall(r"^  ([a-z]+) ", text.split("Commands:")[1], re.MULTILINE) == COMMANDS


def test_an_answer_that_reaches_nobody_is_told_or_left(home: Path) -> None:
    command = [Path(sys.executable).with_name("fmnist"), "list", "--json"]
    environment = {**os.environ, "FMNIST_HOME": str(home)}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "No space left on device" in result.stderr
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["2>&1 | true", "2>&-", ">&-", ">&- 2>&-", "<&- 2>/dev/full"])
def test_runs_are_trained_whether_or_not_anyone_reads(closed: str, home: Path) -> None:
    words = [Path(sys.executable).with_name("python"), "-m", "fmnist", *SMALL]
    words += ["--seeds", "2", "--no-sync"]
    pipeline = f"set -o pipefail; {shlex.join(map(str, words))} {closed}"
    result = subprocess.run(
        ["bash", "-c", pipeline],
        env={**os.environ, "FMNIST_HOME": str(home)},
        capture_output=True,
        timeout=120,
    )
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False), result.stderr
    folders = state.state_folders(home)
    assert [folder.result and folder.result.outcome for folder in folders] == ["finished"] * 2
    for folder in folders:
        assert journal.read(folder.path / "journal")[1] == (folder.path / "journal").stat().st_size


def test_a_terminal_that_lacks_letters_gets_all_the_same_lines(fmnist: Fmnist, home: Path) -> None:
    question = "Größer ± 0,5 → besser?"
    (home / "experiments" / "mine.yaml").write_text(f"extends: baseline\nquestion: {question}\n")
    plain = {"PYTHONIOENCODING": "ascii"}
    listed = fmnist("list", **plain)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "Gr??er ? 0,5 ? besser?" in listed.stdout
    found = json.loads(fmnist("list", "--json", **plain).stdout)["experiments"]
    assert question in [each["question"] for each in found]


@pytest.mark.parametrize("words", ["fmnist run l", "fmnist show l"])
def test_shell_completion_offers_experiment_names(home: Path, words: str) -> None:
    (home / "experiments" / "linear.yaml").touch()
    script = Path(sys.executable).with_name("fmnist")
    asked = {
        **os.environ,
        "_FMNIST_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": "2",
    }
    result = subprocess.run([script], env=asked, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == sorted(
        ["linear", *(name for name in NAMES if name.startswith("l"))]
    ), result.stderr


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["run"], ["EXP is missing", "fmnist list"]),
        (
            ["run", "baseline", "--resume", "nothing"],
            ["'nothing' fits 0 of the runs that are on disk", "none"],
        ),
    ],
)
def test_what_to_run_has_to_be_clear(
    fmnist: Fmnist, home: Path, arguments: list[str], fragments: list[str]
) -> None:
    refused(fmnist(*arguments), home, *fragments)


def test_resume_refuses_what_it_cant_continue_and_doctor_tells_what_to_do(
    fmnist: Fmnist, home: Path
) -> None:
    assert fmnist(*SMALL, "--no-sync").returncode == 0
    key = state.state_folders(home)[0].path.name
    for arguments, fragment in (
        (["run", "--resume", key], f"{key} has ended, there is nothing to continue; `fmnist sync`"),
        (
            ["run", "baseline", "--resume", key, "--fresh"],
            "--fresh starts anew and --resume goes on",
        ),
    ):
        result = fmnist(*arguments)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert fragment in result.stderr
    doctor = fmnist("doctor", "--json")
    findings = {
        finding["what"].partition(":")[0]: finding
        for finding in json.loads(doctor.stdout)["findings"]
    }
    assert doctor.returncode == 1
    assert findings[key] == {
        "what": f"{key}: ended, not all of it in MLflow",
        "remedy": "fmnist sync",
    }
    assert set(findings) == {"environment", "data", "disk", "store", key}
    assert findings["store"]["what"] == "store: none yet, the first run makes it"


@pytest.mark.usefixtures("with_store")
def test_one_bad_folder_is_named_by_every_command_and_keeps_none_from_its_work(
    fmnist: Fmnist, home: Path
) -> None:
    spec = experiments.load("baseline", [*SMALL[3::2]], home).spec
    environment = {"git_commit": None, "command": "fmnist run baseline", "packages": {"torch": "2"}}
    folders = []
    for _ in range(4):
        made = state.Journal.create(home, spec, "bad", environment, "local")
        made.event("end", status="KILLED", reason="stopped", resumable=True)
        made.release()
        folders.append(made.folder)
    recovered, lost, unknown, piped = folders
    (recovered / "run.json").write_text("")
    for name in ("run.json", "spec.yaml"):
        (lost / name).write_text("[]")
    (unknown / "environment.json").write_text("null")
    (piped / "journal").unlink()
    os.mkfifo(piped / "journal")

    def named(*arguments: str) -> "tuple[subprocess.CompletedProcess[str], list[bool]]":
        result = fmnist(*arguments)
        assert "Traceback" not in result.stderr, result.stderr
        told = [
            line
            for line in (result.stdout + result.stderr).splitlines()
            if "json: " in line or "left alone" in line
        ]
        return result, [any(folder.name in line for line in told) for folder in folders]

    for arguments in (["list"], ["runs"], ["doctor"]):
        assert named(*arguments)[1] == [True] * 4, arguments
    result, told = named(*SMALL, "--no-sync", "--json")
    assert (result.returncode, told) == (0, [True] * 4)
    assert json.loads(result.stdout)["key"] == recovered.name
    result, told = named(*SMALL, "--no-sync", "--json", "--fresh")
    assert (result.returncode, told) == (0, [False, True, True, True])
    result, told = named("sync")
    assert (result.returncode, told) == (1, [False, True, True, True])
    assert result.stdout.count(": FINISHED") == 2
    assert [folder.path for folder in state.state_folders(home)] == [unknown]
    assert all(folder.exists() for folder in (lost, unknown, piped))


def test_doctor_names_every_trouble(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmnist import doctor

    (home / "data").unlink()
    (home / "mlruns" / "state" / ".left-1").mkdir(parents=True)
    (home / "mlruns" / "mlflow.db").write_text("no database")
    (tmp_path / "fmnist").mkdir()
    (tmp_path / "requirements.lock").write_text("torch==0.1\npandas==0.2 ; python_version < '3'\n")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "fmnist" / "doctor.py"))
    monkeypatch.setattr(doctor, "FREE_BYTES", 1e18)
    found = list(doctor.findings(home))
    assert all(finding.remedy for finding in found)
    told = " ".join(finding.what for finding in found)
    for fragment in (
        "torch ",
        "pandas ",
        "train-images-idx3-ubyte is missing",
        "GB free",
        "store: can't be used",
        ".left-1",
    ):
        assert fragment in told
