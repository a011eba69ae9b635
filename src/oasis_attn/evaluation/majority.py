"""Answers of the majority task: whether the model predicts them, and its loss there and elsewhere.

Axes: N windows, B windows in a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data.majority import QUESTION
from oasis_attn.data.windows import Windows
from oasis_attn.errors import UserError
from oasis_attn.evaluation.likelihood import MakeCache, window_logits
from oasis_attn.evaluation.samples import Sample, SampleLog
from oasis_attn.hub.model_info import eval_mode
from oasis_attn.ops.token_losses import token_losses

ANSWER_COUNTS = {
    "answers": int, "others": int, "right": float, "answer_loss": float, "other_loss": float,
}  # fmt: skip
"""The fields of a logged sample."""


def question_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that an answer follows; `UserError` if the tokenizer does not have it."""
    found = tokenizer.get_vocab().get(QUESTION)
    if found is None:
        raise UserError(
            f"tokenizer: it has no token {QUESTION!r}, so the model was not trained on the corpus"
            " majority"
        )
    return int(found)


def score_answers(
    model: PreTrainedModel,
    windows: Windows,
    question: int,
    *,
    log: SampleLog,
    batch_size: int,
    cache: MakeCache | None = None,
    first: Sequence[int] = (),
) -> list[Sample]:
    """For each window, sums over its answers and over its other tokens, logged batch by batch.

    A token is an answer if the one before it is `question`.  All earlier tokens are those of the
    text, so that an error does not lead to others; the tokens `first` precede each window.  `right`
    is the number of answers that have the largest logit of the whole vocabulary; losses are in
    nats, summed.
    """
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(windows), batch_size):
            positions = windows.positions[start : start + batch_size]
            if all((position, 0) in log for position in positions):
                continue
            ids_BT = windows.ids_NT[start : start + batch_size].to(model.device)
            logits_BTV = window_logits(model, ids_BT, None, cache, first)
            losses_BT = token_losses(logits_BTV, ids_BT)
            right_BT = logits_BTV[:, :-1].argmax(-1) == ids_BT[:, 1:]
            answer_BT = ids_BT[:, :-1] == question
            log.add(
                {
                    "id": position,
                    "repeat": 0,
                    "answers": int(answer_T.sum()),
                    "others": int((~answer_T).sum()),
                    "right": float(right_T[answer_T].sum()),
                    "answer_loss": float(losses_T[answer_T].sum()),
                    "other_loss": float(losses_T[~answer_T].sum()),
                }
                for position, answer_T, right_T, losses_T in zip(
                    positions, answer_BT, right_BT, losses_BT, strict=True
                )
            )
    return [log[position, 0] for position in windows.positions]
