"""A folder in the format compressed-tensors holds the codes of a model, and loads without ours."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.quantization import (
    QuantSpec,
    linear_targets,
    quantized_modules,
    save_compressed_tensors,
    save_torchao,
)
from oasis_attn.quantization.int8 import to_int8
from oasis_attn.quantization.kv_scales import kv_scales
from oasis_attn.quantization.linear import fused_layers
from oasis_attn.quantization.primitives import fake_quantize, power_of_two
from oasis_attn.quantization.quantizers import StaticQuantizer, observe_qparams
from quantization.exported_models import (
    DYNAMIC,
    GROUPS,
    STATIC,
    TABLE,
    W4A16,
    has_int8_kernels,
    make,
    quantized,
)
from tiny_models import word_tokenizer

compressors = pytest.importorskip(
    "compressed_tensors.compressors", reason="compressed-tensors is not installed"
)

SCHEMES = {
    "dynamic": DYNAMIC,
    "head": replace(DYNAMIC, head=True),
    "static": STATIC,
    "static, symmetric, per channel": replace(
        STATIC, weight=DYNAMIC.weight, activation=QuantSpec(bits=8, symmetric=True)
    ),
    "smoothed": replace(STATIC, smooth_alpha=0.5),
    "rotated": replace(STATIC, rotation="folded"),
    "w4a16": W4A16,
    "w4a16, gptq": replace(W4A16, rounding="gptq"),
    "w3a16": replace(W4A16, weight=replace(DYNAMIC.weight, bits=3)),
    "w4a8": TABLE["w4a8"],
    "w4a8, groups": replace(TABLE["w4a8"], weight=GROUPS),
    "w4a8, asymmetric weights": replace(TABLE["w4a8"], weight=replace(GROUPS, symmetric=False)),
    "w4a4": TABLE["w4a4"],
}
HALF_WAY = 2**-13  # rounding of x / scale + zero point in float32, for codes of up to 8 bits


def export(model, folder):
    with quiet():
        save_compressed_tensors(model, folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return loaded


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def check_layers(ours, theirs, ids):
    """With the same input, the library's layers have the same weights and codes."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    inputs = {}
    for name, layer in quantized_modules(ours).items():
        layer.input_quantizer.register_forward_hook(
            lambda _module, args, output, name=name: inputs.update({name: (args[0], output)})
        )
    logits(ours, ids)
    logits(theirs, ids)  # the first forward pass decompresses the weights
    for name, layer in quantized_modules(ours).items():
        other = theirs.get_submodule(name)
        assert torch.equal(other.weight, layer.weight)
        arguments, (x, expected) = other.quantization_scheme.input_activations, inputs[name]
        if arguments is None:
            continue
        found = forward_quantize(other, x, "input", arguments)
        quantizer = layer.input_quantizer
        static = isinstance(quantizer, StaticQuantizer)
        scale = quantizer.scale if static else observe_qparams(x, quantizer.spec).scale
        steps = ((found - expected) / scale).abs()
        half_way = ((x / scale).frac().abs() - 0.5).abs() < HALF_WAY
        assert (steps < torch.where(half_way, 1 + HALF_WAY, HALF_WAY)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_loads_with_the_same_codes(name, ids, tmp_path):
    model, scheme = make(), SCHEMES[name]
    ours = quantized(model, scheme)
    theirs = export(ours, tmp_path / "out")
    assert type(theirs) is type(model)
    expected, found, exact = logits(ours, ids), logits(theirs, ids), logits(model, ids)
    if scheme.activation is None:
        assert torch.equal(found, expected)
    # An input that lies half way between two codes changes the inputs of all later layers.
    assert (found - expected).norm() < (expected - exact).norm()
    check_layers(ours, theirs, ids)


@pytest.mark.parametrize(
    "kind", ["gemma3_text", "gpt_neox", "granite_swa", "opt", "qwen2", "qwen3"]
)
def test_families(kind, ids, tmp_path):
    rotation = "folded" if kind in ("granite_swa", "qwen2", "qwen3") else "none"
    ours = quantized(make(kind), replace(W4A16, rotation=rotation))
    assert torch.equal(logits(export(ours, tmp_path / "out"), ids), logits(ours, ids))


@pytest.mark.parametrize("scheme", [W4A16, STATIC])
def test_the_library_compresses_layers_whose_parameters_all_have_values(
    scheme, tmp_path, monkeypatch
):
    def compress(linear):
        assert not any(value.is_meta for value in linear.parameters())
        found.append(linear)
        whole(linear)

    found, whole = [], compressors.compress_module
    monkeypatch.setattr(compressors, "compress_module", compress)
    model = make()
    export(quantized(model, scheme), tmp_path / "out")
    assert len(found) == len(linear_targets(model))


def test_what_the_folder_holds(tmp_path):
    model = make()
    targets = [name for name in linear_targets(model) if "self_attn" in name]
    ours = quantized(model, STATIC, targets=targets)
    export(ours, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in quantized_modules(ours).items():
        assert torch.equal(stored[f"{name}.weight"], layer.codes())
        assert torch.equal(stored[f"{name}.weight_scale"], layer.weight_scale.view(-1))
        assert torch.equal(stored[f"{name}.input_scale"], layer.input_quantizer.scale)
        zero_point = -128 - layer.input_quantizer.quant_min
        assert stored[f"{name}.input_zero_point"].tolist() == zero_point.tolist()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "int-quantized"
    assert config["quantization_status"] == "compressed"
    mlp = {f"model.layers.{i}.mlp.{name}_proj" for i in range(4) for name in ("gate", "up", "down")}
    assert set(config["ignore"]) == {"lm_head", *mlp}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pip install compressed-tensors" in card
    assert "import oasis_attn" not in card


def test_a_process_without_this_package(ids, tmp_path, monkeypatch):
    """A rotated model with a tied head needs nothing of ours either, nor one of torchao.

    Keys and values are rounded to FP8, and clipped, in a forward pass without a cache, too.
    """
    ours = quantized(make(), replace(W4A16, rounding="gptq", rotation="folded"))
    with quiet():
        save_compressed_tensors(ours, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(stored[name].eq(1).all() for name in stored if name.endswith("norm.weight"))
    models, rounded = {"out": ours, "cache": ours}, kv_scales(ours, [ids[:1]])
    with quiet():
        save_compressed_tensors(ours, tmp_path / "cache", kv_scales=rounded)
    scheme = json.loads((tmp_path / "cache" / "config.json").read_text())["quantization_config"]
    fields = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    assert scheme["kv_cache_scheme"].items() >= (fields | {"symmetric": True}).items()
    stored = load_file(tmp_path / "cache" / "model.safetensors")
    assert {name for name in stored if name.endswith(("k_scale", "v_scale"))} == rounded.keys()
    if has_int8_kernels():
        models["torchao"] = to_int8(quantized(make(), DYNAMIC))
        with quiet():
            save_torchao(models["torchao"], tmp_path / "torchao")
    torch.save(ids, tmp_path / "ids.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load("ids.pt")
for name in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, model(input_ids=ids, use_cache=True).logits)
        torch.save(found, f"{name}.pt")
    assert model.generate(ids[:1], max_new_tokens=2, eos_token_id=-1).shape == (1, ids.shape[1] + 2)
assert not any(name.startswith("oasis") for name in sys.modules)
"""
    command = [sys.executable, "-c", code, *models]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    attention, names = ALL_ATTENTION_FUNCTIONS["sdpa"], {m: n for n, m in ours.named_modules()}

    def round_cache(module, query, *cached, **kwargs):
        scales = (rounded[f"{names[module]}.{kind}_scale"] for kind in "kv")
        pairs = zip(cached[:2], scales, strict=True)
        codes = [((x / s).clamp(-448, 448).to(torch.float8_e4m3fn), s) for x, s in pairs]
        keys, values = (code.float() * scale for code, scale in codes)
        return attention(module, query, keys, values, *cached[2:], **kwargs)

    for name, model in models.items():
        with monkeypatch.context() as patch:
            if name == "cache":
                patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", round_cache)
            expected = logits(model, ids)
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected)


def test_a_model_in_int8_arithmetic_has_the_same_files(tmp_path):
    if not has_int8_kernels():
        pytest.skip("torchao has no int8 kernels here")
    ours = quantized(make(), DYNAMIC)
    with quiet():
        save_compressed_tensors(ours, tmp_path / "simulated")
        save_compressed_tensors(to_int8(ours), tmp_path / "int8")
    for name in ("model.safetensors", "config.json"):
        simulated, int8 = (tmp_path / each / name for each in ("simulated", "int8"))
        assert simulated.read_bytes() == int8.read_bytes()


def test_transformers_rounds_the_scales_of_a_model_in_bfloat16(tmp_path):
    ours = quantized(make(dtype=torch.bfloat16), W4A16)
    theirs = export(ours, tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    logits(theirs, torch.tensor([[3]]))
    for name, layer in quantized_modules(ours).items():
        found, expected = theirs.get_submodule(name).weight.float(), layer.weight.float()
        assert ((found - expected).abs() <= 2**-7 * expected.abs()).all()
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight_scale"],
        layer.weight_scale.squeeze(-1),
    )


def test_dynamic_ranges_that_the_library_computes_otherwise(ids, tmp_path):
    """As the docs say: symmetric ranges are a little smaller, and flat tokens share one."""
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    symmetric = QuantSpec(bits=8, symmetric=True, granularity="token")
    theirs = export(quantized(make(), replace(DYNAMIC, activation=symmetric)), tmp_path / "1")
    x = torch.randn(2, 5, 32)
    layer = theirs.get_submodule("model.layers.0.self_attn.q_proj")
    scale, _ = compute_dynamic_scales_and_zp(x, layer.quantization_scheme.input_activations, layer)
    ours = observe_qparams(x, symmetric).scale
    torch.testing.assert_close(scale * 127.5, ours * 127)

    ours = quantized(make("opt"), DYNAMIC)
    theirs = export(ours, tmp_path / "2")
    shapes = {}
    for name in quantized_modules(ours):
        theirs.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: shapes.update({name: args[0].ndim})
        )
    logits(theirs, ids)
    assert {name.rpartition(".")[2] for name, axes in shapes.items() if axes == 2} == {"fc1", "fc2"}


FLOATS = {
    "fp8-static": TABLE["fp8-static"],
    "fp8-static, smoothed": replace(TABLE["fp8-static"], smooth_alpha=0.5),
    "fp8-dynamic": TABLE["fp8-dynamic"],
    "fp8, weights": replace(TABLE["fp8-dynamic"], activation=None),
    "mxfp8": TABLE["mxfp8"],
    "mxfp4": TABLE["mxfp4"],
    "mxfp4, gptq": replace(TABLE["mxfp4"], rounding="gptq"),
    "mxfp4, weights": replace(TABLE["mxfp4"], activation=None),
    "nvfp4": TABLE["nvfp4"],
    "nvfp4, head": replace(TABLE["nvfp4"], head=True),
    "nvfp4, fused": replace(TABLE["nvfp4"], fused_scales=True),
    "nvfp4, fused, weights, gptq": TABLE["nvfp4"].with_options(
        {"activation": None, "static": False, "observer": "mse", "rounding": "gptq"}
        | {"fused_scales": True}
    ),
}
PRESETS = {
    "fp8-static": "FP8",
    "fp8-dynamic": "FP8_DYNAMIC",
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_formats(name, ids, tmp_path):
    """The weights are equal, and so are the quantized inputs, apart from the scales of MX."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    model, scheme = make(intermediate_size=64), FLOATS[name]
    ours = quantized(model, scheme)
    theirs = export(ours, tmp_path / "out")
    blocks = not name.startswith("fp8")
    assert theirs.dtype == (torch.bfloat16 if blocks else torch.float32)
    assert ours.dtype == torch.float32
    expected = copy.deepcopy(ours).to(theirs.dtype)
    error = (logits(theirs, ids) - logits(expected, ids)).norm()
    if not blocks or scheme.activation is None:
        assert error == 0
    assert error < (logits(expected, ids) - logits(model, ids)).norm()
    preset = preset_name_to_scheme(PRESETS[scheme.name], ["Linear"])
    if scheme.activation is None:
        preset.input_activations = None
    seen = 0
    for target, layer in quantized_modules(expected).items():
        other = theirs.get_submodule(target)
        assert torch.equal(other.weight, layer.weight)
        for part in ("weights", "input_activations"):
            found, wanted = (
                args and args.model_dump(exclude={"observer"})
                for args in (getattr(other.quantization_scheme, part), getattr(preset, part))
            )
            assert found == wanted
        if scheme.activation is None:
            continue
        x = torch.randn(3, 5, layer.in_features) * torch.rand(3, 5, 1).mul(3).exp()
        found = forward_quantize(other, x, "input", other.quantization_scheme.input_activations)
        rounded = layer.input_quantizer(x)
        if scheme.activation.scale_type == "e8m0":
            groups = x.unflatten(-1, (-1, 32))
            largest = groups.abs().amax(-1, keepdim=True)
            doubled = largest / power_of_two(largest) >= 1.75
            qparams = observe_qparams(x, scheme.activation)
            qparams = qparams._replace(scale=torch.where(doubled, 2, 1) * qparams.scale)
            rounded = fake_quantize(groups, qparams, scheme.activation.element_type).view_as(x)
            seen += int(doubled.sum())
        assert torch.equal(found, rounded)
    assert bool(seen) == (scheme.weight.scale_type == "e8m0" and scheme.activation is not None)


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_nvfp4_folder_holds(fused, tmp_path):
    """With fused scales, the layers that engines fuse have both scales of tensors in common."""
    scheme = replace(FLOATS["nvfp4, head"], fused_scales=fused)
    ours = quantized(make(intermediate_size=64), scheme)
    with quiet():
        save_compressed_tensors(ours, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in quantized_modules(ours).items():
        assert stored[f"{name}.weight_packed"].shape == (layer.out_features, layer.in_features // 2)
        scale = stored[f"{name}.weight_scale"]
        assert scale.dtype == torch.float8_e4m3fn
        blocks = scale.float() / stored[f"{name}.weight_global_scale"]
        assert torch.equal(blocks, layer.weight_scale.squeeze(-1))
        fixed = stored[f"{name}.input_global_scale"] * layer.input_quantizer.scale
        torch.testing.assert_close(fixed, torch.tensor([448.0]))
    groups = fused_layers(quantized_modules(ours))
    assert [len(names) for names in groups] == [3, 1, 2, 1] * 4 + [1]
    for names in groups:
        numbers = [stored[f"{name}.weight_scale"].float().max() for name in names]
        assert max(numbers) == 448
        assert fused or min(numbers) == 448
        own, of_input = (
            {float(stored[f"{name}.{kind}_global_scale"]) for name in names}
            for kind in ("weight", "input")
        )
        assert len(own) == (1 if fused else len(names))
        assert len(of_input) == 1
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    word_tokenizer().save_pretrained(tmp_path / "out")
    model, _ = load_model(tmp_path / "out")  # it runs, though the commands ask for float32
    assert model.dtype == torch.bfloat16
