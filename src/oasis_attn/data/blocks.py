"""Corpora as blocks of tokens, packed and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from oasis_attn.data.cache import cached_file
from oasis_attn.data.corpora import Corpus
from oasis_attn.data.tokenizer import tokenizer_sha256
from oasis_attn.errors import UserError, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_DOCUMENTS_AT_ONCE = 64


class TokenBlocks(Dataset):
    """`tokens_NT`, read from a .npy file as it is indexed; `blocks[i]` is an int64 tensor [T].

    Attributes:
        path: the .npy file, uint16 or int32.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tokens_NT = np.load(path, mmap_mode="r")

    @property
    def block_length(self) -> int:
        """T, in tokens."""
        return self._tokens_NT.shape[1]

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        return len(self._tokens_NT)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._tokens_NT[index].astype(np.int64))


def collate(blocks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch for a causal language model: `input_ids` and `labels`, both [B, T]."""
    tokens_BT = torch.stack(blocks)
    return {"input_ids": tokens_BT, "labels": tokens_BT}


def token_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    vocab_size: int | None = None,
) -> TokenBlocks:
    """The corpus in blocks of `block_length` tokens, BOS first in each.

    Documents are joined with EOS between them and packed; what is left after the last whole block
    is dropped.  A special token's name inside a document is text like any other.  The result is
    cached by the content of the corpus, the tokenizer's rules and the block length.

    Args:
        vocab_size: of the model that will read the blocks; default, the tokenizer's.

    Raises:
        UserError: no BOS and EOS token, a token outside the vocabulary, less text than one block.
    """
    check_whole("block_length", block_length, 2)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    bos = eos if bos is None else bos
    if eos is None:
        raise UserError("tokenizer: it has no end-of-text token, which blocks need")
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    key = [_FORMAT, corpus.sha256, tokenizer_sha256(tokenizer), block_length, vocab_size]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def make(file: BinaryIO) -> None:
        ids = _checked(_document_ids(corpus, tokenizer, eos), tokenizer, vocab_size)
        dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
        _write_blocks(file, ids, bos, block_length, dtype)

    return TokenBlocks(cached_file(f"blocks/{name}.npy", make))


def spread_windows(blocks: TokenBlocks, windows: int) -> torch.Tensor:
    """At most `windows` blocks, spread evenly over all of them: token ids [N, T], int64."""
    count = min(windows, len(blocks))
    return torch.stack([blocks[index * len(blocks) // count] for index in range(count)])


def _document_ids(corpus: Corpus, tokenizer, eos: int) -> Iterator[np.ndarray]:
    texts = corpus.texts()
    while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            yield np.array([*ids, eos])


def _checked(documents: Iterator[np.ndarray], tokenizer, vocab_size: int) -> Iterator[np.ndarray]:
    for ids in documents:
        if ids.max() >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise UserError(
                f"tokenizer: its token {token!r} has id {ids.max()}, outside the model's "
                f"vocabulary of {vocab_size}"
            )
        yield ids


def _write_blocks(
    file: BinaryIO, documents: Iterator[np.ndarray], bos: int, length: int, dtype: np.dtype
) -> None:
    def header(blocks: int) -> dict:
        return {"shape": (blocks, length), "fortran_order": False, "descr": dtype.str}

    # NumPy leaves room in the header for the first axis to grow: it is written again at the end.
    np.lib.format.write_array_header_1_0(file, header(0))
    blocks = 0
    rest = np.empty(0, dtype)
    for ids in documents:
        rest = np.concatenate([rest, ids.astype(dtype)])
        whole = len(rest) // (length - 1)
        tokens_NT = np.full((whole, length), bos, dtype)
        tokens_NT[:, 1:] = rest[: whole * (length - 1)].reshape(whole, length - 1)
        file.write(tokens_NT.tobytes())
        rest = rest[whole * (length - 1) :]
        blocks += whole
    if not blocks:
        raise UserError(
            f"block_length: {length} tokens is more than the whole text gives ({len(rest) + 1})"
        )
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header(blocks))
