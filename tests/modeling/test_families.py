"""Attached, not copied: with the method switched off, a family's logits to the last bit."""

import experiments.null_signals  # noqa: F401
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    T5Config,
)

from oasis_attn import OasisConfig, OasisForCausalLM, UserError, convert
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.modeling.depth_cache import observe_depth
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.modeling.weight_names import is_ours
from tiny_models import cast, tiny_config, tiny_model

SINKS = [name for name, family in FAMILIES.items() if family.sinks]
# Their native softcap or sinks are not in SDPA, and their eager softmax runs in float32.
EAGER_ONLY = ("gemma2", "vaultgemma", *SINKS)
GROUPED = [
    name
    for name in FAMILIES
    if MODEL_MAPPING[CONFIG_MAPPING[name]]._can_set_experts_implementation()
]
EXPERTS = [*GROUPED, "llama4_text"]  # the last one has a single form of its own
# Values narrower than keys, or a softcap: not for the fused kernel on the CPU.
pytestmark = pytest.mark.filterwarnings("ignore:null_attention falls back")


def native_model(family, dtype=torch.float32, **changes):
    """As transformers makes it by default, but each weight off its start, norms and sinks too."""
    torch.manual_seed(0)
    text = tiny_config(family, initializer_range=0.2, **changes)
    native = cast(AutoModelForCausalLM.from_config(text), dtype).eval()
    with torch.no_grad():
        for parameter in native.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return native


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_sum_is_the_native_model(family, ids):
    native, mask = native_model(family), left_padded(ids)
    ours = convert(native, "vanilla")
    difference = ours(ids, attention_mask=mask).logits - native(ids, attention_mask=mask).logits
    bound = 1e-5 if family in EAGER_ONLY else 0.0
    assert difference[mask.bool()].abs().max() <= bound


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [1, 3])
def test_a_converted_model_is_the_native_model(family, block, ids):
    """Full and block depth, left-padded, at once and by way of a cache."""
    native, mask = native_model(family, torch.float64), left_padded(ids)
    ours = convert(native, "oasis", depth_block_size=block)
    # Eager float64 is float32 in its softmax, and NaN under padding: there the plain sum stands in.
    reference = convert(native, "vanilla") if family in EAGER_ONLY else native
    whole, cached = [], []
    for model in (ours, reference):
        whole.append(model(ids, attention_mask=mask).logits[mask.bool()])
        cache = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True).past_key_values
        cached.append(model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(*cached, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_null_probability_reaches_the_routers(family, ids):
    """psi changes the depth weights: every family hands back what our function returned."""
    model = tiny_model(
        family=family,
        mix_scale="sum",
        token_normalizer="learned_sink" if family in SINKS else "softmax1",
    )
    nulls, weights = [], {}
    with observe_attention(model, lambda call: nulls.append(call.null_BHT)):
        with observe_depth(model, lambda call: weights.update({call.router: call.weights_BTS})):
            model(ids)
        assert len(nulls) == 4
        assert all(0.01 < null.mean() < 1 for null in nulls)
        model.model.depth.beta_raw.fill_(-40)
        deaf = {}
        with observe_depth(model, lambda call: deaf.update({call.router: call.weights_BTS})):
            model(ids)
    moved = [(weights[router] - deaf[router]).abs().max() for router in range(1, 9)]
    assert min(moved) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps(family, ids):
    model = tiny_model("kv_null", family=family, dtype=torch.float64)
    outputs = model(ids, output_attentions=True, output_null_probability=True)
    torch.testing.assert_close(outputs.logits, model(ids).logits, rtol=0, atol=2e-6)
    for map_BHTS, null_BHT in zip(outputs.attentions, outputs.null_probability, strict=True):
        torch.testing.assert_close(map_BHTS.sum(-1), 1 - null_BHT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", SINKS)
def test_own_sinks_are_the_null_logits(family, ids):
    """No second parameter, and a null probability that follows them."""
    native = native_model(family)
    ours = convert(native, "oasis")
    nulls = []
    with torch.no_grad(), observe_attention(ours, lambda call: nulls.append(call.null_BHT.mean())):
        ours(ids)
        for layer in ours.model.layers:
            if layer.self_attn.sinks is not None:
                assert layer.null_logit is None
                layer.self_attn.sinks.add_(1)
        ours(ids)
    seen = [i for i, layer in enumerate(ours.model.layers) if layer.null_logit is None]
    assert seen
    assert all(nulls[4 + i] > nulls[i] > 0 for i in seen)
    assert all(nulls[i] == 0 for i in range(4) if i not in seen)


def test_own_sinks_take_no_other_normalizer():
    with pytest.raises(UserError, match=r"not work with 'gpt_oss', .* use 'learned_sink' or"):
        OasisForCausalLM(OasisConfig(text_config=tiny_config("gpt_oss")))


def test_families_of_experts():
    assert len(GROUPED) == 27
    for family in FAMILIES:
        known = vars(tiny_config(family))
        assert (family in EXPERTS) is any("experts_per_tok" in n or "moe" in n for n in known), (
            family
        )


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_train_as_in_the_native_model(family, ids):
    """With transformers' default kernel: the same logits, and every gradient."""
    native = native_model(family).train()
    ours = convert(native, "oasis")
    kernel = "grouped_mm" if family in GROUPED else "eager"
    for config in (native.config, ours.config, ours.model.config):
        assert config._experts_implementation == kernel
    found = []
    for model in (native, ours):
        torch.manual_seed(0)  # phimoe draws noise for its router
        outputs = model(ids, labels=ids)
        native.zero_grad()
        outputs.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((outputs.logits, gradients))
    (logits, gradients), (our_logits, our_gradients) = found
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=2e-5)
    for name, gradient in gradients.items():
        bound = 2e-5 * gradient.abs().max().item()
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=bound, msg=name)
    assert all(is_ours(name) for name in our_gradients.keys() - gradients.keys())


@pytest.mark.parametrize("family", EXPERTS)
def test_checkpoints_of_experts_load_train_and_come_back(family, tmp_path, ids):
    """Names and shapes on disk are the family's own, which differ from those in memory."""
    native = native_model(family)
    native.save_pretrained(tmp_path / "native")
    settings = {"token_normalizer": "learned_sink"} if family in SINKS else {}
    model, info = OasisForCausalLM.from_pretrained(
        tmp_path / "native", mix_scale="sum", output_loading_info=True, **settings
    )
    assert all(is_ours(name) for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    weights = native.state_dict()
    for name, tensor in model.state_dict().items():
        if not is_ours(name):
            assert torch.equal(tensor, weights[name]), name
    before = model(ids, labels=ids).loss
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert model.eval()(ids, labels=ids).loss < before
    model.save_pretrained(tmp_path / "ours")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(ids).logits, model(ids).logits)
    theirs = load_file(tmp_path / "native" / "model.safetensors").keys()
    on_disk = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert {name for name in on_disk if not is_ours(name)} == theirs


ADDED = {
    "official": {"output_gate": "elementwise"},
    "oasis": {
        "output_gate": "head",
        "null_signal": "by_head",
        "mix_scale": "sum",
        "token_normalizer": {"name": "key_value_null", "nulls": 2},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ADDED)
def test_no_conversion_touches_a_parameter_of_ours(variant, family, tmp_path, ids):
    """Saved under their own names, and loaded from them, with every setting that adds some."""
    settings = ADDED[variant]
    if variant == "official" and family in SINKS:
        settings = settings | {"token_normalizer": "learned_sink"}
    model = tiny_model(variant, family, **settings)
    ours = {name for name in model.state_dict() if is_ours(name)}
    assert len(ours) >= 12
    model.save_pretrained(tmp_path)
    assert {n for n in load_file(tmp_path / "model.safetensors") if is_ours(n)} == ours
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path)  # with the conversions that loading has used
    assert {n for n in load_file(tmp_path / "model.safetensors") if is_ours(n)} == ours


def test_no_family_has_a_name_of_ours():
    for family in FAMILIES:
        with torch.device("meta"):
            native = AutoModelForCausalLM.from_config(tiny_config(family))
        assert not any(map(is_ours, native.state_dict())), family


def test_a_loaded_model_with_conversions_is_pickled(tmp_path, ids):
    tiny_model("official", "mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.save(model, tmp_path / "whole")
    again = torch.load(tmp_path / "whole", weights_only=False)
    again.save_pretrained(tmp_path / "again")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_the_experts_implementation_can_be_set(tmp_path, ids):
    model = tiny_model(family="mixtral")
    whole = model(ids).logits
    assert model.get_experts_implementation() == {"": "grouped_mm", "text_config": "grouped_mm"}
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert set(model.get_experts_implementation().values()) == {name}
        assert model.model.layers[0].mlp.experts.config._experts_implementation == name
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    for given in (None, "eager", "grouped_mm"):
        keywords = {} if given is None else {"experts_implementation": given}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **keywords)
        assert set(loaded.get_experts_implementation().values()) == {given or "grouped_mm"}
    with pytest.raises(ValueError, match=r'experts_implementation="grouped".* not supported'):
        model.set_experts_implementation("grouped")
    dense = tiny_model()
    assert set(dense.get_experts_implementation().values()) == {"eager"}
    with pytest.raises(UserError, match="LlamaModel does not support 'grouped_mm'"):
        dense.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generation_with_default_experts(family, ids):
    native = native_model(family)
    texts = [
        model.generate(ids, max_new_tokens=6, do_sample=False)
        for model in (native, convert(native))
    ]
    assert torch.equal(*texts)


def test_a_post_norm_family_needs_the_scaled_mix():
    with pytest.raises(UserError, match=r"mix_scale: 'none' would change .*'olmo2'"):
        OasisForCausalLM(OasisConfig(text_config=tiny_config("olmo2")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GPT2Config(n_layer=1), "model_type: 'gpt2' is not supported; supported are .*$"),
        (BertConfig(num_hidden_layers=1), "model_type: 'bert' is not supported"),
        (T5Config(num_layers=1), "model_type: 't5' has an encoder"),
        ({"model_type": "gptj"}, "'gptj' cannot be converted exactly: .* in parallel"),
        ({"model_type": "mamba"}, "'mamba' cannot be converted exactly: .* no softmax attention"),
        ({"model_type": "minimax"}, "'minimax' cannot be converted exactly: its residual stream"),
        ({"model_type": "stablelm", "use_parallel_residual": True}, "'stablelm' .* in parallel"),
        ({"model_type": "lama"}, "text_config: .*lama"),
    ],
)
def test_other_architectures_are_refused_by_name(text, message):
    with pytest.raises(UserError, match=message) as raised:
        OasisForCausalLM(OasisConfig(text_config=text))
    assert "\n" not in str(raised.value)
