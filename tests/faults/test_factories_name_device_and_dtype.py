"""Every tensor that the package makes says where it stands and of what dtype it is: nothing follows a default."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "torch_mdgd"
FILES = sorted(ROOT.rglob("*.py"))
FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def unsaid(source: str) -> list[str]:
    """Calls of factories of torch that leave out ``device`` or ``dtype``; generators have a device alone."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
            name = ast.unparse(node.func).removeprefix("torch.")
            needed = {"device", "dtype"} if name in FACTORIES else {"device"} if name == "Generator" else set()
            if not needed <= {keyword.arg for keyword in node.keywords}:
                out.append(f"line {node.lineno}: {ast.unparse(node)}")
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_leaves_nothing_to_a_default(path):
    assert unsaid(path.read_text(encoding="utf-8")) == []


def test_what_is_left_out_is_found():
    assert len(unsaid("torch.zeros(3)\ntorch.tensor([1], dtype=d)\ntorch.Generator()\ntorch.zeros_like(x)")) == 3
    assert unsaid("torch.zeros(3, device=d, dtype=t)\ntorch.Generator(device=d)\nx.new_zeros(3)") == []
