"""A tiny LLaVA with a processor that knows the words of the drawn probes, and folders of it."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from torch_mdgd.report import drawn_probes

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:")
TEMPLATE = (
    "{% for turn in messages %}{% if turn['role'] == 'user' %}<s> USER: "
    "{% for part in turn['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% else %}ASSISTANT: {{ turn['content'][0]['text'] }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def words() -> list[str]:
    texts = [text for x in drawn_probes(6) for text in (x.question, *x.choices)]
    return sorted({word for text in texts for word in _split(text)} | {"light", "dark"})


def _split(text):
    spaced = "".join(c if c.isalnum() else f" {c} " for c in text)
    return spaced.split()


def processor() -> LlavaProcessor:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern=_punctuation(), behavior="isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _punctuation():
    from tokenizers import Regex

    return Regex(r"[,.?]")


def model(seed: int = 0, tied: bool = False) -> LlavaForConditionalGeneration:
    """With random weights that are large enough for answers to differ."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = processor().tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(
            **size,
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
    out = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return out


@torch.no_grad()
def moved(model, by=0.3, seed=1):
    """Other weights in the same model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * by * parameter.std(correction=0))
    return model
