"""Held-out text, some to measure on and other to calibrate on.  Axes: N windows, T tokens."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from oasis_attn.data import load_corpus, spread_windows, token_blocks
from oasis_attn.errors import UserError


class HeldOut:
    """Windows spread evenly over a split, in turn to measure on and to calibrate on.

    Attributes:
        measured_NT, calibration_NT: token ids, no window in both.
        data: corpus, split and content hash, for records.

    Raises:
        UserError: text for fewer than two windows.
    """

    def __init__(
        self,
        corpus: str,
        split: str,
        *,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        windows: int,
    ) -> None:
        source = load_corpus(corpus, split)
        blocks = token_blocks(source, tokenizer, length)
        if len(blocks) < 2:
            raise UserError(f"corpus: {corpus!r} split {split!r} has less than 2 x {length} tokens")
        spread = spread_windows(blocks, 2 * windows)
        self.measured_NT, self.calibration_NT = spread[::2], spread[1::2]
        self.data: dict[str, Any] = {"corpus": corpus, "split": split, "sha256": source.sha256}
