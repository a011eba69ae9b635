"""What cannot be written in the format compressed-tensors is refused, and nothing is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oasis_attn.errors import UserError
from oasis_attn.hub.loading import quiet
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization import options, save_compressed_tensors
from quantization.exported_models import DYNAMIC, GROUPS, STATIC, TABLE, W4A16, make, quantized
from tiny_models import tiny_model

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def oasis():
    return quantized(tiny_model(), DYNAMIC)


def prefixed():
    model = make()
    return quantized(with_prefix(model, compute_prefix(model, [5])), DYNAMIC)


def changed():
    model = quantized(make(), DYNAMIC)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    return model


REFUSED = {
    "full": (lambda: quantized(make(), TABLE["w8a8-static-full"]), "it quantizes linear layers"),
    "hadamard": (
        lambda: quantized(make(), replace(DYNAMIC, rotation="hadamard")),
        "transformers does not apply rotation 'hadamard' .* use the scheme option rotation=folded",
    ),
    "inputs": (
        lambda: quantized(make(), replace(DYNAMIC, rotation="inputs")),
        "transformers does not apply rotation 'inputs'",
    ),
    "clipped": (
        lambda: quantized(make(), replace(DYNAMIC, clip_ratio=0.9)),
        "it does not clip dynamic ranges",
    ),
    "zero points": (
        lambda: quantized(make(), replace(W4A16, weight=replace(GROUPS, symmetric=False))),
        "packed weights with zero points",
    ),
    "element types": (
        lambda: quantized(make(), replace(TABLE["fp8-dynamic"], weight=DYNAMIC.weight)),
        "of floating-point elements, it has FP8, MXFP4, MXFP8 and NVFP4, the same for weights",
    ),
    "group size": (
        lambda: quantized(
            make(), TABLE["mxfp4"].with_options({"weight.group_size": 16, "activation": None})
        ),
        "it has FP8, MXFP4, MXFP8 and NVFP4",
    ),
    "nvfp4 without a fixed range": (
        lambda: quantized(make(), replace(TABLE["nvfp4"], static=False)),
        "its NVFP4 has a fixed range of the tensor; use the scheme option static=true",
    ),
    "scales at run time": (
        lambda: quantized(make("bloom"), replace(STATIC, smooth_alpha=0.5)),
        "is scaled at run time",
    ),
    "oasis": (oasis, "which an OASIS model needs"),
    "prefix": (prefixed, "the model has a prefix"),
    "experts": (
        lambda: quantized(make("mixtral"), DYNAMIC),
        "experts.0.gate_up_proj is an expert, and transformers cannot",
    ),
    "Conv1D": (lambda: quantized(make("gpt2"), DYNAMIC), "c_attn is of class Conv1D"),
    "changed": (changed, "weight: it was changed after quantizing"),
    "unquantized": (make, "model: nothing in it is quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, tmp_path):
    model, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        save_compressed_tensors(model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_vllm_computes():
    served = {name for name, scheme in TABLE.items() if options.vllm_computes(scheme)}
    assert {*TABLE} - served == {"w4a4"}
    for scheme, changes in (
        (DYNAMIC, {"weight.bits": 6}),
        (DYNAMIC, {"activation.granularity": "tensor"}),
        (DYNAMIC, {"weight.granularity": "group", "weight.group_size": 8}),
        (STATIC, {"weight.bits": 4}),
        (TABLE["w4a8"], {"weight.granularity": "tensor"}),
    ):
        assert not options.vllm_computes(scheme.with_options(changes))


@pytest.mark.parametrize("name", ["k_scale", "model.layers.0.self_attn.k_scale"])
def test_refuses_scales_of_another_cache(name, tmp_path):
    scales = {name: torch.ones(1)}
    message = "lacks 'model.layers.0" if "layers" in name else "has the unknown name 'k_scale'"
    with pytest.raises(UserError, match=f"kv_scales: it {message}"), quiet():
        save_compressed_tensors(quantized(make(), W4A16), tmp_path / "out", kv_scales=scales)
    assert not list(tmp_path.iterdir())


def test_the_library_is_missing(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'oasis-attn\[export\]'"):
        options.check_format("compressed-tensors", DYNAMIC)
    options.check_format("oasis", DYNAMIC)


def test_an_export_that_stops_leaves_nothing(monkeypatch, tmp_path):
    from compressed_tensors.compressors import ModelCompressor

    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelCompressor, "update_config", stop)
    with pytest.raises(KeyboardInterrupt), quiet():
        save_compressed_tensors(quantized(make(), W4A16), tmp_path / "out")
    assert not list(tmp_path.iterdir())
