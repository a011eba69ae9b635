"""The metrics of 8-bit ranges in `diagnose`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_RANGES = (
    "`diagnose`: the tensors of `outlier.max_inf_norm`; the table `range.noise` has each of them; "
    "mean over tensors, then over windows, n windows"
)

RANGES = (
    Definition(
        name="range.noise_static",
        definition="(r / 255)^2 / (12 s): mean square of the rounding errors of one 8-bit range "
        "for a tensor, over the mean square s of the median token; r is the range of all tokens of "
        "a window.  At 1, the values of the median token are lost.  It is 0 if they are all 0",
        unit="1",
        better="lower",
        protocol=_RANGES,
    ),
    Definition(
        name="range.noise_static_rest",
        definition="`range.noise_static`, where r is the range of the tokens that are not outlier "
        "tokens (`range.outlier_tokens`)",
        unit="1",
        better="lower",
        protocol=_RANGES,
    ),
    Definition(
        name="range.noise_dynamic",
        definition="(r_t / 255)^2 / (12 s_t), median over tokens t: the same noise of one 8-bit "
        "range for each token, where r_t and s_t are of the token itself",
        unit="1",
        better="lower",
        protocol=_RANGES,
    ),
    Definition(
        name="range.outlier_tokens",
        definition="number of outlier tokens in a window: tokens whose max |x| exceeds 64 times "
        "that of the median token of the window, in the output of a layer",
        unit="tokens",
        better="lower",
        protocol="`diagnose`: disjoint windows; mean over windows, n windows.  The table of this "
        "name lists the ten worst with position, ratio and layers",
        source="arXiv 2410.05265 (PrefixQuant), section 4.1, for the threshold 64; this library "
        "for the tensors",
    ),
)
