"""A random Qwen2.5-VL in a folder, with its processor and a few pictures, as frameworks load them: no download.

``python -m examples.tiny_folder FOLDER`` makes FOLDER/model, FOLDER/pictures and FOLDER/data.jsonl, and what
LLaMA-Factory and Axolotl want beside.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)

try:
    from transformers import Qwen2VLVideoProcessor
except ImportError:  # without torchvision
    Qwen2VLVideoProcessor = None

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part['text'] %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "green", "blue", "black")


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens of Qwen2.5-VL."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
        model_max_length=512,
    )  # fmt: skip


def config(words: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Two layers of width 16."""
    ids = dict(zip(SPECIAL, words.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    # Twice, since older releases read rope_scaling.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    sizes = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config={**sizes, **ends, "rope_parameters": rope, "pad_token_id": ids["<|endoftext|>"]},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 24,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        tie_word_embeddings=False,
        **ends,
    )


def write(folder: Path, rows: int = 8) -> Path:
    """FOLDER/model, FOLDER/pictures, and the same rows in the forms that frameworks read.

    FOLDER/data.jsonl has ``messages`` and ``images``, which FOLDER/dataset_info.json explains to LLaMA-Factory.
    FOLDER/axolotl/data.jsonl has the pictures inside the messages.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config(words))
    model.save_pretrained(folder / "model")
    pixels = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    more = {} if Qwen2VLVideoProcessor is None else {"video_processor": Qwen2VLVideoProcessor(**pixels)}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**pixels), words, **more, chat_template=TEMPLATE)
    processor.save_pretrained(folder / "model")
    lines, inside = [], []
    for i in range(rows):
        colour = COLOURS[i % len(COLOURS)]
        picture = Image.new("RGB", (56, 56), "white")
        ImageDraw.Draw(picture).rectangle((8, 8, 20 + 2 * i, 40), fill=colour)
        picture.save(folder / "pictures" / f"{i}.png")
        ask = {"role": "user", "content": "<image>Colour?"}
        answer = {"role": "assistant", "content": colour}
        place = str((folder / "pictures" / f"{i}.png").resolve())
        lines.append({"messages": [ask, answer], "images": [place]})
        parts = [{"type": "image", "path": place}, {"type": "text", "text": "Colour?"}]
        said = [{"type": "text", "text": colour}]
        inside.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]})
    for name, found in (("data.jsonl", lines), ("axolotl/data.jsonl", inside)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(x) + "\n" for x in found), encoding="utf-8")
    info = {
        "drawn": {
            "file_name": "data.jsonl", "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        }
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")))
