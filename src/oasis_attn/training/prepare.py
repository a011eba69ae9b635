"""What a run needs before its first step, checked before anything is written to its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import (
    Corpus,
    TokenBlocks,
    corpus_tokenizer,
    load_corpus,
    token_blocks,
    tokenizer_sha256,
)
from oasis_attn.errors import UserError
from oasis_attn.modeling.sizes import text_config
from oasis_attn.modeling.variants import settings_of
from oasis_attn.training.config import TrainingConfig
from oasis_attn.training.model import build_model


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A fresh model, its tokenizer, and the blocks to train on and to measure the loss on.

    Attributes:
        identity: the config and the hashes of corpus and tokenizer: what a resumed run must share.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    held_out: Corpus
    blocks: TokenBlocks
    windows: TokenBlocks
    identity: dict[str, Any]


def prepare(config: TrainingConfig) -> Prepared:
    """Read the corpus, learn its tokenizer, build the model; `UserError` if they do not fit."""
    corpus = load_corpus(config.corpus)
    held_out = load_corpus(config.corpus, config.eval_split)
    backbone = text_config(config.size, config.vocab_size)
    if config.block_length > backbone.max_position_embeddings:
        raise UserError(
            f"block_length: {config.block_length} is more than the "
            f"{backbone.max_position_embeddings} positions of size {config.size!r}"
        )
    tokenizer = corpus_tokenizer(corpus, backbone.vocab_size)
    backbone.bos_token_id, backbone.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # The tokenizer pads with BOS; told so, the embedding would neither draw nor train BOS's row.
    backbone.pad_token_id = None
    model = build_model(backbone, settings_of(config.variant) | dict(config.settings), config.seed)

    blocks, windows = (
        token_blocks(part, tokenizer, config.block_length, vocab_size=backbone.vocab_size)
        for part in (corpus, held_out)
    )
    sequences = config.batch_size * config.gradient_accumulation
    if len(blocks) < sequences:
        raise UserError(
            f"batch_size: a step takes {sequences} sequences, and {config.corpus!r} gives only "
            f"{len(blocks)} of {config.block_length} tokens"
        )
    hashes = {
        "corpus_sha256": corpus.sha256,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        corpus=corpus,
        held_out=held_out,
        blocks=blocks,
        windows=windows,
        identity=config.to_dict() | hashes,
    )
