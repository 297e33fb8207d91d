import pytest
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reproductions.mini.model.checkpoint import load_checkpoint
from reproductions.mini.world.text import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoint() -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    return load_checkpoint()
