"""The rooms of reproductions import one way, and its modules stand in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ORDERS = {
    "": "shared < methods < mini, paper < __main__",
    "mini": "rules, world < model < experiment < report, demo < commands",
    "paper": "data, models < metrics < config < run, report < commands",
}
"""The rooms of reproductions, and of its experiments. Rooms of one floor do not import each other."""

REPRODUCTIONS = Path(__file__).parents[2] / "reproductions"


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
        yield from (name for name in found if name.startswith("reproductions."))


FILES = {name_of(path): path for path in sorted(REPRODUCTIONS.rglob("*.py"))}
IMPORTS = {name: set(imported(path)) for name, path in FILES.items()}


def room_of(name, house):
    """The room of a house that a module is in; None if it is outside, or the house itself."""
    start = f"reproductions.{house}." if house else "reproductions."
    return name.removeprefix(start).split(".")[0] if name.startswith(start) else None


@pytest.mark.parametrize("house", ORDERS)
def test_a_room_imports_itself_and_lower_rooms(house):
    floors = {room: floor for floor, rooms in enumerate(ORDERS[house].split(" < ")) for room in rooms.split(", ")}
    rooms = {name: room for name in FILES if (room := room_of(name, house))}
    assert set(rooms.values()) == set(floors)
    for name, room in rooms.items():
        for below in {rooms[other] for other in IMPORTS[name] if other in rooms}:
            assert below == room or floors[below] < floors[room], f"{name} imports {below}"


def test_no_module_stands_in_a_circle():
    tuple(TopologicalSorter(IMPORTS).static_order())
