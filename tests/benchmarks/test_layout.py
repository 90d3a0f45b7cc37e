"""Imports run one way: experiments to the core, the data and the models, and these to samax."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = {"core", "data", "models"}
FOLDERS = sorted(path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py"))
EXPERIMENTS = [name for name in FOLDERS if name not in SHARED]


def imported(folder):
    """The modules that the files below a folder import."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def experiments_in(modules):
    parts = (module.split(".") for module in modules)
    return {part[1] for part in parts if part[0] == "benchmarks" and len(part) > 1} - SHARED


def test_there_is_nothing_at_the_top():
    assert [path.name for path in (ROOT / "benchmarks").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_command_with_a_report_and_imports_no_other(name):
    folder = ROOT / "benchmarks" / name
    assert {"__main__.py", "report.py"} <= {path.name for path in folder.glob("*.py")}
    assert experiments_in(imported(folder)) <= {name}


@pytest.mark.parametrize("name", sorted(SHARED))
def test_what_is_shared_imports_no_experiment(name):
    assert not experiments_in(imported(ROOT / "benchmarks" / name))


def test_samax_does_not_import_the_benchmarks():
    assert not [module for module in imported(ROOT / "samax") if module.startswith("benchmarks")]
