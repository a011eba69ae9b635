"""Log-likelihood of given text: windows of a corpus, and reference solutions.

Axes: N windows, B windows or solutions at once, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data.tokens import continuation_ids, joined_ids
from oasis_attn.errors import UserError
from oasis_attn.evaluation.samples import Sample, SampleLog
from oasis_attn.modeling.subject import check_lengths, eval_mode
from oasis_attn.ops.token_losses import token_losses

LOSSES = {"tokens": int, "loss": float}
"""What a logged sample says."""
MakeCache = Callable[[PreTrainedConfig], Cache]
_PIECE = 32  # tokens of a pass through a cache


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of a text's tokens, and how many tokens at the end of each are scored in it.

    Attributes:
        ids_NT: token ids, int64; BOS first in each window where the tokenizer has one.
        scored: per window; T - 1 at most, the first token having nothing before it.
        stride: tokens from one window's start to the next's; T means that none is read twice.
    """

    ids_NT: Tensor
    scored: tuple[int, ...]
    stride: int

    @property
    def sha256(self) -> str:
        """Hash of the token ids, in hexadecimal."""
        return hashlib.sha256(self.ids_NT.numpy().tobytes()).hexdigest()


def strided_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    stride: int | None = None,
    limit: int | None = None,
) -> Windows:
    """The text of all documents, a blank line between them, in windows of `window` tokens.

    With a stride below the window, each window but the first scores only its last `stride` tokens,
    so that each has at least window - stride - 1 tokens before it; without one (or with the
    window's length), windows do not overlap and score all but their first token.  What is left
    after the last whole window is dropped.

    Raises:
        UserError: a text shorter than one window.
    """
    stride = window if stride is None else stride
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    fresh = window - len(prefix)  # text tokens in a window
    step = min(stride, fresh)
    enough = math.inf if limit is None else fresh + (limit - 1) * step
    ids = joined_ids(texts, tokenizer, enough)
    count = 1 + (len(ids) - fresh) // step
    if count < 1:
        raise UserError(f"window: {window} tokens are more than the corpus gives ({len(ids)})")
    count = count if limit is None else min(count, limit)
    rows = [prefix + ids[k * step : k * step + fresh] for k in range(count)]
    later = window - 1 if stride == window else stride
    return Windows(
        ids_NT=torch.tensor(rows), scored=(window - 1, *[later] * (count - 1)), stride=stride
    )


def score_windows(
    model: PreTrainedModel,
    windows: Windows,
    *,
    log: SampleLog,
    batch_size: int,
    cache: MakeCache | None = None,
) -> list[Sample]:
    """Per window, `loss` (nats, summed) over `tokens`; logged as they come."""
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(windows.scored), batch_size):
            scored = windows.scored[start : start + batch_size]
            if all((start + row, 0) in log for row in range(len(scored))):
                continue
            ids_BT = windows.ids_NT[start : start + batch_size].to(model.device)
            losses_BT = token_losses(_logits(model, ids_BT, None, cache), ids_BT)
            log.add(
                {"id": start + row, "repeat": 0, "tokens": n, "loss": float(losses_T[-n:].sum())}
                for row, (n, losses_T) in enumerate(zip(scored, losses_BT, strict=True))
            )
    return [log[index, 0] for index in range(len(windows.scored))]


def score_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    log: SampleLog,
    batch_size: int,
    cache: MakeCache | None = None,
) -> list[Sample]:
    """Per (prompt, continuation), `loss` (nats, summed) over the continuation's `tokens`.

    The tokens are those of the two as one text, see `continuation_ids`.

    Raises:
        UserError: a pair longer than the model's positions, or without tokens to score.
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
    # Padded to the right, where no token that counts looks.
    whole = [list(chain(*pair)) for pair in batch]
    longest = max(map(len, whole))
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in whole])
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    losses_BT = token_losses(_logits(model, ids_BT, mask_BT, cache), ids_BT)
    return [
        float(losses_T[len(prompt) - 1 : len(prompt) + len(text) - 1].sum())
        for losses_T, (prompt, text) in zip(losses_BT, batch, strict=True)
    ]


def _logits(
    model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor | None, cache: MakeCache | None
) -> Tensor:
    """[B, T, V], in one pass, or piece by piece through a cache."""
    if cache is None:
        return model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    filled, pieces = cache(model.config), []
    for start in range(0, ids_BT.shape[1], _PIECE):
        part = slice(start, start + _PIECE)
        mask = None if mask_BT is None else mask_BT[:, : part.stop]
        out = model(input_ids=ids_BT[:, part], attention_mask=mask, past_key_values=filled)
        pieces.append(out.logits)
    return torch.cat(pieces, 1)
