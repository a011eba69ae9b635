"""Experts are quantized like any linear layer, in every family that has experts.

The reference is the family's own model: the test rounds its weights, and hooks round its
activations.  It uses float64, so that both forms round every value in the same direction.  Its
experts run as `batched_mm`, because the default implementation does not support float64.
"""

from __future__ import annotations

import copy
import functools
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from oasis_attn.errors import UserError
from oasis_attn.quantization import (
    linear_targets,
    quantize,
    quantized_modules,
)
from oasis_attn.quantization.coverage import float_weights, quantized_share, rounded_to_nearest
from oasis_attn.quantization.gptq import round_weight, second_moments
from oasis_attn.quantization.linearize import linearize
from oasis_attn.quantization.quantizers import observe_qparams
from oasis_attn.quantization.sensitivity import measure_sensitivity, target_metrics
from oasis_attn.quantization.simulate import transformed_copy
from quantization.expert_models import (
    EAGER,
    EXPERTS,
    GPTQ,
    GROUPED,
    SCHEMES,
    TABLE,
    batches,
    experts_of,
    logits,
    make,
    quantized,
    rounded,
    save_and_load,
    tokens,
    transposed,
)
from tiny_models import tiny_model


def on_grid(x, bits, low, high):
    """Activations rounded to an asymmetric grid over `low` .. `high`."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / step).round()
    return step * (x / step).round().clamp(-zero, 2**bits - 1 - zero)


@torch.no_grad()
def weights_rounded(model, spec):
    quantized_model = copy.deepcopy(model)
    for name in linear_targets(quantized_model):
        if ".experts." not in name or ".shared_experts." in name:
            weight = quantized_model.get_submodule(name).weight
            weight.copy_(rounded(weight, spec))
    for experts in experts_of(quantized_model).values():
        for packed in (experts.gate_up_proj, experts.down_proj):
            for weight in packed:
                weight = weight.T if transposed(experts) else weight
                weight.copy_(rounded(weight.contiguous(), spec))
    return quantized_model


@contextmanager
def inputs_through(model, function):
    """Inside the context, each quantized layer gets `function(name, x)` as its input."""
    undo = []
    for name in linear_targets(model):
        if ".experts." not in name or ".shared_experts." in name:
            layer = model.get_submodule(name)
            hook = layer.register_forward_pre_hook(lambda _, args, n=name: function(n, args[0]))
            undo.append(hook.remove)
    for name, experts in experts_of(model).items():

        def hook(_, args, name=name):
            return (function(f"{name}.gate_up_proj", args[0]), *args[1:])

        def gate(self, x, name=name):
            return function(f"{name}.down_proj", type(self)._apply_gate(self, x))

        def llama4(self, x, name=name):
            x = x.view(len(self.gate_up_proj), -1, x.shape[-1])
            gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
            inner = function(f"{name}.down_proj", up * self.act_fn(gate))
            return torch.bmm(inner, self.down_proj).flatten(0, 1)

        undo.append(experts.register_forward_pre_hook(hook).remove)
        own = ("_apply_gate", gate) if hasattr(experts, "_apply_gate") else ("forward", llama4)
        setattr(experts, own[0], types.MethodType(own[1], experts))
        undo.append(functools.partial(delattr, experts, own[0]))
    try:
        yield
    finally:
        for remove in undo:
            remove()


def reference(model, ids, scheme):
    quantized_model, spec = weights_rounded(model, scheme.weight), scheme.activation
    if hasattr(
        next(iter(experts_of(quantized_model).values())), "is_transposed"
    ):  # false for Llama 4
        quantized_model.set_experts_implementation("batched_mm")
    if spec is None:
        return logits(quantized_model, ids)
    ranges = {}

    def watch(name, x):
        low, high = ranges.get(name, (torch.tensor(torch.inf), torch.tensor(-torch.inf)))
        ranges[name] = low.minimum(x.min()), high.maximum(x.max())
        return x

    def move(name, x):
        low, high = ranges[name] if scheme.static else x.aminmax(dim=-1, keepdim=True)
        return on_grid(x, spec.bits, low, high)

    if scheme.static:
        with inputs_through(quantized_model, watch):
            for batch in batches():
                logits(quantized_model, batch)
    with inputs_through(quantized_model, move):
        return logits(quantized_model, ids)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_equals_hooks_on_the_model_of_the_family(family, name):
    model, scheme, ids = copy.deepcopy(make(family)).double(), SCHEMES[name], tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized_model = quantized(model, scheme)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    expected = reference(model, ids, scheme)
    found = logits(quantized_model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - logits(make(family), ids)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_loading_is_bit_exact(family, name, tmp_path):
    quantized_model = quantized(make(family), SCHEMES[name])
    assert torch.equal(
        logits(save_and_load(quantized_model, tmp_path), tokens()),
        logits(quantized_model, tokens()),
    )


@pytest.mark.parametrize("family", EXPERTS)
def test_linear_layers_equal_the_default_experts_implementation(family):
    model, ids = make(family), tokens()
    assert experts_of(model)
    assert model.config._experts_implementation == ("eager" if family in EAGER else "grouped_mm")
    quantized_model = copy.deepcopy(model)
    linearize(quantized_model, linear_targets(quantized_model))
    assert not experts_of(quantized_model)
    torch.testing.assert_close(logits(quantized_model, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EXPERTS)
def test_all_weights_but_routers_and_gates_are_quantized(family):
    model = make(family)
    quantized_model = quantized(model, SCHEMES["dynamic"])
    for name, experts in experts_of(model).items():
        for index in range(len(experts.down_proj)):
            for part in ("gate_up_proj", "down_proj"):
                own = getattr(experts, part)[index]
                own = own.T.contiguous() if transposed(experts) else own
                weight = quantized_model.get_submodule(f"{name}.{index}.{part}").weight
                torch.testing.assert_close(weight, rounded(own, TABLE["w8a8-dynamic"].weight))
    left = float_weights(quantized_model)
    assert all(".gate" in n or "router" in n or n.endswith("_gate.weight") for n in left), left
    total = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and not name.endswith("bias")
        if "embed_tokens" not in name and "lm_head" not in name
    )
    assert quantized_share(quantized_model) == pytest.approx(1 - sum(left.values()) / total)
    assert quantized_share(quantized_model) > 0.95


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.filterwarnings("ignore:calibration. no token reached")
def test_gptq_rounds_each_expert_by_the_tokens_routed_to_it(family, tmp_path):
    model = make(family)
    quantized_model = quantized(model, GPTQ)
    assert torch.equal(
        logits(save_and_load(quantized_model, tmp_path), tokens()),
        logits(quantized_model, tokens()),
    )
    # The inputs are those that GPTQ used, because the earlier layers are rounded in both cases.
    seen, missed = {}, set(rounded_to_nearest(quantized_model))
    names = [name for name in quantized_modules(quantized_model) if ".experts." in name]
    for name in names:
        layer = quantized_model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    logits(quantized_model, torch.cat(batches()))
    assert seen
    for name in (name for name in names if ".shared_experts." not in name):
        path, index, part = name.rsplit(".", 2)
        experts = model.get_submodule(path)
        own = getattr(experts, part)[int(index)].detach()
        own = own.T.contiguous() if transposed(experts) else own
        expected = rounded(own, GROUPED)
        assert (name in missed) == (name not in seen)
        if name in seen:
            qparams = observe_qparams(own, GROUPED)
            expected = round_weight(own, second_moments(seen[name]), qparams, GROUPED)
        torch.testing.assert_close(quantized_model.get_submodule(name).weight.data, expected)


@torch.no_grad()
def unreached():
    """A model whose first expert of the first layer gets no token."""
    model = copy.deepcopy(make("mixtral"))
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(
        lambda _, __, out: (out[0], out[1], torch.where(out[2] == 0, 3, out[2]))
    )
    return model


def test_gptq_warns_about_experts_without_tokens():
    with pytest.warns(UserWarning, match=r"reached 2 of 24 layers, for example model.layers.0.mlp"):
        quantized_model = quantized(unreached(), GPTQ)
    names = [f"model.layers.0.mlp.experts.0.{part}" for part in ("gate_up_proj", "down_proj")]
    assert rounded_to_nearest(quantized_model) == names


def test_all_experts_share_one_static_range():
    quantized_model = quantized(unreached(), SCHEMES["static"])
    for part in ("gate_up_proj", "down_proj"):
        path = "model.layers.0.mlp.experts"
        ranges = {
            quantized_model.get_submodule(f"{path}.{i}.{part}").input_quantizer.range
            for i in range(4)
        }
        assert len(ranges) == 1
        assert all(torch.tensor(bound).isfinite().all() for bound in ranges)


def test_a_running_range_is_updated_once_per_batch_for_all_experts():
    """Otherwise the moving average would follow the last expert."""
    model = make("mixtral")
    scheme = replace(SCHEMES["static"], observer="running_minmax")
    quantized_model = quantized(model, scheme)
    plain = quantized(model, replace(SCHEMES["static"], activation=None, static=False,
                                     observer="running_minmax"))  # fmt: skip
    lows = []
    plain.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, args: lows.append(args[0].min())
    )
    for batch in batches():
        logits(plain, batch)
    expected = 0.9 * (0.9 * lows[0] + 0.1 * lows[1]) + 0.1 * lows[2]
    quantizer = (
        quantized_model.model.layers[0].mlp.experts.get_submodule("0.gate_up_proj").input_quantizer
    )
    assert quantizer.range[0] == pytest.approx(float(expected), abs=0.51 * float(quantizer.scale))


@pytest.mark.parametrize("family", ["afmoe", "gpt_oss", "llama4_text"])
def test_full_targets(family, tmp_path):
    quantized_model = quantized(make(family), TABLE["w8a8-static-full"])
    assert "model.layers.1.self_attn:context" in quantized_modules(quantized_model)
    assert torch.equal(
        logits(save_and_load(quantized_model, tmp_path), tokens()),
        logits(quantized_model, tokens()),
    )


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_a_model_with_depth_routing(name, tmp_path):
    quantized_model = quantized(tiny_model("oasis", "mixtral"), SCHEMES[name])
    assert "model.layers.3.mlp.experts.3.down_proj" in quantized_modules(quantized_model)
    assert torch.equal(
        logits(save_and_load(quantized_model, tmp_path), tokens()),
        logits(quantized_model, tokens()),
    )


def test_experts_that_are_no_targets_do_not_change(tmp_path):
    model, ids = make("mixtral"), tokens()
    targets = [name for name in linear_targets(model) if ".layers.0.mlp.experts." not in name]
    quantized_model = quantize(model, SCHEMES["dynamic"], targets=targets)
    assert list(quantized_modules(quantized_model)) == targets
    own = model.model.layers[0].mlp.experts
    assert type(quantized_model.model.layers[0].mlp.experts) is type(own)
    assert quantized_model.model.layers[0].mlp.experts.down_proj is own.down_proj
    assert (
        float_weights(quantized_model)["model.layers.0.mlp.experts.down_proj"]
        == own.down_proj.numel()
    )
    assert quantized_share(quantized_model) < 0.7
    assert torch.equal(
        logits(save_and_load(quantized_model, tmp_path), ids), logits(quantized_model, ids)
    )


@pytest.mark.parametrize(
    "changes", [{"rotation": "inputs"}, {"rotation": "fitted"}, {"smooth_alpha": 0.5}]
)
def test_transforms_do_not_change_the_function(changes):
    model = copy.deepcopy(make("mixtral")).double()
    model.set_experts_implementation("eager")  # the default kernel does not support float64
    scheme = replace(SCHEMES["w4a16"], **changes)
    quantized_model = transformed_copy(model, scheme, batches(), linear_targets(model), 0)
    torch.testing.assert_close(
        logits(quantized_model, tokens()), logits(model, tokens()), rtol=0, atol=1e-6
    )
    names = {
        name for name, _ in quantized_model.named_modules() if name.endswith(".input_transform")
    }
    assert {f"model.layers.1.mlp.experts.{i}.down_proj.input_transform" for i in range(4)} <= names


def test_the_residual_stream_of_a_mixture_cannot_be_rotated():
    with pytest.raises(UserError, match=r"cannot be rotated: .*mlp.gate.weight .* use 'inputs'"):
        quantized(make("mixtral"), replace(TABLE["w4a4"], rotation="hadamard"))


def test_sensitivity_groups_all_experts_of_one_kind():
    model, scheme = make("mixtral"), TABLE["w4a4"]
    scores = measure_sensitivity(model, scheme, lambda m: float(logits(m, tokens()).norm()))
    assert "mlp.experts.gate_up_proj" in scores
    assert "mlp.experts.down_proj" in scores
    assert len(scores) == 8  # with `all`, `none` and four of attention
    quantized_model = quantized(unreached(), scheme)
    named = {metric.where for metric in target_metrics(quantized_model, batches())
             if metric.name == "quantization.activation_error"}  # fmt: skip
    assert "model.layers.0.mlp.experts.0.down_proj" not in named
    assert "model.layers.0.mlp.experts.1.down_proj" in named
