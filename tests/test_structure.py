"""Which room uses which, drawn from the sources: imports go down only, also inside functions."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sam_lightning"
# The rooms, and the files beside them, from the ground up: what each may import.
GROUND = {
    "config": set(),
    "optim": set(),
    "models": {"optim"},
    "data": {"config"},
    "runs": {"config"},
}
INFERENCE = {*GROUND}
MAY_USE = GROUND | {
    "plotting": {"config", "runs"},
    "inference": INFERENCE,
    "analysis": INFERENCE | {"inference", "plotting"},
    "training": INFERENCE | {"inference", "plotting", "analysis"},
    "studies": INFERENCE | {"inference", "plotting", "analysis", "training"},
}
FACES = ("cli", "__main__", "__init__")  # these may import everything
LONGEST = 350  # lines of a file


def modules():
    """Every module of the package by its name in it, such as ``data.source``."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return found


def imports():
    """Pairs of modules (importing, imported) of the package."""
    files = modules()
    pairs = set()
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                package, _, inside = name.partition(".")
                if package == "sam_lightning":
                    while inside and inside not in files:  # the last part is no module
                        inside = inside.rpartition(".")[0]
                    pairs.add((module, inside or "__init__"))
    return pairs


def up():
    room = {module: module.partition(".")[0] for module in modules()}
    return {
        (a, b)
        for a, b in imports()
        if room[a] != room[b] and room[a] not in FACES and room[b] not in MAY_USE[room[a]]
    }


def test_every_room_has_its_place():
    assert {module.partition(".")[0] for module in modules()} == {*MAY_USE, *FACES}
    assert len({*MAY_USE, "cli"}) <= 12


def test_imports_go_down_only():
    assert up() == set()


def test_no_two_files_import_each_other():
    graph = {module: set() for module in modules()}
    for importing, imported in imports():
        graph[importing].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_files_are_short():
    files = [file for file in modules().values() if len(file.read_text().splitlines()) > LONGEST]
    assert files == []


def test_optim_and_models_need_nothing_but_torch():
    code = """
import sys
import torch
def packages():
    return {name.partition(".")[0] for name in sys.modules} - {*sys.stdlib_module_names}
before = packages()
import sam_lightning.models
import sam_lightning.optim
print(*sorted(packages() - before))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["sam_lightning"]
