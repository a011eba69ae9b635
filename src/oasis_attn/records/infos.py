"""Parts of records: the model that was measured, and the text that it was measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oasis_attn.errors import UserError, check_choice, shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model that was measured.

    Attributes:
        name: what it was loaded by, or the folder that it was saved in.
        variant: the name that tables and figures use for it; None if they use the end of `name`.
        family: model type in transformers, `llama` for example.
        architecture: name of its class.
        parameters: how many it has.
        dtype: of its weights, `float32` for example.
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
    """The windows of tokens that were read.

    Attributes:
        corpus, split: names of the source; None if it has none.
        sha256: hash of the text of that split.
        window: tokens in each window.
        windows: how many were read.
        windowing: how windows follow each other; `disjoint`: no token is in two.
        bos: the token that begins every window; None if they begin with different tokens.
        tokens_scored: tokens that have a loss.
        tokens_sha256: hash of all token ids.
    """

    corpus: str | None
    split: str | None
    sha256: str | None
    window: int
    windows: int
    windowing: str
    bos: int | None
    tokens_scored: int
    tokens_sha256: str

    @classmethod
    def of(cls, ids_NT: Tensor, source: Mapping[str, str | None]) -> TextInfo:
        """Describe windows of token ids, int64 [N, T], from `source`: corpus, split, sha256.

        Raises:
            UserError: another key in `source`, or a value that is no text.
        """
        names = ("corpus", "split", "sha256")
        for name, value in source.items():
            check_choice("data", name, names)
            if not isinstance(value, str | None):
                raise UserError(f"data: {name} {shown(value)} is not a string")
        first = int(ids_NT[0, 0])
        return cls(
            **{name: source.get(name) for name in names},
            window=ids_NT.shape[1],
            windows=ids_NT.shape[0],
            windowing="disjoint",
            bos=first if bool((ids_NT[:, 0] == first).all()) else None,
            tokens_scored=ids_NT[:, 1:].numel(),
            tokens_sha256=hashlib.sha256(ids_NT.contiguous().numpy().tobytes()).hexdigest(),
        )


@dataclass(frozen=True, kw_only=True)
class BlocksInfo:
    """A split of a corpus cut into blocks of tokens: how many blocks, and the hash of them all."""

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
        eval: the blocks that the final loss was measured on.
    """

    corpus: str
    corpus_sha256: str
    tokenizer_sha256: str
    block_length: int
    train: BlocksInfo
    eval: BlocksInfo
