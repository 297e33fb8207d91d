"""docs/recipes.md has no option that its framework does not know, and names the versions that it was held to."""

import ast
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from yaml import safe_load

from tests.tiny_models import llava
from torch_mdgd.integrations.written import written_mask, written_rule

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples" / "frameworks"
TEXT = (DOCS / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- options: (\S+) -->\n```(\w+)\n(.*?)```", TEXT, re.DOTALL)
FRAMEWORKS = ("ms-swift", "llamafactory", "axolotl", "trl", "unsloth")
# What a tiny model on a CPU takes others of than the recipes.
SIZES = {
    "args", "base_model", "bf16", "chat_template", "cutoff_len", "dataset", "datasets", "external_plugins",
    "gradient_accumulation_steps", "learning_rate", "logging_steps", "lora_alpha", "lora_r", "lr_scheduler",
    "max_length", "micro_batch_size", "model", "model_name_or_path", "output_dir", "per_device_train_batch_size",
    "processing_class", "r", "sequence_len", "torch_dtype", "train_dataset",
}  # fmt: skip
DOORS = {"ms-swift": "optimizer", "llamafactory": "mdgd_rule", "axolotl": "plugins", "unsloth": "rule"}


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


def settings_of(language, code):
    """Options and their values."""
    if language == "bash":
        words = shlex.split(code.replace("\\\n", " "))
        return {key.removeprefix("--"): x for key, x in pairwise(words) if key.startswith("--")}
    if language == "yaml":
        return safe_load(code)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {keyword.arg: ast.unparse(keyword.value) for call in calls for keyword in call.keywords}


@pytest.mark.parametrize("name", DOORS)
def test_an_example_is_the_recipe_in_small(name):
    """As far as that is seen without the framework; ``make example-NAME`` runs it."""
    folder = EXAMPLES / name
    language, recipe = next(block[1:] for block in BLOCKS if block[0] == name)
    script = language == "python"
    code = (folder / ("train.py" if script else "train.yaml")).read_text(encoding="utf-8")
    ours, theirs = settings_of("python" if script else "yaml", code), settings_of(language, recipe)
    if script:
        # Of its command line.
        ours["rule"] = ours["default"]
    # The model of a script is its own, and in its own folder.
    own = code[: code.index("LlamaForCausalLM(config)")] if script else ""
    extra = {*settings_of("python", own), "tap", "local_files_only"} if script else set()
    assert ours.keys() - extra <= listed(name)[1]
    shared = ours.keys() & theirs.keys() - SIZES
    assert {key: str(ours[key]).lower() for key in shared} == {key: str(theirs[key]).lower() for key in shared}
    assert DOORS[name] in shared


@pytest.mark.parametrize("name", DOORS)
def test_an_example_has_the_version_of_the_recipes_and_a_command(name):
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == set(DOORS)
    pinned = dict(x.split("==") for x in (EXAMPLES / name / "requirements.txt").read_text(encoding="utf-8").split())
    assert listed(name)[0] == f"{name} {pinned[name]}"
    command = (EXAMPLES / name / "run.sh").read_text(encoding="utf-8")
    files = re.findall(r"examples/[\w./-]+", command) + [
        f"{module.replace('.', '/')}.py" for module in re.findall(r"-m (examples[\w.]+)", command)
    ]
    assert all((ROOT / file).is_file() for file in files)
    assert files
    told = subprocess.run(["make", "-n", f"example-{name}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"sh examples/frameworks/{name}/run.sh" in told.stdout


def test_the_plugin_of_ms_swift_is_the_recipes():
    plugin = (EXAMPLES / "ms-swift" / "plugin.py").read_text(encoding="utf-8")
    assert f"```python\n{plugin}```" in TEXT
