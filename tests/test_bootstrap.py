"""Set-up: the environment is built once, whole or not at all."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of the same shape that needs no packages, so that building takes seconds."""
    (tmp_path / "tools").mkdir()
    shutil.copy(REPOSITORY / "tools" / "bootstrap.py", tmp_path / "tools")
    (tmp_path / "requirements.lock").write_text("# nothing\n")
    (tmp_path / "tiny.py").write_text("")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "tiny"\nversion = "1"\n'
    )
    # An editable install is a wheel with a .pth file: the least backend that makes one.
    (tmp_path / "backend.py").write_text(
        "import pathlib, zipfile\n"
        "def build_editable(folder, *_):\n"
        "    name = 'tiny-1-py3-none-any.whl'\n"
        "    with zipfile.ZipFile(pathlib.Path(folder) / name, 'w') as wheel:\n"
        "        wheel.writestr('tiny.pth', str(pathlib.Path.cwd()))\n"
        "        wheel.writestr('tiny-1.dist-info/METADATA', 'Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n')\n"
        "        wheel.writestr('tiny-1.dist-info/WHEEL', 'Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
        "        wheel.writestr('tiny-1.dist-info/RECORD', '')\n"
        "    return name\n"
        "def build_wheel(folder, *_):\n    raise NotImplementedError\n"
    )
    return tmp_path


def bootstrap(project: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [
        getattr(sys, "_base_executable", sys.executable),
        str(project / "tools" / "bootstrap.py"),
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def imports_tiny(project: Path) -> bool:
    return (
        subprocess.run(
            [project / ".venv" / "bin" / "python", "-c", "import tiny"], capture_output=True
        ).returncode
        == 0
    )


def test_two_at_once_build_it_once(project: Path) -> None:
    results = [finish(process) for process in (bootstrap(project), bootstrap(project))]
    assert [code for code, _ in results] == [0, 0], results
    assert sum("Building" in text for _, text in results) == 1
    assert imports_tiny(project)
    began = time.monotonic()
    assert finish(bootstrap(project)) == (0, "")
    assert time.monotonic() - began < 5


def test_one_cut_short_leaves_no_stamp_and_the_next_builds_anew(project: Path) -> None:
    process = bootstrap(project)
    while not (project / ".venv" / "bin").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (project / ".venv" / "stamp").exists()
    (project / ".venv" / "left-over").touch()
    assert finish(bootstrap(project))[0] == 0
    assert imports_tiny(project)
    assert not (project / ".venv" / "left-over").exists()


def test_changed_pins_build_it_anew_even_from_within(project: Path) -> None:
    assert finish(bootstrap(project))[0] == 0
    (project / "requirements.lock").write_text("# still nothing\n")
    inside = subprocess.run(
        [project / ".venv" / "bin" / "python", project / "tools" / "bootstrap.py"],
        capture_output=True,
        text=True,
    )
    assert inside.returncode == 0, inside.stderr
    assert "Building" in inside.stdout
    assert imports_tiny(project)


CUT_SHORT = """
import runpy, shutil, os, sys
def cut_short(folder):
    shutil.os.rename(os.path.join(folder, "bin"), os.path.join(folder, "half"))
    os._exit(9)
shutil.rmtree = cut_short
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_upgrade_cut_short_leaves_nothing_that_passes_for_whole(project: Path) -> None:
    assert finish(bootstrap(project))[0] == 0
    lock, before = project / "requirements.lock", (project / "requirements.lock").read_text()
    lock.write_text("# another one\n")
    interpreter = getattr(sys, "_base_executable", sys.executable)
    command = [interpreter, "-c", CUT_SHORT, str(project / "tools" / "bootstrap.py")]
    assert subprocess.run(command, capture_output=True).returncode == 9
    lock.write_text(before)  # the pins that the half environment was built from
    assert finish(bootstrap(project))[0] == 0
    assert imports_tiny(project)


def test_failed_install_is_told_and_leaves_no_stamp(project: Path) -> None:
    (project / "requirements.lock").write_text(
        "no-such-package==1 --hash=sha256:" + "0" * 64 + "\n"
    )
    code, text = finish(bootstrap(project))
    assert code == 1
    assert "run the same command again" in text
    assert not (project / ".venv" / "stamp").exists()


def test_another_environment_stands_beside_it(project: Path) -> None:
    (project / "requirements-bench.lock").write_text("# nothing\n")
    code, text = finish(bootstrap(project, ".venv-bench", "requirements-bench.lock"))
    assert (code, text.split(" (once")[0]) == (
        0,
        "Building .venv-bench from requirements-bench.lock",
    )
    assert (project / ".venv-bench" / "stamp").exists()
    assert not (project / ".venv").exists()


def test_other_python_is_refused_in_one_line(project: Path) -> None:
    source = (project / "tools" / "bootstrap.py").read_text()
    code = source.replace("if __name__", "sys.version_info = (3, 14, 0, 'final', 0)\nif __name__")
    result = subprocess.run(
        [sys.executable, "-"],
        input=code.replace("__file__", repr(str(project / "tools" / "x"))),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "3.11, 3.12 and 3.13" in result.stderr
    assert "make PYTHON=" in result.stderr
