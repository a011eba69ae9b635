"""Tokenizers that put the tokens of a prefix before every text (see `prefix_export`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oasis_attn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = "<prefix>"  # a name in the template of the post-processor, not the text of a token


def prefix_in_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that `save_tokenizer_with_prefix` put before every text; none without it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    processor = backend and json.loads(backend.to_str())["post_processor"]
    for step in post_processor_steps(processor or None):
        found = step.get("special_tokens", {})
        if step["type"] == "TemplateProcessing" and PIECE in found:
            return tuple(found[PIECE]["ids"])
    return ()


def check_no_prefix_in_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: str | Path | None = None
) -> None:
    """Raise `UserError` if `tokenizer`, that of `model`, puts a prefix before every text.

    Windows of a text have no special tokens but BOS, so that they would be without the prefix.
    """
    tokens = prefix_in_tokenizer(tokenizer)
    if tokens:
        where = "tokenizer: it" if model is None else f"model: the tokenizer of {str(model)!r}"
        raise UserError(
            f"{where} has the prefix {list(tokens)}, which windows of a text would lack; use the"
            " folder that `oasis prefix` wrote"
        )


def post_processor_steps(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of the post-processor in `tokenizer.json`."""
    if processor is None:
        return []
    return list(processor["processors"]) if processor["type"] == "Sequence" else [processor]
