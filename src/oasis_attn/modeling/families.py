"""The families of decoders that can be converted, one row each, and why others cannot.

A decoder layer computes `x + m * post(branch(pre(x)))` twice, for attention and for the MLP.  A row
gives the names of the norms, of the multiplier m and of the MLP in the family's layer.  A test over
all rows shows that a converted model with the plain residual sum has exactly the logits of the
native model.  `decoder_map` finds everything else, in families without a row too.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from transformers import PreTrainedConfig

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.ops.normalizers import LEARNED_NULL_LOGIT


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of attributes of the family's decoder layer, and what is special about the family.

    Attributes:
        pre_attention, post_attention: the norms before and after attention; None if there is none.
        pre_mlp, post_mlp: the norms before and after the MLP.
        mlp: the MLP.
        multiplier: the number that multiplies the outputs of attention and MLP.
        attention_dropout, mlp_dropout: the dropout of these outputs.
        sinks: whether the family's attention has learned sinks, which are null logits.
        final_norm_reads_embedding: whether the norm after the last layer also normalizes the
            embedding.
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
    final_norm_reads_embedding: bool = False

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
    "nanochat": Family(final_norm_reads_embedding=True),
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
    "openai-gpt": Family(pre_attention=None, pre_mlp=None),  # it normalizes the sums
    "rwkv": Family(pre_attention="ln1", pre_mlp="ln2", mlp="feed_forward"),
}
"""Families that cannot be converted and in which the heuristic of `decoder_map` would be wrong."""

_PARALLEL = "its attention and its MLP run in parallel and read the same input"
_REFUSED = {
    _PARALLEL: (
        *("codegen", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "falcon"),
        *("gpt_neox", "gptj", "phi"),
    ),
    "some of its layers have no softmax attention and therefore no null probability": (
        *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba"),
        *("kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "nemotron_h"),
        *("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
        *("qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
    ),
    "its residual stream is not the sum of the outputs of its sublayers": (
        *("beam", "bloom", "deepseek_v4", "doge", "gemma3n", "gemma3n_text", "gemma4"),
        *("gemma4_text", "gemma4_unified", "gemma4_unified_text", "hy_v4", "inkling2_text"),
        *("minimax", "openai-gpt", "qwen4_exp", "qwen4_exp_text", "xlnet", "zaya"),
    ),
    "an indexer selects the keys that its attention reads": (
        *("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa"),
        *("minimax_m3_vl", "minimax_m3_vl_text"),
    ),
    "each of its layers has two attention modules": ("longcat_flash",),
    "its attention is a difference of two softmaxes": ("diffllama",),
}
_REASONS = {family: reason for reason, families in _REFUSED.items() for family in families}


def check_fits(config: OasisConfig) -> Family:
    """The row of the family of `config`; `UserError` if there is none or a setting does not fit."""
    kind, family = config.text_config.model_type, family_of(config.text_config)
    if config.residual == "depth" and config.mix_scale != "sum" and family.pre_mlp is None:
        # The family has no norm before the MLP that would undo the scale of the mix.
        raise UserError(
            f"mix_scale: {config.mix_scale!r} would change the scale of the inputs of attention and"
            f" MLP, because {kind!r} has no norms before them; use 'sum'"
        )
    if getattr(config.text_config, "output_router_logits", False):
        raise UserError(
            "output_router_logits: True requests the load-balancing loss of the experts, which is"
            " not computed; set it to False in the model's configuration"
        )
    if family.sinks and config.normalizer.name not in LEARNED_NULL_LOGIT:
        raise UserError(
            f"token_normalizer: {config.token_normalizer!r} does not work with {kind!r}, because"
            " its attention already has learned sinks; use"
            f" {' or '.join(map(repr, LEARNED_NULL_LOGIT))}"
        )
    if family.sinks and config.null_logit:
        raise UserError(
            f"null_logit: {config.null_logit!r} has no effect with {kind!r}, whose attention has"
            " its own learned sinks; leave it out"
        )
    return family


def family_of(text_config: PreTrainedConfig) -> Family:
    """The row of this config's `model_type`; `UserError` with the reason if there is none."""
    kind = text_config.model_type
    if getattr(text_config, "is_encoder_decoder", False):
        raise UserError(f"model_type: {kind!r} has an encoder; only decoders are supported")
    reason = _REASONS.get(kind)
    if kind in FAMILIES and getattr(text_config, "use_parallel_residual", False):
        reason = _PARALLEL
    if reason:
        raise UserError(f"model_type: {kind!r} cannot be converted exactly: {reason}")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"model_type: {kind!r} is not supported; supported are {', '.join(FAMILIES)}{hint}"
        )
    return FAMILIES[kind]
