"""Experts are quantised as any linear layer is, in every family that has them.

The reference is the family's own model: its weights are rounded here, its activations by hooks.
It is in float64, where a rounding never tips: so its experts run as `batched_mm`, for the default
implementation has no float64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from oasis_attn.errors import UserError
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.modeling.loading import quiet
from oasis_attn.quantization import (
    Grid,
    linear_sites,
    quantize,
    quantized_sites,
    schemes,
)
from oasis_attn.quantization.costs import sensitivity, site_metrics
from oasis_attn.quantization.coverage import float_weights, quantized_share, rounded_to_nearest
from oasis_attn.quantization.gptq import inverse_factor, round_weight
from oasis_attn.quantization.linearize import linearize
from oasis_attn.quantization.quantizers import find_levels
from oasis_attn.quantization.simulate import transformed
from tiny import VOCABULARY, tiny_config, tiny_model

COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
EAGER = ("llama4_text",)  # which has no other implementation
DENSE = ("hunyuan_v1_dense",)  # whose config has the number all the same
TABLE = schemes()
GROUPED = Grid(bits=4, symmetric=True, granularity="group", group_size=16)
SCHEMES = {
    "dynamic": TABLE["w8a8-dynamic"],
    "static": TABLE["w8a8-static-linear"],
    "w4a16": replace(TABLE["w4a16"], weight=GROUPED),
}
GPTQ = replace(TABLE["w4a16"], weight=GROUPED, rounding="gptq")


def _has_experts(family):
    kind = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    return bool(fields & COUNTS) and family not in DENSE


EXPERTS = [family for family in FAMILIES if _has_experts(family)]


@functools.cache
def make(family):
    layers = 4 if family == "flint" else 2  # of which the last is sparse
    config = tiny_config(family, num_hidden_layers=layers, initializer_range=0.2)
    config._experts_implementation = None  # the library's default
    if family == "llama4_text":
        config.intermediate_size_mlp = 48
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter.dim() == 2 and not parameter.any()):
                parameter.add_(torch.randn_like(parameter) * 0.1)  # biases of experts too
    return model


def tokens(seed=9, batch=2, length=12):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.manual_seed(seed))


def batches():
    return [tokens(seed) for seed in range(3)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def quantized(model, scheme):
    return quantize(model, scheme, calibration=batches() if scheme.needs_calibration else None)


def experts_of(model):
    """The modules that hold experts' weights, [E, out, in] or [E, in, out], by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter)
    }


def rounded(weight_OI, grid):
    """A weight on a symmetric grid."""
    size = {"tensor": weight_OI.numel(), "channel": weight_OI.shape[1], "group": grid.group_size}
    blocks = weight_OI.reshape(-1, size[grid.granularity])
    step = blocks.abs().amax(1, keepdim=True) / (2 ** (grid.bits - 1) - 1)
    return ((blocks / step).round() * step).reshape(weight_OI.shape)


def on_grid(x, bits, low, high):
    """Activations on an asymmetric grid over `low` .. `high`."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / step).round()
    return step * (x / step).round().clamp(-zero, 2**bits - 1 - zero)


def transposed(experts):
    return getattr(experts, "is_transposed", True)  # Llama 4's are


@torch.no_grad()
def weights_rounded(model, grid):
    twin = copy.deepcopy(model)
    for name in linear_sites(twin):
        if ".experts." not in name or ".shared_experts." in name:
            weight = twin.get_submodule(name).weight
            weight.copy_(rounded(weight, grid))
    for experts in experts_of(twin).values():
        for packed in (experts.gate_up_proj, experts.down_proj):
            for weight in packed:
                weight = weight.T if transposed(experts) else weight
                weight.copy_(rounded(weight.contiguous(), grid))
    return twin


@contextmanager
def inputs_through(model, function):
    """While open, what each quantised layer reads is `function(name, x)`."""
    undo = []
    for name in linear_sites(model):
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
    twin, grid = weights_rounded(model, scheme.weight), scheme.activation
    if hasattr(next(iter(experts_of(twin).values())), "is_transposed"):  # not Llama 4's
        twin.set_experts_implementation("batched_mm")
    if grid is None:
        return logits(twin, ids)
    ranges = {}

    def watch(name, x):
        low, high = ranges.get(name, (torch.tensor(torch.inf), torch.tensor(-torch.inf)))
        ranges[name] = low.minimum(x.min()), high.maximum(x.max())
        return x

    def move(name, x):
        low, high = ranges[name] if scheme.static else x.aminmax(dim=-1, keepdim=True)
        return on_grid(x, grid.bits, low, high)

    if scheme.static:
        with inputs_through(twin, watch):
            for batch in batches():
                logits(twin, batch)
    with inputs_through(twin, move):
        return logits(twin, ids)


def there_and_back(model, folder):
    with quiet():
        model.save_pretrained(folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return loaded


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_computes_what_hooks_on_the_familys_own_model_compute(family, name):
    model, scheme, ids = copy.deepcopy(make(family)).double(), SCHEMES[name], tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = quantized(model, scheme)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    expected = reference(model, ids, scheme)
    found = logits(twin, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - logits(make(family), ids)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_comes_back_from_disk_bit_for_bit(family, name, tmp_path):
    twin = quantized(make(family), SCHEMES[name])
    assert torch.equal(logits(there_and_back(twin, tmp_path), tokens()), logits(twin, tokens()))


@pytest.mark.parametrize("family", EXPERTS)
def test_linear_layers_compute_what_the_default_experts_implementation_computes(family):
    model, ids = make(family), tokens()
    assert experts_of(model)
    assert model.config._experts_implementation == ("eager" if family in EAGER else "grouped_mm")
    twin = copy.deepcopy(model)
    linearize(twin, linear_sites(twin))
    assert not experts_of(twin)
    torch.testing.assert_close(logits(twin, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EXPERTS)
def test_all_weights_but_routers_and_gates_are_quantised(family):
    model = make(family)
    twin = quantized(model, SCHEMES["dynamic"])
    for name, experts in experts_of(model).items():
        for index in range(len(experts.down_proj)):
            for part in ("gate_up_proj", "down_proj"):
                own = getattr(experts, part)[index]
                own = own.T.contiguous() if transposed(experts) else own
                weight = twin.get_submodule(f"{name}.{index}.{part}").weight
                torch.testing.assert_close(weight, rounded(own, TABLE["w8a8-dynamic"].weight))
    left = float_weights(twin)
    assert all(".gate" in n or "router" in n or n.endswith("_gate.weight") for n in left), left
    total = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and not name.endswith("bias")
        if "embed_tokens" not in name and "lm_head" not in name
    )
    assert quantized_share(twin) == pytest.approx(1 - sum(left.values()) / total)
    assert quantized_share(twin) > 0.95


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.filterwarnings("ignore:calibration. no token reached")
def test_gptq_rounds_each_expert_by_the_tokens_routed_to_it(family, tmp_path):
    model = make(family)
    twin = quantized(model, GPTQ)
    assert torch.equal(logits(there_and_back(twin, tmp_path), tokens()), logits(twin, tokens()))
    # Earlier layers are rounded in both: an input now is the input that the rounding saw.
    seen, missed = {}, set(rounded_to_nearest(twin))
    names = [name for name in quantized_sites(twin) if ".experts." in name]
    for name in names:
        layer = twin.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    logits(twin, torch.cat(batches()))
    assert seen
    for name in (name for name in names if ".shared_experts." not in name):
        path, index, part = name.rsplit(".", 2)
        experts = model.get_submodule(path)
        own = getattr(experts, part)[int(index)].detach()
        own = own.T.contiguous() if transposed(experts) else own
        expected = rounded(own, GROUPED)
        assert (name in missed) == (name not in seen)
        if name in seen:
            levels = find_levels(own, GROUPED)
            expected = round_weight(own, inverse_factor(seen[name]), levels, GROUPED)
        torch.testing.assert_close(twin.get_submodule(name).weight.data, expected)


@torch.no_grad()
def unreached():
    """A model whose first expert of the first layer gets no token."""
    model = copy.deepcopy(make("mixtral"))
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(
        lambda _, __, out: (out[0], out[1], torch.where(out[2] == 0, 3, out[2]))
    )
    return model


def test_gptq_says_which_experts_got_no_token():
    with pytest.warns(UserWarning, match=r"no token reached 2 of 24 layers, as model.layers.0.mlp"):
        twin = quantized(unreached(), GPTQ)
    names = [f"model.layers.0.mlp.experts.0.{part}" for part in ("gate_up_proj", "down_proj")]
    assert rounded_to_nearest(twin) == names


def test_a_static_range_is_that_of_all_experts():
    twin = quantized(unreached(), SCHEMES["static"])
    for part in ("gate_up_proj", "down_proj"):
        path = "model.layers.0.mlp.experts"
        ranges = {twin.get_submodule(f"{path}.{i}.{part}").input_quantizer.range for i in range(4)}
        assert len(ranges) == 1
        assert all(torch.tensor(bound).isfinite().all() for bound in ranges)


def test_a_batch_of_a_running_range_is_what_all_experts_read():
    """Not what one of them does: the mean over batches would follow the last expert."""
    model = make("mixtral")
    scheme = replace(SCHEMES["static"], estimator="running_minmax")
    twin = quantized(model, scheme)
    plain = quantized(model, replace(SCHEMES["static"], activation=None, static=False,
                                     estimator="running_minmax"))  # fmt: skip
    lows = []
    plain.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, args: lows.append(args[0].min())
    )
    for batch in batches():
        logits(plain, batch)
    expected = 0.9 * (0.9 * lows[0] + 0.1 * lows[1]) + 0.1 * lows[2]
    quantizer = twin.model.layers[0].mlp.experts.get_submodule("0.gate_up_proj").input_quantizer
    assert quantizer.range[0] == pytest.approx(float(expected), abs=0.51 * float(quantizer.scale))


@pytest.mark.parametrize("family", ["afmoe", "gpt_oss", "llama4_text"])
def test_the_tensors_between_linear_layers_too(family, tmp_path):
    twin = quantized(make(family), TABLE["w8a8-static"])
    assert "model.layers.1.self_attn:context" in quantized_sites(twin)
    assert torch.equal(logits(there_and_back(twin, tmp_path), tokens()), logits(twin, tokens()))


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_of_a_model_with_depth_routing(name, tmp_path):
    twin = quantized(tiny_model("oasis", "mixtral"), SCHEMES[name])
    assert "model.layers.3.mlp.experts.3.down_proj" in quantized_sites(twin)
    assert torch.equal(logits(there_and_back(twin, tmp_path), tokens()), logits(twin, tokens()))


def test_experts_left_out_stay_as_they_are(tmp_path):
    model, ids = make("mixtral"), tokens()
    sites = [name for name in linear_sites(model) if ".layers.0.mlp.experts." not in name]
    twin = quantize(model, SCHEMES["dynamic"], sites=sites)
    assert list(quantized_sites(twin)) == sites
    own = model.model.layers[0].mlp.experts
    assert type(twin.model.layers[0].mlp.experts) is type(own)
    assert twin.model.layers[0].mlp.experts.down_proj is own.down_proj
    assert float_weights(twin)["model.layers.0.mlp.experts.down_proj"] == own.down_proj.numel()
    assert quantized_share(twin) < 0.7
    assert torch.equal(logits(there_and_back(twin, tmp_path), ids), logits(twin, ids))


@pytest.mark.parametrize("changes", [{"rotation": "inputs"}, {"smooth_alpha": 0.5}])
def test_transforms_keep_the_function(changes):
    model = copy.deepcopy(make("mixtral")).double()
    model.set_experts_implementation("eager")  # the default kernel has no float64
    scheme = replace(SCHEMES["w4a16"], **changes)
    twin = transformed(model, scheme, batches(), linear_sites(model), 0)
    torch.testing.assert_close(logits(twin, tokens()), logits(model, tokens()), rtol=0, atol=1e-6)
    names = {name for name, _ in twin.named_modules() if name.endswith(".input_transform")}
    assert {f"model.layers.1.mlp.experts.{i}.down_proj.input_transform" for i in range(4)} <= names


def test_the_residual_stream_of_experts_is_not_rotated():
    with pytest.raises(UserError, match=r"cannot be rotated: .*mlp.gate.weight .* 'inputs' fits"):
        quantized(make("mixtral"), replace(TABLE["w4a4"], rotation="hadamard"))


def test_costs_are_by_kind_over_all_experts():
    model, scheme = make("mixtral"), TABLE["w4a4"]
    scores = sensitivity(model, scheme, lambda m: float(logits(m, tokens()).norm()))
    assert "mlp.experts.gate_up_proj" in scores
    assert "mlp.experts.down_proj" in scores
    assert len(scores) == 8  # with all, none, and four of attention
    twin = quantized(unreached(), scheme)
    named = {metric.where for metric in site_metrics(twin, batches())
             if metric.name == "quantization.activation_error"}  # fmt: skip
    assert "model.layers.0.mlp.experts.0.down_proj" not in named
    assert "model.layers.0.mlp.experts.1.down_proj" in named
