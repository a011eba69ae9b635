"""What the measurements of one text say, in sentences and a table computed from the numbers.

Axes: L layers, H heads, T tokens, P prefix tokens, S = P + T keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oasis_attn.measure.inspect_text import DepthWeights, Inspection
from oasis_attn.measure.sink_tokens import THRESHOLD
from oasis_attn.report.tables import ABSENT, Table, number, ranges

_SHOWN = 3  # sinks after the first that are named
_ROWS = 12  # of the table
_WORDS = {"": "part of a character", " ": "a blank", "\n": "a line break", "\t": "a tab"}


def token_names(texts: Sequence[str], prefix: int) -> list[str]:
    """What each of the S keys is called: its text, and its position.

    Args:
        texts: the text of each.
        prefix: P.
    """
    names = []
    for index, text in enumerate(texts):
        shown = f"“{text.strip()}”" if text.strip() else _WORDS.get(text, "white space")
        place = f"prefix {index}" if index < prefix else f"token {index - prefix}"
        names.append(f"{shown} ({place})")
    return names


def sinks(received_LHS: np.ndarray) -> list[int]:
    """The keys that are a sink of at least one head; the one with the most heads first."""
    heads_S, mean_S = (received_LHS > THRESHOLD).sum((0, 1)), received_LHS.mean((0, 1))
    order = np.lexsort((mean_S, heads_S))[::-1]
    return [int(key) for key in order if heads_S[key]]


def findings(inspection: Inspection, names: Sequence[str]) -> tuple[str, ...]:
    """What the numbers say, in sentences; the first is about attention sinks.

    Args:
        names: of the S keys.
    """
    said = [*_about_sinks(inspection, names), _about_activations(inspection, names)]
    if inspection.has_null:
        share = percent(inspection.null_LHT.mean())
        said.append(f"Heads put {share} of their attention on the null option.")
    if inspection.depth and inspection.depth_off:
        moved = percent(_moved(inspection.depth, inspection.depth_off))
        said.append(f"The null signal moves {moved} of the weights of the depth routers.")
    return tuple(said)


def massive_table(inspection: Inspection, names: Sequence[str]) -> Table | None:
    """The massive activations, one row per token and channel; None without any."""
    prefix = len(inspection.prefix)
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for each in inspection.massive:
        found.setdefault((each.position, each.channel), []).append((each.layer, each.value))
    rows = []
    for (position, channel), values in found.items():
        layer, largest = max(values, key=lambda value: abs(value[1]))
        median = float(inspection.medians_L[layer])
        ratio = number(abs(largest) / median) if median else ABSENT
        layers = [layer for layer, _ in values]
        rows.append((abs(largest), names[prefix + position], channel, layers, largest, ratio))
    rows.sort(key=lambda row: -row[0])
    if not rows:
        return None
    more = f"; the {_ROWS} largest of {len(rows)}" if len(rows) > _ROWS else ""
    return Table(
        title=f"Massive activations{more}",
        columns=("token", "channel", "layers", "largest value", "times the median"),
        rows=tuple(
            (name, str(channel), ranges(layers), number(largest), ratio)
            for _, name, channel, layers, largest, ratio in rows[:_ROWS]
        ),
    )


def percent(share: float) -> str:
    """A share as a percentage, with one decimal below 10 %."""
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def _about_sinks(inspection: Inspection, names: Sequence[str]) -> list[str]:
    received_LHS = inspection.received_LHS()
    mean_S = received_LHS.mean((0, 1))
    heads_S = (received_LHS > THRESHOLD).sum((0, 1))
    found = sinks(received_LHS)
    if not found:
        layer, head, key = np.unravel_index(received_LHS.argmax(), received_LHS.shape)
        most = percent(received_LHS.max())
        where = f"{names[int(key)]} in layer {layer}, head {head}"
        share = (
            f"The largest share of a head's attention that one token receives is {most}: {where}."
        )
        return ["No token is an attention sink.", share]
    first, *others = found
    heads = f"{heads_S[first]} of {received_LHS[..., 0].size} heads"
    received = f"receives {percent(mean_S[first])} of all attention"
    weighted = percent(inspection.received_LHS(weighted=True).mean((0, 1))[first])
    said = [
        f"{names[first]} is an attention sink in {heads} and {received}.",
        f"Weighted by the norm of what heads read, its share is {weighted}.",
    ]
    uniform = _uniform(first, len(inspection.ids), len(inspection.prefix))
    if uniform > THRESHOLD:
        said.append(f"The text is short: uniform attention would give it {percent(uniform)}.")
    if others:
        named = [f"{names[key]} in {_count(heads_S[key], 'head')}" for key in others[:_SHOWN]]
        more = len(others) - len(named)
        tail = [_count(more, "more token")] if more else []
        said.append(f"Further sinks: {', '.join(named + tail)}.")
    return said


def _uniform(key: int, tokens: int, prefix: int) -> float:
    """The share that a key receives if every token attends equally to all keys up to its own."""
    counts = prefix + 1 + np.arange(max(key - prefix, 0), tokens)
    return float((1 / counts).sum() / tokens)


def _about_activations(inspection: Inspection, names: Sequence[str]) -> str:
    prefix = len(inspection.prefix)
    largest_LT = np.abs(inspection.largest_LT)
    layer, token = np.unravel_index(largest_LT.argmax(), largest_LT.shape)
    value = float(inspection.largest_LT[layer, token])
    where = f"channel {inspection.channels_LT[layer, token]} of {names[prefix + token]}"
    median = float(inspection.medians_L[layer])
    size = f"{number(abs(value) / median)} times the median" if median else "the median is 0"
    largest = f"The largest is {number(value)}, in {where} after layer {layer}: {size}."
    if not inspection.massive:
        return f"No activation is massive. {largest}"
    first = inspection.massive[0].layer
    tokens = len({each.position for each in inspection.massive})
    have = f"{_count(tokens, 'token')} {'has' if tokens == 1 else 'have'}"
    return f"{have} massive activations, from layer {first} on. {largest}"


def _count(number: int, noun: str) -> str:
    """`1 head`, `2 heads`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _moved(on: DepthWeights, off: DepthWeights) -> float:
    """Half the mean absolute difference of the weights of a router at a token."""
    pairs = zip(on.weights, off.weights, strict=True)
    return float(np.mean([np.abs(a - b).sum(-1).mean() / 2 for a, b in pairs]))
