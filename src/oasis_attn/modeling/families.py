"""What our layers must know of a family's own: where its norms stand, and any residual multiplier.

A decoder layer is `x + m * post(branch(pre(x)))`, twice.  `None` marks a norm the family lacks.
What proves a row is that the plain residual sum through it equals the native model to the last bit;
that is a test over all rows.  A family that no row can make exact is refused with the reason.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from transformers import PreTrainedConfig

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration import OasisConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute names on the family's decoder layer.

    `sinks` says that the family's attention has learned sinks of its own: null logits.
    """

    pre_attention: str | None = "input_layernorm"
    post_attention: str | None = None
    pre_mlp: str | None = "post_attention_layernorm"
    post_mlp: str | None = None
    mlp: str = "mlp"
    multiplier: str | None = None
    attention_dropout: str | None = None
    mlp_dropout: str | None = None
    sinks: bool = False

    @property
    def norms(self) -> tuple[str | None, str | None, str | None, str | None]:
        """The norms before and after attention, then before and after the MLP."""
        return self.pre_attention, self.post_attention, self.pre_mlp, self.post_mlp


_PRE_NORM = Family()
_WITH_SINKS = Family(sinks=True)
_SANDWICH = Family(
    post_attention="post_attention_layernorm",
    pre_mlp="pre_feedforward_layernorm",
    post_mlp="post_feedforward_layernorm",
)
_GLM = Family(post_attention="post_self_attn_layernorm", post_mlp="post_mlp_layernorm")
_POST_NORM = Family(
    pre_attention=None,
    post_attention="post_attention_layernorm",
    pre_mlp=None,
    post_mlp="post_feedforward_layernorm",
)

FAMILIES = {
    "afmoe": Family(
        post_attention="post_attention_layernorm",
        pre_mlp="pre_mlp_layernorm",
        post_mlp="post_mlp_layernorm",
    ),
    "apertus": Family(pre_attention="attention_layernorm", pre_mlp="feedforward_layernorm"),
    "arcee": _PRE_NORM,
    "aria_text": _PRE_NORM,
    "axk1": _PRE_NORM,
    "bitnet": _PRE_NORM,
    "cwm": _PRE_NORM,
    "deepseek_v2": _PRE_NORM,
    "deepseek_v3": _PRE_NORM,
    "dots1": _PRE_NORM,
    "ernie4_5": _PRE_NORM,
    "ernie4_5_moe": _PRE_NORM,
    "exaone4": _POST_NORM,
    "exaone_moe": _PRE_NORM,
    "flex_olmo": _POST_NORM,
    "flint": _WITH_SINKS,
    "gemma": _PRE_NORM,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "glm": _PRE_NORM,
    "glm4": _GLM,
    "glm4_moe": _PRE_NORM,
    "glm4_moe_lite": _PRE_NORM,
    "gpt_oss": _WITH_SINKS,
    "granite": Family(multiplier="residual_multiplier"),
    "granite_swa": Family(multiplier="residual_multiplier", sinks=True),
    "granitemoe": Family(multiplier="residual_multiplier", mlp="block_sparse_moe"),
    "helium": _PRE_NORM,
    "hunyuan_v1_dense": _PRE_NORM,
    "hunyuan_v1_moe": _PRE_NORM,
    "hy_v3": _PRE_NORM,
    "hyperclovax": Family(
        post_attention="post_norm1", post_mlp="post_norm2", multiplier="residual_multiplier"
    ),
    "internlm3": _PRE_NORM,
    "iquestcoder": _PRE_NORM,
    "jais2": _PRE_NORM,
    "kolibri1": _GLM,
    "laguna": _PRE_NORM,
    "llama": _PRE_NORM,
    "llama4_text": Family(mlp="feed_forward"),
    "mellum": _PRE_NORM,
    "mimo_v2_flash": _WITH_SINKS,
    "minicpm3": Family(multiplier="residual_scale"),
    "minimax_m2": _PRE_NORM,
    "ministral": _PRE_NORM,
    "ministral3": _PRE_NORM,
    "mistral": _PRE_NORM,
    "mixtral": _PRE_NORM,
    "nanochat": _PRE_NORM,
    "nemotron": _PRE_NORM,
    "olmo": _PRE_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmoe": _PRE_NORM,
    "persimmon": Family(mlp_dropout="dropout"),
    "phi3": Family(attention_dropout="resid_attn_dropout", mlp_dropout="resid_mlp_dropout"),
    "phimoe": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen2_moe": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,
    "seed_oss": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "solar_open": _PRE_NORM,
    "stablelm": Family(mlp_dropout="dropout"),
    "starcoder2": _PRE_NORM,
    "vaultgemma": Family(pre_mlp="pre_feedforward_layernorm"),
    "youtu": _PRE_NORM,
}

DEPARTURES = {
    "lfm3": Family(
        pre_attention="operator_norm",
        post_attention="post_operator_norm",
        pre_mlp="ffn_norm",
        post_mlp="post_ffn_norm",
        mlp="feed_forward",
    ),
    "modernbert-decoder": Family(pre_attention="attn_norm", pre_mlp="mlp_norm"),
    "openai-gpt": Family(pre_attention=None, pre_mlp=None),  # its norms are of the sums
    "rwkv": Family(pre_attention="ln1", pre_mlp="ln2", mlp="feed_forward"),
}
"""Families that cannot be converted, and whose norms `decoder_map` would take for others."""

_PARALLEL = "its attention and MLP run in parallel, on one input"
_REFUSED = {
    _PARALLEL: (
        *("codegen", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "falcon"),
        *("gpt_neox", "gptj", "phi"),
    ),
    "some of its layers have no softmax attention, and so no null mass": (
        *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba"),
        *("kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "nemotron_h"),
        *("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
        *("qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
    ),
    "its residual is not a plain sum of branches": (
        *("beam", "bloom", "deepseek_v4", "doge", "gemma3n", "gemma3n_text", "gemma4"),
        *("gemma4_text", "gemma4_unified", "gemma4_unified_text", "hy_v4", "inkling2_text"),
        *("minimax", "openai-gpt", "qwen4_exp", "qwen4_exp_text", "xlnet", "zaya"),
    ),
    "an indexer picks the keys its attention sees": (
        *("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa"),
        *("minimax_m3_vl", "minimax_m3_vl_text"),
    ),
    "its layers have two attentions each": ("longcat_flash",),
    "its attention is a difference of two softmaxes": ("diffllama",),
}
_REASONS = {family: reason for reason, families in _REFUSED.items() for family in families}


def check_fits(config: OasisConfig) -> Family:
    """The adapter of `config`'s family, whose needs its settings meet; `UserError` otherwise."""
    kind, family = config.text_config.model_type, family_of(config.text_config)
    if config.residual == "depth" and config.mix_scale != "sum" and family.pre_mlp is None:
        # No pre-norm undoes the scale of the mix.
        raise UserError(
            f"mix_scale: {config.mix_scale!r} would set the scale of the inputs of {kind!r}, a"
            " post-norm family; it needs 'sum'"
        )
    if getattr(config.text_config, "output_router_logits", False):
        raise UserError(
            "output_router_logits: True asks for the experts' balancing loss, which is not computed"
            " here; set it to False in the model's configuration"
        )
    if family.sinks and config.normalizer.name != "learned_sink":
        raise UserError(
            f"token_normalizer: {config.token_normalizer!r} is not for {kind!r}, whose attention"
            " has learned sinks of its own; it needs 'learned_sink'"
        )
    return family


def family_of(text_config: PreTrainedConfig) -> Family:
    """The adapter for this config's `model_type`; `UserError` with the reason if there is none."""
    kind = text_config.model_type
    if getattr(text_config, "is_encoder_decoder", False):
        raise UserError(f"model_type: {kind!r} has an encoder; only decoders fit")
    reason = _REASONS.get(kind)
    if kind in FAMILIES and getattr(text_config, "use_parallel_residual", False):
        reason = _PARALLEL
    if reason:
        raise UserError(f"model_type: {kind!r} cannot be exact: {reason}")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model_type: {kind!r} has no adapter; {', '.join(FAMILIES)} have{hint}")
    return FAMILIES[kind]
