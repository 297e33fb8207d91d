"""The models: batches, what stands at image tokens, answers, and weights on disk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.auto import image_processing_auto
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from reproductions.paper.models import ModelError, commit_of_weights, load_model
from reproductions.paper.models.base import IGNORED
from reproductions.paper.run.estimate import size_of
from tests.reproductions.paper.questions import examples, picture
from torch_mdgd import MDGDOptimizer, connector, last_decoder_layers, mdgd_backward

CPU = torch.device("cpu")
FAMILIES = [
    "llava-1.5-7b", "minicpm-v-2", "minicpm-v-4.6", "qwen2.5-vl-3b", "qwen3-vl-2b", "internvl3.5-1b", "smolvlm2-2.2b",
]  # fmt: skip
"""One size of each."""


@pytest.fixture(params=FAMILIES)
def model(request, assets):
    return load_model(request.param, assets.model(request.param), "float32", CPU)


def test_pictures_are_prepared_by_pillow(model, assets, monkeypatch):
    """Whatever else is installed: torchvision's processors, which transformers would take, have other pixels."""
    asked, resolve = [], image_processing_auto._resolve_backend

    def resolved(backend, *arguments):
        asked.append(resolve(backend, *arguments))
        return asked[-1]

    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(image_processing_auto, "_resolve_backend", resolved)
    load_model(model.name, assets.model(model.name), "float32", CPU)
    assert set(asked) <= {"pil"}


def test_a_run_knows_the_commit_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert commit_of_weights("smolvlm2-2.2b", None) is None, "they are not there yet"
    here, commit = tmp_path / "models--some--weights", "0123456789" * 4
    for path, content in ((f"snapshots/{commit}/config.json", "{}"), ("refs/main", commit)):
        (here / path).parent.mkdir(parents=True)
        (here / path).write_text(content)
    assert commit_of_weights("smolvlm2-2.2b", "some/weights") == commit
    for folder in (tmp_path, tmp_path / "missing"):
        assert commit_of_weights("smolvlm2-2.2b", folder) is None, "a folder has no commit"


def test_labels_are_the_answers_alone(model):
    batch = model.collate(examples(), answers=True)
    for ids, labels, mask, example in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], examples(), strict=True
    ):
        learned = labels != IGNORED
        assert model.tokenizer.decode(labels[learned]) == (
            getattr(model, "before_answer", "") + example.target + model.tokenizer.eos_token
        )
        assert torch.equal(ids[learned], labels[learned])
        last = int(mask.nonzero().max())
        assert bool(learned[last]), "the answer comes last"
        assert not labels[mask == 0].ne(IGNORED).any()
        assert example.question in model.tokenizer.decode(ids[~learned])


def test_a_text_that_names_the_picture_s_token_is_a_text(model):
    token = model.placeholder or "<image>"
    asked = SimpleNamespace(image=picture(0), question=f"what is {token}?", target=f"{token}.")
    for answers in (True, False):
        batch = model.collate([asked, *examples()], answers=answers)
        seen = model.tap().mask(batch).sum(1)
        assert torch.isfinite(model.network(**batch).logits).all()
        plain = SimpleNamespace(image=picture(0), question="what is it?", target="it.")
        assert torch.equal(seen, model.tap().mask(model.collate([plain, *examples()], answers=answers)).sum(1))


def test_a_batch_is_its_examples_one_by_one(model):
    """Padding on either side, and pictures of other sizes in the batch, change nothing."""
    whole = model.network(**model.collate(examples(), answers=True)).logits
    batch = model.collate(examples(), answers=True)
    prompts = model.collate(examples(), answers=False)
    texts = model.generate(prompts, 5)
    for i, example in enumerate(examples()):
        alone = model.network(**model.collate([example], answers=True)).logits[0]
        torch.testing.assert_close(whole[i][batch["attention_mask"][i].bool()], alone, rtol=1e-4, atol=1e-4)
        assert model.generate(model.collate([example], answers=False), 5) == [texts[i]]


def test_generation_is_greedy_step_by_step(model):
    batch = model.collate(examples()[:1], answers=False)
    tokens = batch["input_ids"]
    for _ in range(4):
        more = {**batch, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if "mm_token_type_ids" in batch:
            kinds = batch["mm_token_type_ids"]
            more["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, tokens.shape[1] - kinds.shape[1]))
        tokens = torch.cat([tokens, model.network(**more).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if tokens[0, -1] == model.tokenizer.eos_token_id:
            break
    words = tokens[0, batch["input_ids"].shape[1] :]
    assert model.generate(batch, 4) == [model.tokenizer.decode(words, skip_special_tokens=True).strip()]


def test_image_tokens_are_what_a_change_of_the_picture_changes_first(model):
    """What enters the decoder differs at image tokens, and nowhere else."""
    entering = []
    layer = last_decoder_layers(model.network, 3)[0]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    same, other = examples()[0], examples()[0]
    other.image = picture(99)
    with torch.no_grad():
        for example in (same, other):
            batch = model.collate([example], answers=False)
            model.network(**batch)
    handle.remove()
    changed = (entering[0] != entering[1]).any(-1)
    assert torch.equal(changed, model.tap().mask(batch))
    assert changed.any()


def test_the_tap_gives_one_feature_a_sample(model):
    batch = model.collate(examples(), answers=False)
    with torch.no_grad():
        tap = model.tap()
        _, z = tap(model.network, batch)
        _, last = tap.last_image_token()(model.network, batch)
        _, instruction = tap.last_instruction_token()(model.network, batch)
    assert len(last) == len(instruction) == 3
    counts = tap.mask(batch).sum(1).cumsum(0)
    assert len(z) == counts[-1]
    assert torch.equal(last, z[counts - 1])
    assert tap.last_instruction_token().mask(batch)[:, -1].all(), "padding is on the left"


def test_a_step_of_mdgd_moves_layers_and_connector(model):
    from reproductions.methods.base import train_last

    parameters = train_last(model.network, 2)
    assert {id(p) for p in parameters} <= {
        id(p) for part in (*last_decoder_layers(model.network, 2), connector(model.network)) for p in part.parameters()
    }
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=1e-2))
    before = [p.detach().clone() for p in parameters]
    for _ in range(2):
        mdgd_backward(model.network, optimizer, model.collate(examples(), answers=True), tap=model.tap())
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.diagnostics["visual_loss"] > 0
    still = [bool((p == x).all()) for p, x in zip(parameters, before, strict=True)]
    assert not any(still)


def test_weights_are_the_same_again(model, assets):
    again = load_model(model.name, assets.model(model.name), "float32", CPU)
    for (name, p), (other, q) in zip(model.network.named_parameters(), again.network.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
    assert sum(p.numel() for p in model.network.parameters()) < 50_000
    assert not again.network.training


@pytest.mark.parametrize("name", ["llava-1.5-7b", "minicpm-v-4.6"])
def test_weights_with_one_missing_are_refused(name, assets, tmp_path):
    """transformers fills the gap with random numbers, and its warning is lost among those of a run."""
    for file in assets.model(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if "layers.1." in key and "norm" not in key and "vision" not in key)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not hold the weights of .*it lacks .*{lost.split('layers.1.')[1]}"):
        load_model(name, tmp_path, "float32", CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_that_cannot_be_read_are_named_with_what_to_do(name, assets, tmp_path):
    for file in assets.model(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"half of ")
    with pytest.raises(ModelError, match=rf"{name}: could not read {tmp_path}: .*--set source=FOLDER"):
        load_model(name, tmp_path, "float32", CPU)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "minicpm-v-4.6"])
def test_generation_settings_of_the_weights_do_not_matter(name, assets):
    model = load_model(name, assets.model(name), "float32", CPU)
    batch = model.collate(examples(), answers=False)
    expected = model.generate(batch, 8)
    model.network.generation_config.update(repetition_penalty=50.0, num_beams=2)
    assert model.generate(batch, 8) == expected


# LLaVA


@pytest.fixture
def llava(assets):
    return load_model("llava-1.5-7b", assets.model("llava-1.5-7b"), "float32", CPU)


def test_the_instruction_of_llava(llava):
    example = examples()[0]
    tokens = llava.encode(example.image, example.question).tokens
    assert tokens.count(llava.tokenizer.bos_token_id) == 1
    assert llava.tokenizer.decode(tokens[1:]) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: {4 * '<image>'}\nWhat is this? ASSISTANT:"
    )


@pytest.mark.parametrize("size", [(64, 16), (16, 64), (32, 32)])
def test_llava_sees_the_whole_picture_on_a_square(llava, size):
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, 0, size[0] // 4, size[1] // 4))
    seen = llava.encode(image, "?").pictures["pixel_values"][0].mean(0)
    dark, light = ((value - torch.tensor(llava.pixels.image_mean)) / torch.tensor(llava.pixels.image_std)
                   for value in (0.0, 1.0))  # fmt: skip
    assert float(seen.min()) == pytest.approx(float(dark.mean()), abs=0.6), "the corner is there"
    shares = [float((seen > 0.7 * light.mean()).double().mean()), float((seen.abs() < 0.3).double().mean())]
    full = size[0] * size[1] / max(size) ** 2
    np.testing.assert_allclose(shares, [full * 15 / 16, 1 - full], atol=0.1)


# MiniCPM-V 4.6


@pytest.mark.parametrize("size", [(20, 20), (60, 30), (30, 60)])
def test_the_instruction_of_minicpm_v_4_6_is_that_of_transformers_own_processor(size, assets):
    """Which cannot be made without torchvision, so that its parts are asked."""
    from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor

    model = load_model("minicpm-v-4.6", assets.model("minicpm-v-4.6"), "float32", CPU)
    image = Image.new("RGB", size)
    names = ["image_start_token", "image_end_token", "slice_start_token", "slice_end_token", "image_token",
             "image_id_start_token", "image_id_end_token"]  # fmt: skip
    theirs = SimpleNamespace(slice_mode=True, **{name: getattr(model.tokenizer, name) for name in names})
    seen = model.pixels(images=[image], return_tensors="pt")
    picture = MiniCPMV4_6Processor.replace_image_token(theirs, seen, 0, image_token_divisor=16)
    (picture,) = MiniCPMV4_6Processor._prepend_local_ids(theirs, ["<|image_pad|>"], [picture], "<|image_pad|>")
    expected = f"<|im_start|>user\n{picture}\nWhy?</s>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(model.encode(image, "Why?").tokens) == expected
    assert picture.count("<slice>") == (0 if size == (20, 20) else 2)


# Models of today, by their own chat templates and image processors.


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # As the hub shows them; InternVL3.5 by the table of its report: 304.01 M of vision, 751.63 M and 4.41 B of
        # language, and the projector.
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen3-vl-2b", 2_127_532_032),
        ("qwen3-vl-4b", 4_437_815_808),
        ("internvl3.5-1b", 1_060_824_064),
        ("internvl3.5-4b", 4_732_415_488),
        ("smolvlm2-2.2b", 2_246_784_880),
    ],
)
def test_skeletons_have_the_published_sizes(name, total):
    assert size_of(name).total == total


PROCESSORS = {
    "qwen2.5-vl-3b": (Qwen2_5_VLProcessor, "<|vision_start|>{}<|vision_end|>What is this?"),
    "qwen3-vl-2b": (Qwen3VLProcessor, "<|vision_start|>{}<|vision_end|>What is this?"),
    "internvl3.5-1b": (InternVLProcessor, "{}\nWhat is this?"),
    "smolvlm2-2.2b": (SmolVLMProcessor, "User:{}What is this?"),
}


@pytest.mark.parametrize("size", [(20, 20), (60, 30), (30, 60)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_instruction_is_that_of_transformers_own_processor(name, size, assets):
    """Which cannot be made without torchvision, so that its part for pictures is asked."""
    processor, form = PROCESSORS[name]
    model = load_model(name, assets.model(name), "float32", CPU)
    image = Image.new("RGB", size)
    seen = model.pixels(images=[image], return_tensors="pt", **getattr(processor, "images_kwargs", {}))
    theirs = SimpleNamespace(
        image_processor=model.pixels, image_token=model.placeholder, image_seq_length=4, image_seq_len=4,
        start_image_token="<img>", end_image_token="</img>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )  # fmt: skip
    written = processor.replace_image_token(theirs, seen, 0)
    tokens = model.encode(image, "What is this?").tokens
    assert form.format(written) in model.tokenizer.decode(tokens)
    assert written.count(model.placeholder) == int(model.tap().mask(model.collate([Asked(image)], answers=False)).sum())


class Asked(SimpleNamespace):
    def __init__(self, image):
        super().__init__(image=image, question="What is this?", target="cat")


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_answer_is_put_as_the_chat_template_puts_it(name, assets):
    model = load_model(name, assets.model(name), "float32", CPU)
    content = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    talk = [{"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]  # fmt: skip
    whole = model.tokenizer.apply_chat_template(talk, tokenize=False)
    asked = model.tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    taught = model.tokenizer.decode(model.answer_tokens("a dog"))
    assert whole == f"{asked}{taught}\n"


def test_a_processors_template_goes_before_its_tokenizers(assets, tmp_path):
    for file in assets.model("qwen3-vl-2b").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    own = "{% for m in messages %}[{% for p in m.content %}{{ p.text or '<|image_pad|>' }}{% endfor %}]{% endfor %}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    model = load_model("qwen3-vl-2b", tmp_path, "float32", CPU)
    text = model.tokenizer.decode(model.encode(Image.new("RGB", (20, 20)), "Why?").tokens)
    assert text.replace("<|image_pad|>", "") == "[Why?]"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": own.replace("<|image_pad|>", "")}))
    with pytest.raises(ModelError, match=r"does not write <\|image_pad\|> for a picture"):
        load_model("qwen3-vl-2b", tmp_path, "float32", CPU)
