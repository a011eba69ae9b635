"""Every family of causal language models in transformers works, or is refused by name and reason.

The page docs/families.md says which; `tests/tiny_families.py` writes it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from oasis_attn.modeling.decoder_map import decoder_map
from oasis_attn.quantization.coverage import float_weights, quantized_share
from oasis_attn.quantization.linear import QuantizedLinear
from tiny_families import FAMILIES, family_model, outcomes, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
NOT_BUILT = {
    **dict.fromkeys(("dbrx", "musicgen", "musicgen_melody"), "an error in transformers"),
    "dots3_note": "its defaults describe 42 layers",
    "dots3_note_text": "76 million parameters",
    "gemma3n": "needs timm",
    "gemma4_assistant": "it reads the cache of another model",
    "gemma4_unified_assistant": "it reads the cache of another model",
    "phi4_multimodal": "6 million parameters",
}


def listed(operation, family):
    """The outcome for a family on the page."""
    (section,) = re.findall(rf"## {operation}\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)
    (outcome,) = (
        outcome
        for outcome, families in re.findall(r"^\| (.*?) \| (.*) \|$", section, re.MULTILINE)
        if family in families.split(", ")
    )
    return outcome


def weights(model):
    """The number of entries of all weights that `quantize` may quantize."""
    head = model.get_output_embeddings()
    return sum(
        parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not head
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not name.endswith("bias")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_or_is_refused_by_name(family):
    if family in NOT_BUILT:
        pytest.skip(f"cannot be built tiny: {NOT_BUILT[family]}")
    model = family_model(family)
    implementation = model.config._attn_implementation
    lines, record, static, by_weight = outcomes(model)
    if f"\n{transformers.__version__}," in PAGE:
        for operation, outcome in lines.items():
            assert listed(operation, family) == outcome
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        if record is not None:
            logits_TV = model(input_ids=tokens(), use_cache=False).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits_TV, tokens()[0, 1:])
            assert record["loss.windowed"] == pytest.approx(float(loss), abs=1e-4)
            layers = decoder_map(model).layers
            without = [row["layer"] for row in record.tables.get("sink.no_map", ())]
            assert without == [i for i, layer in enumerate(layers) if layer.attention is None]
        if static is not None:
            assert static(input_ids=tokens(), use_cache=False).logits.isfinite().all()
    if by_weight is not None:
        quantized = sum(
            module.in_features * module.out_features
            for module in by_weight.modules()
            if isinstance(module, QuantizedLinear)
        )
        rest = sum(float_weights(by_weight).values())
        assert quantized + rest == weights(model)
        assert quantized_share(by_weight) == quantized / (quantized + rest)
