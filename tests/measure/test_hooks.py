from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedConfig

from oasis_attn.errors import UserError
from oasis_attn.measure.hooks import find_hook_points

from .models import native, ours

FIRST_LAYER = {
    "llama": ["", ".self_attn.o_proj", ".mlp", ".input_layernorm", ".post_attention_layernorm"],
    "gemma2": [
        "", ".self_attn.o_proj", ".mlp", ".input_layernorm", ".post_attention_layernorm",
        ".pre_feedforward_layernorm", ".post_feedforward_layernorm",
    ],
    "gpt2": ["", ".attn.c_proj", ".mlp", ".ln_1", ".ln_2"],
    "opt": ["", ".self_attn.out_proj", ".fc2", ".self_attn_layer_norm", ".final_layer_norm"],
    "qwen3_moe": ["", ".self_attn.o_proj", ".mlp", ".input_layernorm", ".post_attention_layernorm"],
}  # fmt: skip
LAYERS_AND_NORM = {"gpt2": ("h", "ln_f"), "opt": ("layers", "final_layer_norm")}


@pytest.mark.parametrize("family", list(FIRST_LAYER))
def test_exactly_the_hooked_tensors_are_found(family):
    points = find_hook_points(native(family))
    layers, norm = LAYERS_AND_NORM.get(family, ("layers", "norm"))
    first = {point.name for point in points if point.layer == 0}
    assert first == {f"{layers}.0{part}" for part in FIRST_LAYER[family]}
    assert [(point.name, point.kind) for point in points if point.layer is None] == [
        (norm, "final_norm")
    ]
    assert len(points) == 3 * len(first) + 1
    for kind in ("layer", "attention", "mlp"):
        assert [point.layer for point in points if point.kind == kind] == [0, 1, 2]


@pytest.mark.parametrize("variant", ["vanilla", "oasis", "gated_elementwise", "kv_null"])
def test_ours_has_the_tensors_of_its_family(variant):
    native_names = [point.name for point in find_hook_points(native("llama"))]
    assert [point.name for point in find_hook_points(ours(variant))] == native_names


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: BertModel(BertConfig(hidden_size=8, num_attention_heads=2)),
            "is not supported: 0 modules look like its list of 12 layers",
        ),
    ],
)
def test_other_trees_are_refused_by_name(model, reason):
    with torch.device("meta"):
        model = model()
    with pytest.raises(UserError, match=f"family '{model.config.model_type}' {reason}"):
        find_hook_points(model)


def test_a_configuration_without_a_number_of_layers_is_refused_by_name():
    """As that of blt, which is several models."""
    model = native("llama")
    model.config = PreTrainedConfig()
    model.config.model_type = "several"
    with pytest.raises(
        UserError, match="configuration of family 'several' has no num_hidden_layers"
    ):
        find_hook_points(model)
