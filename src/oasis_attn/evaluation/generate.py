"""Generates answers in batches, with a random generator for each sample.

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
from oasis_attn.evaluation.likelihood import new_cache
from oasis_attn.evaluation.samples import Sample, SampleLog
from oasis_attn.hub.model_info import check_lengths, eval_mode
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.modeling.packing import smallest_window

ANSWER_FIELDS = {"prompt": str, "response": str}
"""The fields of a logged sample."""


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[list[int]]:
    """The token ids of the prompts.

    Raises:
        UserError: a prompt with its new tokens is longer than the positions of the model.
    """
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
    """`repeats` continuations of each prompt, [prompts][repeats], logged batch by batch.

    Temperature 0 takes the most likely token; other temperatures sample from
    softmax(logits / temperature), with a random generator for each sample.  The generation config
    of the model and the global random generator have no effect.  The batches do not depend on what
    is in the log, so that a resumed run computes each batch as an uninterrupted run does.

    Args:
        log: samples that are in it are not generated again.
        finish: (index of the prompt, continuation) -> further fields of the logged sample.
        batch_size: prompts in a batch.  It is 1 where padding would change the results: with a
            cache, which may treat tokens by their position, and with a prefix that leaves the
            sliding windows of layers.
        cache: makes the cache of a batch; by default, that of transformers.
        stops: a continuation ends before the first of these strings, or at an end-of-text token.

    Raises:
        UserError: a prompt with its new tokens is longer than the positions of the model.
    """
    rows = check_prompts(model, tokenizer, prompts, max_new_tokens)
    ends = _end_tokens(model, tokenizer)
    longest = max(map(len, rows), default=0) + max_new_tokens
    if cache is not None or _padding_moves_prefix(model, longest):
        batch_size = 1
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


def _padding_moves_prefix(model: PreTrainedModel, longest: int) -> bool:
    """Whether padding in rows of up to `longest` tokens moves a prefix out of a sliding window."""
    prefix = prefix_of(model)
    window = None if prefix is None else smallest_window(model.config)
    return prefix is not None and window is not None and len(prefix) + longest > window


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
        past_key_values=None if cache is None else new_cache(model, cache),
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
    """The continuation up to the first end token or stop string; padding follows it."""
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:length])
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS tokens of the tokenizer and of the model's generation config."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({end for end in ends if end is not None})


def _generator(seed: int, *key: int) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """Replace the model's generation config (penalties, top-k) by an empty one for a while."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to logits / temperature: the maximum is a sample from the softmax."""

    def __init__(self, generators: list[torch.Generator], temperature: float) -> None:
        self.generators, self.temperature = generators, temperature

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_BV = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        )
        return scores / self.temperature - noise_BV.log().to(scores.device)


class _Stops(StoppingCriteria):
    """Tells for each row whether its new text contains a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.stops, self.prompt = tokenizer, stops, prompt
        # No token is shorter than a byte.
        self.tail = 1 + max((len(stop.encode()) for stop in stops), default=0)

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        start = max(self.prompt, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, start:])
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)
