"""The rooms of the package import one way, and its modules stand in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ORDER = (
    "checks, parallel < kernels, models < rules, masks < captures, diagnostics, storage < optimizer < backward, delta "
    "< integrations"
)
"""From the lowest floor up. Rooms of one floor do not import each other."""

FLOORS = {room: floor for floor, rooms in enumerate(ORDER.split(" < ")) for room in rooms.split(", ")}
PACKAGE = Path(__file__).parents[1] / "torch_mdgd"


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """What a file takes from the package, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in FILES else str(node.module) for name in whole]
        yield from (name for name in found if name.startswith("torch_mdgd"))


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: set(imported(path)) for name, path in FILES.items()}


def room_of(name):
    return name.split(".")[1]


def test_every_room_has_a_floor():
    assert {room_of(name) for name in FILES if "." in name} == set(FLOORS)


@pytest.mark.parametrize("name", [name for name in IMPORTS if "." in name])
def test_a_room_imports_itself_and_lower_floors(name):
    for other in IMPORTS[name]:
        assert "." in other, f"{name} imports the whole package"
        below, room = room_of(other), room_of(name)
        assert below == room or FLOORS[below] < FLOORS[room], f"{name} imports {other}"


def test_no_module_stands_in_a_circle():
    # A package is imported before its modules, so what it exports is no arrow of theirs.
    tuple(TopologicalSorter({name: IMPORTS[name] - {name.rpartition(".")[0]} for name in IMPORTS}).static_order())
