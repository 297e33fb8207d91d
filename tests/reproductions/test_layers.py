"""Rooms of the experiments import one way, and what both use knows neither."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOMS = {
    "mini": "rules, world < model < experiment < report, demo < commands",
}
"""The rooms of each experiment, from the lowest floor up. Rooms of one floor do not import each other."""
BELOW = ("shared", "methods")
"""What lies below every experiment."""

ROOT = Path(__file__).parents[2]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """The modules of reproductions that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("reproductions."):
                yield name if name in FILES else name.rpartition(".")[0]


FILES = {name_of(path): path for path in sorted((ROOT / "reproductions").rglob("*.py"))}
IMPORTS = {name: set(imports_of(path)) for name, path in FILES.items()}
MODULES = {
    part: [name for name in IMPORTS if f"{name}.".startswith(f"reproductions.{part}.")] for part in (*ROOMS, *BELOW)
}


@pytest.mark.parametrize("experiment", ROOMS)
def test_a_room_imports_itself_and_lower_floors(experiment):
    floors = {room: i for i, floor in enumerate(ROOMS[experiment].split(" < ")) for room in floor.split(", ")}
    rooms = {name: name.split(".")[2] for name in MODULES[experiment] if name.count(".") > 1}
    assert set(rooms.values()) == set(floors)
    for name, room in rooms.items():
        for other in (other for other in IMPORTS[name] if other.split(".")[1] not in BELOW):
            assert other in rooms, f"{name} imports {other}, which is in no room of {experiment}"
            assert rooms[other] == room or floors[rooms[other]] < floors[room], f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for part in BELOW for name in MODULES[part]])
def test_what_both_use_knows_no_experiment(name):
    assert {other.split(".")[1] for other in IMPORTS[name]} <= set(BELOW)


@pytest.mark.parametrize("part", MODULES)
def test_no_module_imports_itself_by_way_of_others(part):
    tuple(TopologicalSorter({name: IMPORTS[name] for name in MODULES[part]}).static_order())
