"""Checks of the options of `null_from_sink`, without torch, so that wrong ones fail at once."""

from __future__ import annotations

from collections.abc import Iterable

from oasis_attn.errors import UserError, check_whole

MOST_NULLS = 16
"""The largest number of nulls; a search precedes each one but the first."""

MOST_NEURONS = 64
"""The largest number of neurons that are pruned; a search precedes each one."""


def check_null_from_sink(
    overrides: Iterable[str],
    *,
    nulls: int = 1,
    prune_neurons: int = 0,
    window: int = 512,
    windows: int = 16,
) -> None:
    """Raise `UserError` for an option of `null_from_sink_checkpoint` that works with no model.

    Args:
        overrides: names of the settings that replace those of the variant.
        nulls: maximum number of nulls of each head.
        prune_neurons: maximum number of pruned neurons.
        window: tokens per window, at least BOS and two tokens of text.
        windows: number of windows.
    """
    check_whole("nulls", nulls, 1, MOST_NULLS)
    check_whole("prune_neurons", prune_neurons, 0, MOST_NEURONS)
    check_whole("window", window, 3)
    check_whole("windows", windows, 1)
    for name in ("token_normalizer", "null_logit"):
        if name in overrides:
            raise UserError(f"{name}: the conversion sets it to that of the sink; leave it out")
