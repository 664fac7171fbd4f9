"""Where a run was computed: what could make the same spec give other numbers elsewhere."""

import contextlib
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fmnist import __version__, data

BITS = ("device", "threads", "processor", "torch")
"""On another of these, the same arithmetic may round otherwise."""


def facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `collect` found, what may matter for a result."""
    packages, diff = environment.get("packages", {}), environment.get("git_diff")
    plain = ("device", "threads", "processor", "platform", "python", "fmnist", "git_commit", "data_digest")
    found = {key: environment.get(key) for key in plain} | {key: packages.get(key) for key in ("torch", "numpy", "scikit-learn")}
    return {**found, "git_diff": diff and hashlib.sha256(diff.encode()).hexdigest()[:8]}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between the facts of two environments, as 'before -> now'."""
    return {key: f"{before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value}


def collect(command: str, device: torch.device) -> dict[str, Any]:
    """What could make the same spec give other numbers elsewhere."""
    packages = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name}
    return {
        "fmnist": __version__,
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "data_digest": data.DIGEST,
        **_git(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor()


def _git() -> dict[str, Any]:
    """The commit of the working tree and how it differs from it; empty outside a repository."""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
            return result.stdout
        return None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain")
    if commit is None or status is None:
        return {"git_commit": None, "git_dirty": None, "git_diff": None}
    return {"git_commit": commit.strip(), "git_dirty": bool(status), "git_diff": git("diff", "HEAD") if status else ""}
