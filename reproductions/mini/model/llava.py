"""The small LLaVA, about 1.6 million parameters, and its checkpoint."""

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from reproductions.mini.world.pictures import SIZE
from reproductions.mini.world.text import IMAGE, IMAGE_TOKENS

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "pretrained"
"""The pre-trained model that comes with the repository."""

SECOND_CHECKPOINT = CHECKPOINT.with_name("second")
"""Another, pre-trained from other random weights on other pictures."""

WIDTH = 128
_PATCH = 12
_LONGEST_ANSWER = 10


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A new model with random weights (from torch's global generator), in float32."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=_PATCH,
        projection_dim=WIDTH,
    )
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    # The usual 0.02 leaves so narrow a decoder on a plateau for hundreds of steps.
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=_LONGEST_ANSWER, **special)
    return model


def patch_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the vision tower hands to the projector: (batch, 16, 128) from pixels (batch, 3, 48, 48)."""
    return model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]


def save_checkpoint(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer to the folder `path`."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def load_checkpoint(path: Path = CHECKPOINT) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """Read a checkpoint from the folder `path`, without network: the model in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: `path` holds no checkpoint.
    """
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"{path} holds no checkpoint (model.safetensors); make one with `mini pretrain`")
    model = LlavaForConditionalGeneration.from_pretrained(path, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer
