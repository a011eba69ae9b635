"""The quantized cache: exact tokens, quantization error, and use in `generate`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from oasis_attn.errors import UserError
from oasis_attn.quantization.kv_cache import QuantizedCache, pack, unpack
from oasis_attn.quantization.options import KV_GROUP
from tiny_models import VOCABULARY, tiny_config, tiny_model


def wide(**changes):
    sizes = {"head_dim": 32, "max_position_embeddings": 4096, "initializer_range": 0.2}
    return tiny_model(text=tiny_config(**sizes | changes))


def text(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return wide()


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 99),
    shift=st.floats(-5, 5),
    size=st.floats(0, 1e3),
)
def test_values_move_by_at_most_half_a_step(bits, seed, shift, size):
    x = torch.randn(3, 5, KV_GROUP, generator=torch.Generator().manual_seed(seed)).double()
    x = size * (x + shift)
    again = unpack(pack(x, bits), bits)
    steps = 2**bits - 1
    wide = x.clamp(min=0).amax(-1) - x.clamp(max=0).amin(-1)
    asymmetric = x - _independent(x, wide / steps, steps)
    symmetric_scale = x.abs().amax(-1) / (2 ** (bits - 1) - 1)
    error = (again - x).abs()
    assert (error.sum(-1) <= asymmetric.abs().sum(-1) * (1 + 1e-9) + 1e-300).all()
    assert (error <= symmetric_scale[..., None] / 2 * (1 + 1e-9) + 1e-300).all() or (
        error <= wide[..., None] / steps * (1 + 1e-9)
    ).all()


def _independent(x, scale, steps):
    """Asymmetric quantization in the usual unsigned notation."""
    scale = scale[..., None].clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-x.clamp(max=0).amin(-1, keepdim=True) / scale).round()
    return ((x / scale).round() + zero).clamp(0, steps).sub(zero) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constants_and_zeros_are_exact(bits):
    x = torch.tensor([0.0, 1e-30, -3.0, 7.0])[:, None].expand(4, KV_GROUP)
    assert torch.allclose(unpack(pack(x, bits), bits), x, rtol=1e-6)
    assert pack(x, bits).codes.nbytes == 4 * KV_GROUP * bits // 8


def test_keys_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="past_key_values: holds NaN or infinity"):
        pack(torch.full((1, KV_GROUP), torch.inf), 4)


@torch.no_grad()
def test_short_text_is_exact(model):
    ids = text(2, 90)
    cache = QuantizedCache(model.config, bits=2)
    rows = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(45, 1)]
    want = model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat(rows, 1), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_first_and_recent_tokens_are_exact_and_others_are_close(model):
    ids = text(2, 300)
    exact, cache = DynamicCache(config=model.config), QuantizedCache(model.config, bits=8)
    for part in ids.split(50, 1):
        want = model(input_ids=part, past_key_values=exact).logits
        got = model(input_ids=part, past_key_values=cache).logits
    assert (got - want).norm() < 0.02 * want.norm()
    assert not torch.equal(got, want)
    assert cache.get_seq_length() == exact.get_seq_length() == 300
    layer, whole = cache.layers[0], exact.layers[0]
    held = layer.keys.shape[2]
    assert 32 + 96 <= held < 32 + 96 + KV_GROUP
    assert layer.packed[0].codes.shape[2] == 300 - held
    assert torch.equal(layer.values[:, :, :32], whole.values[:, :, :32])
    assert torch.equal(layer.values[:, :, 32:], whole.values[:, :, 32 - held :])
    keys, values = layer._dequantized()
    between = slice(32, 332 - held)
    torch.testing.assert_close(keys, whole.keys[:, :, between], atol=0.02, rtol=0.02)
    torch.testing.assert_close(values, whole.values[:, :, between], atol=0.02, rtol=0.02)


@torch.no_grad()
def test_the_cache_does_not_depend_on_how_text_is_split(model):
    """Values are always grouped from token 32 on; the norms of keys are those of the first call."""
    ids = text(1, 260)
    caches = [QuantizedCache(model.config, bits=8, recent=32) for _ in range(2)]
    model(input_ids=ids, past_key_values=caches[0])
    model(input_ids=ids[:, :200], past_key_values=caches[1])
    for part in ids[:, 200:].split(7, 1):
        model(input_ids=part, past_key_values=caches[1])
    first, second = (cache.layers[0]._dequantized()[1] for cache in caches)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_generate(model, how):
    ids = text(2, 150)
    cache = QuantizedCache(model.config, bits=8)
    torch.manual_seed(0)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, **how)
    assert out.shape[1] == 170
    assert cache.layers[0].packed[0].codes.shape[2] == 32


@torch.no_grad()
def test_only_exact_tokens_can_be_removed(model):
    cache = QuantizedCache(model.config)
    model(input_ids=text(1, 200), past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 195
    with pytest.raises(UserError, match="past_key_values: cannot remove 150 tokens"):
        cache.crop(-150)


@torch.no_grad()
def test_size_in_bytes(model):
    exact, cache = DynamicCache(config=model.config), QuantizedCache(model.config, bits=4)
    for each in (exact, cache):
        model(input_ids=text(1, 2000), past_key_values=each)
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in exact.layers)
    # 4 bits instead of 32, a scale and an offset of 6 bytes per 32 numbers, and the exact tokens.
    assert cache.nbytes() < whole * (4 / 32 + 6 / 128) + 160 / 2000 * whole


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"head_dim": 24}, {}, "config: its head width of 24 is not a multiple of 32"),
        ({}, {"bits": 3}, "bits: 3 is not one of 2, 4, 8"),
        ({}, {"bits": True}, "bits: True"),
        ({}, {"recent": -1}, "recent: -1"),
    ],
)
def test_refusals(changes, options, message):
    with pytest.raises(UserError, match=message):
        QuantizedCache(wide(**changes).config, **options)
