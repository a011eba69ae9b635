"""Documents packed into blocks of tokens, tokenized once and memory-mapped.

Axes: N blocks, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from oasis_attn.hub.tokenizer_bos import is_without_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_DOCUMENTS_AT_ONCE = 64


class TokenBlocks(Dataset):
    """Blocks in a .npy file that is read as it is indexed; `blocks[i]` is an int64 tensor [T].

    Attributes:
        path: the .npy file.
        tokens_NT: the memory-mapped token ids, uint16 or int32.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tokens_NT = np.load(path, mmap_mode="r")

    @property
    def block_length(self) -> int:
        """T, in tokens."""
        return self.tokens_NT.shape[1]

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.tokens_NT[index].astype(np.int64))


@dataclass(frozen=True)
class Packing:
    """The special tokens that packing adds to the text.

    Attributes:
        separator: follows each document: EOS; BOS for a tokenizer without EOS; None without both.
        bos: begins each block: BOS; EOS for a tokenizer without BOS; None without both, and for a
            model whose null has the place of BOS.
    """

    separator: int | None
    bos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Packing:
        """The special tokens of `tokenizer`."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = None if is_without_bos(tokenizer) else eos if bos is None else bos
        return cls(separator=bos if eos is None else eos, bos=first)

    def text_tokens(self, block_length: int) -> int:
        """How many tokens of a block are not the BOS in front."""
        return block_length - (self.bos is not None)


def collate(blocks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch for a causal language model: `input_ids` and `labels`, both int64 [B, T]."""
    tokens_BT = torch.stack(blocks)
    return {"input_ids": tokens_BT, "labels": tokens_BT}


def token_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    vocab_size: int | None = None,
) -> TokenBlocks:
    """The corpus in blocks of `block_length` tokens, in the form of `pack_texts`.

    The file of blocks is cached.  Its name depends on the content of the corpus, the rules of the
    tokenizer, the block length and the vocabulary size.

    Args:
        vocab_size: of the model that reads the blocks; by default, the tokenizer's.

    Raises:
        UserError: a token outside the vocabulary, less text than one block, or a tokenizer that
            is not a fast one.
    """
    check_whole("block_length", block_length, 2)
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    key = [_FORMAT, corpus.sha256, tokenizer_sha256(tokenizer), block_length, vocab_size]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def make(file: BinaryIO) -> None:
        parts = _packed(corpus.texts(), tokenizer, block_length, vocab_size, corpus.label)
        _write_blocks(file, parts, block_length, _dtype(vocab_size))

    return TokenBlocks(cached_file(f"blocks/{name}.npy", make))


def pack_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    vocab_size: int | None = None,
    source: str = "the text",
) -> np.ndarray:
    """Token ids [N, T] of the documents, packed in memory.

    Each document is tokenized as a text of its own and followed by EOS.  The tokens of all
    documents are cut into blocks, each with BOS in front; what is left after the last whole block
    is dropped.  `Packing` says what replaces a missing EOS or BOS.  The name of a special token in
    a document is text like any other.

    Args:
        source: what error messages call the text.

    Raises:
        UserError: a token outside the vocabulary, or less text than one block.
    """
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    return np.concatenate(list(_packed(texts, tokenizer, block_length, vocab_size, source)))


def count_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> int:
    """Length of the block that holds all documents; `limit` if it would be longer."""
    packing = Packing.of(tokenizer)
    count = limit - packing.text_tokens(limit)
    for ids in _document_ids(texts, tokenizer, packing.separator):
        count += len(ids)
        if count >= limit:
            return limit
    return count


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _packed(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    vocab_size: int,
    source: str,
) -> Iterator[np.ndarray]:
    """The blocks [N, T] in parts, as the documents are tokenized."""
    packing, dtype = Packing.of(tokenizer), _dtype(vocab_size)
    fresh, blocks = packing.text_tokens(length), 0
    rest = np.empty(0, dtype)
    for ids in _document_ids(texts, tokenizer, packing.separator):
        _check_vocabulary(ids, tokenizer, vocab_size)
        rest = np.concatenate([rest, ids.astype(dtype)])
        whole = len(rest) // fresh
        tokens_NT = np.empty((whole, length), dtype)
        tokens_NT[:, : length - fresh] = packing.bos or 0
        tokens_NT[:, length - fresh :] = rest[: whole * fresh].reshape(whole, fresh)
        yield tokens_NT
        rest = rest[whole * fresh :]
        blocks += whole
    if not blocks:
        raise UserError(
            f"{source} has {len(rest)} tokens, which is less than one window of {length}"
        )


def _document_ids(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, separator: int | None
) -> Iterator[np.ndarray]:
    end = [] if separator is None else [separator]
    texts = iter(texts)
    while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            yield np.array([*ids, *end], dtype=np.int64)


def _check_vocabulary(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    if len(ids) and ids.max() >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise UserError(
            f"tokenizer: its token {token!r} has id {ids.max()}, outside the model's "
            f"vocabulary of {vocab_size}"
        )


def _write_blocks(
    file: BinaryIO, parts: Iterator[np.ndarray], length: int, dtype: np.dtype
) -> None:
    def header(blocks: int) -> dict:
        return {"shape": (blocks, length), "fortran_order": False, "descr": dtype.str}

    # The number of blocks is known at the end only.  NumPy leaves room in the header for a larger
    # first axis, so the header can be written again then.
    np.lib.format.write_array_header_1_0(file, header(0))
    blocks = 0
    for tokens_NT in parts:
        file.write(tokens_NT.tobytes())
        blocks += len(tokens_NT)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header(blocks))
