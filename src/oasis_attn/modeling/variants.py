"""The variants of the architecture: each is a row of settings in one table."""

from __future__ import annotations

from typing import Any

from oasis_attn.errors import check_choice

_PLAIN: dict[str, Any] = {"token_normalizer": "softmax", "residual": "sum", "null_signal": "off"}
_DEPTH = _PLAIN | {"residual": "depth", "depth_normalizer": "softmax"}
_OASIS: dict[str, Any] = {
    "token_normalizer": "softmax1",
    "residual": "depth",
    "depth_normalizer": "softmax1",
    "null_signal": "on",
}

_VARIANTS: dict[str, dict[str, Any]] = {
    # the literature
    "vanilla": _PLAIN,
    "clipped_softmax": _PLAIN | {"token_normalizer": {"name": "clipped_softmax", "alpha": 3}},
    "gated_attention": _PLAIN | {"output_gate": "head"},
    "gated_elementwise": _PLAIN | {"output_gate": "elementwise"},
    "softmax1": _PLAIN | {"token_normalizer": "softmax1"},
    "learned_sink": _PLAIN | {"token_normalizer": "learned_sink"},
    "kv_null": _PLAIN | {"token_normalizer": "key_value_null"},
    "softpick": _PLAIN | {"token_normalizer": "softpick"},
    "sparsemax": _PLAIN | {"token_normalizer": "sparsemax"},
    "entmax15": _PLAIN | {"token_normalizer": "entmax15"},
    "attn_residual": _DEPTH,
    "attn_residual_block": _DEPTH | {"depth_block_size": 4},
    # the method
    "oasis": _OASIS,
    "oasis_block": _OASIS | {"depth_block_size": 4},
    "official": _OASIS | {"residual": "official"},
    # its ablations, one part changed at a time
    "oasis_signal_off": _OASIS | {"null_signal": "off"},
    "oasis_signal_shuffled": _OASIS | {"null_signal": "shuffled"},
    "oasis_depth_softmax": _OASIS | {"depth_normalizer": "softmax"},
    "oasis_depth_sigmoid": _OASIS | {"depth_normalizer": "sigmoid"},
    "token_softmax1_only": _DEPTH | {"token_normalizer": "softmax1"},
    "depth_softmax1_only": _DEPTH | {"depth_normalizer": "softmax1"},
    "depth_sigmoid_only": _DEPTH | {"depth_normalizer": "sigmoid"},
    # the same with the scale of mixes fixed, for static quantization: no effect of the norms' eps
    "oasis_unit": _OASIS | {"mix_scale": "rms"},
    # other functions, for fewer sinks and outliers: see docs/study.md
    "oasis_peri": _OASIS | {"mix_scale": "rms", "null_logit": 5.0, "branch_norm": "rms"},
    "oasis_quiet": _OASIS | {"mix_scale": "rms", "null_logit": 4.5, "branch_norm": "rms_mlp"},
    # controls
    "attn_residual_gated": _DEPTH | {"output_gate": "head"},
    "attn_residual_softpick": _DEPTH | {"token_normalizer": "softpick"},
}


_SYNONYMS = {  # other names -> the variant that may be meant, for error messages
    "authors": "official",
    "reference": "official",
    "baseline": "vanilla",
    "plain": "vanilla",
    "softmax": "vanilla",
    "clipped": "clipped_softmax",
    "gated": "gated_attention",
    "attention_residuals": "attn_residual",
}


def variants() -> dict[str, dict[str, Any]]:
    """The settings of each variant, as arguments of `OasisConfig`: `{name: {setting: value}}`.

    Settings that a row does not name have the default of `OasisConfig`.  Rows that differ only in
    softmax or softmax1 over depth compute the same function with `mix_scale` rms; otherwise the
    same up to the eps of the norms: see `depth_normalizer` in `OasisConfig`.
    """
    return {name: dict(settings) for name, settings in _VARIANTS.items()}


def settings_of(variant: str) -> dict[str, Any]:
    """The settings of one variant; `UserError` with similar names if there is none."""
    check_choice("variant", variant, tuple(_VARIANTS), _SYNONYMS)
    return dict(_VARIANTS[variant])
