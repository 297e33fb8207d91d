"""A delta as what servers load: a checkpoint and an adapter, each equal to base + delta."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration

from tests import tiny_models
from torch_mdgd import MDGD, MDGDOptimizer
from torch_mdgd.delta import apply_delta, export_adapter, export_checkpoint, save_delta
from torch_mdgd.delta.__main__ import main
from torch_mdgd.masks import Random

LAYER = "model.language_model.layers.1"


def tuned(base, path, names, dtype=None, fraction=0.1, rate=0.05):
    """Trains what these names are in, on random gradients, and writes the delta; returns the model."""
    kind = LlavaForConditionalGeneration if "llava" in base.name else Qwen2VLForConditionalGeneration
    model = kind.from_pretrained(base, **({} if dtype is None else {"dtype": dtype}))
    for name, p in model.named_parameters():
        p.requires_grad_(any(x in name for x in names))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = MDGDOptimizer(torch.optim.SGD(trained, lr=rate), MDGD(1.0, regularize=0), mask=Random(fraction))
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in trained]
    optimizer.set_gradients(task=gradients, visual=gradients)
    optimizer.step()
    assert save_delta(model, path, optimizer) > 0
    return model


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype, name
        assert torch.equal(x, other[name]), name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaVA in several files, with a processor's file beside it and a pickle that nobody wants."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    tiny_models.llava().save_pretrained(folder, max_shard_size="4KB")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    return folder


def test_a_checkpoint_loads_as_base_and_delta(base, tmp_path, capsys):
    delta, out = tmp_path / "delta.safetensors", tmp_path / "out"
    model = tuned(base, delta, [f"{LAYER}.mlp"])
    assert main(["export", str(base), str(delta), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "equal base + delta bit for bit" in printed
    assert_same(LlavaForConditionalGeneration.from_pretrained(out), model)
    assert (out / "preprocessor_config.json").read_text() == "{}"
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_only_files_that_the_delta_touches_are_rewritten(base, tmp_path):
    delta = tmp_path / "delta.safetensors"
    tuned(base, delta, [f"{LAYER}.mlp.up_proj"])
    found = export_checkpoint(base, delta, tmp_path / "out")
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    (touched,) = {file for key, file in index.items() if "layers.1.mlp.up_proj" in key and "vision" not in key}
    assert found.rewritten == (touched,)
    assert set(found.copied) == set(index.values()) - {touched}
    assert len(found.copied) > 2
    for name in found.copied:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    with safe_open(base / touched, "pt") as old, safe_open(tmp_path / "out" / touched, "pt") as new:
        assert old.metadata() == new.metadata()
        assert set(old.keys()) == set(new.keys())


def test_a_delta_of_another_dtype_names_it_in_the_configuration(base, tmp_path):
    delta = tmp_path / "delta.safetensors"
    model = tuned(base, delta, [f"{LAYER}.mlp"], dtype=torch.bfloat16)
    export_checkpoint(base, delta, tmp_path / "out")
    assert_same(LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto"), model)


def test_tied_weights_and_one_file(tmp_path):
    base, delta = tmp_path / "llava", tmp_path / "delta.safetensors"
    tiny_models.llava(tied=True).save_pretrained(base)
    model = tuned(base, delta, ["embed_tokens", "lm_head"])
    assert export_checkpoint(base, delta, tmp_path / "out").rewritten == ("model.safetensors",)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same(loaded, model)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_another_family(tmp_path):
    base, delta = tmp_path / "qwen", tmp_path / "delta.safetensors"
    tiny_models.qwen().save_pretrained(base)
    model = tuned(base, delta, ["language_model.layers.1", "merger"])
    export_checkpoint(base, delta, tmp_path / "out")
    assert_same(Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_peft_loads_as_base_and_delta(base, tmp_path, dtype, capsys):
    peft = pytest.importorskip("peft")
    delta, out = tmp_path / "delta.safetensors", tmp_path / "adapter"
    model = tuned(base, delta, [f"{LAYER}.mlp", f"{LAYER}.self_attn.q_proj"], dtype=dtype)
    assert main(["export", "--adapter", str(base), str(delta), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "equal base + delta bit for bit" in printed
    assert dtype == torch.float32 or "off by rounding" not in printed
    fresh = LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype)
    loaded = peft.PeftModel.from_pretrained(fresh, out)
    batch = tiny_models.llava_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)
    merged = loaded.merge_and_unload()
    if dtype == torch.bfloat16:
        assert_same(merged, model)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], x, rtol=0, atol=1e-7)
    assert {x.name for x in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


REFUSED = {
    "norm": ([f"{LAYER}.input_layernorm"], 0.5, "changes '.*input_layernorm.weight' of a LlamaRMSNorm"),
    "bias": (["multi_modal_projector.linear_1.bias"], 0.5, "linear_1.bias' of a Linear, and a SHiRA adapter holds wei"),
    "dense": (
        [f"{LAYER}.mlp.up_proj"],
        1.0,
        r"takes r = 10, at which a SHiRA adapter has 400 elements of .*, which has 384",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_adapter_holds_is_refused_with_the_reason(base, tmp_path, name):
    pytest.importorskip("peft")
    names, fraction, reason = REFUSED[name]
    delta = tmp_path / "delta.safetensors"
    tuned(base, delta, names, fraction=fraction)
    with pytest.raises(ValueError, match=reason):
        export_adapter(base, delta, tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["delta.safetensors"]


def test_what_no_addition_reaches_is_rounded_and_counted(base, tmp_path):
    """From 1 to 1e-30 in float32: 1 + v is zero or at least 2⁻²⁴ away from it."""
    peft = pytest.importorskip("peft")
    model = LlavaForConditionalGeneration.from_pretrained(base)
    p, own, out = model.get_parameter(f"{LAYER}.mlp.up_proj.weight"), tmp_path / "llava", tmp_path / "out"
    model.requires_grad_(False)
    p.requires_grad_(True)
    with torch.no_grad():
        p[0, 0] = 1.0
    model.save_pretrained(own)
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0))
    with torch.no_grad():
        p[0, 0] = 1e-30
    save_delta(model, tmp_path / "delta.safetensors", optimizer)
    found = export_adapter(own, tmp_path / "delta.safetensors", out)
    assert found.rounded == 1
    assert "but 1 elements that are off by rounding" in str(found)
    loaded = peft.PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(own), out).merge_and_unload()
    assert abs(float(loaded.get_parameter(f"{LAYER}.mlp.up_proj.weight")[0, 0]) - 1e-30) <= 2.0**-23
    assert export_checkpoint(own, tmp_path / "delta.safetensors", tmp_path / "whole").rounded == 0


def test_what_is_wrong_is_named_and_leaves_nothing(base, tmp_path, capsys):
    delta, other = tmp_path / "delta.safetensors", tmp_path / "llava"
    model = tuned(base, delta, [f"{LAYER}.mlp"])
    model.save_pretrained(other)
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    for arguments, message in (
        ((other, delta, tmp_path / "out"), "made for a base model with fingerprint"),
        ((tmp_path, delta, tmp_path / "out"), "has no config.json"),
        ((base, delta, full), "holds something already"),
        ((base, tmp_path / "none", tmp_path / "out"), "none"),
    ):
        assert main(["export", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def test_a_folder_of_pickles_is_refused(tmp_path, base, capsys):
    delta, pickles = tmp_path / "delta.safetensors", tmp_path / "pickles"
    tuned(base, delta, [f"{LAYER}.mlp"])
    pickles.mkdir()
    (pickles / "config.json").write_text((base / "config.json").read_text())
    (pickles / "pytorch_model.bin").write_bytes(b"")
    assert main(["export", str(pickles), str(delta), str(tmp_path / "out")]) == 1
    assert "has no safetensors files, but pickles, which are not opened: pytorch_model.bin" in capsys.readouterr().err


def test_a_delta_of_adapters_is_sent_to_peft(base, tmp_path):
    peft = pytest.importorskip("peft")
    fresh = LlavaForConditionalGeneration.from_pretrained(base)
    model = peft.get_peft_model(fresh, peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = MDGDOptimizer(torch.optim.SGD(trained, lr=1.0))
    with torch.no_grad():
        trained[0].add_(1.0)
    save_delta(model, tmp_path / "delta.safetensors", optimizer)
    with pytest.raises(ValueError, match=r"of a model with an adapter in it .*: save_pretrained of peft writes"):
        export_checkpoint(base, tmp_path / "delta.safetensors", tmp_path / "out")


def test_a_checkpoint_that_does_not_load_as_wanted_is_not_kept(base, tmp_path, monkeypatch):
    """The check compares what is loaded, and can fail."""
    delta = tmp_path / "delta.safetensors"
    tuned(base, delta, [f"{LAYER}.mlp"])
    monkeypatch.setattr("torch_mdgd.delta.export.reverted", lambda model: {})
    with pytest.raises(ValueError, match=r"does not load as base \+ delta: 3 of .* tensors differ, such as '.*mlp"):
        export_checkpoint(base, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert apply_delta(LlavaForConditionalGeneration.from_pretrained(base), delta)
