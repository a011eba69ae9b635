"""Tokenizers that no longer put BOS in front of texts, because a null has its place."""

from __future__ import annotations

import copy
import json
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from oasis_attn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "null_from_bos"  # in tokenizer_config.json


def is_without_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` is from `without_bos`, also after it was saved and loaded."""
    return bool(getattr(tokenizer, "init_kwargs", {}).get(_MARK))


def without_bos(tokenizer: PreTrainedTokenizerBase, bos: int) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` that does not put the token `bos` in front of texts.

    It is saved with its post-processor, which `AutoTokenizer` loads.  The windows and blocks of
    this library have no BOS in front with it.  A chat template is left as it is.

    Raises:
        UserError: the tokenizer has no `tokenizer.json`, adds the token by other means than a
            template of its post-processor, or adds it again when it is loaded.
    """
    changed = copy.deepcopy(tokenizer)
    backend: Any = getattr(changed, "backend_tokenizer", None)
    if backend is None:
        raise _error("it has no tokenizer.json")
    from tokenizers import Tokenizer, models

    carrier = Tokenizer(models.BPE())  # the JSON form of a post-processor needs a tokenizer
    carrier.post_processor = backend.post_processor
    rules = json.loads(carrier.to_str())
    processor = rules["post_processor"] or {"type": "none"}
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    for step in steps:
        if step["type"] == "TemplateProcessing":
            for name in ("single", "pair"):
                step[name] = _without(step[name], step["special_tokens"], bos)
            backend.post_processor = Tokenizer.from_str(json.dumps(rules)).post_processor
    ids: Any = changed("a")["input_ids"]
    if ids[:1] == [bos]:
        raise _error(f"its post-processor is {[step['type'] for step in steps]}")
    changed.init_kwargs[_MARK] = True
    with TemporaryDirectory() as folder:
        changed.save_pretrained(folder)
        loaded = type(changed).from_pretrained(folder)
    if loaded("a").input_ids[:1] == [bos]:
        raise _error(f"{type(changed).__name__} adds it again when it is loaded")
    return changed


def _without(pieces: list[Any], special: dict[str, Any], bos: int) -> list[Any]:
    """The pieces of a template, without those that put `bos` in front of a text."""
    return [
        piece
        for piece, after in zip(pieces, [*pieces[1:], {}], strict=True)
        if not (
            "Sequence" in after
            and "SpecialToken" in piece
            and special[piece["SpecialToken"]["id"]]["ids"] == [bos]
        )
    ]


def _error(reason: str) -> UserError:
    return UserError(f"null_from_bos: BOS cannot be taken out of the tokenizer: {reason}")
