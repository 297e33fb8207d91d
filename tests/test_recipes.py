"""docs/recipes.md has no option that its framework does not know, and names the versions that it was held to."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny_models import llava
from torch_mdgd.integrations.written import written_mask, written_rule

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- options: (\S+) -->\n```(\w+)\n(.*?)```", TEXT, re.DOTALL)
FRAMEWORKS = ("ms-swift", "llamafactory", "axolotl", "trl", "unsloth")


def listed(framework):
    first, *names = (DOCS / "options" / f"{framework}.txt").read_text(encoding="utf-8").splitlines()
    return first, set(names)


def of_command(code):
    words = shlex.split(code.replace("\\\n", " "))
    return {word.removeprefix("--") for word in words if word.startswith("--")}


def of_file(code):
    """Keys at the top, and those of a list's first level."""
    return set(re.findall(r"^(?:  - |    )?(\w+):", code, re.MULTILINE))


def of_script(code):
    """Keywords of every call whose function is the framework's."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = [call for call in calls if not ast.unparse(call.func).endswith("load_dataset")]
    return {keyword.arg for call in named for keyword in call.keywords}


READ = {"bash": of_command, "yaml": of_file, "python": of_script}


@pytest.mark.parametrize(("framework", "language", "code"), BLOCKS, ids=[f"{b[0]}-{i}" for i, b in enumerate(BLOCKS)])
def test_every_option_is_the_frameworks_own(framework, language, code):
    used = READ[language](code)
    assert len(used) >= 4
    assert used <= listed(framework)[1], sorted(used - listed(framework)[1])


def test_there_is_a_recipe_for_each_framework_and_its_version_is_that_of_its_options():
    assert {block[0] for block in BLOCKS} == set(FRAMEWORKS)
    for framework in FRAMEWORKS:
        name, version = listed(framework)[0].split()
        assert name == framework
        assert f"| {framework} | {version} |" in TEXT


def test_an_option_that_is_not_there_is_found():
    assert not of_command("swift sft --model m --optimiser mdgd") <= listed("ms-swift")[1]
    assert not of_file("stage: sft\nmdgd_rules: MDGD()\n") <= listed("llamafactory")[1]
    assert not of_script("SFTConfig(output='runs')") <= listed("trl")[1]


def test_every_rule_and_mask_of_the_page_can_be_read():
    found = set(re.findall(r"\b(?:MDGD|Anchor|DriftBudget|Random)\([^`\"\n]*\)", TEXT))
    assert len(found) >= 5
    for text in found:
        if text.startswith("Random"):
            written_mask(text)
        else:
            written_rule(text)(llava())


def test_frameworks_that_are_installed_here_still_have_these_options():
    """TRL alone is in the development extra."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    import inspect

    kinds = (trl.SFTConfig, trl.SFTTrainer, peft.LoraConfig)
    known = {name for kind in kinds for name in inspect.signature(kind).parameters} | {"rule"}
    for framework, language, code in BLOCKS:
        if framework == "trl":
            assert READ[language](code) <= known
