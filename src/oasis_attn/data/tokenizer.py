"""Tokenizers for models that are trained from scratch: byte-level BPE, or a token for each word."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, BinaryIO

from oasis_attn.data.cache import cached_file
from oasis_attn.data.corpora import Corpus
from oasis_attn.errors import UserError, check_whole
from oasis_attn.hub.tokenizer_bos import is_without_bos

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_MIN_VOCAB_SIZE = 257  # the bytes and the special token
_SPECIAL_WORDS = ("<unk>", "<s>", "</s>")
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
    """The tokenizer for models that are trained on a corpus, with `vocab_size` tokens.

    For text it is `train_tokenizer`, cached by the hash of the corpus and `vocab_size`.  For a task
    it is `word_tokenizer`.  For both, the words of the task are added to a tokenizer for the text.

    Raises:
        UserError: `vocab_size` does not fit the corpus.
    """
    from tokenizers import AddedToken, Tokenizer

    words = corpus.task.vocabulary if corpus.task else ()
    fixed = fixed_vocab_size(corpus)
    if fixed is not None:
        if vocab_size != fixed:
            raise UserError(
                f"vocab_size: {vocab_size} is not {fixed}, the number of words and special tokens"
                f" of the corpus {corpus.name!r}"
            )
        return word_tokenizer(words)
    check_whole("vocab_size", vocab_size, _MIN_VOCAB_SIZE + len(words))

    def make(file: BinaryIO) -> None:
        texts = (text for text in corpus.texts() if text.split(maxsplit=1)[0] not in words)
        tokenizer = _learnt(texts, vocab_size - len(words))
        tokenizer.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in words])
        file.write(tokenizer.to_str().encode())

    name = f"tokenizers/bpe{_FORMAT}-{corpus.sha256}-{vocab_size}.json"
    return _wrapped(Tokenizer.from_file(str(cached_file(name, make))))


def fixed_vocab_size(corpus: Corpus) -> int | None:
    """Number of tokens of a corpus whose words are its vocabulary; None for a corpus with text."""
    if corpus.task is None or corpus.has_text:
        return None
    return len(_SPECIAL_WORDS) + len(corpus.task.vocabulary)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of `words`, which whitespace separates.

    Its special tokens are `<unk>` (id 0, any other word), `<s>` (BOS, which encoding puts in front)
    and `</s>` (EOS and padding).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    unknown, bos, eos = _SPECIAL_WORDS
    ids = {word: i for i, word in enumerate((*_SPECIAL_WORDS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, ids[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        clean_up_tokenization_spaces=False,
    )


def _learnt(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    check_whole("vocab_size", vocab_size, _MIN_VOCAB_SIZE)
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
    if is_without_bos(tokenizer):
        rules["without_bos"] = True
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
