"""Tiny models of every family that has experts, and what the tests of experts share."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import replace

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from oasis_attn.hub.loading import quiet
from oasis_attn.modeling.families import FAMILIES
from oasis_attn.quantization import (
    QuantSpec,
    quantize,
    schemes,
)
from tiny_models import VOCABULARY, tiny_config

COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
EAGER = ("llama4_text",)  # has no other implementation
DENSE = ("hunyuan_v1_dense",)  # its config has the field, but it has no experts
TABLE = schemes()
GROUPED = QuantSpec(bits=4, symmetric=True, granularity="group", group_size=16)
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
    layers = 4 if family == "flint" else 2  # the last layer is sparse
    config = tiny_config(family, num_hidden_layers=layers, initializer_range=0.2)
    config._experts_implementation = None  # the default of transformers
    if family == "llama4_text":
        config.intermediate_size_mlp = 48
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter.dim() == 2 and not parameter.any()):
                parameter.add_(torch.randn_like(parameter) * 0.1)  # including biases of experts
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


def rounded(weight_OI, spec):
    """A weight rounded to a symmetric grid."""
    size = {"tensor": weight_OI.numel(), "channel": weight_OI.shape[1], "group": spec.group_size}
    blocks = weight_OI.reshape(-1, size[spec.granularity])
    step = blocks.abs().amax(1, keepdim=True) / (2 ** (spec.bits - 1) - 1)
    return ((blocks / step).round() * step).reshape(weight_OI.shape)


def transposed(experts):
    return getattr(experts, "is_transposed", True)  # Llama 4 has no such attribute


def save_and_load(model, folder):
    with quiet():
        model.save_pretrained(folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return loaded
