"""A stage never imports a later one."""

import ast
from pathlib import Path

import pytest

import jaxrmils

PACKAGE = Path(jaxrmils.__file__).parent
STAGES = (
    "graph",
    "numerics",
    "sensitivity",
    "policies",
    "lowering",
    "evaluation",
    "artifacts",
    "data",
    "zoo",
    "cli",
)
FOR_ALL = {"progress", "statistics", "version"}


def imported_stages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names]
            package = node.module == "jaxrmils"
            modules = [f"jaxrmils.{n}" for n in names] if package else [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "jaxrmils" and len(parts) > 1:
                yield parts[1]


def test_every_folder_is_a_stage():
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} == set(STAGES) | {
        "statistics"
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_earlier_ones_alone(stage):
    allowed = set(STAGES[: STAGES.index(stage) + 1]) | FOR_ALL
    for path in (PACKAGE / stage).rglob("*.py"):
        later = set(imported_stages(path)) - allowed
        assert not later, f"{path.name} imports {sorted(later)}"
