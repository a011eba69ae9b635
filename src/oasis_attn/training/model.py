"""The initial model of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

if TYPE_CHECKING:
    from oasis_attn.modeling.modeling_oasis import OasisForCausalLM


def build_model(
    backbone: PreTrainedConfig, settings: dict[str, Any], seed: int
) -> OasisForCausalLM:
    """A model with new float32 weights; those of the backbone depend only on the seed.

    The family's own model is initialized first, and its weights are copied by name into the
    variant's model.  So the backbone's weights are the same for all variants.  The caller's random
    state does not change.
    """
    from oasis_attn.modeling.configuration_oasis import OasisConfig
    from oasis_attn.modeling.modeling_oasis import OasisForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        native = AutoModelForCausalLM.from_config(
            backbone, dtype=torch.float32, trust_remote_code=False
        )
        torch.manual_seed(seed)
        model = OasisForCausalLM(OasisConfig(text_config=backbone, **settings))
    _, foreign = model.load_state_dict(native.state_dict(), strict=False)
    assert not foreign, f"backbone weights that the variant does not have: {foreign}"
    return model
