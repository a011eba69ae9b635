"""What a diagnosis means for quantization to 8 bits, in sentences computed from its numbers.

The rules.  The noise of a range is the mean square of its rounding errors over the mean square of
the median token, a mean over tensors (`oasis metrics range.`).  A range breaks a model if its noise
is above `BREAKS`.  There are three kinds of noise:

- S, static: one range for a tensor;
- R, static without the outlier tokens, whose largest value exceeds 64 times that of the median
  token in the output of a layer.  A prefix that takes over the role of these tokens leaves R;
- D, dynamic: one range for each token.

| S breaks | D breaks | R breaks | conclusion |
| --- | --- | --- | --- |
| no | | | no outlier breaks 8 bits |
| yes | no | no | a few tokens carry it; static ranges break, dynamic ranges or a prefix do not |
| yes | no | yes | static ranges break, also with a prefix; dynamic ranges do not |
| yes | yes | no | a few tokens carry it; static and dynamic ranges break, a prefix does not |
| yes | yes | yes | the channels carry it; only methods that change channels can help |

A head idles if it gives more than half of its attention to the first position and the null.  A head
is silent if what it writes is below a tenth of the root mean square of its layer's heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from oasis_attn.quantization.schemes import Scheme
from oasis_attn.records import DiagnosisRecord
from oasis_attn.report.tables import number, percent, ranges, token_name

BREAKS = 0.1
"""The largest noise of a range that does not break a model."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise of 8-bit ranges in a diagnosis, or of ranges with another number of steps.

    Attributes:
        static, rest, dynamic: S, R and D.
    """

    static: float
    rest: float
    dynamic: float

    @classmethod
    def of(cls, record: DiagnosisRecord, steps: float = 255) -> Noise:
        """The noise of ranges with so many steps; it is inverse to their square."""
        factor = (255 / steps) ** 2
        kinds = {"static": "static", "rest": "static_rest", "dynamic": "dynamic"}
        return cls(**{k: factor * record[f"range.noise_{name}"] for k, name in kinds.items()})

    @property
    def breaks(self) -> dict[str, bool]:
        """Whether each kind is above `BREAKS`, or not a number."""
        return {kind: not value <= BREAKS for kind, value in vars(self).items()}


def scheme_breaks(record: DiagnosisRecord, scheme: Scheme) -> dict[str, bool]:
    """Which kinds of ranges break with the activations of `scheme`, as `Noise.breaks`.

    None of them if activations are not quantized, or in groups, of which a diagnosis says nothing.
    """
    activation = scheme.activation
    if activation is None or activation.granularity == "group":
        return dict.fromkeys(("static", "rest", "dynamic"), False)
    return Noise.of(record, activation.steps).breaks


def conclusion(record: DiagnosisRecord) -> tuple[str, ...]:
    """What a diagnosis says about ranges of 8 bits and about heads, in sentences."""
    noise = Noise.of(record)
    if not math.isfinite(noise.static):
        return ("Some values are not finite, so no range covers them.",)
    carried = noise.breaks["static"] and not noise.breaks["rest"]
    carriers = [_carriers(record)] if carried else []
    return *carriers, *_about_ranges(noise), *_about_heads(record)


def _carriers(record: DiagnosisRecord) -> str:
    """Which tokens have the large values."""
    rows, count = record.tables["range.outlier_tokens"], record["range.outlier_tokens"]
    first, reached = rows[0], "reaches"
    # The largest activation of every layer may be one of another token, in fewer windows.
    same = [
        row
        for row in record.tables["outlier.largest"]
        if (row["position"], row["token"]) == (first["position"], first["token"])
    ]
    if same:
        largest = max(same, key=lambda row: abs(row["largest"]))
        reached = f"reaches {number(largest['largest'])} in channel {largest['channel']}, and"
    found = (
        f"{token_name(first)} at position {first['position']} {reached} up to"
        f" {first['ratio']:,.0f} times the median token, in layers {ranges(first['layers'])}"
    )
    if len(rows) == 1:
        return f"One token carries the outliers: {found}."
    return f"A few tokens carry the outliers, {number(count)} in a window. The worst: {found}."


def _about_ranges(noise: Noise) -> list[str]:
    static, rest, dynamic = (percent(value) for value in vars(noise).values())
    error = f"their rounding error is {static} of the power of a median token"
    if not noise.breaks["static"]:
        holds = f"Static per-tensor ranges of 8 bits will hold: {error}"
        return [
            "No outlier breaks ranges of 8 bits.",
            f"{holds} (dynamic per-token ranges: {dynamic}).",
        ]
    cures = {
        f"dynamic per-token ranges ({dynamic})": noise.breaks["dynamic"],
        f"a prefix that takes over from the outlier tokens ({rest})": noise.breaks["rest"],
    }
    held = " or ".join(cure for cure, breaks in cures.items() if not breaks)
    broken = " and ".join(cure for cure, breaks in cures.items() if breaks)
    said = [f"Static per-tensor ranges of 8 bits will break: {error}."]
    said += [f"{_capital(held)} will not."] if held else []
    said += [f"{_capital(broken)} will break too."] if broken else []
    said += [] if held else ["Channels carry the outliers: try SmoothQuant or a rotation."]
    return said


def _about_heads(record: DiagnosisRecord) -> list[str]:
    if "sink.mass" not in record.tables:
        return []  # there is no softmax attention
    # Layers with fewer heads than others have NaN in the place of the missing ones.
    heads = sum(not math.isnan(float(x)) for row in record.tables["sink.mass"] for x in row)
    idle = number(record["sink.idle_heads"])
    to = "the first position or the null" if "null.mass" in record.tables else "the first position"
    said = [f"Idle heads: {idle} of {heads}; more than half of their attention goes to {to}."]
    if "sink.silent_heads" in record.tables:
        silent = len(record.tables["sink.silent_heads"])
        said.append(f"Silent heads: {silent}; they write less than a tenth of what others do.")
    return said


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
