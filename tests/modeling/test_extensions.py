"""Null signals, branch norms and token normalizers of a user act as the library's own do."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from oasis_attn import (
    OasisConfig,
    OasisForCausalLM,
    UserError,
    convert,
    register_branch_norm,
    register_null_signal,
    register_token_normalizer,
)
from oasis_attn.extension_files import load_extensions
from oasis_attn.modeling.extensions import NULL_SIGNALS, null_evidence
from oasis_attn.ops import normalize
from tiny_models import tiny_config, tiny_model

EXPERIMENTS = [
    Path(__file__).parents[2] / "experiments" / name
    for name in ("branch_norms.py", "null_signals.py")
]
EXPERIMENTAL = [
    ("null_signal", "log"),
    ("null_signal", "attention_only"),
    ("null_signal", "by_head"),
    ("branch_norm", "bounded"),
]


@pytest.fixture(autouse=True)
def experiments(own_extensions):  # noqa: ARG001
    load_extensions(EXPERIMENTS)


def logits_of(ids, **settings):
    model = tiny_model(**settings)
    if model.model.null_signal is not None:
        model.model.null_signal.weights_LH.data.uniform_(0, 2)
    return model(ids).logits


@pytest.mark.parametrize(("setting", "name"), EXPERIMENTAL)
def test_each_experiment_has_an_effect_and_gradients(setting, name, ids):
    logits = logits_of(ids, **{setting: name})
    assert (logits - logits_of(ids)).abs().max() > 1e-3
    model = tiny_model(**{setting: name}).train()
    model(ids, labels=ids).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(("setting", "name"), EXPERIMENTAL)
def test_cached_decoding_equals_the_full_pass(setting, name, ids):
    model = tiny_model(dtype=torch.float64, **{setting: name})
    cache, steps = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, rtol=0, atol=2e-5)


def test_a_signal_with_parameters_is_saved_and_starts_at_its_own_values(tmp_path, ids):
    model = tiny_model(null_signal="by_head")
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)  # the mean over heads
    model.model.null_signal.weights_LH.data.uniform_(0, 2)
    model.save_pretrained(tmp_path / "model")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)

    native = AutoModelForCausalLM.from_config(tiny_config()).eval()
    converted = convert(native, null_signal="by_head")
    torch.testing.assert_close(converted(ids).logits, native(ids).logits, rtol=0, atol=1e-5)
    native.save_pretrained(tmp_path / "native")
    direct = OasisForCausalLM.from_pretrained(tmp_path / "native", null_signal="by_head")
    for new in (converted, direct):
        assert new.model.null_signal.weights_LH.eq(1).all()


class Scaled(nn.Module):
    """A signal with modules, and with buffers that checkpoints contain and that they do not."""

    def __init__(self, config):
        super().__init__()
        heads = config.num_attention_heads
        self.mix = nn.Linear(heads, 1)
        nn.init.constant_(self.mix.weight, 0.3)
        nn.init.constant_(self.mix.bias, 0.1)
        self.register_buffer("offset", torch.full((heads,), 0.1))
        self.register_buffer("scale", torch.linspace(0.1, 0.9, heads), persistent=False)
        self.register_buffer("order", torch.arange(heads).flip(0), persistent=False)

    def forward(self, null_BHT, layer):  # noqa: ARG002
        x_BTH = null_BHT.transpose(1, 2)[..., self.order] @ self.scale.diag() + self.offset
        return self.mix(x_BTH).squeeze(-1)


@torch.no_grad()
@pytest.mark.parametrize("residual", ["depth", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_signal_of_modules_is_cast_saved_and_loaded(dtype, residual, tmp_path, ids):
    narrow = dtype == torch.bfloat16
    register_null_signal("scaled", Scaled)
    expected = tiny_model(null_signal="scaled", residual=residual)
    expected.model.null_signal.mix.weight.data.uniform_(0, 2)
    logits, null_BHT = expected(ids).logits, torch.rand(2, 4, 12)
    assert (logits - tiny_model(residual=residual)(ids).logits).abs().max() > 1e-3
    model = copy.deepcopy(expected).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    psi = null_evidence(expected.model.null_signal, null_BHT, 0)
    for other in (model, loaded.eval()):
        found = null_evidence(other.model.null_signal, null_BHT, 0)
        assert found[0] is found[1]
        torch.testing.assert_close(found, psi, rtol=0, atol=3e-2 if narrow else 1e-6)
        assert other(ids).logits.dtype == dtype
        atol = 0.5 if narrow else 1e-5
        torch.testing.assert_close(other(ids).logits.float(), logits, rtol=0, atol=atol)
    signal, precise = loaded.model.null_signal, torch.promote_types(dtype, torch.float32)
    for tensor in (*signal.parameters(), signal.offset, signal.scale):
        assert tensor.dtype == precise
    torch.testing.assert_close(signal.scale, torch.linspace(0.1, 0.9, 4, dtype=precise))
    assert signal.order.tolist() == [3, 2, 1, 0]


def test_a_new_signal_and_new_routers_are_at_least_float32(tmp_path):
    register_null_signal("scaled", Scaled)
    config, native = OasisConfig(text_config=tiny_config(), null_signal="scaled"), tmp_path
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(native)
    for model in (
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
        OasisForCausalLM.from_pretrained(native, dtype=torch.bfloat16, null_signal="scaled"),
    ):
        signal, depth = model.model.null_signal, model.model.depth
        for tensor in (*depth.parameters(), *signal.parameters(), signal.offset, signal.scale):
            assert tensor.dtype == torch.float32
        assert signal.mix.weight.eq(0.3).all()  # not rounded to bfloat16
        assert signal.scale.tolist() == torch.linspace(0.1, 0.9, 4).tolist()
    assert torch.get_default_dtype() == torch.float32


def test_a_checkpoint_needs_the_registration_and_says_so(tmp_path, monkeypatch):
    tiny_model(null_signal="log").save_pretrained(tmp_path)
    monkeypatch.delitem(NULL_SIGNALS._entries, "log")
    names = ", ".join(NULL_SIGNALS)
    with pytest.raises(UserError) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(raised.value) == (
        f"null_signal: 'log' is not one of off, {names}; register it with register_null_signal, or"
        " load its file with --extension"
    )


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"null_signal": "mine"}, "null_signal: 'mine' is not one of off, on, shuffled"),
        ({"branch_norm": "mine"}, "branch_norm: 'mine' is not one of none, rms, rms_mlp"),
        ({"token_normalizer": "mine"}, "token_normalizer: 'mine' is not one of softmax, softmax1"),
        ({"token_normalizer": {"name": "mine", "a": 1.0}}, "token_normalizer: 'mine' is not one"),
    ],
)
def test_a_name_that_is_not_registered_is_refused_with_the_remedy(settings, start):
    (setting,) = settings
    with pytest.raises(UserError) as raised:
        OasisConfig(text_config=tiny_config(), **settings)
    assert str(raised.value).startswith(start)
    end = f"register it with register_{setting}, or load its file with --extension"
    assert str(raised.value).endswith(end)


def test_a_signal_reads_each_layers_null_and_may_differ_for_the_mlp(ids):
    seen = []

    def spy(null_BHT, layer):
        seen.append((layer, null_BHT.shape))
        return null_BHT.mean(1), torch.zeros_like(null_BHT[:, 0])

    register_null_signal("spy", spy)
    logits = logits_of(ids, null_signal="spy")
    assert seen == [(layer, (2, 4, 12)) for layer in range(4)]
    assert torch.equal(logits, logits_of(ids, null_signal="attention_only"))  # None is 0


def test_a_branch_norm_reads_the_embedding_and_every_branch(ids):
    seen = []

    def spy(x_BTD, kind):
        seen.append((kind, x_BTD.shape))
        return x_BTD

    register_branch_norm("spy", spy)
    assert torch.equal(logits_of(ids, branch_norm="spy"), logits_of(ids))
    kinds = ["embedding", *["attention", "mlp"] * 4]
    assert seen == [(kind, (2, 12, 32)) for kind in kinds]


@pytest.mark.parametrize(
    ("norm", "returned"),
    [
        (lambda x, kind: x[:, :1] if kind == "mlp" else x, r"'mlp', .* \[2, 1, 32\]"),
        (lambda x, kind: x.mean(-1, keepdim=True), r"'embedding', .* \[2, 12, 1\]"),  # noqa: ARG005
        (lambda x, kind: x[..., :5] if kind == "attention" else x, r"'attention', .* \[2, 12, 5\]"),
        (lambda x, kind: (x,), "'embedding', .* tuple"),  # noqa: ARG005
        (lambda x, kind: None, "'embedding', .* NoneType"),  # noqa: ARG005
    ],
)
@pytest.mark.parametrize("residual", ["sum", "depth", "official"])
def test_a_branch_norm_that_returns_another_shape_is_named(norm, returned, residual, ids):
    register_branch_norm("wrong", norm)
    model = tiny_model("softmax1", residual=residual, branch_norm="wrong")
    message = rf"^branch_norm: for kind {returned}; it must return a tensor \[2, 12, 32\]$"
    with pytest.raises(UserError, match=message.replace(".*", "'wrong' returned")):
        model(ids)


def softmax1_with_temperature(scores, temperature=1.0):
    weights = nn.functional.pad(scores / temperature, (0, 1)).softmax(-1)
    return weights[..., :-1], weights[..., -1]


def test_a_token_normalizer_is_the_same_as_the_library_s_with_the_same_formula(ids, tmp_path):
    register_token_normalizer("warm", softmax1_with_temperature, has_null=True)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    results = []
    for normalizer in ("softmax1", "warm", {"name": "warm", "temperature": 2.0}):
        model = tiny_model(token_normalizer=normalizer, dtype=torch.float64)
        with torch.no_grad():
            results.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-5)
    assert (results[0] - results[2]).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.token_normalizer == {"name": "warm", "temperature": 2.0}
    with torch.no_grad():
        logits = again(ids, attention_mask=mask).logits[mask.bool()]
    assert torch.equal(logits, results[2])


def test_masked_keys_have_no_weight_whatever_a_token_normalizer_returns():
    register_token_normalizer("all_ones", lambda s: (s * 0 + 1, s[..., 0] * 0), has_null=False)
    scores, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [False] * 3])
    weights, null = normalize(scores, "all_ones", mask=mask)
    assert weights.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert null.tolist()[1] == 1
    with pytest.raises(UserError, match="needs a token_normalizer with a null"):
        OasisConfig(text_config=tiny_config(), token_normalizer="all_ones")
