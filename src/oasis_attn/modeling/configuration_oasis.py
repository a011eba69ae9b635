"""`OasisConfig`: a family's own config, and the method's settings around it."""

from __future__ import annotations

import copy
import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from oasis_attn.errors import UserError, check_at_least, check_choice, check_whole
from oasis_attn.modeling.extensions import BRANCH_NORMS, NULL_SIGNALS
from oasis_attn.modeling.hf_compat import (
    SubConfigSpec,
    experts_implementation,
    set_attention_implementation,
)
from oasis_attn.ops.normalizers import (
    TOKEN_NORMALIZERS,
    TokenNormalizer,
    resolve_normalizer,
    with_null,
)

ATTENTION = "oasis"
"""The name of our function in transformers' attention and mask registries."""

_LARGEST = 1e6  # of numbers that are set
_CHOICES: dict[str, Iterable[str]] = {
    "token_normalizer": TOKEN_NORMALIZERS,
    "output_gate": ("none", "head", "elementwise"),
    "residual": ("sum", "depth", "official"),
    "depth_normalizer": ("softmax", "softmax1", "sigmoid"),
    "mix_scale": ("none", "sum", "rms"),
}
_FORWARDED = {  # what transformers reads off a model's top config
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
_BASE_EXTRAS = {  # what transformers itself may hand to any config
    *("torch_dtype", "attn_implementation", "experts_implementation", "output_attentions"),
    *("name_or_path", "num_labels", "trust_remote_code", "model_type"),
    *("quantization_config", "tokenizer_class"),
}


class OasisConfig(PreTrainedConfig):
    """A decoder family's config with a null option in attention and routing over depth.

    Everything is saved with a checkpoint, the attention function included: `from_pretrained` needs
    no flag.  Settings that cannot act together are refused at construction.

    Args:
        text_config: the family's own config, or its dictionary with `model_type`; default Llama.
        token_normalizer: of token attention, one of `oasis_attn.ops.normalizers.NORMALIZERS` but
            `sigmoid`, or registered by `register_token_normalizer`.  One that takes arguments is
            given as a mapping: `{"name": "clipped_softmax", "gamma": -0.03}`.
        null_logit: c of `softmax1`; 0 is Softmax1, very negative values switch the null off.
        output_gate: sigmoid gate on the attention output before its projection: one per `head`
            and token (Bondarenko 2023), or `elementwise` (arXiv 2505.06708).
        residual: `sum`, attention over `depth` (arXiv 2603.15031), or the `official` form of the
            OASIS authors' code: sources are states, routers in each layer project queries and keys.
        depth_block_size: sublayers per depth source; 1 is the full form.
        depth_normalizer: over the sources.  With `depth`, a common factor on the weights cancels in
            the next RMSNorm, so in a family with pre-norms `softmax1` does what `softmax` does,
            with the null signal and without, up to the norms' eps: it changes only the scale of the
            mixes.  That eps is not small beside the mixes of a new model: see docs/study.md.
        mix_scale: `sum` multiplies the mix by the number of sources (plus 1 for `softmax1`; by 2
            for `sigmoid`), so that zero queries give the exact residual sum.  `rms` brings each
            token's mix to a root mean square of 1.  The next RMSNorm removes that, up to its eps,
            but a quantizer needs it: without it, tokens whose mixes are small share a range with
            large ones.
        branch_norm: brings the embedding and the branches' outputs to one size before they join the
            residual: `none`, `rms` (all of them), `rms_mlp` (only the MLPs), or registered by
            `register_branch_norm`.
        null_signal: the null evidence psi that lowers the depth logits: `on` (OASIS), `shuffled`
            or `averaged` over all tokens of the batch (controls, not causal), `off`, or registered
            by `register_null_signal`.
        beta_init: initial value of beta, the strength of the null signal, before the softplus.

    Raises:
        UserError: on an unknown setting or value, or settings that exclude each other.
    """

    model_type = "oasis"
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: Any = None
    token_normalizer: str | dict[str, Any] = "softmax1"
    null_logit: float = 0.0
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
            raise UserError(f"text_config: {self.text_config!r} is no configuration or its mapping")
        if isinstance(self.text_config, PreTrainedConfig):
            # Ours from here on: the caller's object keeps its own attention implementation.
            self.text_config = copy.deepcopy(self.text_config)
            # The top config hands its own down, and would forget the family's.
            kwargs.setdefault("experts_implementation", experts_implementation(self.text_config))
        labeled = self.id2label is not None or "num_labels" in kwargs
        try:
            super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"text_config: {' '.join(str(error).split())}") from error
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        text: Any = self.text_config
        if not labeled:  # a classifier's are in the family's config
            self.id2label, self.label2id = text.id2label, text.label2id
        if self.problem_type is None:
            self.problem_type = text.problem_type
        if text.output_attentions:  # which it could not be saved with beside our function
            self.output_attentions, text.output_attentions = True, False
        self.check()
        set_attention_implementation(self, ATTENTION)

    def __getattr__(self, name: str) -> Any:
        # An open fall-through would leak the family's fields into this config's own.
        if name in _FORWARDED and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        text = self.__dict__.get("text_config")
        if name in _FORWARDED and isinstance(text, PreTrainedConfig):
            setattr(text, name, value)  # where the family's own model reads it
        else:
            super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    @property
    def output_attentions(self) -> bool:
        """Whether forward returns attention maps unless told; our function can, `eager` or not."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Nothing to refuse: see `output_attentions`."""

    def validate(self) -> None:
        """Raise `UserError` on what could not be loaded again; `save_pretrained` asks first."""
        self.check()
        try:
            self.text_config.validate()
            for validator in self.__class_validators__:  # by name: one of them is overridden here
                getattr(self, validator.__name__)()
        except BROKEN as error:
            raise UserError(f"config: {' '.join(str(error).split())}") from error

    def to_dict(self) -> dict[str, Any]:
        """As transformers', less attributes of other libraries, which loading would refuse."""
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
        """As transformers', except that a family's own checkpoint is taken as `text_config`."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found and found.get("model_type") != cls.model_type and "text_config" not in found:
            found = {"text_config": found, "model_type": cls.model_type}
        return found, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but a checkpoint must say of which family it is: none is the default.

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
        """Raise `UserError` on a setting's unknown value, and on settings that exclude each other.

        The constructor does; whoever changes a setting afterwards should.
        """
        normalizer = self.normalizer  # its arguments are checked
        for name, allowed in _CHOICES.items():
            value = normalizer.name if name == "token_normalizer" else getattr(self, name)
            check_choice(name, value, tuple(allowed))
        BRANCH_NORMS.check(self.branch_norm, "none")
        NULL_SIGNALS.check(self.null_signal, "off")
        check_whole("depth_block_size", self.depth_block_size, 1)
        for name in ("null_logit", "beta_init"):
            value = getattr(self, name)
            if name != "null_logit" or value != -math.inf:  # minus infinity: no null
                check_at_least(name, value, -_LARGEST, _LARGEST)
        if normalizer.name != "softmax1":
            self._needs("null_logit", "token_normalizer", "'softmax1'")
        if self.residual == "sum":
            self._needs("depth_normalizer", "residual", "'depth' or 'official'")
        if self.residual != "depth":
            for name in ("depth_block_size", "mix_scale"):
                self._needs(name, "residual", "'depth'")
        if self.null_signal == "off":
            self._needs("beta_init", "null_signal", "one that is not off")
        elif self.residual == "sum":
            raise UserError(
                f"null_signal: {self.null_signal!r} needs residual 'depth' or 'official', for a"
                " sum has no router; set null_signal='off'"
            )
        elif not normalizer.has_null:
            raise UserError(
                f"null_signal: {self.null_signal!r} needs a token_normalizer with a null,"
                f" one of {', '.join(with_null())}; {normalizer.name!r} has none"
            )

    @property
    def normalizer(self) -> TokenNormalizer:
        """`token_normalizer`, resolved: its name, function and arguments."""
        return resolve_normalizer("token_normalizer", self.token_normalizer)

    def _needs(self, name: str, other: str, values: str) -> None:
        """A setting that `other` leaves without effect must be at its default."""
        if getattr(self, name) != getattr(type(self), name):
            raise UserError(
                f"{name}: {getattr(self, name)!r} has no effect with"
                f" {other}={getattr(self, other)!r}; it needs {values}"
            )


SETTINGS = (
    "token_normalizer",
    "null_logit",
    "output_gate",
    "residual",
    "depth_block_size",
    "depth_normalizer",
    "mix_scale",
    "branch_norm",
    "null_signal",
    "beta_init",
)


def check_settings(names: Iterable[str]) -> None:
    """Raise `UserError` on the first of `names` that is none of `SETTINGS`."""
    refuse_unknown(name for name in names if name not in SETTINGS)


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise `UserError` on the first of `names`, with the setting it may have meant."""
    for name in names:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"settings: {name!r} is none of {', '.join(SETTINGS)}{hint}")


AutoConfig.register(OasisConfig.model_type, OasisConfig)
