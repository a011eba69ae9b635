"""What our layers must know of a family's own: where its norms stand, and any residual multiplier.

A decoder layer is `x + m * post(branch(pre(x)))`, twice.  `None` marks a norm the family lacks.
What proves a row is that the plain residual sum through it equals the native model to the last bit;
that is a test over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from oasis_attn.errors import UserError, check_choice


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute names on the family's decoder layer."""

    pre_attention: str | None = "input_layernorm"
    post_attention: str | None = None
    pre_mlp: str | None = "post_attention_layernorm"
    post_mlp: str | None = None
    multiplier: str | None = None
    attention_dropout: str | None = None
    mlp_dropout: str | None = None


_PRE_NORM = Family()
_SANDWICH = Family(
    post_attention="post_attention_layernorm",
    pre_mlp="pre_feedforward_layernorm",
    post_mlp="post_feedforward_layernorm",
)
_POST_NORM = Family(
    pre_attention=None,
    post_attention="post_attention_layernorm",
    pre_mlp=None,
    post_mlp="post_feedforward_layernorm",
)

FAMILIES = {
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gpt_oss": _PRE_NORM,
    "granite": Family(multiplier="residual_multiplier"),
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "mixtral": _PRE_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmoe": _PRE_NORM,
    "phi3": Family(attention_dropout="resid_attn_dropout", mlp_dropout="resid_mlp_dropout"),
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,
    "smollm3": _PRE_NORM,
}


def check_scaled(text_config: PreTrainedConfig, residual: str, depth_scale: str) -> None:
    """Refuse an unscaled mix where no pre-norm undoes its scale."""
    if residual == "depth" and depth_scale == "none" and family_of(text_config).pre_mlp is None:
        raise UserError(
            f"depth_scale: 'none' would shrink the input of {text_config.model_type!r}, a post-norm"
            " family, with every source; it needs 'sources'"
        )


def family_of(text_config: PreTrainedConfig) -> Family:
    """The adapter for this config's `model_type`; `UserError` naming the supported ones."""
    if getattr(text_config, "is_encoder_decoder", False):
        raise UserError(f"model_type: {text_config.model_type!r} has an encoder; only decoders fit")
    check_choice("model_type", text_config.model_type, tuple(FAMILIES))
    return FAMILIES[text_config.model_type]
