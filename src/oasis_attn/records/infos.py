"""Parts of records: the model that was measured, and the text that it was measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model that was measured.

    Attributes:
        name: the name or path that it was loaded from, or the folder that it was saved in.
        variant: the name that tables and figures use for it; None if they use the end of `name`.
        family: model type in transformers, `llama` for example.
        architecture: name of its class.
        parameters: number of its parameters.
        dtype: dtype of its weights, `float32` for example.
        config: the settings of the method; None for a model without them.
    """

    name: str
    variant: str | None = None
    family: str
    architecture: str
    parameters: int
    dtype: str
    config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TextInfo:
    """The windows of tokens that were read, and the protocol by which text was cut into them.

    See `oasis_attn.data.windows` for the protocol.

    Attributes:
        corpus, split: names of the source; None if it has none.
        sha256: hash of the text of that split.
        window: tokens in each window.
        windows: number of windows that were read.
        stride: tokens from the start of a window to the start of the next; `window` if disjoint.
        choice: `spread` evenly over the text, the `first` ones, `given` as rows of tokens, or
            `generated` sequences of a task, which are vectors in place of tokens.
        separator: the token after each document; None if there was none.
        bos: the token that begins every window; None if they begin with different tokens.
        tokens_scored: tokens that have a loss.
        tokens_sha256: hash of all token ids.
    """

    corpus: str | None
    split: str | None
    sha256: str | None
    window: int
    windows: int
    stride: int
    choice: str
    separator: int | None
    bos: int | None
    tokens_scored: int
    tokens_sha256: str


@dataclass(frozen=True, kw_only=True)
class Try:
    """One way to quantize a model that `doctor` has tried.

    Attributes:
        name: names of the remedies, with `+` between; `plain` without any.
        scheme: `Scheme.to_dict()` of the scheme with these remedies.
        prefix: tokens of the model's prefix; empty without one.
        problem: why it is not possible; empty if it was measured.
    """

    name: str
    scheme: dict[str, Any]
    prefix: tuple[int, ...]
    problem: str


@dataclass(frozen=True, kw_only=True)
class BlocksInfo:
    """A split of a corpus cut into blocks of tokens: the number of blocks, and a hash of all."""

    split: str
    blocks: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a model was trained on, and the windows that its final loss was measured on.

    Attributes:
        corpus: name or path.
        corpus_sha256: hash of the text of its train split.
        tokenizer_sha256: hash of the tokenizer.
        block_length: tokens in a block.
        train: the blocks that training draws from.
        eval: the windows that the final loss was measured on.
    """

    corpus: str
    corpus_sha256: str
    tokenizer_sha256: str
    block_length: int
    train: BlocksInfo
    eval: TextInfo
