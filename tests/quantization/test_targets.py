"""The full form: which tensors between the linear layers are quantized, and what that computes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from oasis_attn.errors import UserError
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.decoder_map import find_layers
from oasis_attn.quantization import (
    linear_targets,
    quantize,
    quantized_modules,
    scheme_targets,
    schemes,
    tensor_targets,
)
from oasis_attn.quantization.quantizers import StaticQuantizer
from tiny_families import family_model, tokens
from tiny_models import VOCABULARY, tiny_config, tiny_model

SCHEME = schemes()["w8a8-static-full"]
ATTENTION = ("self_attn:probabilities", "self_attn:context")
PRE_NORM = (
    *("{}:input", "{}.input_layernorm:output", *(f"{{}}.{target}" for target in ATTENTION)),
    *("{}.post_attention_layernorm:input", "{}.post_attention_layernorm:output"),
)
ROUTED = (*PRE_NORM[:4], "{}.self_attn:output", *PRE_NORM[4:], "{}.mlp:output")
TARGETS = {
    "llama": PRE_NORM,
    "gpt_oss": PRE_NORM,
    "granite": PRE_NORM,
    "olmo2": (
        *("{}:input", *(f"{{}}.{target}" for target in ATTENTION)),
        *("{}.post_attention_layernorm:output", "{}.mlp:input"),
        "{}.post_feedforward_layernorm:output",
    ),
    "gemma2": (
        *(*PRE_NORM[:4], "{}.post_attention_layernorm:output"),
        *("{}.pre_feedforward_layernorm:input", "{}.pre_feedforward_layernorm:output"),
        "{}.post_feedforward_layernorm:output",
    ),
    "vanilla": PRE_NORM,
    "gated_attention": PRE_NORM,
    "kv_null": PRE_NORM,
    "oasis": ROUTED,
    "oasis_block": ROUTED,
    "official": ROUTED,
}
VARIANTS = ("vanilla", "gated_attention", "kv_null", "oasis", "oasis_block", "official")


def make(kind, **config):
    if kind == "official":
        return tiny_model("oasis", residual="official")
    if kind in VARIANTS:
        return tiny_model(kind)
    torch.manual_seed(0)
    config = tiny_config(kind, num_hidden_layers=2, initializer_range=0.2, **config)
    return AutoModelForCausalLM.from_config(config).eval()


def batches():
    return [torch.randint(3, VOCABULARY, (2, 12), generator=torch.manual_seed(i)) for i in range(3)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", TARGETS)
def test_the_targets_are_exactly_these_and_all_of_them_act(kind, ids):
    model = make(kind)
    layers = model.config.get_text_config().num_hidden_layers
    named = [target.format(f"model.layers.{i}") for i in range(layers) for target in TARGETS[kind]]
    expected = (*named, "model.norm:input", "model.norm:output")
    assert tensor_targets(model) == expected
    assert scheme_targets(model, SCHEME) == (*linear_targets(model), *expected)
    quantized_model = quantize(model, SCHEME, calibration=batches(), targets=expected)
    quantizers, exact = quantized_modules(quantized_model), logits(model, ids)
    assert set(quantizers) == set(expected)
    for quantizer in quantizers.values():
        quantizer.enabled = False
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(logits(quantized_model, ids), exact, **close)
    for target, quantizer in quantizers.items():
        quantizer.enabled = True
        assert not torch.allclose(logits(quantized_model, ids), exact, **close), target
        quantizer.enabled = False


def reference(model, ids, ranges):
    """Llama, written out, with the tensors named in `ranges` on the specs of these ranges."""

    def q(target, x):
        low, high = ranges[target]
        step = (high - low) / 255
        zero = round(-low / step)
        return step * (x / step).round().clamp(-zero, 255 - zero)

    def rms(norm, x):
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def linear(name, x):
        weight = model.get_submodule(name).weight
        step = weight.abs().max() / 127
        return F.linear(q(name, x), (weight / step).round() * step)

    B, T = ids.shape
    x = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(x, torch.arange(T)[None])
    for i in range(len(model.model.layers)):
        here = f"model.layers.{i}"
        layer = model.get_submodule(here)
        x = q(f"{here}:input", x)
        h = q(f"{here}.input_layernorm:output", rms(layer.input_layernorm, x))
        query, key, value = (
            linear(f"{here}.self_attn.{part}_proj", h).view(B, T, -1, 8).transpose(1, 2)
            for part in "qkv"
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = query @ key.transpose(-1, -2) * 8**-0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        p = q(f"{here}.self_attn:probabilities", scores.softmax(-1))
        context = q(f"{here}.self_attn:context", p @ value).transpose(1, 2).flatten(2)
        x = x + linear(f"{here}.self_attn.o_proj", context)
        x = q(f"{here}.post_attention_layernorm:input", x)
        h = rms(layer.post_attention_layernorm, x)
        h = q(f"{here}.post_attention_layernorm:output", h)
        up = linear(f"{here}.mlp.up_proj", h)
        h = F.silu(linear(f"{here}.mlp.gate_proj", h)) * up
        x = x + linear(f"{here}.mlp.down_proj", h)
    x = q("model.norm:input", x)
    x = q("model.norm:output", rms(model.model.norm, x))
    return model.lm_head(x)


@torch.no_grad()
def test_computes_what_the_model_written_out_computes(ids):
    model = make("llama").double()
    quantized_model = quantize(model, SCHEME, calibration=batches())
    ranges = {
        name: getattr(target, "input_quantizer", target).range
        for name, target in quantized_modules(quantized_model).items()
    }
    torch.testing.assert_close(logits(quantized_model, ids), reference(model, ids, ranges))
    assert len(ranges) == 2 * (7 + 6) + 2


@torch.no_grad()
def test_what_is_read_is_what_is_carried_on(ids):
    """The layer's output is a quantized sum plus a branch, not the sum before it was quantized."""
    model = make("llama")
    middle = "model.layers.0.post_attention_layernorm:input"
    quantized_model = quantize(model, SCHEME, calibration=batches(), targets=[middle])
    seen = {}
    layer = quantized_model.model.layers[0]
    layer.post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: seen.update(sum=args[0].clone())
    )
    layer.mlp.register_forward_hook(lambda _, _args, out: seen.update(mlp=out))
    layer.register_forward_hook(lambda _, _args, out: seen.update(out=out))
    quantized_model(input_ids=ids)
    assert torch.equal(seen["out"], seen["sum"] + seen["mlp"])
    assert len(seen["sum"].unique()) <= 256


@pytest.mark.parametrize("kind", ["llama", "oasis"])
def test_the_caller_s_embeddings_are_left_alone(kind, ids):
    quantized_model = quantize(make(kind), SCHEME, calibration=batches())
    embedded = quantized_model.get_input_embeddings()(ids).detach()
    before = embedded.clone()
    with torch.no_grad():
        given = quantized_model(inputs_embeds=embedded).logits
    assert torch.equal(embedded, before)
    assert torch.equal(given, logits(quantized_model, ids))


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gated_attention", "oasis"])
def test_whoever_observes_or_switches_attention_changes_nothing(kind, ids):
    quantized_model = quantize(make(kind), SCHEME, calibration=batches())
    before, calls = logits(quantized_model, ids), []
    with observe_attention(quantized_model, calls.append):
        assert torch.equal(logits(quantized_model, ids), before)
    assert len(calls) == quantized_model.config.get_text_config().num_hidden_layers
    if kind == "llama":
        quantized_model.set_attn_implementation("sdpa")
        assert torch.equal(logits(quantized_model, ids), before)


@pytest.mark.parametrize("kind", ["llama", "oasis"])
def test_cached_decoding_equals_the_full_forward(kind):
    quantized_model = quantize(make(kind), SCHEME, calibration=batches())
    prompt = batches()[0][:1, :4]
    greedy = quantized_model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    for length in range(4, greedy.shape[1]):
        assert logits(quantized_model, greedy[:, :length])[0, -1].argmax() == greedy[0, length]


@pytest.mark.parametrize("kind", ["llama", "oasis", "official"])
def test_gradients_reach_the_embedding(kind, ids):
    quantized_model = quantize(make(kind), SCHEME, calibration=batches())
    quantized_model(input_ids=ids, labels=ids).loss.backward()
    gradient = quantized_model.get_input_embeddings().weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_padding_changes_nothing(ids):
    quantized_model = quantize(make("llama"), SCHEME, calibration=batches())
    padded = F.pad(ids, (3, 0))
    mask = F.pad(torch.ones_like(ids), (3, 0))
    with torch.no_grad():
        shown = quantized_model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(shown, logits(quantized_model, ids), rtol=1e-2, atol=1e-2)


def test_names_that_are_no_targets():
    model = make("llama")
    with pytest.raises(UserError, match=r"did you mean 'model\.norm:output'"):
        quantize(model, SCHEME, calibration=batches(), targets=["model.norm:outputs"])
    with pytest.raises(UserError, match=r"targets: 'model\.norm:output' is not one of"):
        quantize(model, "w8a8-dynamic", targets=["model.norm:output"])


_HYBRID = (
    *("{}:input", "{}.post_attention_layernorm:input"),
    *("{}.post_attention_layernorm:output", "{}.input_layernorm:output"),
)
UNKNOWN = {  # the layers of families without a row, and the final norm
    "gpt2": (
        *("{}:input", "{}.ln_1:output", "{}.attn:probabilities", "{}.attn:context"),
        *("{}.ln_2:input", "{}.ln_2:output"),
    ),
    "cohere": ("{}:input", "{}.input_layernorm:output", *(f"{{}}.{each}" for each in ATTENTION)),
    "qwen3_next": (_HYBRID, _HYBRID, _HYBRID, PRE_NORM),
    "mamba": ("{}:input", "{}.norm:output"),
}
FINAL = {"gpt2": "transformer.ln_f", "mamba": "backbone.norm_f"}


@pytest.mark.parametrize("family", UNKNOWN)
def test_the_targets_of_a_family_without_a_row_are_found_by_running_it(family):
    model = family_model(family)
    path, layers = find_layers(model)
    rows = UNKNOWN[family]
    rows = rows if isinstance(rows[0], tuple) else (rows,) * len(layers)
    named = [target.format(f"{path}.{i}") for i, row in enumerate(rows) for target in row]
    final = FINAL.get(family, "model.norm")
    expected = (*named, f"{final}:input", f"{final}:output")
    assert tensor_targets(model) == expected
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    found = quantize(model, SCHEME, calibration=[tokens()], targets=expected)
    quantizers, exact = quantized_modules(found), logits(model, tokens())
    assert set(quantizers) == set(expected)
    for quantizer in quantizers.values():
        quantizer.enabled = False
    off = logits(found, tokens())
    torch.testing.assert_close(off, exact, rtol=1e-4, atol=1e-6)
    for target, quantizer in quantizers.items():
        quantizer.enabled = True
        assert not torch.equal(logits(found, tokens()), off), target
        quantizer.enabled = False


def test_the_mode_of_training_stays():
    model = family_model("gpt2").train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    assert tensor_targets(model) == tensor_targets(family_model("gpt2"))
    assert [module.training for module in model.modules()] == before


def _with_gate(model):
    """A residual stream that is multiplied by a vector."""
    with torch.no_grad():
        model.model.layers[2].post_attention_residual.add_(torch.linspace(0, 1, 32))


def _with_copy(model):
    """A layer that does not carry on what its MLP reads."""
    model.transformer.h[1].ln_2.register_forward_pre_hook(lambda _, args: (args[0].clone(),))


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("bart", None, "its layers do not add just the outputs of their sublayers to the residual"),
        ("doge", _with_gate, "its layers do not add just"),
        ("gpt2", _with_copy, "its layers do not add just"),
        ("lfm2", lambda model: model.bfloat16(), "its layers .* as far as torch.bfloat16 shows it"),
        ("falcon", None, "its attention does not use the attention interface"),
        ("nanochat", None, "its final norm reads the embedding too"),
    ],
)
def test_other_forms_are_refused(family, change, reason):
    model = family_model(family)
    if change:
        assert tensor_targets(model)
        change(model)
    with pytest.raises(UserError, match=f"'full' is not possible with family .*: {reason}"):
        tensor_targets(model)
    assert linear_targets(model)


def test_a_copy_runs_its_own_quantizers(ids):
    quantized_model = quantize(make("oasis"), SCHEME, calibration=batches())
    other, before = copy.deepcopy(quantized_model), logits(quantized_model, ids)
    for module in other.modules():
        if isinstance(module, StaticQuantizer):
            module.scale.mul_(8)
    assert torch.equal(logits(quantized_model, ids), before)
    assert not torch.equal(logits(other, ids), before)
