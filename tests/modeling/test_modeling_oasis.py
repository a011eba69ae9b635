"""Laws that hold for any causal model, over families and variants."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from oasis_attn import UserError, variants
from oasis_attn.modeling import attention
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.depth_cache import observe_depth
from tiny_models import VOCABULARY, tiny_config, tiny_model

FAMILIES = ("llama", "qwen3", "phi3")
CAUSAL = [name for name in variants() if name != "oasis_signal_shuffled"]  # a control that is not
LAWS = [(variant, "llama") for variant in CAUSAL] + [("oasis", f) for f in FAMILIES[1:]]


@pytest.fixture(params=LAWS, ids=lambda law: "-".join(law))
def model(request):
    return tiny_model(*request.param, dtype=torch.float64)


@torch.no_grad()
def test_a_future_token_changes_nothing_before_it(model, ids):
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCABULARY
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_the_two_phases_of_inference_change_nothing(model, ids):
    differentiable = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, differentiable, rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_changes_nothing(model, ids):
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 5:], model(ids).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(model, ids):
    packed = ids.reshape(1, -1)
    positions = torch.arange(12).repeat(2)[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits.view(2, 12, -1), model(ids).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_cached_decoding_is_the_full_forward(model, ids):
    full = model(ids).logits
    outputs, steps = None, []
    for chunk in ids.split([5, 4, 1, 1, 1], dim=1):
        cache = outputs.past_key_values if outputs else None
        outputs = model(chunk, past_key_values=cache, use_cache=True)
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_static_cache_is_the_full_forward(model, ids):
    cache = StaticCache(config=model.config.text_config, max_cache_len=20)
    prefill = model(ids[:, :10], past_key_values=cache, use_cache=True).logits
    after = model(ids[:, 10:11], past_key_values=cache, use_cache=True).logits
    expected = model(ids[:, :11]).logits
    torch.testing.assert_close(torch.cat([prefill, after], 1), expected, rtol=0, atol=1e-10)


def test_every_parameter_gets_a_gradient_and_recomputing_changes_none(model, ids):
    model.train()
    losses, gradients = [], []
    for how in ("keep all", "activation checkpointing", "recompute mixes"):
        each = copy.deepcopy(model)
        if how == "activation checkpointing":
            each.activation_checkpointing_enable()
        elif how == "recompute mixes":
            each.recompute_mixes()
        loss = each(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-12)


def test_recomputed_mixes_are_not_stored(ids):
    """A sublayer then stores its output, as a residual sum stores its state, and no mix."""

    def kept_bytes(model):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids.repeat(8, 4), use_cache=False).logits.sum()
        return sum(storages.values())

    text = tiny_config(hidden_size=128, intermediate_size=384, head_dim=32)
    routed = tiny_model("attn_residual", text=text)
    kept, vanilla = kept_bytes(routed), kept_bytes(tiny_model("vanilla", text=text))
    routed.recompute_mixes()
    assert kept_bytes(routed) < 1.02 * vanilla < kept


@torch.no_grad()
def test_mixes_of_unit_scale_are_the_same_function(ids):
    unit, plain = (tiny_model(name, dtype=torch.float64) for name in ("oasis_unit", "oasis"))
    seen = []
    for model in (unit, plain):
        for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
            norm.variance_epsilon = 0.0
    for layer in unit.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    # The family's own norms compute in float32.
    torch.testing.assert_close(unit(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    rms = torch.stack(seen).pow(2).mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_norm_after_each_branch_of_a_sum(ids):
    model = tiny_model("vanilla", dtype=torch.float64, branch_norm="rms").model
    added, read = [], []

    def kept(_module, _inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        added.append(x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())

    branches = (branch for layer in model.layers for branch in (layer.self_attn, layer.mlp))
    for module in (model.embed_tokens, *branches):
        module.register_forward_hook(kept)
    model.norm.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model(ids)
    torch.testing.assert_close(read[0], sum(added), rtol=0, atol=1e-12)


def test_generate_is_the_same_with_and_without_a_cache(model, ids):
    texts = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("variant", ["oasis", "softpick"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_mask_of_whole_numbers_is_refused(variant, mapped, ids):
    mask = torch.ones(12, 12).tril().long().expand(2, 1, 12, 12)
    settings = {"null_signal": "off"} if variant == "softpick" else {}
    with pytest.raises(UserError, match=r"dtype torch\.int64 is neither"):
        tiny_model(variant, **settings)(ids[:2, :12], attention_mask=mask, output_attentions=mapped)


@torch.no_grad()
def test_a_trace_computes_what_the_model_does(ids):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids_BT):
            return self.model(ids_BT, use_cache=False).logits

    module = Logits(tiny_model())
    traced = torch.jit.trace(module, ids, check_trace=False)
    torch.testing.assert_close(traced(ids.flip(0)), module(ids.flip(0)), rtol=0, atol=1e-4)


def test_an_elementwise_gate_is_as_wide_as_the_values(ids):
    text = tiny_config("deepseek_v3")
    assert text.v_head_dim != text.head_dim
    model = tiny_model("gated_elementwise", text=text)
    assert model.model.layers[0].output_gate.out_features == 4 * text.v_head_dim
    assert model(ids).logits.isfinite().all()


def test_activation_checkpointing_keeps_no_cache(ids):
    """Checkpointed layers ignore a cache, so that `generate` would read one token only."""
    model = tiny_model()
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **greedy)
    model.train().activation_checkpointing_enable()
    with pytest.raises(UserError, match=r"use_cache: .*call model.eval\(\) to generate, or pass"):
        model.generate(ids, **greedy)
    with pytest.raises(
        UserError, match="use_cache: activation checkpointing does not support a cache"
    ):
        model(ids, past_key_values=DynamicCache())
    assert torch.equal(model.generate(ids, use_cache=False, **greedy), want)
    assert model(ids).past_key_values is None
    assert torch.equal(model.eval().generate(ids, **greedy), want)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(UserError, match="use_reentrant: True is not supported"):
        tiny_model().activation_checkpointing_enable({"use_reentrant": True})


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_depth_routing_is_the_equations(block, ids):
    """A second reading of Attention Residuals and OASIS, from recorded branches."""
    model = tiny_model(depth_block_size=block, dtype=torch.float64)
    branches, nulls, seen = [], [], {}

    def after_attention(_module, _args, output):
        branches.append(output[0])
        nulls.append(output[1].mean(1))

    def after_mlp(_module, _args, output):
        branches.append(output)
        nulls.append(nulls[-1])

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(after_attention)
        layer.mlp.register_forward_hook(after_mlp)
    states = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _m, args: states.append(args[0])
        )
    with observe_depth(model, lambda call: seen.update({call.router: call.weights_BTS})):
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    depth = model.model.depth
    beta = torch.nn.functional.softplus(depth.beta_raw).clamp(max=10)
    embedding = model.model.embed_tokens(ids)
    for router in range(9):
        done = router // block
        sources = [embedding] + [sum(branches[k * block : (k + 1) * block]) for k in range(done)]
        psi = [torch.zeros(ids.shape, dtype=torch.float64)] + [
            sum(nulls[k * block : (k + 1) * block]) / block for k in range(done)
        ]
        if router % block:
            sources.append(sum(branches[done * block : router]))
            psi.append(sum(nulls[done * block : router]) / (router % block))
        keys = [v / (v.pow(2).mean(-1, keepdim=True) + depth.eps).sqrt() for v in sources]
        query = depth.queries[router] * depth.key_norm[router]
        mean = sum(psi) / len(psi)
        g = torch.stack(
            [k @ query - beta[router] * (p - mean) for k, p in zip(keys, psi, strict=True)], -1
        )
        weights = g.exp() / (1 + g.exp().sum(-1, keepdim=True))
        torch.testing.assert_close(seen[router].double(), weights, rtol=0, atol=1e-12)
        mixed = (torch.stack(sources, -1) * weights.unsqueeze(-2)).sum(-1)
        if router % 2:
            actual = states[router // 2]
        elif router < 8:
            actual = hidden[router // 2] if router else None
        else:
            continue
        if actual is not None:
            torch.testing.assert_close(actual, mixed, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_tap_sees_what_was_computed(ids):
    for variant in ("oasis", "kv_null", "softpick", "vanilla"):
        model = tiny_model(variant, dtype=torch.float64)
        calls = []
        with observe_attention(model, calls.append):
            model(ids)
        assert [call.layer for call in calls] == [0, 1, 2, 3]
        for call in calls:
            weights = torch.stack([call.column(j) for j in range(12)], -1)
            assert weights.triu(1).eq(0).all()
            torch.testing.assert_close(weights.sum(-1), 1 - call.null_BHT, rtol=0, atol=1e-12)
        assert attention._observers == []


def test_the_asked_for_kernel_runs(monkeypatch, ids):
    ran = []
    kernel = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **k: ran.append(k) or kernel(*a, **k))
    tiny_model("oasis")(ids)
    assert len(ran) == 4
    tiny_model("vanilla")(ids)  # the stock kernel: nothing of ours
    assert len(ran) == 4


@torch.no_grad()
def test_the_shuffled_signal_keeps_the_values_and_moves_them(ids):
    model = tiny_model("oasis_signal_shuffled")
    torch.manual_seed(0)
    first = model(ids).logits
    assert not torch.allclose(first, model(ids).logits)
    torch.manual_seed(0)
    assert torch.equal(first, model(ids).logits)
