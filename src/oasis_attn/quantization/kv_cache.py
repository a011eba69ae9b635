"""A key-value cache in few bits (InnerQ, 2602.23200): what is old is quantised, both ends are not.

The first tokens, where sinks are, and the last ones stay as they came.  What lies between is cut
into groups of 32 numbers along the axis that attention sums over: keys along the width of a head,
values along the tokens.  Every group takes the symmetric or the asymmetric grid, whichever moves it
less (L1).  Keys are divided by sqrt(max_t |K|), channel by channel, before, and multiplied after.

Axes: B batch, G key heads, T tokens, d head width, N groups, n = 32 numbers of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from oasis_attn.errors import UserError, check_whole
from oasis_attn.quantization.grids import Grid, Levels, place, snap
from oasis_attn.quantization.ranges import finite_range

GROUP = 32
FIRST, RECENT = 32, 96
BITS = (2, 4, 8)


class QuantizedCache(Cache):
    """A cache to be given to `generate` or a forward pass as `past_key_values`.

    What a pass brings is attended to as it came in that very pass; from the next one on, what is
    neither among the first tokens nor the last is read from its quantised form.  Codes are packed:
    4 bits are half a byte.  No kernel reads them, and they are unpacked in every pass: the cache is
    small, not fast.

    Padding counts among the first tokens, so that rows are best not padded on the left.

    Args:
        config: of the model.
        bits: 2, 4 or 8.
        first: tokens at the start that are kept as they are.
        recent: the least number of last tokens that are; at most 31 more are.

    Raises:
        UserError: other bits, negative lengths, a head width that 32 does not divide, layers that
            are not of full attention; in a pass: keys or values that are not finite.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        bits: int = 4,
        first: int = FIRST,
        recent: int = RECENT,
    ) -> None:
        check_bits(bits)
        check_whole("first", first, 0)
        check_whole("recent", recent, 0)
        text: Any = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            others = ", ".join(sorted(kinds - {"full_attention"}))
            raise UserError(f"config: layers of {others} have no quantised cache")
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if width % GROUP:
            raise UserError(f"config: {GROUP} does not divide its head width of {width}")
        layers: list[Any] = [_Layer(bits, first, recent) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, _Layer))


def check_bits(bits: int) -> None:
    """Raise `UserError` unless a cache can have so many."""
    if isinstance(bits, bool) or bits not in BITS:
        raise UserError(f"bits: {bits!r} is not one of {', '.join(map(str, BITS))}")


def check_reached(window: int) -> None:
    """Raise `UserError` if a window is too short for any of its tokens to be quantised."""
    if window < (least := FIRST + RECENT + GROUP):
        raise UserError(
            f"window: {window} tokens stay as they are in a quantised cache, which keeps the first"
            f" {FIRST} and the last {RECENT}; take at least {least}"
        )


class Packed(NamedTuple):
    """Groups [..., N, n] in few bits: codes uint8 [..., N, n * bits / 8], two tensors [..., N, 1].

    A code c stands for scale * (c + lowest); scale has the data's dtype, lowest int16.
    """

    codes: Tensor
    scale: Tensor
    lowest: Tensor


def pack(x: Tensor, bits: int) -> Packed:
    """Quantise `x` [..., N, n], floating and finite, each group on the better of two grids."""
    low, high = finite_range(x, "past_key_values")
    choices = [place(low, high, Grid(bits=bits, symmetric=way)) for way in (True, False)]
    errors = [(snap(x, levels) - x).abs().sum(-1, keepdim=True) for levels in choices]
    worse = errors[1] < errors[0]
    levels = Levels(*(torch.where(worse, b, a) for a, b in zip(*choices, strict=True)))
    level = (x / levels.scale).round().clamp(levels.lowest, levels.highest)
    codes = (level - levels.lowest).to(torch.uint8)
    parts = codes.unflatten(-1, (-1, 8 // bits))
    packed = torch.zeros_like(parts[..., 0])
    for place_in_byte, part in enumerate(parts.unbind(-1)):
        packed |= part << place_in_byte * bits
    return Packed(packed, levels.scale.to(x.dtype), levels.lowest.to(torch.int16))


def unpack(packed: Packed, bits: int) -> Tensor:
    """What `pack` made, [..., N, n] in the scale's dtype."""
    shifts = range(0, 8, bits)
    codes = torch.stack([packed.codes >> shift & 2**bits - 1 for shift in shifts], -1).flatten(-2)
    return (codes + packed.lowest).to(packed.scale.dtype) * packed.scale


class _Layer(DynamicLayer):
    """`keys` and `values` [B, G, t, d] hold what is exact: the first tokens, then the last ones."""

    def __init__(self, bits: int, first: int, recent: int) -> None:
        super().__init__()
        self.bits, self.first, self.recent = bits, first, recent
        self.norm: Tensor | None = None  # [B, G, 1, d], sqrt(max_t |K|) of the first that went
        self.packed: list[Packed] = []  # of keys [B, G, T, N, n], of values [B, G, T / n, d, n]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        old = self._old()
        exact = super().update(key_states, value_states, *args, **kwargs)
        whole = exact
        if old is not None:
            parts = zip(exact, old, strict=True)
            whole = tuple(  # type: ignore[assignment]
                torch.cat([x[..., : self.first, :], between, x[..., self.first :, :]], -2)
                for x, between in parts
            )
        self._retire()
        return whole

    def _old(self) -> tuple[Tensor, Tensor] | None:
        if self.norm is None:
            return None
        keys, values = (unpack(part, self.bits) for part in self.packed)
        return keys.flatten(-2) * self.norm, values.mT.flatten(2, 3)

    def _retire(self) -> None:
        """Quantise whole groups of tokens that are no longer among the last."""
        assert self.keys is not None
        assert self.values is not None
        count = (self.keys.shape[-2] - self.first - self.recent) // GROUP * GROUP
        if count <= 0:
            return
        sizes = [self.first, count, self.keys.shape[-2] - self.first - count]
        key_parts, value_parts = self.keys.split(sizes, -2), self.values.split(sizes, -2)
        if self.norm is None:
            largest = key_parts[1].abs().amax(-2, keepdim=True)
            self.norm = torch.where(largest > 0, largest, 1).sqrt()
        new = [
            pack((key_parts[1] / self.norm).unflatten(-1, (-1, GROUP)), self.bits),
            pack(value_parts[1].unflatten(-2, (-1, GROUP)).mT, self.bits),
        ]
        if self.packed:
            pairs = zip(self.packed, new, strict=True)
            new = [
                Packed(*(torch.cat(two, 2) for two in zip(*pair, strict=True))) for pair in pairs
            ]
        self.packed = new
        self.keys, self.values = (
            torch.cat([parts[0], parts[2]], -2) for parts in (key_parts, value_parts)
        )

    def get_seq_length(self) -> int:
        between = self.packed[0].codes.shape[2] if self.packed else 0
        return super().get_seq_length() + between

    def reset(self) -> None:
        super().reset()
        self.norm, self.packed = None, []

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers', of exact tokens only."""
        assert self.keys is not None
        if self.packed and -tokens_to_remove > (held := self.keys.shape[-2] - self.first):
            raise UserError(
                f"past_key_values: {-tokens_to_remove} tokens are to be taken back, but only the"
                f" last {held} are kept as they came"
            )
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor that is kept, all [B, ...]."""
        if not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = change(self.keys), change(self.values)
        self.packed = [Packed(*map(change, part)) for part in self.packed]
        self.norm = None if self.norm is None else change(self.norm)

    def nbytes(self) -> int:
        held = [self.keys, self.values, self.norm, *(x for part in self.packed for x in part)]
        return sum(x.nbytes for x in held if x is not None)
