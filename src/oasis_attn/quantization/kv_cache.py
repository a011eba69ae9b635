"""A quantized key-value cache (InnerQ, 2602.23200).

The first tokens, which contain the attention sinks, and the most recent tokens are not quantized.
The tokens between them are quantized in groups of 32 numbers along the axis that attention sums
over: keys along the width of a head, values along the tokens.  Each group uses symmetric or
asymmetric quantization, whichever has the smaller L1 error.  Before quantization, each channel of
the keys is divided by sqrt(max_t |K|); the division is undone when keys are read.

Axes: B batch, G key heads, T tokens, d head width, N groups, n = 32 numbers of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedConfig

from oasis_attn.errors import UserError, check_whole
from oasis_attn.quantization.observers import finite_range
from oasis_attn.quantization.options import KV_FIRST, KV_GROUP, KV_RECENT, check_kv_bits
from oasis_attn.quantization.primitives import QParams, compute_qparams, fake_quantize
from oasis_attn.quantization.spec import QuantSpec


class QuantizedCache(Cache):
    """A cache for `generate` or a forward pass, passed as `past_key_values`.

    A forward pass attends to the exact keys and values of its own tokens.  Later passes read the
    quantized ones, except for the first and the most recent tokens.  Codes are packed: a 4-bit code
    takes half a byte.  They are unpacked in every pass, because there is no kernel that reads
    packed codes: the cache saves memory, not time.

    Padding counts as tokens at the start; avoid left padding.

    Args:
        config: config of the model.
        bits: 2, 4 or 8.
        first: number of tokens at the start that are not quantized.
        recent: minimum number of most recent tokens that are not quantized; up to 31 more are not.

    Raises:
        UserError: another number of bits, negative lengths, a head width that is not a multiple of
            32, or layers without full attention; in a forward pass: keys or values that are not
            finite.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        bits: int = 4,
        first: int = KV_FIRST,
        recent: int = KV_RECENT,
    ) -> None:
        check_kv_bits(bits)
        check_whole("first", first, 0)
        check_whole("recent", recent, 0)
        text: Any = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            others = ", ".join(sorted(kinds - {"full_attention"}))
            raise UserError(
                f"config: it has layers of type {others}; only full_attention can be quantized"
            )
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if width % KV_GROUP:
            raise UserError(f"config: its head width of {width} is not a multiple of {KV_GROUP}")
        layers: list[Any] = [_Layer(bits, first, recent) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """The size of the cache in bytes."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, _Layer))


class Packed(NamedTuple):
    """Quantized groups [..., N, n].

    `codes` is uint8 [..., N, n * bits / 8]; `scale`, in the dtype of the data, and `quant_min`,
    int16, are [..., N, 1].  A code c stands for scale * (c + quant_min).
    """

    codes: Tensor
    scale: Tensor
    quant_min: Tensor


def pack(x: Tensor, bits: int) -> Packed:
    """Quantize `x` [..., N, n], finite, each group symmetrically or asymmetrically (see above)."""
    low, high = finite_range(x, "past_key_values")
    choices = [
        compute_qparams(low, high, QuantSpec(bits=bits, symmetric=flag)) for flag in (True, False)
    ]
    errors = [(fake_quantize(x, qparams) - x).abs().sum(-1, keepdim=True) for qparams in choices]
    asymmetric = errors[1] < errors[0]
    qparams = QParams(*(torch.where(asymmetric, b, a) for a, b in zip(*choices, strict=True)))
    signed = (x / qparams.scale).round().clamp(qparams.quant_min, qparams.quant_max)
    codes = (signed - qparams.quant_min).to(torch.uint8)
    parts = codes.unflatten(-1, (-1, 8 // bits))
    packed = torch.zeros_like(parts[..., 0])
    for position, part in enumerate(parts.unbind(-1)):
        packed |= part << position * bits
    return Packed(packed, qparams.scale.to(x.dtype), qparams.quant_min.to(torch.int16))


def unpack(packed: Packed, bits: int) -> Tensor:
    """The values that `pack` quantized, [..., N, n] in the dtype of the scale."""
    shifts = range(0, 8, bits)
    codes = torch.stack([packed.codes >> shift & 2**bits - 1 for shift in shifts], -1).flatten(-2)
    return (codes + packed.quant_min).to(packed.scale.dtype) * packed.scale


class _Layer(DynamicLayer):
    """`keys` and `values` [B, G, t, d] hold the exact tokens: the first, then the most recent."""

    def __init__(self, bits: int, first: int, recent: int) -> None:
        super().__init__()
        self.bits, self.first, self.recent = bits, first, recent
        self.norm: Tensor | None = (
            None  # [B, G, 1, d], sqrt(max_t |K|) of the first quantized tokens
        )
        self.packed: list[Packed] = []  # keys [B, G, T, N, n] and values [B, G, T / n, d, n]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        old = self._dequantized()
        exact = super().update(key_states, value_states, *args, **kwargs)
        whole = exact
        if old is not None:
            parts = zip(exact, old, strict=True)
            whole = tuple(  # type: ignore[assignment]
                torch.cat([x[..., : self.first, :], between, x[..., self.first :, :]], -2)
                for x, between in parts
            )
        self._quantize_old_tokens()
        return whole

    def _dequantized(self) -> tuple[Tensor, Tensor] | None:
        if self.norm is None:
            return None
        keys, values = (unpack(part, self.bits) for part in self.packed)
        return keys.flatten(-2) * self.norm, values.mT.flatten(2, 3)

    def _quantize_old_tokens(self) -> None:
        """Quantize the complete groups of tokens that are no longer among the most recent."""
        assert self.keys is not None
        assert self.values is not None
        count = (self.keys.shape[-2] - self.first - self.recent) // KV_GROUP * KV_GROUP
        if count <= 0:
            return
        sizes = [self.first, count, self.keys.shape[-2] - self.first - count]
        key_parts, value_parts = self.keys.split(sizes, -2), self.values.split(sizes, -2)
        if self.norm is None:
            largest = key_parts[1].abs().amax(-2, keepdim=True)
            self.norm = torch.where(largest > 0, largest, 1).sqrt()
        new = [
            pack((key_parts[1] / self.norm).unflatten(-1, (-1, KV_GROUP)), self.bits),
            pack(value_parts[1].unflatten(-2, (-1, KV_GROUP)).mT, self.bits),
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
        """Remove tokens from the end; only exact tokens can be removed."""
        assert self.keys is not None
        if self.packed and -tokens_to_remove > (held := self.keys.shape[-2] - self.first):
            raise UserError(
                f"past_key_values: cannot remove {-tokens_to_remove} tokens; only the last {held}"
                " are not quantized"
            )
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every stored tensor, all [B, ...]."""
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
