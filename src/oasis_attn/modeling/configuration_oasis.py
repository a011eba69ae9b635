"""`OasisConfig`: the config of a decoder family, with the settings of the method."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from oasis_attn.errors import UserError, check_at_least, check_choice
from oasis_attn.modeling.extensions import BRANCH_NORMS, NULL_SIGNALS
from oasis_attn.modeling.hf_compat import (
    SubConfigSpec,
    experts_implementation,
    set_attention_implementation,
)
from oasis_attn.modeling.null_logit import least_of_context, resolve_null_logit
from oasis_attn.modeling.settings import SETTINGS, check_settings, refuse_unknown
from oasis_attn.ops.normalizers import (
    LEARNED_NULL_LOGIT,
    TOKEN_NORMALIZERS,
    WITH_NULL_LOGIT,
    TokenNormalizer,
    resolve_normalizer,
    with_length,
    with_null,
)

ATTENTION = "oasis"
"""The name of our function in transformers' attention and mask registries."""

_LARGEST = 1e6  # largest absolute value of a null logit
_FORWARDED = {  # fields of `text_config` that transformers reads from the config of a model
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "sliding_window"),
    *("classifier_dropout", "hidden_dropout"),
}
BROKEN = (
    *(StrictDataclassError, OSError, ValueError, TypeError, AttributeError, LookupError),
    ArithmeticError,
)
"""What transformers raises for a configuration whose fields are absent or of another kind."""
_BASE_EXTRAS = {  # arguments that transformers may pass to any config
    *("torch_dtype", "attn_implementation", "experts_implementation", "output_attentions"),
    *("name_or_path", "num_labels", "trust_remote_code", "model_type"),
    *("quantization_config", "tokenizer_class", "auto_map"),
}


class OasisConfig(PreTrainedConfig):
    """A decoder family's config with a null option in attention and routing over depth.

    A checkpoint contains all settings, and the attention function: `from_pretrained` needs no other
    arguments.  A setting that has no effect in combination with the others raises an error.

    Args:
        text_config: the family's own config, or its dictionary with `model_type`; default Llama.
        token_normalizer: normalizer of token attention: one of
            `oasis_attn.ops.normalizers.NORMALIZERS` except `sigmoid`, or a name registered with
            `register_token_normalizer`.  For one with arguments, pass a mapping:
            `{"name": "clipped_softmax", "gamma": -0.03}` or
            `{"name": "key_value_null", "nulls": 2}`.  `clipped_softmax` also takes `alpha` and
            `length` in place of gamma = -alpha / length.  `length` is that of the training
            sequences; by default, the `max_position_embeddings` of `text_config`.
        null_logit: c of `softmax1`, and the initial value of the learned c of `learned_sink`,
            `value_null`, `key_null` and `key_value_null`.  0 is Softmax1 and the start in gpt-oss;
            -inf switches the null of `softmax1` off.
            `log_context` is log(n) + 2, and with depth routing at least 8 for nulls without a key.
            n is the number of tokens of a training sequence if `oasis train` makes the config, and
            otherwise the `max_position_embeddings` of `text_config`;
            `{"name": "log_context", "length": n}` states another n.  It is replaced by the number
            when the config is created, so that config.json contains the number and a later change
            of the positions does not change the null.
        output_gate: sigmoid gate on the attention output before its projection: one per `head`
            and token (Bondarenko 2023), or `elementwise` (arXiv 2505.06708).
        residual: `sum`, `depth` for attention over depth (arXiv 2603.15031), or `official` for the
            form of the OASIS authors' code, in which routers in each layer mix hidden states.
        depth_block_size: sublayers per depth source; 1 is the full form.
        depth_normalizer: normalizer over the sources: `softmax`, `softmax1` or `sigmoid`.  With
            `depth`, `softmax1` differs from `softmax` only in the scale of the mixes, with and
            without the null signal.  In a family with pre-norms, the next RMSNorm removes this
            scale, up to its eps, which is not small relative to the mixes of a new model: see
            docs/study.md.
        mix_scale: `sum` multiplies the mix by the number of sources (plus 1 for `softmax1`; by 2
            for `sigmoid`), so that zero queries give the exact residual sum.  `rms` scales each
            token's mix to a root mean square of 1.  The next RMSNorm makes this scale irrelevant,
            up to its eps, but static quantization needs it: otherwise tokens with small mixes share
            a range with tokens with large ones.  `none` changes nothing.
        branch_norm: normalizes branches before they are added to the residual: `none`, `rms` (the
            embedding and the outputs of attention and MLPs), `rms_mlp` (the outputs of MLPs), or a
            name registered with `register_branch_norm`.
        null_signal: the null evidence psi that lowers the depth logits: `on` (OASIS), `shuffled`
            or `averaged` over all tokens of the batch (controls, not causal), `off`, or a name
            registered with `register_null_signal`.
        beta_init: initial value of the parameter `raw` in beta = softplus(raw), not of beta itself;
            beta is the strength of the null signal.  The default of -5 is a beta of 0.0067.

    Raises:
        UserError: a setting or its value is unknown, or a setting has no effect in combination with
            the others.
    """

    model_type = "oasis"
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: Any = None
    token_normalizer: str | dict[str, Any] = "softmax1"
    null_logit: Any = 0.0
    output_gate: str = "none"
    residual: str = "depth"
    depth_block_size: int = 1
    depth_normalizer: str = "softmax1"
    mix_scale: str = "none"
    branch_norm: str = "none"
    null_signal: str = "on"
    beta_init: float = -5.0
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = _BASE_EXTRAS | _FORWARDED
        refuse_unknown(name for name in kwargs if name not in known and name[0] != "_")
        asked = kwargs.pop("attn_implementation", None)
        if asked not in (None, ATTENTION):
            raise UserError(
                f"attn_implementation: {asked!r} has no null option;"
                f" leave it out, it is {ATTENTION!r}"
            )
        if not isinstance(self.text_config, dict | PreTrainedConfig | None):
            raise UserError(f"text_config: {self.text_config!r} is not a configuration or mapping")
        if isinstance(self.text_config, PreTrainedConfig):
            # A copy, because the attention implementation of the caller's object must not change.
            self.text_config = copy.deepcopy(self.text_config)
            # transformers copies the value of this config to `text_config`.
            kwargs.setdefault("experts_implementation", experts_implementation(self.text_config))
        labeled = self.id2label is not None or "num_labels" in kwargs
        try:
            super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"text_config: {' '.join(str(error).split())}") from error
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if positions:
            self.token_normalizer = with_length(self.token_normalizer, positions)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        text: Any = self.text_config
        least = least_of_context(self.residual, self.normalizer.name)
        self.null_logit = resolve_null_logit(self.null_logit, text, least)
        if not labeled:  # the labels of a classifier are in the family's config
            self.id2label, self.label2id = text.id2label, text.label2id
        if self.problem_type is None:
            self.problem_type = text.problem_type
        if text.output_attentions:  # transformers does not save it with our attention function
            self.output_attentions, text.output_attentions = True, False
        self.check()
        set_attention_implementation(self, ATTENTION)

    def __getattr__(self, name: str) -> Any:
        # Only these: otherwise all fields of the family would look like fields of this config.
        if name in _FORWARDED and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        text = self.__dict__.get("text_config")
        if name in _FORWARDED and isinstance(text, PreTrainedConfig):
            setattr(text, name, value)  # the family's own model reads it there
        else:
            super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    @property
    def output_attentions(self) -> bool:
        """Whether forward returns attention maps by default; our function supports it."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Accept every value, unlike transformers: see `output_attentions`."""

    def validate(self) -> None:
        """Raise `UserError` if the saved config could not be loaded; `save_pretrained` calls it."""
        self.check()
        try:
            self.text_config.validate()
            for validator in self.__class_validators__:  # by name: one of them is overridden here
                getattr(self, validator.__name__)()
        except BROKEN as error:
            raise UserError(f"config: {' '.join(str(error).split())}") from error

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without attributes of other libraries, which loading would refuse."""
        known = {field.name for field in fields(self)} | _BASE_EXTRAS
        return {
            name: value
            for name, value in super().to_dict().items()
            if name in known or name[0] == "_"
        }

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but the config of a family's own checkpoint becomes `text_config`."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found and found.get("model_type") != cls.model_type and "text_config" not in found:
            found = {"text_config": found, "model_type": cls.model_type}
        return found, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but the dictionary must contain `text_config`: there is no default.

        Raises:
            UserError: no `text_config`.
        """
        if config_dict.get("text_config") is None:
            raise UserError("text_config: None is not a family's configuration or its mapping")
        return super().from_dict(config_dict, **kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings, as the constructor takes them."""
        return {name: getattr(self, name) for name in SETTINGS}

    def check(self) -> None:
        """Raise `UserError` if a value is unknown, or a setting has no effect with the others.

        The constructor calls it.  Call it again after a setting was changed.
        """
        normalizer = self.normalizer  # checks its arguments
        check_choice("token_normalizer", normalizer.name, tuple(TOKEN_NORMALIZERS))
        check_settings({name: getattr(self, name) for name in SETTINGS})
        BRANCH_NORMS.check(self.branch_norm, "none")
        NULL_SIGNALS.check(self.null_signal, "off")
        # -inf switches the null off.  A parameter with this value could not be trained.
        off = isinstance(self.null_logit, float) and self.null_logit == -math.inf
        if not (off and normalizer.name not in LEARNED_NULL_LOGIT):
            check_at_least("null_logit", self.null_logit, -_LARGEST, _LARGEST)
        if normalizer.name not in WITH_NULL_LOGIT:
            self._needs("null_logit", "token_normalizer", " or ".join(map(repr, WITH_NULL_LOGIT)))
        if self.residual == "sum":
            self._needs("depth_normalizer", "residual", "'depth' or 'official'")
        if self.residual != "depth":
            for name in ("depth_block_size", "mix_scale"):
                self._needs(name, "residual", "'depth'")
        if self.null_signal == "off":
            self._needs("beta_init", "null_signal", "any other value")
        elif self.residual == "sum":
            raise UserError(
                f"null_signal: {self.null_signal!r} needs residual 'depth' or 'official',"
                " because a sum has no router; set null_signal='off'"
            )
        elif not normalizer.has_null:
            raise UserError(
                f"null_signal: {self.null_signal!r} needs a token_normalizer with a null,"
                f" one of {', '.join(with_null())}; {normalizer.name!r} has none"
            )
        elif self.null_logit == -math.inf:
            raise UserError(
                f"null_signal: {self.null_signal!r} has no effect with null_logit=-inf, which makes"
                " every null probability 0; set null_signal='off' or a finite null_logit"
            )

    @property
    def normalizer(self) -> TokenNormalizer:
        """`token_normalizer`, resolved: its name, function and arguments."""
        return resolve_normalizer("token_normalizer", self.token_normalizer)

    def _needs(self, name: str, other: str, values: str) -> None:
        """Raise `UserError` if `name`, which has no effect with this value of `other`, was set."""
        if getattr(self, name) != getattr(type(self), name):
            raise UserError(
                f"{name}: {getattr(self, name)!r} has no effect with"
                f" {other}={getattr(self, other)!r}; it needs {values}"
            )


AutoConfig.register(OasisConfig.model_type, OasisConfig)
