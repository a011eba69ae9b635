"""Corpora by name, tokenizers trained on them, blocks to train on and windows to measure on.

Names that need torch are imported on first use, so that a corpus can be looked up without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oasis_attn.data.corpora import CORPORA, Corpus, calibration_corpora, load_corpus, whole_file
from oasis_attn.lazy import import_on_first_use

if TYPE_CHECKING:  # for type checkers: the names that `__getattr__` imports
    from oasis_attn.data.blocks import TokenBlocks, collate, token_blocks
    from oasis_attn.data.tokenizer import (
        corpus_tokenizer,
        fixed_vocab_size,
        tokenizer_sha256,
        train_tokenizer,
    )
    from oasis_attn.data.windows import HeldOut, Windows, as_windows, held_out_windows, read_windows

_HOMES = {
    "HeldOut": "oasis_attn.data.windows",
    "TokenBlocks": "oasis_attn.data.blocks",
    "Windows": "oasis_attn.data.windows",
    "as_windows": "oasis_attn.data.windows",
    "collate": "oasis_attn.data.blocks",
    "corpus_tokenizer": "oasis_attn.data.tokenizer",
    "fixed_vocab_size": "oasis_attn.data.tokenizer",
    "held_out_windows": "oasis_attn.data.windows",
    "read_windows": "oasis_attn.data.windows",
    "token_blocks": "oasis_attn.data.blocks",
    "tokenizer_sha256": "oasis_attn.data.tokenizer",
    "train_tokenizer": "oasis_attn.data.tokenizer",
}

__all__ = [
    "CORPORA",
    "Corpus",
    "HeldOut",
    "TokenBlocks",
    "Windows",
    "as_windows",
    "calibration_corpora",
    "collate",
    "corpus_tokenizer",
    "fixed_vocab_size",
    "held_out_windows",
    "load_corpus",
    "read_windows",
    "token_blocks",
    "tokenizer_sha256",
    "train_tokenizer",
    "whole_file",
]

if not TYPE_CHECKING:  # type checkers would conclude that every name exists
    __getattr__ = import_on_first_use(__name__, _HOMES)
