"""A pretrained model's sink becomes a null without training."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from float64_mode import IDS, Float64Mode, native_model
from oasis_attn import UserError
from oasis_attn.hub.key_value_nulls import (
    Null,
    _least_squares,
    fitted_values,
    mean_null,
    with_nulls,
)
from oasis_attn.hub.null_from_sink import (
    CANDIDATES,
    activation_size,
    null_from_sink,
    token_peaks,
)
from oasis_attn.modeling.attention import observe_attention
from tiny_models import tiny_config, tiny_model

FAMILIES = ["llama", "qwen3", "gemma2", "smollm3", "deepseek_v3", "olmo2"]
CALIBRATION = torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(1))


def after_prefix(native, tokens):
    """The logits of IDS after a prefix of single tokens, each at position 0."""
    cache = DynamicCache()
    for count, token in enumerate(tokens):
        native(
            torch.full((2, 1), token), past_key_values=cache, position_ids=torch.zeros(1, 1).long(),
            attention_mask=torch.ones(2, count + 1).long(),
        )  # fmt: skip
    return native(
        IDS, past_key_values=cache, position_ids=torch.arange(12)[None],
        attention_mask=torch.ones(2, len(tokens) + 12).long(),
    ).logits  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["kv_null", "oasis_signal_off"])
def test_the_null_of_one_token_is_a_prefix_that_shifts_no_position(family, variant):
    # The prefix would leave a sliding window; the null does not.
    native = native_model(family, **({"sliding_window": 64} if family == "gemma2" else {}))
    with Float64Mode():
        converted, layer_0, tokens, _ = null_from_sink(native, torch.tensor([[7]]), variant=variant)
        assert (layer_0, tokens) == (None, ())
        expected = after_prefix(native, [7])
        torch.testing.assert_close(converted(IDS).logits, expected, rtol=0, atol=1e-9)
        assert (expected - native(IDS).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_null_from_bos_is_a_prefix_of_bos_that_shifts_no_position(family):
    native = native_model(family)
    with Float64Mode():
        converted, layer_0, tokens, _ = null_from_sink(native, CALIBRATION, first_token=1)
        assert (layer_0, tokens) == (None, ())
        expected = after_prefix(native, [1])
        torch.testing.assert_close(converted(IDS).logits, expected, rtol=0, atol=1e-9)
        more = null_from_sink(native, CALIBRATION, first_token=1, nulls=2)
    assert len(more.tokens) == 1
    for one, two in zip(converted.model.layers, more.model.model.layers, strict=True):
        assert torch.equal(one.null_key[:, 0], two.null_key[:, 0])


@torch.no_grad()
def test_the_second_null_is_the_token_that_decreases_activations_most():
    native = native_model("llama")
    tried = []
    with Float64Mode():
        one = null_from_sink(native, CALIBRATION).model
        converted, _, tokens, _ = null_from_sink(
            native, CALIBRATION, nulls=2, on_try=lambda: tried.append(1)
        )
        peaks = token_peaks(one, CALIBRATION)
        before, after = (activation_size(token_peaks(m, CALIBRATION)) for m in (one, converted))
    assert len(tried) == CANDIDATES
    assert after < before
    (token,) = tokens
    relative = (peaks / peaks.flatten(1).median(-1).values[:, None, None]).amax(0)
    largest = relative.flatten().topk(2 * CANDIDATES).indices
    assert token in CALIBRATION.flatten()[largest]


@torch.no_grad()
def test_the_key_of_a_null_has_the_rotation_of_its_place_undone():
    """The null of a token in its context, on a query at distance r from position 0, acts as the
    token's key itself on a query at distance r from the token."""
    native, context = native_model("llama"), torch.tensor([[5, 9, 11, 7]])
    with Float64Mode():
        null = mean_null(native, [context])
        cache = DynamicCache()
        native(context, past_key_values=cache, position_ids=torch.arange(4)[None])
        stored = cache.layers[2].keys[0, :, -1]
        query = torch.randn(1, 1, 2, 8, dtype=torch.float64)
        rotary = native.model.rotary_emb
        near, far = (rotated(rotary, query, torch.tensor([[r]])) for r in (6, 3 + 6))
        torch.testing.assert_close(
            (near[0, 0] * null.keys[2]).sum(-1), (far[0, 0] * stored).sum(-1), rtol=0, atol=1e-10
        )


def rotated(rotary, query_BTGd, positions):
    cos, sin = rotary(query_BTGd, positions)
    first, second = query_BTGd.chunk(2, -1)
    return query_BTGd * cos.unsqueeze(2) + torch.cat([-second, first], -1) * sin.unsqueeze(2)


@torch.no_grad()
@pytest.mark.parametrize("massive", [0, 1000])  # every first token is, or none
def test_the_first_null_is_the_mean_and_in_layer_0_a_token_if_first_tokens_are_massive(
    massive, monkeypatch
):
    monkeypatch.setattr("oasis_attn.hub.null_from_sink._MASSIVE", massive)
    monkeypatch.setattr(
        "oasis_attn.hub.null_from_sink.fitted_values", lambda _model, nulls, _ids: nulls
    )
    native = native_model("llama")
    ids = torch.tensor([[5, 5, 5, 9, 9], [11, 11, 7, 7, 8]])
    with Float64Mode():
        converted, layer_0, _, _ = null_from_sink(native, ids)
        each = [mean_null(native, [token.view(1, 1)]) for token in ids.flatten()]
        layers = range(4)
        mean = Null(
            [torch.stack([null.keys[layer] for null in each]).mean(0) for layer in layers],
            [torch.stack([null.values[layer] for null in each]).mean(0) for layer in layers],
        )
        options = {None: mean}
        for token in (5, 7, 9, 11):  # not 8, which is less frequent
            keys, values = mean_null(native, [torch.tensor([[token]])])
            options[token] = Null([keys[0], *mean.keys[1:]], [values[0], *mean.values[1:]])
        first = torch.tensor([[5], [7], [8], [9], [11]])
        sizes = {
            token: activation_size(token_peaks(with_nulls(native, [null]), first))
            for token, null in options.items()
        }
    assert min(sizes, key=sizes.get) is not None
    assert layer_0 == (None if massive else min(sizes, key=sizes.get))
    assert converted.config.null_logit == 0
    for index, layer in enumerate(converted.model.layers):
        assert layer.null_logit.eq(0).all()
        for found, expected in zip(
            (layer.null_key, layer.null_value), options[layer_0], strict=True
        ):
            of_key_heads = expected[index].repeat_interleave(2, 0)
            torch.testing.assert_close(found[:, 0], of_key_heads, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("family", "count"), [*((each, 1) for each in FAMILIES), ("gemma2", 2)])
def test_values_are_those_that_keep_the_output_of_attention(family, count, monkeypatch):
    """The derivative of the squared difference is 0 in every layer of the model as a whole.

    Query heads that share a key head share the value.
    """
    monkeypatch.setattr("oasis_attn.hub.key_value_nulls._QUERIES", 4)
    monkeypatch.setattr("oasis_attn.hub.key_value_nulls._SWEEPS", 50)
    native = native_model(family)
    with Float64Mode():
        tokens_N1 = CALIBRATION.reshape(-1, 1)
        means = [mean_null(native, [part]) for part in tokens_N1.chunk(count)]
        converted = with_nulls(native, fitted_values(native, means, CALIBRATION))
        expected, found = (outputs_of_heads(model, CALIBRATION) for model in (native, converted))
        nulls = null_probabilities(converted, CALIBRATION)
    groups = 4 // len(means[0].values[0])
    first = converted.model.layers[0]
    for index, mean in enumerate(means):
        unchanged_Gd = first.null_value[::groups, index]
        torch.testing.assert_close(unchanged_Gd, mean.values[0], rtol=0, atol=1e-10)
    for layer, index in itertools.product(range(1, len(found)), range(count)):
        weight = converted.model.layers[layer].self_attn.o_proj.weight
        values_Hd = converted.model.layers[layer].null_value[:, index]
        values_Gd = values_Hd[::groups].clone()
        assert torch.equal(values_Hd, values_Gd.repeat_interleave(groups, 0))
        error_BTI = (found[layer] - expected[layer])[:, :, 1:].transpose(1, 2).flatten(2)
        n_BHT = nulls[layer][:, :, 1:, index]

        def squares(change_Gd, error_BTI=error_BTI, n_BHT=n_BHT, weight=weight):
            change_Hd = change_Gd.repeat_interleave(groups, 0)
            added_BTI = torch.einsum("bht,hd->bthd", n_BHT, change_Hd).flatten(2)
            return ((error_BTI + added_BTI) @ weight.T).square().sum()

        zero = torch.zeros_like(values_Gd)
        slope_Gd = torch.func.grad(squares)(zero) / 2
        curvature = torch.func.hessian(squares)(zero).flatten(2).flatten(0, 1).diagonal() / 2
        mean_Gd = means[index].values[layer]
        moved_Gd = values_Gd - mean_Gd
        noise = squares(-moved_Gd) / (n_BHT[:, 0].numel() * len(weight))
        prior = (0.1 * mean_Gd).square().mean()
        slope_Gd += (0.01 * curvature.mean() + noise / prior) * moved_Gd
        assert slope_Gd.abs().max() < 1e-8
        assert moved_Gd.abs().max() > 1e-3


def null_probabilities(model, ids_BT):
    """For each layer, the probability of each null, `[B, H, T, M]`."""
    shares = []

    def see(call):
        key_HMd = model.model.layers[call.layer].null_key
        logits_BHTM = call.query_BHTd @ key_HMd.mT * call.module.scaling
        softcap = getattr(call.module, "attn_logit_softcapping", None)
        if softcap is not None:
            logits_BHTM = softcap * torch.tanh(logits_BHTM / softcap)
        shares.append(logits_BHTM.softmax(-1))

    with observe_attention(model, see):
        nulls = model(ids_BT, output_null_probability=True).null_probability
    return [each.unsqueeze(-1) * share for each, share in zip(nulls, shares, strict=True)]


@torch.no_grad()
def test_values_are_fitted_again_after_the_last_null():
    native = native_model("llama")
    with Float64Mode():
        found = null_from_sink(native, CALIBRATION, nulls=2)
        means = [mean_null(native, [CALIBRATION.reshape(-1, 1)])]
        one = with_nulls(native, fitted_values(native, means, CALIBRATION))
        token = found.tokens[0]
        kept = found.model.model.layers[2]
    keys_HMd, before_HMd = kept.null_key, one.model.layers[2].null_value
    assert keys_HMd.shape[1] == 2
    assert token in CALIBRATION
    torch.testing.assert_close(keys_HMd[::2, 0], means[0].keys[2], rtol=0, atol=1e-10)
    assert (kept.null_value[:, 0] - before_HMd[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("null", [1.0, 1e-3, 1e-8, 1e-25, 0.0])
@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("size", [1.0, 0.0])  # of the means
@pytest.mark.parametrize("key_heads", [1, 2])
def test_values_stay_near_the_means_with_few_queries_or_small_null_probabilities(
    null, queries, size, key_heads
):
    torch.manual_seed(0)
    n_MBHT, e_BHTd = torch.rand(1, 1, 2, queries) * null, torch.randn(1, 2, queries, 3)
    mean_MGd = size * torch.randn(1, key_heads, 3)
    arguments = (n_MBHT, e_BHTd, mean_MGd, torch.randn(5, 6))
    change_MGd = _least_squares(*(x.double() for x in arguments)) - mean_MGd
    assert change_MGd.square().mean() <= mean_MGd.square().mean()  # false if it is not finite


def outputs_of_heads(model, ids_BT):
    """The input of each layer's output projection, `[B, H, T, d]`."""
    seen = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _module, args: seen.append(args[0].unflatten(-1, (4, -1)).transpose(1, 2))
        )
        for layer in model.model.layers
    ]
    model(ids_BT)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_the_native_model_stays_as_it_was(ids):
    native = AutoModelForCausalLM.from_config(tiny_config()).train()
    before = native.state_dict()
    converted = null_from_sink(native, ids, nulls=2).model
    assert native.training
    assert native.config._attn_implementation == "sdpa"
    for name, tensor in native.state_dict().items():
        assert tensor.data_ptr() == before[name].data_ptr()
        assert tensor.data_ptr() == converted.state_dict()[name].data_ptr()


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("gpt_oss", {}, "family 'gpt_oss' has learned sinks of its own"),
        ("gptj", {}, "'gptj' cannot be converted exactly: its attention and its MLP run"),
        ("llama", {"nulls": 0}, "nulls: 0 is not"),
        ("llama", {"nulls": 17}, "nulls: 17 is not"),
        ("llama", {"first_token": 97}, r"first_token: token ids 97 .. 97 are not all in 0 .. 96"),
        ("llama", {"null_logit": 1.0}, "null_logit: the conversion sets it"),
        ("llama", {"token_normalizer": "softmax1"}, "token_normalizer: the conversion sets it"),
        ("llama", {"variant": "gated_attention"}, "output_gate: 'head' scales"),
        ("llama", {"variant": "kvnull"}, "variant: 'kvnull' is not one of"),
    ],
)
def test_refusals(family, arguments, message, ids):
    native = AutoModelForCausalLM.from_config(tiny_config(family))
    with pytest.raises(UserError, match=message):
        null_from_sink(native, ids, **arguments)


def test_wrong_tokens_and_models_are_refused(ids):
    native = AutoModelForCausalLM.from_config(tiny_config())
    for wrong, message in (
        (ids[0], r"ids_NT: torch.int64 \(12,\) is not int64 \[windows, tokens\]"),
        (ids[:0], r"ids_NT: torch.int64 \(0, 12\) is not"),
        (ids.float(), "ids_NT: torch.float32"),
        (ids + 90, r"ids_NT: token ids \d+ .. \d+ are not all in 0 .. 96"),
    ):
        with pytest.raises(UserError, match=message):
            null_from_sink(native, wrong)
    with pytest.raises(UserError, match="it is an OASIS model already"):
        null_from_sink(tiny_model(), ids)
    native.model.embed_tokens.weight.data[ids[0, 0]] = torch.nan
    for arguments, message in (
        ({"nulls": 2}, "keys and values"),
        ({"nulls": 2, "first_token": int(ids[0, 1])}, "activations"),
    ):
        with pytest.raises(UserError, match=f"model: its {message} are not finite in torch.float"):
            null_from_sink(native, ids, **arguments)


def test_more_nulls_need_positions_below_0(ids):
    """Ministral 3 multiplies queries by a function of the position, NaN below 0."""
    native = AutoModelForCausalLM.from_config(tiny_config("ministral3", initializer_range=0.2))
    null_from_sink(native, ids)
    with pytest.raises(UserError, match=r"nulls: .* not finite; family 'ministral3' may not be"):
        null_from_sink(native, ids, nulls=2)


@torch.no_grad()
def test_depth_routing_starts_as_the_sum(ids):
    """With its null signal at the variant's beta; without the signal, the outputs are equal."""
    native = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.2)).eval()
    plain, off, on = (
        null_from_sink(native, ids, variant=variant).model(ids).logits
        for variant in ("kv_null", "oasis_signal_off", "oasis")
    )
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-4)
    assert 1e-4 < (on - plain).abs().max() < 0.5
    exact = null_from_sink(native, ids, variant="oasis", beta_init=-40.0).model(ids).logits
    torch.testing.assert_close(exact, plain, rtol=0, atol=1e-4)


def model_with_sink(family):
    """A model that was trained to attend to the first token, whichever it is, after layer 0."""
    torch.manual_seed(0)
    config = tiny_config(family, initializer_range=0.2, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        maps = model.model(torch.randint(3, 97, (16, 16)), output_attentions=True).attentions
        sum(-p[:, :, 1:, 0].log().mean() for p in maps[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_the_null_takes_the_sink(family):
    with torch.enable_grad():
        native = model_with_sink(family)
    calibration, ids = torch.randint(3, 97, (12, 16)).split([4, 8])
    converted = null_from_sink(native, calibration).model

    def first(model):
        maps = model(ids, output_attentions=True).attentions
        return torch.stack([p[:, :, 1:, 0].mean() for p in maps])[1:]

    null = torch.stack(converted(ids, output_null_probability=True).null_probability).mean(
        (1, 2, 3)
    )
    assert first(native).min() > 0.9
    assert first(converted).max() < 0.25
    assert null[1:].min() > 0.7
