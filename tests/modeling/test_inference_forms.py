"""Inference, in each of its forms, computes what the differentiable form does."""

import copy

import experiments.null_signals  # noqa: F401
import pytest
import torch

from oasis_attn.modeling.depth_cache import observe_depth
from oasis_attn.ops import c_kernels
from oasis_attn.ops.depth_mix import TwoPhaseMixer, c_mixer
from oasis_attn.ops.depth_mix.c_mixer import CMixer
from oasis_attn.ops.null_attention import decode_attention, null_attention
from tiny_models import tiny_config, tiny_model

VARIANTS = ["oasis", "oasis_block", "attn_residual", "oasis_signal_off"]
SETTINGS = [
    {},
    {"mix_scale": "sum"},
    {"mix_scale": "rms", "branch_norm": "rms"},
    {"depth_block_size": 3},
    {"depth_block_size": 100_000},
]
compiled = pytest.mark.skipif(c_kernels.library() is None, reason="there is no C compiler")


@pytest.fixture
def steps(monkeypatch):
    """The class of the mixer, once for each sublayer."""
    seen = []
    for mixer in (CMixer, TwoPhaseMixer):

        def counted(self, branch, psi, router, mixer=mixer, update=mixer.update):
            if router:
                seen.append(mixer.__name__)
            return update(self, branch, psi, router)

        monkeypatch.setattr(mixer, "update", counted)
    return seen


def build(variant, **settings):
    text = tiny_config(num_hidden_layers=5, initializer_range=0.2)
    return tiny_model(variant, text=text, **settings)


def differentiable(model, ids_BT, **inputs):
    """Logits in float64, for the differentiable form."""
    return copy.deepcopy(model).double()(ids_BT, **inputs).logits.float()


def decoded(model, ids_BT):
    """Logits of every position but the first three, one token at a time."""
    cache, logits = None, []
    for start, stop in ((0, 3), *((t, t + 1) for t in range(3, ids_BT.shape[1]))):
        outputs = model(ids_BT[:, start:stop], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits[:, -1:])
    return torch.cat(logits[1:], 1)


@compiled
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_at_a_time(variant, settings, batch, steps):
    model = build(variant, **settings)
    ids = torch.randint(3, 90, (batch, 9))
    whole = differentiable(model, ids)[:, 3:]
    with torch.no_grad():
        torch.testing.assert_close(decoded(model, ids), whole, rtol=0, atol=1e-4)
    assert steps == ["CMixer"] * 7 * 10


@compiled
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_prompt(variant, settings, threads, steps, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = build(variant, **settings)
    ids = torch.randint(3, 90, (3, 25))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    whole = differentiable(model, ids, attention_mask=mask)
    with torch.no_grad():
        fast = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(fast[mask > 0], whole[mask > 0], rtol=0, atol=1e-4)
    assert set(steps) == {"CMixer"}


@pytest.mark.parametrize("signal", ["log", "attention_only", "by_head"])
@pytest.mark.parametrize("compiler", [pytest.param(True, marks=compiled), False])
def test_other_null_signals(signal, compiler, steps, monkeypatch):
    if not compiler:
        monkeypatch.setattr(c_kernels, "library", lambda: None)
    model = build("oasis", null_signal=signal)
    ids = torch.randint(3, 90, (2, 9))
    whole = differentiable(model, ids)[:, 3:]
    with torch.no_grad():
        torch.testing.assert_close(decoded(model, ids), whole, rtol=0, atol=1e-4)
    assert len(steps) == 7 * 10


@pytest.mark.parametrize("settings", [{}, {"depth_block_size": 3}])
@pytest.mark.parametrize("compiler", [pytest.param(True, marks=compiled), False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_shuffled_signal_is_drawn_alike_in_all_forms(
    settings, compiler, batch, steps, monkeypatch
):
    """One permutation a layer, whatever the form."""
    if not compiler:
        monkeypatch.setattr(c_kernels, "library", lambda: None)
    model, draws, randperm = build("oasis_signal_shuffled", **settings), [], torch.randperm

    def counted(n, **keywords):
        draws.append(n)
        return randperm(n, **keywords)

    monkeypatch.setattr(torch, "randperm", counted)
    ids = torch.randint(3, 90, (batch, 9))
    torch.manual_seed(4)
    whole = differentiable(model, ids)
    assert draws == [9 * batch] * 5
    with torch.no_grad():
        torch.manual_seed(4)
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-4)
        assert len(steps) == 10
        assert draws == [9 * batch] * 10
        model(ids[:, :1])
    assert steps == ["CMixer" if compiler else "TwoPhaseMixer"] * 20


def test_the_shuffled_signal_is_one_for_the_attention_and_the_mlp_of_a_layer(monkeypatch):
    model, seen, ids = build("oasis_signal_shuffled"), [], torch.randint(3, 90, (2, 9))
    with observe_depth(model, lambda call: seen.append(call.signal_BTS)):
        model(ids)
    sources = seen[-1].unbind(-1)  # the embedding, then an attention and an MLP a layer
    for attention, mlp in zip(sources[1::2], sources[2::2], strict=True):
        assert torch.equal(attention, mlp)
        assert attention.std() > 0
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
    on = tiny_model("oasis", text=model.config.text_config)
    torch.testing.assert_close(model(ids).logits, on(ids).logits)


def test_the_averaged_signal_is_that_of_a_mean_token():
    model, seen, nulls = build("oasis", null_signal="averaged"), [], []
    ids = torch.randint(3, 90, (2, 9))
    with observe_depth(model, lambda call: seen.append(call.signal_BTS)):
        nulls = model(ids, output_null_probability=True).null_probability
    _, beta_R = model.model.depth()
    means = [torch.zeros(()), *(null.mean() for null in nulls for _ in range(2))]
    for router, signal_BTS in enumerate(seen):
        psi_S = torch.stack(means[: router + 1])
        expected_BTS = beta_R[router] * (psi_S.mean() - psi_S).expand_as(signal_BTS)
        torch.testing.assert_close(signal_BTS, expected_BTS)
    assert seen[-1].std() > 0


@compiled
@pytest.mark.parametrize(
    "null_logit",
    [0.0, -12.0, 90.0, -torch.inf, torch.tensor([0.5, -2.0, -torch.inf, 30.0])],
    ids=str,
)
def test_the_null_of_one_token(null_logit):
    query, (key, value) = torch.randn(3, 4, 1, 8), torch.randn(2, 3, 2, 7, 8)
    with torch.no_grad():
        fast = decode_attention(query, key, value, scale=0.3, null_logit=null_logit)
    plain = null_attention(query, key, value, scale=0.3, null_logit=null_logit, backend="naive")
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_compiler(variant, settings, steps, monkeypatch):
    monkeypatch.setattr(c_kernels, "library", lambda: None)
    model = build(variant, **settings)
    ids = torch.randint(3, 90, (2, 9))
    whole = differentiable(model, ids)[:, 3:]
    with torch.no_grad():
        torch.testing.assert_close(decoded(model, ids), whole, rtol=0, atol=1e-4)
    assert set(steps) == {"TwoPhaseMixer"}


def test_a_compiler_that_fails_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path))
    assert c_kernels.library.__wrapped__() is None
    assert not list(tmp_path.iterdir())


@compiled
def test_autocast_keeps_the_stream_in_float32(steps):
    model = build("oasis")
    ids = torch.randint(3, 90, (2, 40))
    whole = differentiable(model, ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    assert set(steps) == {"CMixer"}
    assert (logits.float() - whole).norm() < 0.1 * whole.norm()  # the differentiable form: 0.07


@compiled
def test_a_branch_of_another_shape_is_refused():
    model = build("oasis")
    layer = model.model.layers[1].mlp
    layer.register_forward_hook(lambda _module, _inputs, output: output[:, :-1])
    with torch.no_grad(), pytest.raises(ValueError, match=r"router 4 .* branch is \[1, 4, "):
        model(torch.randint(3, 90, (1, 5)))


@compiled
def test_a_block_larger_than_the_model_takes_no_more_memory_than_one_as_large(ids, monkeypatch):
    sizes = []

    def allocate(size):
        sizes.append(size)
        return torch.empty(size)

    monkeypatch.setattr(c_mixer, "_allocate", allocate)
    large = build("oasis", depth_block_size=100_000)
    fitting = build("oasis", depth_block_size=11)  # all routers
    with torch.no_grad():
        logits = [model(ids).logits for model in (large, fitting)]
    assert sizes[0] == sizes[1]
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], differentiable(large, ids), rtol=0, atol=1e-4)
