"""The setting `null_logit`: a number, or `log_context`, a number computed from a context length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from oasis_attn.errors import UserError, check_whole, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LOG_CONTEXT = "log_context"

LOG_CONTEXT_MARGIN = 2.0
"""`log_context` is the log of the context length plus this margin.

n keys with logit 0 have a log-sum-exp of log n, so that a null logit above log n takes more than
half of the attention of a head that ignores all keys.  docs/results/lab/null_law contains the
smallest constant null logit that leaves less than 0.02 of the attention on the first token, in
attention-only models on the trigger task (arXiv 2603.11487): its excess over log n grows with heads
and layers, up to 1.3 in the groups of runs that converged and 1.8 in all, and it is negative with
512 and 1024 tokens.  In decoders
(docs/results/lab/null_law_decoders), from 16 to 1024 tokens, it is 2.7 to 5.6 with a residual sum
and 4.3 to 7.9 with Attention Residuals, which log n plus the margin exceeds from 64 and from 512
tokens on.
"""

LEAST_WITH_DEPTH = 8.0
"""With depth routing, `log_context` is at least this, which exceeds all thresholds of decoders.

Not for nulls with a learned key: the query can lower them, and a start of 8 costs accuracy in small
language models (docs/results/majority).
"""


def least_of_context(residual: str, normalizer: str) -> float:
    """What `log_context` is at least, with these settings of `OasisConfig`."""
    with_key = normalizer in ("key_null", "key_value_null")
    return 0.0 if residual == "sum" or with_key else LEAST_WITH_DEPTH


def resolve_null_logit(value: Any, text_config: PreTrainedConfig, least: float = 0.0) -> Any:
    """The number that a value of `null_logit` stands for; numbers are returned unchanged.

    Args:
        value: a number; or `"log_context"`, log(n) + `LOG_CONTEXT_MARGIN` with n the
            `max_position_embeddings` of `text_config`, and at least `least`.
            `{"name": "log_context", "length": n}` states n, for a model that is trained on windows
            of fewer tokens than its positions.
        text_config: configuration of the family.
        least: see `least_of_context`.

    Raises:
        UserError: the value has neither of these forms, or the family states no
            `max_position_embeddings`.
    """
    if not isinstance(value, str | dict):
        return value
    form = context_form(value)
    length = form.get("length", getattr(text_config, "max_position_embeddings", None))
    if not isinstance(length, int) or length < 1:
        raise UserError(
            f"null_logit: {LOG_CONTEXT!r} needs max_position_embeddings, which is {length!r} in"
            f" the configuration of {text_config.model_type!r}; state the length:"
            f' {{"name": "{LOG_CONTEXT}", "length": tokens}}'
        )
    return max(math.log(length) + LOG_CONTEXT_MARGIN, least)


def of_windows(value: Any, length: int) -> Any:
    """A value of `null_logit`, in which `log_context` without a length has that of the windows."""
    return {"length": length} | context_form(value) if isinstance(value, str | dict) else value


def context_form(value: str | dict[str, Any]) -> dict[str, Any]:
    """The mapping form of `log_context`; `UserError` if the value is not one of its forms."""
    form: dict[str, Any] = dict(value) if isinstance(value, dict) else {"name": value}
    if form.get("name") != LOG_CONTEXT or set(form) - {"name", "length"}:
        raise UserError(
            f"null_logit: {shown(value)} is neither a number nor {LOG_CONTEXT!r} nor"
            f' {{"name": "{LOG_CONTEXT}", "length": tokens}}'
        )
    if "length" in form:
        check_whole("null_logit: length", form["length"], 1)
    return form
