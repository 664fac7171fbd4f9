"""Imports run one way, and functions stay short: read from the source, imports inside functions too."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "fmnist"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
ALLOWED = {
    "errors": set(),
    "files": set(),
    "words": set(),
    "spec": {"errors"},
    "experiments": {"spec", "errors"},
    "data": {"files", "spec", "errors"},
    "model": {"spec"},
    "capture": set(),
    "optim": {"capture", "spec"},
    "engine": {"capture", "data", "fused", "model", "optim", "spec", "errors"},
    "kernels": set(),
    "fused": {"kernels", "spec"},
    "devices": {"data", "engine", "spec", "errors"},
    "journal": {"files", "spec"},
    "state": {"files", "journal", "spec", "experiments", "errors"},
    "checkpoint": {"files", "optim", "spec", "errors"},
    "environment": {"data", "__version__"},
    "training": {"checkpoint", "engine", "state", "spec", "errors"},
    "runner": {
        "experiments",
        "checkpoint",
        "devices",
        "engine",
        "environment",
        "journal",
        "state",
        "training",
        "spec",
        "errors",
    },
    "verify": {
        "experiments",
        "checkpoint",
        "devices",
        "engine",
        "environment",
        "journal",
        "spec",
        "errors",
    },
    "database": {"files", "spec", "journal", "errors"},
    "models": {"errors"},
    "exported": {"errors"},
    "guard": set(),
    "tracking": {"database", "files", "models", "spec", "journal", "errors"},
    "sweeps": {"experiments", "spec", "errors"},
    "search": {"database", "files", "journal", "spec", "sweeps"},
    "workers": {
        "database",
        "engine",
        "experiments",
        "runner",
        "state",
        "training",
        "spec",
        "errors",
    },
    "cluster": {
        "data",
        "database",
        "experiments",
        "runner",
        "training",
        "workers",
        "spec",
        "errors",
    },
    "sweep_run": {"files", "journal", "plots", "search", "sweeps", "tracking"},
    "sweeping": {
        "database",
        "errors",
        "journal",
        "runner",
        "search",
        "state",
        "sweep_run",
        "sweeps",
        "tracking",
        "training",
        "workers",
    },
    "display": {"journal", "spec", "sweeping", "training"},
    "moving": {"files", "groups", "journal", "models", "tracking", "errors"},
    "serving": {"exported", "guard", "models", "plots", "tracking", "errors"},
    "compare": {"spec", "errors"},
    "changes": {"compare"},
    "plots": set(),
    "groups": {"files", "compare", "experiments", "journal", "plots", "tracking", "errors"},
    "promotion": {"compare", "exported", "groups", "models", "tracking", "errors"},
    "readme": {"compare", "experiments", "spec", "sweeps", "errors"},
    "report": {"changes", "compare", "plots", "readme", "tracking", "spec", "errors"},
    "sidecar": {
        "files",
        "checkpoint",
        "data",
        "model",
        "journal",
        "state",
        "groups",
        "plots",
        "spec",
        "errors",
        "tracking",
    },
    "api": {
        "compare",
        "database",
        "experiments",
        "groups",
        "runner",
        "training",
        "tracking",
        "spec",
    },
    "doctor": {"database", "data", "journal", "state", "spec", "errors", "tracking"},
    "cli": {
        "files",
        "spec",
        "experiments",
        "errors",
        "data",
        "journal",
        "state",
        "runner",
        "training",
        "verify",
        "tracking",
        "report",
        "sidecar",
        "doctor",
        "api",
        "promotion",
        "cluster",
        "database",
        "display",
        "moving",
        "serving",
        "sweeping",
        "sweeps",
        "words",
        "workers",
    },
}
OUTSIDE = {
    "torch": {
        "capture",
        "devices",
        "exported",
        "fused",
        "data",
        "model",
        "optim",
        "engine",
        "checkpoint",
        "environment",
        "verify",
        "sidecar",
    },
    "mlflow": {"tracking", "database"},
    "optuna": {"search"},
    "ray": {"cluster"},
    "matplotlib": {"plots"},
}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The fmnist modules and the other packages that a file imports, wherever in it."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fmnist":
            own |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fmnist."):
            own.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module:
            others.add(node.module.partition(".")[0])
    return own, others


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    own, others = imports(PACKAGE / f"{module}.py")
    assert own <= ALLOWED[module]
    for package, users in OUTSIDE.items():
        assert package not in others or module in users, f"{module} must not import {package}"


def test_no_module_is_imported_in_a_circle() -> None:
    graph = {module: imports(PACKAGE / f"{module}.py")[0] & set(MODULES) for module in MODULES}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


def test_functions_stay_short() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_what_is_printed_is_cleaned() -> None:
    """The command line's `print` is the one that escapes; elsewhere only the log of uploads is printed."""
    assert "from fmnist.words import print_plain as print\n" in (PACKAGE / "cli.py").read_text()
    printing = {path.stem for path in PACKAGE.glob("*.py") if " print(" in path.read_text()}
    assert printing == {"cli", "sidecar"}


def test_nothing_unpickles() -> None:
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text
        assert text.count("torch.load(") == text.count("weights_only=True"), path.name
        assert "allow_pickle=True" not in text, path.name
