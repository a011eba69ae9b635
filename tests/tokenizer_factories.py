"""Small tokenizers of the kinds that pretrained models use."""

from __future__ import annotations

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from oasis_attn.data import train_tokenizer

TEXT = [
    "Question: Ann has 12 pens. She buys 5 more. How many pens does Ann have now?",
    "Answer: Ann now has 17 pens. The quick brown fox jumps over the lazy dog, and says so.",
]


def spaced(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space, written as "\u2581", before every text.

    Args:
        kind: `prepend` uses the normalizer, as Llama 2 does; `first` and `always` are the
            schemes of the Metaspace pre-tokenizer.
    """
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=160,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\u2581", "\n"],
        show_progress=False,
    )
    words = " ".join(TEXT).split(" ")  # one by one: no token holds more than a word
    inner.train_from_iterator(words, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """The tokenizer of models trained here: byte-level, as GPT-2's; only BOS precedes a text."""
    return train_tokenizer([*TEXT, "\n\n\n" * 9], 330)
