"""MiniCPM-V-2.0: the adapter, our network of it, its own code, and slices of pictures."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from reproductions.paper.models import ModelError, load_model
from reproductions.paper.models.base import IGNORED
from reproductions.paper.models.minicpm_v2 import Adapter, image_tokens
from reproductions.paper.models.minicpm_v2_network import MiniCPMV2, MiniCPMV2Settings, sines
from reproductions.paper.models.slices import SliceSettings, best_grid, cut
from tests.reproductions.paper.questions import examples, picture
from torch_mdgd import connector

CPU = torch.device("cpu")


@pytest.fixture
def minicpm(assets):
    return load_model("minicpm-v-2", assets.model("minicpm-v-2"), "float32", CPU)


def test_labels_shifted_before_give_the_same_loss(minicpm):
    batch = minicpm.collate(examples(), answers=True)
    loss = minicpm.network(**batch).loss
    shifted = Adapter(minicpm.network.model, shifted_labels=True)
    batch["labels"] = torch.cat([batch["labels"][:, 1:], torch.full((3, 1), IGNORED)], 1)
    torch.testing.assert_close(shifted(**batch).loss, loss)
    logits = shifted(**batch).logits
    learned = batch["labels"] != IGNORED
    expected = nn.functional.cross_entropy(logits[learned], batch["labels"][learned])
    torch.testing.assert_close(loss, expected)


def test_the_loss_over_several_passes_is_divided_by_all_their_tokens(minicpm):
    batch = minicpm.collate(examples(), answers=True)
    count = int((batch["labels"] != IGNORED).sum())
    half = minicpm.network(**batch, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * half, minicpm.network(**batch).loss)


def test_image_bound_marks_every_slice_whatever_is_written_in_the_question(minicpm):
    example = examples()[0]
    example.question = "What does <image>x</image> mean?"
    batch = minicpm.collate([example, examples()[1]], answers=False)
    queries = minicpm.network.model.config.query_num
    for bounds, slices in zip(batch["image_bound"], batch["pixel_values"], strict=True):
        assert len(bounds) == len(slices)
        assert {int(end - begin) for begin, end in bounds} == {queries}
    ids, mask = batch["input_ids"], image_tokens(batch)
    assert set(ids[mask].tolist()) == {minicpm.tokenizer.unk_token_id}
    before = ids[mask.roll(-1, 1) & ~mask]
    assert set(before.tolist()) == {minicpm.tokenizer.convert_tokens_to_ids("<image>")}
    assert [len(slices) for slices in batch["pixel_values"]] == [3, 1 + 2 * (20 * 30 > 24**2)]


def test_a_tokenizer_that_takes_the_marks_apart_is_refused(minicpm, assets):
    minicpm.tokenizer = load_model("llava-1.5-7b", assets.model("llava-1.5-7b"), "float32", CPU).tokenizer
    with pytest.raises(ValueError, match="does not keep <image>, </image> and 4 times <unk> between them whole"):
        minicpm.collate(examples(), answers=False)


def test_a_tokenizer_as_sentencepiece_wrote_it(minicpm, assets, tmp_path):
    """As the published one may come: without a tokenizer.json, and of a class that lies beside the weights."""
    import sentencepiece

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((assets.model("minicpm-v-2") / name).read_bytes())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["<用户> what is this a cat <AI>"] * 50), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300, hard_vocab_limit=False, model_type="bpe", byte_fallback=True, minloglevel=2,
        user_defined_symbols=["<image>", "</image>", "<slice>", "</slice>"],
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizerWrapper", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "auto_map": {"AutoTokenizer": ["modeling_minicpmv.LlamaTokenizerWrapper", None]}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    minicpm.tokenizer = load_model("minicpm-v-2", tmp_path, "float32", CPU).tokenizer
    batch = minicpm.collate(examples(), answers=True)
    for ids, labels, bounds, example in zip(
        batch["input_ids"], batch["labels"], batch["image_bound"], examples(), strict=True
    ):
        for begin, end in bounds:
            assert minicpm.tokenizer.convert_ids_to_tokens(ids[begin - 1 : end + 1].tolist()) == [
                "<image>", *4 * ["<unk>"], "</image>"
            ]  # fmt: skip
        assert minicpm.tokenizer.decode(labels[labels != IGNORED]).strip() == f"{example.target}</s>"


def test_its_language_model_is_minicpm():
    """Scaled embeddings, scaled residuals, scaled logits, as MiniCPM-2.4B has them and Llama does not."""
    settings = MiniCPMV2Settings(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, dim_model_base=2, scale_emb=3.0, scale_depth=1.4, query_num=4, resampler_head=8,
        vision_width=8, vision_hidden=8, vision_layers=2, vision_heads=2, vision_grid=2,
    )  # fmt: skip
    torch.manual_seed(0)
    llm = MiniCPMV2(settings).llm.eval()
    ids = torch.tensor([[3, 7, 1, 12]])
    x = nn.functional.embedding(ids, llm.model.embed_tokens.weight) * 3.0
    places = torch.arange(4)
    angles = torch.outer(places, 1 / 10000 ** (torch.arange(0, 4, 2) / 4)).repeat(1, 2)

    def rotated(y):
        turned = torch.cat([-y[..., 2:], y[..., :2]], -1)
        return y * angles.cos() + turned * angles.sin()

    def normed(y, norm):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    for layer in llm.model.layers:
        y, a = normed(x, layer.input_layernorm), layer.self_attn
        q, k, v = (f(y).unflatten(-1, (2, 4)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        scores = rotated(q) @ rotated(k).transpose(-1, -2) / 4**0.5
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + a.o_proj((scores @ v).transpose(1, 2).flatten(2)) * 1.4 / 2**0.5
        y, m = normed(x, layer.post_attention_layernorm), layer.mlp
        x = x + m.down_proj(nn.functional.silu(m.gate_proj(y)) * m.up_proj(y)) * 1.4 / 2**0.5
    expected = llm.lm_head(normed(x, llm.model.norm) / (8 / 2))
    torch.testing.assert_close(llm(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_positions_of_a_grid_are_sines_of_column_and_row():
    found = sines(8, (2, 3))
    assert found.shape == (6, 8)
    for row in range(2):
        for column in range(3):
            expected = [
                f(place / 10000 ** (i / 2)) for place in (column, row) for f in (np.sin, np.cos) for i in (0, 1)
            ]
            np.testing.assert_allclose(found[3 * row + column], expected, rtol=1e-6, atol=1e-7)


def test_the_tower_stretches_its_positions_and_pads_to_patches(minicpm):
    tower = minicpm.network.model.vpm.eval()
    with torch.no_grad():
        assert tower(torch.zeros(1, 3, 17, 30)).shape == (1, 3 * 4, tower.norm.weight.numel())
        assert tower.positions(torch.Size((3, 3))) is tower.pos_embed
        square = tower.positions(torch.Size((6, 6)))
    torch.testing.assert_close(square.mean(1), tower.pos_embed.mean(1), rtol=0.2, atol=0.1)


def test_weights_of_another_shape_are_refused(assets, tmp_path):
    from safetensors.torch import load_file, save_file

    source = assets.model("minicpm-v-2")
    weights = load_file(source / "model.safetensors")
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="holds no weights"):
        load_model("minicpm-v-2", tmp_path, "float32", CPU)
    save_file({"strange": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"strange \(1,\) is no weight of MiniCPM-V-2"):
        load_model("minicpm-v-2", tmp_path, "float32", CPU)
    del weights["resampler.proj"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"it lacks resampler.proj"):
        load_model("minicpm-v-2", tmp_path, "float32", CPU)


REMOTE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel


class RemoteConfig(PretrainedConfig):
    model_type = "remote_minicpmv"

    def __init__(self, vocab_size=300, **more):
        self.vocab_size = vocab_size
        self.query_num = 2
        super().__init__(**more)


class RemoteMiniCPMV(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.llm = LlamaForCausalLM(LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
            num_attention_heads=2, tie_word_embeddings=False,
        ))
        self.vpm = nn.Linear(3, 4)
        self.resampler = nn.Linear(4, 16)
        self.post_init()

    def transform(self, image):
        return torch.ones(3, *image.size[::-1])

    def get_slice_image_placeholder(self, image, tokenizer):
        return [image], tokenizer.im_start + tokenizer.unk_token * 2 + tokenizer.im_end

    def get_vllm_embedding(self, data):
        words = self.llm.model.embed_tokens(data["input_ids"]) * 1
        for i, slices in enumerate(data["pixel_values"]):
            for pixels, (begin, end) in zip(slices, data["image_bound"][i]):
                words[i, begin:end] = self.resampler(self.vpm(pixels.mean((1, 2)))).view(2, 8)
        return words, None

    def forward(self, data, **kwargs):
        embeddings, _ = self.get_vllm_embedding(data)
        return self.llm(inputs_embeds=embeddings, position_ids=data["position_ids"], **kwargs)
"""


@pytest.fixture
def remote(assets, tmp_path, tmp_path_factory, monkeypatch):
    """A folder with weights, and beside them code with the interface of MiniCPM-V-2.0."""
    # transformers copies such code to a cache and imports it from there.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr("sys.path", [*sys.path])
    from safetensors.torch import save_file

    for file in assets.model("minicpm-v-2").glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "remote_minicpmv.py").write_text(REMOTE)
    space = {}
    exec(REMOTE, space)
    torch.manual_seed(0)
    network = space["RemoteMiniCPMV"](space["RemoteConfig"]())
    save_file(network.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "remote_minicpmv", "vocab_size": 300, "architectures": ["RemoteMiniCPMV"],
        "auto_map": {"AutoConfig": "remote_minicpmv.RemoteConfig", "AutoModel": "remote_minicpmv.RemoteMiniCPMV"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_code_beside_the_weights_runs_only_if_the_user_says_so(remote):
    (remote / "remote_minicpmv.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ValueError, match="is no weight of MiniCPM-V-2"):
        load_model("minicpm-v-2", remote, "float32", CPU)


def test_code_beside_the_weights_behind_the_adapter(remote):
    model = load_model("minicpm-v-2", remote, "float32", CPU, trust_remote_code=True)
    assert type(model.network.model).__name__ == "RemoteMiniCPMV"
    batch = model.collate(examples(), answers=True)
    assert model.tap().mask(batch).sum(1).tolist() == [2, 2, 2]
    model.network(**batch).loss.backward()
    assert connector(model.network) is model.network.model.resampler
    assert connector(model.network).weight.grad.any()
    assert len(model.generate(model.collate(examples(), answers=False), 2)) == 3


def test_code_that_does_not_run_today_says_what_to_do(remote):
    (remote / "remote_minicpmv.py").write_text("from transformers.utils.import_utils import is_torch_fx_available\n")
    with pytest.raises(ModelError, match="leave out --trust-remote-code to use this repository's implementation"):
        load_model("minicpm-v-2", remote, "float32", CPU, trust_remote_code=True)


# Slices


def test_small_pictures_stay_whole_and_large_ones_are_cut():
    settings = SliceSettings(most=9, resolution=448, patch=14)
    (whole,), grid = cut(Image.new("RGB", (300, 200)), settings)
    assert grid is None
    assert all(side % 14 == 0 for side in whole.size)
    assert whole.width * whole.height == pytest.approx(448**2, rel=0.1)
    for size in [(1344, 448), (448, 1344), (1000, 900), (4000, 3000)]:
        (overview, *slices), (columns, rows) = cut(Image.new("RGB", size), settings)
        assert len(slices) == columns * rows <= 9
        assert len({part.size for part in slices}) == 1
        for part in (overview, *slices):
            assert all(side % 14 == 0 for side in part.size)
            assert part.width * part.height == pytest.approx(448**2, rel=0.15)
        assert (columns > rows) == (size[0] > 1.5 * size[1])


def test_a_slice_has_the_shape_of_its_share_of_the_picture_rounded():
    """835 / 2 is 418 and not 417: shape 457 : 418 fits 448² in 467 × 428, which is 33 and 31 patches of 14."""
    (_, *slices), grid = cut(Image.new("RGB", (457, 835)), SliceSettings(most=9, resolution=448, patch=14))
    assert grid == (1, 2)
    assert {part.size for part in slices} == {(33 * 14, 31 * 14)}


def test_slices_together_are_the_picture():
    image = picture(0, (96, 48))
    slices, (columns, rows) = cut(image, SliceSettings(most=9, resolution=48, patch=8))
    assert (columns, rows) == (2, 1)
    assert np.array_equal(np.hstack([np.asarray(part) for part in slices[1:]]), np.asarray(image))


def test_the_grid_is_that_with_the_squarest_slices():
    assert best_grid((300, 300), 4, 9) == (2, 2)
    assert best_grid((900, 300), 3, 9) == (3, 1)
    assert best_grid((300, 900), 3, 9) == (1, 3)
    assert best_grid((300, 200), 6, 9) == (3, 2)
