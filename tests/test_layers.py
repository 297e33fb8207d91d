"""The package's rooms import one way: from the lowest floor up, and only what is a room's face."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

FLOORS = (
    "checks, prompts, parallel.dtensor",
    "kernels, models, parallel.ranks",
    "rules, masks",
    "captures, diagnostics",
    "storage",
    "optimizer",
    "backward, loss, delta",
    "report",
    "integrations",
)
"""From the lowest up. Rooms of one floor do not import each other."""
BASES = {"captures": {"rules.base"}, "diagnostics": {"rules.base"}, "storage": {"rules.base", "masks.base"}}
"""Of rules and masks, what these know: nothing of any one of them."""
ARROWS = 52
MODULES = 8

ROOT = Path(__file__).parents[1] / "torch_mdgd"
FACE = "__init__"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == FACE else parts)


def named_in(node: ast.AST, path: Path) -> list[str]:
    """What a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: a relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def called_in(node: ast.AST) -> list[str]:
    """What a call of ``import_module`` names, or how that begins."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    return []


def imports_of(path: Path, called: bool = True) -> set[str]:
    """The modules of the package that a file imports, inside functions too, and by calls."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in [*named_in(node, path), *(called_in(node) if called else [])]:
            if name == "torch_mdgd" or name.startswith("torch_mdgd."):
                inside = name.removeprefix("torch_mdgd").strip(".")
                while inside and inside not in FILES:
                    inside = inside.rpartition(".")[0]
                out.add(inside or FACE)
    return out


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
IMPORTS = {name: imports_of(path) for name, path in FILES.items()}
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor.split(", ")}
INSIDE = [name for name in FILES if name not in (FACE, "parallel")]


def room_of(name: str) -> str:
    return next(room for room in FLOOR if f"{name}.".startswith(f"{room}."))


def test_every_module_has_a_room():
    assert [name for name in INSIDE if not any(f"{name}.".startswith(f"{room}.") for room in FLOOR)] == []


def test_nobody_imports_the_face():
    assert [name for name in INSIDE if FACE in IMPORTS[name]] == []


@pytest.mark.parametrize("name", INSIDE)
def test_a_module_imports_its_own_room_and_lower_floors(name):
    room = room_of(name)
    for other in IMPORTS[name]:
        assert room_of(other) == room or FLOOR[room_of(other)] < FLOOR[room], f"{name} imports {other}"
        if room in BASES and room_of(other) in ("rules", "masks"):
            assert other in BASES[room], f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    tuple(TopologicalSorter({name: imports_of(FILES[name], called=False) for name in INSIDE}).static_order())


def test_there_are_few_arrows_between_rooms():
    def top(name):
        return name.split(".")[0]

    arrows = {(top(name), top(other)) for name in INSIDE for other in IMPORTS[name] if top(name) != top(other)}
    listed = ", ".join(f"{a} → {b}" for a, b in sorted(arrows))
    assert len(arrows) <= ARROWS, f"{len(arrows)} arrows: {listed}"


def test_few_modules_stand_outside_of_rooms():
    alone = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != FACE)
    assert len(alone) <= MODULES, alone
