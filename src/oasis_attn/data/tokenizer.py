"""Byte-level BPE tokenizers for models that are trained from scratch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO

from oasis_attn.data.cache import cached_file
from oasis_attn.data.corpora import Corpus
from oasis_attn.errors import UserError, check_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_FORMAT = 1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Radford et al. 2019, section 2.2); each digit is a token.

    It has one special token, `<|endoftext|>` (id 0), which is BOS, EOS and padding.  Encoding puts
    it in front of the text.  Every string can be encoded, and decodes to itself.

    Args:
        texts: the documents that merges are learnt from.
        vocab_size: at least 257 (the bytes and the special token); the vocabulary is smaller if
            the text has too few pairs to merge.
    """
    return _wrapped(_learnt(texts, vocab_size))


def corpus_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """`train_tokenizer` on a corpus, cached by the hash of the corpus and `vocab_size`."""
    from tokenizers import Tokenizer

    def make(file: BinaryIO) -> None:
        file.write(_learnt(corpus.texts(), vocab_size).to_str().encode())

    name = f"tokenizers/bpe{_FORMAT}-{corpus.sha256}-{vocab_size}.json"
    return _wrapped(Tokenizer.from_file(str(cached_file(name, make))))


def _learnt(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    check_whole("vocab_size", vocab_size, 257)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides the tokens of a text: the rules of the backend, and BOS and EOS.

    Raises:
        UserError: a tokenizer that is written in Python and so has no backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} has no fast form (a tokenizer.json), which"
            " identifies it"
        )
    rules = json.loads(backend.to_str())
    # These two are the state that the last call left, not properties of the tokenizer.
    for passing in ("padding", "truncation"):
        rules.pop(passing)
    rules["ends"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
