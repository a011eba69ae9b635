"""Text by name, tokenizers learnt from it, and blocks of tokens."""

from oasis_attn.data.blocks import TokenBlocks, collate, spread_windows, token_blocks
from oasis_attn.data.corpora import CORPORA, Corpus, load_corpus
from oasis_attn.data.tokenizer import corpus_tokenizer, tokenizer_sha256, train_tokenizer

__all__ = [
    "CORPORA",
    "Corpus",
    "TokenBlocks",
    "collate",
    "corpus_tokenizer",
    "load_corpus",
    "spread_windows",
    "token_blocks",
    "tokenizer_sha256",
    "train_tokenizer",
]
