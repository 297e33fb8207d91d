"""What a model answers, and how likely it finds answers that it is given: both by its own generation.

Answers that are given are forced, token by token, so that whatever a family does between a prompt and what follows
(caches, positions, prefixes that attend both ways) is as in use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.models.folders import transformers
from torch_mdgd.models.parts import unwrap
from torch_mdgd.prompts import processed, prompt
from torch_mdgd.report.probes import Probe


@dataclass(frozen=True)
class Generated:
    """Answers of a batch.

    Attributes:
        tokens: of each row, behind its prompt: int64 (rows, steps).
        logits: before each of them, as the model gives them: by step, float32 (rows, vocabulary).
    """

    tokens: Tensor
    logits: Sequence[Tensor]


def ask(processor: Any, probes: Sequence[Probe], model: nn.Module) -> dict[str, Any]:
    """Pictures and questions as a batch on the model's device, padded on the left; numbers in the model's dtype."""
    inner: Any = unwrap(model)
    pictures, questions = [probe.image() for probe in probes], [probe.question for probe in probes]
    batch: Any = processed(processor, pictures, questions, padding_side="left")
    moved = batch.to(inner.device, inner.dtype)
    # What PaliGemma's processor adds for training says nothing of these prompts.
    return {name: x for name, x in moved.items() if name != "labels"}


def answer_tokens(processor: Any, question: str, answer: str) -> list[int]:
    """The tokens of an answer behind a question, as the chat template writes it, without what ends it.

    Raises:
        ValueError: the answer has no tokens.
    """
    tokenizer, before = processor.tokenizer, prompt(processor, question)
    tokens: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if getattr(processor, "chat_template", None):
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        written: str = processor.apply_chat_template(turns)
        place = written.find(answer, len(before)) if written.startswith(before) else -1
        if place >= 0:
            both = (before, written[: place + len(answer)])
            head, whole = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in both)
            if whole[: len(head)] == head:
                tokens = whole[len(head) :]
    if not tokens:
        raise ValueError(f"the tokenizer makes no tokens of the answer {answer!r}")
    return tokens


def generate(
    model: nn.Module,
    processor: Any,
    batch: Mapping[str, Any],
    steps: int,
    forced: Sequence[Sequence[int]] | None = None,
) -> Generated:
    """Answer greedily, without penalties or sampling, whatever the model's own settings.

    Args:
        model: a model of transformers, in evaluation mode.
        processor: its own.
        batch: prompts, padded on the left.
        steps: the most tokens of an answer.
        forced: the tokens of each row's answer, which it then gives.
    """
    library, inner = transformers(), unwrap(model)
    pad = processor.tokenizer.pad_token_id
    length = batch["input_ids"].shape[1]
    settings = library.GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        # Unused by greedy search, which warns of others.
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        pad_token_id=pad if pad is not None else processor.tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    more: dict[str, Any] = {}
    if forced is not None:
        more["logits_processor"] = library.LogitsProcessorList([_Forced(forced, length, settings.pad_token_id)])
    generating: Any = inner
    out = generating.generate(**batch, generation_config=settings, **more)
    return Generated(out.sequences[:, length:], out.logits)


class _Forced:
    """Leaves each row one token to choose, and padding behind its answer."""

    def __init__(self, answers: Sequence[Sequence[int]], length: int, pad: int) -> None:
        self.answers, self.length, self.pad = answers, length, pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.length
        chosen = [answer[step] if step < len(answer) else self.pad for answer in self.answers]
        only = torch.full_like(scores, -torch.inf)
        at = torch.tensor(chosen, dtype=torch.int64, device=only.device)
        return only.scatter_(1, at[:, None], 0)
