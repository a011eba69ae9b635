"""Models whose null has a learned value, and a learned key."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from oasis_attn import OasisConfig, OasisForCausalLM, UserError, convert
from oasis_attn.hub.convert import to_vanilla
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.variants import settings_of
from tiny_models import tiny_config, tiny_model

SEVERAL = {"name": "key_value_null", "nulls": 3}
FORMS = ["value_null", "key_null", "key_value_null", SEVERAL]
NAMES = ("null_logit", "null_key", "null_value")


def of(form, variant="kv_null", **keywords):
    return tiny_model(variant, token_normalizer=form, **keywords)


def nulls(model, ids, **keywords):
    return model(ids, output_null_probability=True, **keywords).null_probability


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parameters(form, tmp_path, ids):
    settings = settings_of("kv_null") | {"token_normalizer": form, "null_logit": 2.0}
    torch.manual_seed(0)
    model = OasisForCausalLM(OasisConfig(text_config=tiny_config(), **settings))
    M = 3 if form is SEVERAL else 1
    for layer in model.model.layers:
        assert layer.null_logit.eq(2).all()
        assert (layer.null_key is None) is (form == "value_null")
        assert (layer.null_value is None) is (form == "key_null")
        for parameter in (layer.null_key, layer.null_value):
            if parameter is not None:
                assert parameter.shape == (4, M, 8)
                assert parameter.std().item() == pytest.approx(0.02, rel=0.4)
    model = of(form)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["token_normalizer"] == form
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_form_contains_the_simpler_ones(ids):
    """A null without a value is a learned sink, and one with a zero key has one logit a head."""
    forms = ("learned_sink", "value_null", "key_null", "key_value_null")
    sink, value, key, both = map(of, forms)
    for simple, general, zero in (
        (sink, value, "null_value"), (sink, key, "null_key"),
        (value, both, "null_key"), (key, both, "null_value"),
    ):  # fmt: skip
        general.load_state_dict(simple.state_dict(), strict=False)
        for name, parameter in general.named_parameters():
            if name.endswith(zero):
                parameter.zero_()
        for mine, theirs in zip(nulls(general, ids), nulls(simple, ids), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(general(ids).logits, simple(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", ["key_value_null", SEVERAL], ids=str)
def test_a_null_is_a_prefix_that_shifts_no_position(form, ids):
    """In a family with rotary positions: a key before the sequence, at position 0, not rotated."""
    model = of(form)
    native = AutoModelForCausalLM.from_config(tiny_config()).eval()
    native.set_attn_implementation("eager")  # it returns its attention
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.null_logit.zero_()
        for name in ("null_key", "null_value"):  # one per key head, as in a cache
            parameter = getattr(layer, name)
            parameter.copy_(parameter[::2].repeat_interleave(2, 0))
        pair = (x[::2].expand(2, -1, -1, -1) for x in (layer.null_key, layer.null_value))
        cache.update(*pair, layer.index)
    native.load_state_dict(model.state_dict(), strict=False)
    M = cache.get_seq_length()
    expected = native(
        ids, past_key_values=cache, position_ids=torch.arange(12)[None],
        attention_mask=torch.ones(2, M + 12, dtype=torch.long), output_attentions=True,
    )  # fmt: skip
    torch.testing.assert_close(model(ids).logits, expected.logits, rtol=0, atol=1e-5)
    for null_BHT, weights in zip(nulls(model, ids), expected.attentions, strict=True):
        torch.testing.assert_close(null_BHT, weights[..., :M].sum(-1), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_decoding_is_the_full_forward(form, family, dtype, ids):
    """With sliding windows, a softcap, values of another width, and a family's own sinks."""
    model = of(form, family=family, dtype=dtype)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits[:, 6:]
    cache, found = None, []
    for start, stop in ((0, 6), *((t, t + 1) for t in range(6, 12))):
        outputs = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
        )
        cache = outputs.past_key_values
        found.append(outputs.logits[:, -1:])
    atol = 2e-6 if dtype == torch.float64 else 2e-5  # the norms run in float32
    torch.testing.assert_close(torch.cat(found[1:], 1), expected, rtol=0, atol=atol)
    unmasked, cache = model(ids).logits, model(ids[:, :11], use_cache=True).past_key_values
    last = model(ids[:, 11:], past_key_values=cache).logits
    torch.testing.assert_close(last, unmasked[:, 11:], rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_left_padding_without_positions_changes_nothing(form, family, ids):
    """The distance to a null key does not count padding.  (Rotary angles are float32.)"""
    model = of(form, family=family, dtype=torch.float64)
    padding = torch.zeros(2, 4, dtype=torch.long)
    padded, mask = (torch.cat([padding, x], 1) for x in (ids, torch.ones_like(ids)))
    expected = model(ids).logits
    found = model(padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pieces, cache = [], None
    for start, stop in ((0, 9), (9, 10), (10, 16)):
        outputs = model(
            padded[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 4:], expected, rtol=0, atol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=20)  # with a mask for all its places
    whole = torch.cat([mask, mask[:, -4:]], 1)
    pieces = [
        model(padded[:, start:stop], attention_mask=whole, past_key_values=cache).logits
        for start, stop in ((0, 9), (9, 10), (10, 16))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 4:], expected, rtol=0, atol=1e-5)
    mask[1, 7:9] = 0  # tokens in the middle that are hidden
    given = model(ids, attention_mask=mask[:, 4:], position_ids=torch.arange(12)[None]).logits
    found = model(padded, attention_mask=mask).logits[:, 4:]
    shown = mask[:, 4:].bool()
    torch.testing.assert_close(found[shown], given[shown], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_mask_of_queries_and_keys_needs_positions_if_it_may_hide_padding(form, family, ids):
    """gemma2 has one mask for its sliding window, and one for the other layers."""
    model = of(form, family=family, dtype=torch.float64)
    expected = model(ids).logits
    seen = torch.ones(2, 12, dtype=torch.long)
    for padding, additive in ((0, False), (4, False), (4, True)):
        padded, shown = (torch.cat([x.new_zeros(2, padding), x], 1) for x in (ids, seen))
        T = 12 + padding
        mask = torch.ones(T, T, dtype=torch.bool).tril() & shown[:, None, None].bool()
        masks = {"full_attention": mask, "sliding_attention": mask.triu(-5)}
        if additive:
            zeros = torch.zeros(mask.shape, dtype=torch.float64)
            masks = {kind: zeros.masked_fill(~mask, -torch.inf) for kind, mask in masks.items()}
        given = masks if family == "gemma2" else masks["full_attention"]
        positions = (torch.arange(T) - padding).clamp(min=0)[None]
        found = model(padded, attention_mask=given, position_ids=positions).logits
        torch.testing.assert_close(found[:, padding:], expected, rtol=0, atol=1e-5)
        if padding and form != "value_null":
            with pytest.raises(UserError, match=r"hides the first key .* pass position_ids"):
                model(padded, attention_mask=given)
        else:
            found = model(padded, attention_mask=given).logits
            torch.testing.assert_close(found[:, padding:], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_maps(form, ids):
    model = of(form, dtype=torch.float64)
    outputs = model(ids, output_attentions=True, output_null_probability=True)
    torch.testing.assert_close(outputs.logits, model(ids).logits, rtol=0, atol=1e-10)
    for weights, null_BHT in zip(outputs.attentions, outputs.null_probability, strict=True):
        torch.testing.assert_close(weights.sum(-1), 1 - null_BHT, rtol=0, atol=1e-12)
    calls = []
    with observe_attention(model, calls.append):
        model(ids)
    for call, weights in zip(calls, outputs.attentions, strict=True):
        torch.testing.assert_close(call.rows(0, 12), weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_parts_train(form, ids):
    model = of(form, "oasis").train()
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for name in NAMES:
            parameter = getattr(layer, name)
            assert parameter is None or parameter.grad.ne(0).all(), name


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("variant", ["kv_null", "oasis"])
def test_conversion_there_and_back(form, variant, ids):
    torch.manual_seed(0)
    native = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.2)).eval()
    ours = convert(native, variant, token_normalizer=form)
    torch.testing.assert_close(ours(ids).logits, native(ids).logits, rtol=0, atol=1e-5)
    assert all(null.eq(0).all() for null in nulls(ours, ids))
    if form is SEVERAL:
        key = ours.model.layers[0].null_key
        assert (key[:, 0] - key[:, 1]).abs().max() > 0.01
    again = convert(native, variant, token_normalizer=form)
    assert all(map(torch.equal, ours.state_dict().values(), again.state_dict().values()))
    assert torch.equal(to_vanilla(ours)(ids).logits, native(ids).logits)
    if form != "key_null":
        ours.model.layers[1].null_value.fill_(7.0)  # without effect while the null is off
    assert torch.equal(to_vanilla(ours)(ids).logits, native(ids).logits)
    if form != "value_null":
        ours.model.layers[2].null_key[1] = -3.0
        with pytest.raises(UserError, match="to_vanilla: null_key: layer 2 has the learned value"):
            to_vanilla(ours)


@torch.no_grad()
def test_own_sinks_get_a_key_and_a_value(ids):
    """gpt-oss: the family's sink is the logit, so that zero keys and values change nothing."""
    torch.manual_seed(0)
    native = AutoModelForCausalLM.from_config(tiny_config("gpt_oss", initializer_range=0.2)).eval()
    for form in ("value_null", "key_value_null"):
        ours = convert(native, "kv_null", token_normalizer=form)
        assert ours.model.layers[0].null_logit is None
        torch.testing.assert_close(ours(ids).logits, native(ids).logits, rtol=0, atol=1e-5)
        ours.model.layers[0].null_value.fill_(1.0)
        assert (ours(ids).logits - native(ids).logits).abs().max() > 1e-3
        with pytest.raises(UserError, match="null_value: layer 0 has 1 nulls beside the family's"):
            to_vanilla(ours)
    with pytest.raises(UserError, match="null_key: layer 0 has 3 nulls beside the family's sinks"):
        convert(native, "kv_null", token_normalizer=SEVERAL)
