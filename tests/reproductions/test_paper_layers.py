"""The rooms of reproductions/paper import one way, and its modules stand in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ORDER = "fields, data, models < metrics, methods < config < run, report < commands"
"""Below it are reproductions/shared and reproductions/methods. Rooms of one floor do not import each other."""

FLOORS = {room: floor for floor, rooms in enumerate(ORDER.split(" < ")) for room in rooms.split(", ")}
REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"
BELOW = ("reproductions.shared", "reproductions.methods")
PAPER = "reproductions.paper"


def name_of(path):
    parts = path.relative_to(REPRODUCTIONS.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """What a file takes from reproductions, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in FILES else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in found if name.startswith("reproductions"))


FILES = {name_of(path): path for path in sorted(REPRODUCTIONS.rglob("*.py"))}
IMPORTS = {name: set(imported(path)) for name, path in FILES.items() if name.startswith((PAPER, *BELOW))}


@pytest.mark.parametrize("name", [name for name in IMPORTS if name.startswith(f"{PAPER}.")])
def test_a_room_imports_itself_and_lower_rooms(name):
    room = name.split(".")[2]
    for other in IMPORTS[name]:
        if not other.startswith(BELOW):
            assert other.startswith(f"{PAPER}."), f"{name} imports {other}"
            below = other.split(".")[2]
            assert below == room or FLOORS[below] < FLOORS[room], f"{name} imports {other}"


def test_what_lies_below_knows_nothing_of_the_paper():
    assert not {other for name in IMPORTS if name.startswith(BELOW) for other in IMPORTS[name] if PAPER in other}


def test_no_module_stands_in_a_circle():
    tuple(TopologicalSorter(IMPORTS).static_order())
