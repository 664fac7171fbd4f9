"""Build .venv from requirements.lock, whole or not at all; standard library only, since it runs before anything is installed.

    python tools/bootstrap.py                                       # what `make` calls first
    python tools/bootstrap.py .venv-bench requirements-bench.lock   # another environment, for `make bench`

Two of these at once are safe: the second waits for the lock, then finds the work done. One that is cut short
leaves no stamp, so the next one starts afresh: the stamp is the last that comes and the first that goes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME, LOCK = sys.argv[1:3] or (".venv", "requirements.lock")
VENV = ROOT / NAME
STAMP = VENV / "stamp"
OLDEST, NEWEST = (3, 11), (3, 13)
NEEDED_GB = 8  # 6 GB stay; pip unpacks a wheel beside its download


def stop(message):
    sys.exit("fmnist set-up: " + message)


def fingerprint():
    """What the environment depends on: the pins, the interpreter, and where it stands (a venv can't be moved)."""
    import tomllib  # not before the version is known to be recent enough

    digest = hashlib.sha256(repr((sys.version_info[:3], sys.base_prefix, str(ROOT))).encode())
    digest.update((ROOT / LOCK).read_bytes())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    digest.update(json.dumps(project, sort_keys=True).encode())
    return digest.hexdigest()


def is_whole(expected):
    return STAMP.is_file() and STAMP.read_text() == expected


def remove():
    """Take the environment away, its stamp first: the rest goes in any order, and what a cut leaves must not pass for whole."""
    STAMP.unlink(missing_ok=True)
    folder = os.open(VENV, os.O_RDONLY)
    os.fsync(folder)  # also where the power fails
    os.close(folder)
    shutil.rmtree(VENV)


def build(expected):
    interpreter = getattr(
        sys, "_base_executable", sys.executable
    )  # an activated .venv is about to be removed
    if VENV.exists():
        remove()
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < NEEDED_GB:
        stop(
            "%.1f GB are free in %s, about %d GB are needed: free some space and run the same command again"
            % (free_gb, ROOT, NEEDED_GB)
        )
    print("Building %s from %s (once; some 6 GB, a few minutes) ..." % (NAME, LOCK), flush=True)
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    steps = (
        [interpreter, "-m", "venv", str(VENV)],
        pip + ["--require-hashes", "-r", str(ROOT / LOCK)],
        # The lock holds the build backend, so nothing is fetched here and nothing is resolved.
        pip + ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
    )
    for command in steps:
        if subprocess.call(command) != 0:
            stop(
                "'%s' failed (its message is above); nothing half-built will be used: mend it and run the same command again"
                % " ".join(command[1:4])
            )
    os.sync()  # what the stamp vouches for is on the disk before it is
    partial = STAMP.with_name("stamp.partial")
    partial.write_text(expected)
    partial.rename(STAMP)


def main():
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        stop(
            "Python %d.%d is not supported, only 3.11, 3.12 and 3.13: name one, as in `make PYTHON=python3.12 ...`"
            % sys.version_info[:2]
        )
    expected = fingerprint()
    if is_whole(expected):
        return
    with open(ROOT / (NAME + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole(expected):
            build(expected)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; run the same command again")
