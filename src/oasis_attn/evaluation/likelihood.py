"""Log-likelihood of given text: windows of a corpus, and reference solutions.

Axes: N windows, B windows or solutions in a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data.tokens import continuation_ids
from oasis_attn.data.windows import Windows
from oasis_attn.errors import check_type
from oasis_attn.evaluation.samples import Sample, SampleLog
from oasis_attn.hub.model_info import check_lengths, eval_mode
from oasis_attn.ops.token_losses import token_losses

LOSS_FIELDS = {"tokens": int, "loss": float}
"""The fields of a logged sample."""
MakeCache = Callable[[PreTrainedConfig], Cache]
_PIECE = 32  # tokens in one forward pass with a cache


def score_windows(
    model: PreTrainedModel,
    windows: Windows,
    *,
    log: SampleLog,
    batch_size: int,
    cache: MakeCache | None = None,
    first: Sequence[int] = (),
) -> list[Sample]:
    """For each window the `loss` (nats, summed) of its scored `tokens`, logged batch by batch.

    The tokens `first` precede each window.  A sample's `id` is the position of the window in the
    text, so that a log can be resumed with another number of windows.
    """
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(windows), batch_size):
            batch = slice(start, start + batch_size)
            positions, scored = windows.positions[batch], windows.scored[batch]
            if all((position, 0) in log for position in positions):
                continue
            ids_BT = windows.ids_NT[batch].to(model.device)
            losses_BT = token_losses(window_logits(model, ids_BT, None, cache, first), ids_BT)
            log.add(
                {"id": position, "repeat": 0, "tokens": n, "loss": float(losses_T[-n:].sum())}
                for position, n, losses_T in zip(positions, scored, losses_BT, strict=True)
            )
    return [log[position, 0] for position in windows.positions]


def score_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    log: SampleLog,
    batch_size: int,
    cache: MakeCache | None = None,
) -> list[Sample]:
    """For each (prompt, continuation), the `loss` (nats, summed) of the continuation's `tokens`.

    The tokens are those of both as one text; see `continuation_ids`.

    Raises:
        UserError: a pair that is longer than the positions of the model, or has no tokens to score.
    """
    rows = [continuation_ids(prompt, text, tokenizer) for prompt, text in pairs]
    check_lengths(model, [len(prompt) + len(text) for prompt, text in rows], "solution")
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            if all((start + row, 0) in log for row in range(len(batch))):
                continue
            losses = _continuation_losses(model, batch, cache)
            log.add(
                {"id": start + row, "repeat": 0, "tokens": len(text), "loss": loss}
                | {"prompt": pairs[start + row][0], "continuation": pairs[start + row][1]}
                for row, ((_, text), loss) in enumerate(zip(batch, losses, strict=True))
            )
    return [log[index, 0] for index in range(len(rows))]


def _continuation_losses(
    model: PreTrainedModel,
    batch: Sequence[tuple[list[int], list[int]]],
    cache: MakeCache | None,
) -> list[float]:
    # Padding on the right: causal attention of the tokens before it does not see it.
    whole = [list(chain(*pair)) for pair in batch]
    longest = max(map(len, whole))
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in whole])
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    losses_BT = token_losses(window_logits(model, ids_BT, mask_BT, cache), ids_BT)
    return [
        float(losses_T[len(prompt) - 1 : len(prompt) + len(text) - 1].sum())
        for losses_T, (prompt, text) in zip(losses_BT, batch, strict=True)
    ]


def new_cache(model: PreTrainedModel, cache: MakeCache) -> Cache:
    """What `cache` makes for `model`; `UserError` if it is no cache."""
    made = cache(model.config)
    check_type("cache", made, Cache, "a cache of transformers, which the function must return")
    return made


def window_logits(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    cache: MakeCache | None,
    first: Sequence[int] = (),
) -> Tensor:
    """Logits [B, T, V] behind the tokens `first`, in one pass, or in pieces with a cache."""
    if first:
        assert mask_BT is None  # the rows are of one length
        ids_BT = torch.cat([ids_BT.new_tensor([*first]).expand(len(ids_BT), -1), ids_BT], 1)
        return window_logits(model, ids_BT, None, cache)[:, len(first) :]
    if cache is None:
        return model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    filled, pieces = new_cache(model, cache), []
    for start in range(0, ids_BT.shape[1], _PIECE):
        part = slice(start, start + _PIECE)
        mask = None if mask_BT is None else mask_BT[:, : part.stop]
        out = model(input_ids=ids_BT[:, part], attention_mask=mask, past_key_values=filled)
        pieces.append(out.logits)
    return torch.cat(pieces, 1)
