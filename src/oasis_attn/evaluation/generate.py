"""Answers from a model, in batches, each sample's draws its own.

Axes: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from oasis_attn.data.tokens import prompt_ids
from oasis_attn.evaluation.samples import Sample, SampleLog
from oasis_attn.modeling.subject import check_lengths, eval_mode

ANSWERS = {"prompt": str, "response": str}
"""What a logged sample says."""


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[list[int]]:
    """Their token ids; `UserError` if one, with the new tokens, is too long for the model."""
    rows = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    check_lengths(model, [len(ids) + max_new_tokens for ids in rows], "prompt with max_new_tokens")
    return rows


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    log: SampleLog,
    finish: Callable[[int, str], Sample],
    stops: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    repeats: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    cache: Callable[[PreTrainedConfig], Cache] | None = None,
) -> list[list[str]]:
    """`repeats` continuations of each prompt, [prompts][repeats], logged as they come.

    Temperature 0 takes the likeliest token; any other draws from softmax(logits / temperature), by
    a generator per sample.  Neither the model's own generation settings nor the global generator
    plays a part.  Batches are cut from the whole list, whatever the log holds already, so that a
    run that was cut short and resumed computes each batch as an unbroken run does.

    Args:
        log: samples in it are not made again.
        finish: (index of the prompt, continuation) -> what else is logged with the sample.
        cache: makes the cache of a batch; default, transformers' own.  With another, batches are of
            one: what it does to a token may depend on its position, and padding would move it.
        stops: a continuation ends before the first of these, or at an end-of-text token.

    Raises:
        UserError: a prompt that, with the new tokens, is longer than the model's positions.
    """
    rows = check_prompts(model, tokenizer, prompts, max_new_tokens)
    ends = _end_tokens(model, tokenizer)
    batch_size = batch_size if cache is None else 1
    keys = list(product(range(len(prompts)), range(repeats)))
    with eval_mode(model), torch.no_grad(), _no_defaults(model):
        for start in range(0, len(keys), batch_size):
            batch = keys[start : start + batch_size]
            if all(key in log for key in batch):
                continue
            draws = [_generator(seed, *key) for key in batch] if temperature else None
            texts = _continue(
                model,
                tokenizer,
                [rows[index] for index, _ in batch],
                stops=stops,
                ends=ends,
                max_new_tokens=max_new_tokens,
                cache=cache,
                noise=None if draws is None else _Gumbel(draws, temperature),
            )
            log.add(
                {"id": index, "repeat": repeat, "prompt": prompts[index], "response": text}
                | finish(index, text)
                for (index, repeat), text in zip(batch, texts, strict=True)
            )
    return [[log[index, r]["response"] for r in range(repeats)] for index in range(len(prompts))]


def _continue(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    *,
    stops: Sequence[str],
    ends: list[int],
    max_new_tokens: int,
    cache: Callable[[PreTrainedConfig], Cache] | None,
    noise: LogitsProcessor | None,
) -> list[str]:
    pad = ends[0] if ends else 0
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
    output_BT = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        past_key_values=None if cache is None else cache(model.config),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad,
        ),
        logits_processor=LogitsProcessorList([] if noise is None else [noise]),
        stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, stops, longest)]),
    )
    return [_text(tokenizer, ids, ends, stops) for ids in output_BT[:, longest:].tolist()]


def _text(tokenizer: Any, ids: list[int], ends: list[int], stops: Sequence[str]) -> str:
    """The continuation up to the first end token or stop string; what follows is padding."""
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:length])
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end of text, and all that the model counts as ends."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({end for end in ends if end is not None})


def _generator(seed: int, *key: int) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """While open, `model` brings no generation settings (penalties, top-k) of its own."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to logits / temperature: their maximum is a draw from the softmax."""

    def __init__(self, generators: list[torch.Generator], temperature: float) -> None:
        self.generators, self.temperature = generators, temperature

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_BV = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        )
        return scores / self.temperature - noise_BV.log().to(scores.device)


class _Stops(StoppingCriteria):
    """Whether each row's new text holds one of the stop strings."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.stops, self.prompt = tokenizer, stops, prompt
        # No token is shorter than a byte.
        self.tail = 1 + max((len(stop.encode()) for stop in stops), default=0)

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        start = max(self.prompt, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, start:])
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)
