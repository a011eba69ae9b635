"""Quantized models: which modules change, what they compute, and which input is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from oasis_attn.quantization import QuantSpec, linear_targets, quantize, quantized_modules, schemes
from oasis_attn.quantization.linear import QuantizedLinear
from oasis_attn.quantization.quantizers import fake_quantize_dynamic

VOCABULARY = 61
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TARGETS = {
    "llama": (*ATTENTION, *MLP),
    "qwen3": (*ATTENTION, *MLP),
    "phi3": ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "oasis": (*ATTENTION, *MLP),
    "gated_attention": (*ATTENTION, *MLP),
}
STATIC, DYNAMIC = "w8a8-static-linear", "w8a8-dynamic"


def make_model(kind="llama", **config):
    torch.manual_seed(0)
    variant = kind in ("oasis", "gated_attention")
    text = AutoConfig.for_model(
        "llama" if variant else kind,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
        }
        | config,
    )
    if variant:
        return OasisForCausalLM(OasisConfig(text_config=text, **settings_of(kind))).eval()
    return AutoModelForCausalLM.from_config(text).eval()


def tokens(seed=0, batch=2, length=12):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.manual_seed(seed))


def batches():
    return [tokens(seed) for seed in range(3)]


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


@pytest.mark.parametrize("kind", TARGETS)
def test_changes_exactly_the_targets(kind):
    model = make_model(kind)
    expected = {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in TARGETS[kind]}
    quantized_model = quantize(model, STATIC, calibration=batches())
    before, after = dict(model.named_modules()), dict(quantized_model.named_modules())
    changed = {name for name in before if type(before[name]) is not type(after[name])}
    assert (
        set(linear_targets(model)) == set(quantized_modules(quantized_model)) == changed == expected
    )
    assert set(after) - set(before) == {f"{name}.input_quantizer" for name in expected}
    assert logits(quantized_model, tokens(9)).isfinite().all()


@pytest.mark.parametrize("scheme", schemes())
def test_the_original_does_not_change_and_shares_other_tensors(scheme):
    model = make_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = batches() if schemes()[scheme].static else None
    quantized_model = quantize(model, scheme, calibration=calibration)
    assert not quantized_modules(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    own = {f"{name}.weight" for name in quantized_modules(quantized_model)}
    originals = dict(model.named_parameters())
    for name, parameter in quantized_model.named_parameters():
        assert (parameter is originals[name]) == (name not in own)


def reference_logits(model, token_ids, scheme, ranges=None):
    """Fake quantization by hooks on the unquantized model."""
    hooks, saved = [], {}
    for name in linear_targets(model):
        linear = model.get_submodule(name)
        saved[name] = linear.weight.data
        linear.weight.data = fake_quantize_dynamic(linear.weight.data, scheme.weight)

        def quantize_input(_, args, name=name):
            if ranges is None:
                return fake_quantize_dynamic(args[0], scheme.activation)
            low, high = min(ranges[name][0], 0), max(ranges[name][1], 0)
            step = (high - low) / 255
            zero = round(-low / step)
            return step * ((args[0] / step).round().clamp(-zero, 255 - zero))

        hooks.append(linear.register_forward_pre_hook(quantize_input))
    try:
        return logits(model, token_ids)
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in saved.items():
            model.get_submodule(name).weight.data = weight


def observed_ranges(model, scheme):
    """Minimum and maximum input of each target in a model with quantized weights only."""
    model = quantize(model, replace(scheme, activation=None, static=False))
    ranges = {}

    def record(name, x):
        low, high = ranges.get(name, (torch.inf, -torch.inf))
        ranges[name] = min(low, x.min().item()), max(high, x.max().item())

    for name, module in quantized_modules(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
    for batch in batches():
        logits(model, batch)
    return ranges


@pytest.mark.parametrize("kind", ["llama", "oasis"])
def test_static_equals_hooks(kind):
    model, scheme = make_model(kind), schemes()[STATIC]
    quantized_model = quantize(model, STATIC, calibration=iter(batches()))
    ranges = observed_ranges(model, scheme)
    for name, module in quantized_modules(quantized_model).items():
        low, high = ranges[name]
        step = (high - low) / 255
        assert module.input_quantizer.range == pytest.approx((low, high), abs=step)
    expected = reference_logits(model, tokens(7), scheme, ranges)
    torch.testing.assert_close(logits(quantized_model, tokens(7)), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, logits(model, tokens(7)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", [DYNAMIC, "w4a8", "w4a4"])
def test_dynamic_equals_hooks(scheme):
    model = make_model()
    quantized_model = quantize(model, scheme)
    expected = reference_logits(model, tokens(7), schemes()[scheme])
    torch.testing.assert_close(logits(quantized_model, tokens(7)), expected)


def test_per_token_ranges_do_not_depend_on_other_tokens():
    quantized_model = quantize(make_model(), DYNAMIC)
    torch.testing.assert_close(
        logits(quantized_model, tokens(7))[:1, :5], logits(quantized_model, tokens(7)[:1, :5])
    )


def test_error_falls_with_bits():
    model = make_model()
    exact = logits(model, tokens(7))
    errors = [
        (logits(quantize(model, s), tokens(7)) - exact).norm() for s in ("w4a4", "w4a8", DYNAMIC)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * exact.norm()


def test_the_bias_is_not_quantized():
    model = make_model(attention_bias=True)
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    quantized_model = quantize(model, DYNAMIC)
    layer = quantized_modules(quantized_model)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 32)
    expected = F.linear(fake_quantize_dynamic(x, schemes()[DYNAMIC].activation), layer.weight)
    expected = expected + model.model.layers[0].self_attn.q_proj.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["llama", "oasis"])
def test_a_quantized_head_stays_quantized(kind):
    model = make_model(kind)
    targets = linear_targets(model, head=True)
    assert set(targets) - set(linear_targets(model)) == {"lm_head"}
    quantized_model = quantize(model, STATIC, calibration=batches(), targets=targets)
    weight = quantized_model.lm_head.weight
    quantized_model.tie_weights()
    assert isinstance(quantized_model.lm_head, QuantizedLinear)
    assert quantized_model.lm_head.weight is weight
    assert len(weight.unique()) <= 256
    assert quantized_model.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert logits(quantized_model, tokens(7)).isfinite().all()


def test_explicit_targets():
    model = make_model()
    quantized_model = quantize(model, DYNAMIC, targets=["model.layers.1.mlp.down_proj"])
    assert list(quantized_modules(quantized_model)) == ["model.layers.1.mlp.down_proj"]


def test_gradients_pass_through_to_the_embedding():
    quantized_model = quantize(make_model(), STATIC, calibration=batches())
    quantized_model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert quantized_model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["llama", "oasis"])
def test_cached_generation_equals_the_full_forward(kind):
    quantized_model = quantize(make_model(kind), STATIC, calibration=batches())
    prompt = tokens(5, batch=1, length=4)
    greedy = quantized_model.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=VOCABULARY
    )
    for length in range(4, greedy.shape[1]):
        assert logits(quantized_model, greedy[:, :length])[0, -1].argmax() == greedy[0, length]


def test_after_hidden_states_were_recorded():
    model = make_model()
    model(input_ids=tokens(), output_hidden_states=True)
    quantized_model = quantize(model, DYNAMIC)
    states = quantized_model(input_ids=tokens(), output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(quantized_model.lm_head(states[-1]), logits(quantized_model, tokens()))


@pytest.mark.parametrize("kind", ["llama", "oasis"])
@pytest.mark.parametrize(
    "options", [{}, {"targets": "full"}, {"smooth_alpha": 0.5}, {"rounding": "gptq"}], ids=str
)
def test_embeddings_calibrate_as_their_tokens_do(kind, options):
    model, scheme, batches = make_model(kind), schemes()[STATIC], [tokens(1), tokens(2)]
    scheme = scheme.with_options(options)
    embedding = model.get_input_embeddings()
    embedded = [embedding(ids_BT).detach() for ids_BT in batches]
    one, other = (quantize(model, scheme, calibration=each) for each in (batches, embedded))
    assert torch.equal(one(tokens()).logits, other(tokens()).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scheme": "w8a8-statik"},
            "scheme: 'w8a8-statik' is not one of .*did you mean 'w8a8-stat",
        ),
        (
            {"scheme": "w8a8"},
            "did you mean 'w8a8-static-full' or 'w8a8-static-linear' or 'w8a8-dynamic'",
        ),
        ({"scheme": DYNAMIC, "seed": -1}, "seed: -1 is not a whole number"),
        ({"scheme": DYNAMIC, "seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"scheme": STATIC}, "calibration: None given, but 'w8a8-static-linear' needs"),
        ({"scheme": DYNAMIC, "calibration": [tokens()]}, "calibration: given, but 'w8a8-dynamic'"),
        ({"scheme": STATIC, "calibration": []}, "calibration: it has no batches"),
        ({"scheme": STATIC, "calibration": ["text"]}, "calibration: a batch is of type str"),
        ({"scheme": STATIC, "calibration": [torch.ones(4)]}, r"a batch is torch.float32 \(4,\)"),
        (
            {"scheme": STATIC, "calibration": [torch.ones(1, 2, 3)]},
            r"a batch is torch.float32 \(1, 2, 3\), not .* embeddings, \[batch, tokens, 32\]",
        ),
        ({"scheme": STATIC, "calibration": [tokens()[:0]]}, r"a batch is torch.int64 \(0, 12\)"),
        ({"scheme": STATIC, "calibration": [tokens() + 50]}, r"are not all in 0 \.\. 60"),
        (
            {"scheme": DYNAMIC, "targets": ["model.layers.0.mlp.down"]},
            "did you mean 'model.layers.0.mlp",
        ),
        (
            {"scheme": DYNAMIC, "targets": []},
            "targets: they name no linear layer of LlamaForCausalLM",
        ),
    ],
)
def test_refuses_bad_input(arguments, message):
    with pytest.raises(UserError, match=message):
        quantize(make_model(), **arguments)


def test_refuses_a_quantized_model():
    with pytest.raises(UserError, match="model: it is already quantized"):
        quantize(quantize(make_model(), DYNAMIC), DYNAMIC)


def test_refuses_weights_and_activations_that_are_not_finite():
    model = make_model()
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        quantize(model, DYNAMIC)
    weight[0, 0] = 0
    model.model.embed_tokens.weight.data[3] = torch.inf
    for scheme, calibration in ((DYNAMIC, None), (STATIC, [torch.full((1, 4), 3)])):
        with pytest.raises(
            UserError, match=r"^model\.layers\.0\.self_attn\.q_proj\.input: holds NaN"
        ):
            logits(quantize(model, scheme, calibration=calibration), torch.full((1, 4), 3))


def test_refuses_groups_that_do_not_divide_naming_the_layer():
    scheme = replace(
        schemes()["w4a16"],
        weight=QuantSpec(bits=4, symmetric=True, granularity="group", group_size=24),
    )
    with pytest.raises(UserError, match=r"24 does not divide the 32 entries of model\.layers\.0"):
        quantize(make_model(), scheme)
