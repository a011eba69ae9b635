"""The model a run starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

if TYPE_CHECKING:
    from oasis_attn.modeling.model import OasisForCausalLM


def build_model(
    backbone: PreTrainedConfig, settings: dict[str, Any], seed: int
) -> OasisForCausalLM:
    """A model with fresh float32 weights; the backbone's depend on the seed only.

    The family's own model is drawn first and its weights are copied, by name, over those of the
    variant: whatever parameters a variant adds, and wherever it draws them, the rest is the same.
    The caller's random state is left as it was.
    """
    from oasis_attn.modeling.configuration import OasisConfig
    from oasis_attn.modeling.model import OasisForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        native = AutoModelForCausalLM.from_config(
            backbone, dtype=torch.float32, trust_remote_code=False
        )
        torch.manual_seed(seed)
        model = OasisForCausalLM(OasisConfig(text_config=backbone, **settings))
    _, foreign = model.load_state_dict(native.state_dict(), strict=False)
    assert not foreign, f"backbone weights without a place in the variant: {foreign}"
    return model
