"""A folder in the format torchao computes the logits of our int8 model, bit for bit, without ours.

`test_compressed_tensors` loads one in a process without this package.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oasis_attn.errors import UserError
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.quantization import linear_targets, options, quantized_modules, save_torchao
from oasis_attn.quantization.int8 import to_int8
from quantization.exported_models import (
    DYNAMIC,
    STATIC,
    TABLE,
    has_int8_kernels,
    make,
    quantized,
)
from tiny_models import tiny_model, word_tokenizer

pytestmark = pytest.mark.skipif(not has_int8_kernels(), reason="torchao has no int8 kernels here")


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def load(folder, **keywords):
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **keywords
        )
    assert not any(info.values())
    return model


CASES = {
    "plain": ({}, DYNAMIC),
    "rotated": ({}, replace(DYNAMIC, rotation="folded")),
    "head, one scale per tensor, gptq": (
        {},
        DYNAMIC.with_options({"weight.granularity": "tensor", "head": True, "rounding": "gptq"}),
    ),
    "flat tokens and biases": ({"kind": "opt"}, DYNAMIC),
    "bfloat16": ({"dtype": torch.bfloat16}, DYNAMIC),
}


@pytest.mark.parametrize("name", CASES)
def test_has_the_logits_of_the_int8_model(name, ids, tmp_path):
    changes, scheme = CASES[name]
    ours = quantized(make(**changes), scheme)
    with quiet():
        save_torchao(ours, tmp_path / "simulated")
        save_torchao(to_int8(ours), tmp_path / "int8")
    # Not the bytes: safetensors writes the metadata in any order.
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("simulated", "int8")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    cards = [(tmp_path / name / "README.md").read_text() for name in ("simulated", "int8")]
    assert cards[0] == cards[1]
    theirs = load(tmp_path / "int8")
    assert theirs.dtype == ours.dtype
    assert torch.equal(logits(theirs, ids), logits(ours, ids))


def test_what_the_folder_holds(ids, tmp_path):
    """Codes and scales as they are, also if another dtype is asked for; the rest in floating point.

    Experts may stay in floating point.
    """
    model = make("mixtral")
    targets = [name for name in linear_targets(model) if "o_proj" in name]
    ours = quantized(model, DYNAMIC, targets=targets)
    with quiet():
        save_torchao(ours, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    loaded = load(tmp_path / "out", dtype=torch.bfloat16)
    assert logits(loaded, ids).dtype == loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for name, layer in quantized_modules(ours).items():
        weight = loaded.get_submodule(name).weight
        for codes in (stored[f"{name}._weight_qdata"], weight.qdata):
            assert torch.equal(codes, layer.codes())
        for scale in (stored[f"{name}._weight_scale"], weight.scale):
            assert torch.equal(scale.view(-1), layer.weight_scale.view(-1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    kept = config["modules_to_not_convert"]
    assert "lm_head" in kept
    assert "model.layers.0.self_attn.q_proj" in kept
    assert not set(kept) & set(targets)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "computed in int8 arithmetic: 4" in card
    needed = re.findall(r"'(\w+)(>=[\d.]+)'", card)
    assert [name for name, _ in needed] == ["torchao", "transformers"]
    for name, least in needed:
        assert any(x.startswith(name) and least in x for x in metadata.requires("oasis-attn"))


def test_a_scale_that_is_not_finite(tmp_path):
    ours = to_int8(quantized(make(), DYNAMIC))
    next(iter(quantized_modules(ours).values())).weight_scale[0] = torch.nan
    with quiet():
        save_torchao(ours, tmp_path / "out")
    word_tokenizer().save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"not finite in model.layers.0.self_attn.*weight"):
        load_model(tmp_path / "out")


def prefixed():
    model = make()
    return quantized(with_prefix(model, compute_prefix(model, [5])), DYNAMIC)


REFUSED = {
    "static": (lambda: quantized(make(), STATIC), "transformers does not load static ranges of"),
    "4 bits": (lambda: quantized(make(), TABLE["w4a4"]), "8-bit weights by 8-bit activations only"),
    "clipped": (lambda: quantized(make(), replace(DYNAMIC, clip_ratio=0.9)), "do not clip dynamic"),
    "hadamard": (
        lambda: quantized(make(), replace(DYNAMIC, rotation="hadamard")),
        "transformers does not apply rotation 'hadamard'",
    ),
    "scales at run time": (
        lambda: quantized(make("bloom"), replace(DYNAMIC, smooth_alpha=0.5)),
        "is scaled at run time",
    ),
    "oasis": (lambda: quantized(tiny_model(), DYNAMIC), "which an OASIS model needs"),
    "prefix": (prefixed, "`oasis quantize --format torchao` writes both"),
    "experts": (lambda: quantized(make("mixtral"), DYNAMIC), "leave experts out with --ignore"),
    "Conv1D": (lambda: quantized(make("gpt2"), DYNAMIC), "c_attn is of class Conv1D"),
    "float64": (
        lambda: quantized(make(dtype=torch.float64), DYNAMIC),
        "int8 kernels do not support float64",
    ),
    "unquantized": (make, "model: nothing in it is quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, tmp_path):
    model, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        save_torchao(model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_library_is_missing(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'oasis-attn\[int8\]'"):
        options.check_format("torchao", DYNAMIC)
