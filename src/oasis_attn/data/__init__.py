"""Corpora by name, tokenizers trained on them, blocks to train on and windows to measure on."""

from oasis_attn.data.blocks import TokenBlocks, collate, token_blocks
from oasis_attn.data.corpora import CORPORA, Corpus, load_corpus, whole_file
from oasis_attn.data.tokenizer import (
    corpus_tokenizer,
    fixed_vocab_size,
    tokenizer_sha256,
    train_tokenizer,
)
from oasis_attn.data.windows import HeldOut, Windows, as_windows, held_out_windows, read_windows

__all__ = [
    "CORPORA",
    "Corpus",
    "HeldOut",
    "TokenBlocks",
    "Windows",
    "as_windows",
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
