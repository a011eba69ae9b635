"""The metrics of `diagnose`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_WINDOWS = "`diagnose`: disjoint windows; mean over windows, n windows"
_TENSORS = (
    "`diagnose`: hooked tensors are each layer's output, MLP output, attention out-projection and "
    "norms, and the final norm; a value per window and tensor"
)
_HEADS = "`diagnose`: mean over layers and heads, then over windows, n windows"
_ROUTERS = "`diagnose`: depth routers with at least two sources; mean over routers, then windows"
_JOINT = (
    "`diagnose --joint`: p_i is the mean over heads; queries after the first token; mean over "
    "queries, sublayers after the first, and windows.  The paper's own protocol differs: each head "
    "alone, and near-no-op pairs by a quantile pooled over both models"
)

OUTLIERS = (
    Definition(
        name="outlier.max_inf_norm",
        definition="max |x| over a window's tokens and channels",
        unit="activation",
        better="lower",
        protocol=f"{_TENSORS}; with `where` the mean over windows of one tensor, without it the "
        "largest of these means",
        source="arXiv 2306.12929 (Bondarenko et al. 2023)",
    ),
    Definition(
        name="outlier.max_inf_norm_mlp",
        definition="`outlier.max_inf_norm` of MLP outputs alone",
        unit="activation",
        better="lower",
        protocol="as `outlier.max_inf_norm`",
    ),
    Definition(
        name="outlier.max_inf_norm_layer",
        definition="`outlier.max_inf_norm` of layer outputs alone",
        unit="activation",
        better="lower",
        protocol="as `outlier.max_inf_norm`",
    ),
    Definition(
        name="outlier.kurtosis",
        definition="mean((x - mu)^4) / (s^4 + 1e-6), s the unbiased standard deviation; 3 for a "
        "normal variable.  The 1e-6 has a scale: where s^4 is not far above it, the value is too "
        "low, down to 0",
        unit="1",
        better="lower",
        protocol=f"{_TENSORS}; with `where`, the mean over windows of one tensor",
        source="arXiv 2306.12929 (Bondarenko et al. 2023), to the letter",
    ),
    Definition(
        name="outlier.avg_kurtosis",
        definition="mean of `outlier.kurtosis` over all tensors, silent and understated ones too",
        unit="1",
        better="lower",
        protocol="as `outlier.kurtosis`; see also `outlier.silent_tensors` and "
        "`outlier.understated_kurtosis`",
        source="arXiv 2306.12929; OutEffHop (2404.03828); OASIS (2605.17887)",
    ),
    Definition(
        name="outlier.max_kurtosis",
        definition="maximum of `outlier.kurtosis` over all tensors",
        unit="1",
        better="lower",
        protocol="as `outlier.kurtosis`",
    ),
    Definition(
        name="outlier.pearson_kurtosis",
        definition="mean((x - mu)^4) / mean((x - mu)^2)^2: the same at every scale, at least 1, 3 "
        "for a normal variable; none where x is constant (standard deviation at most 1e-12 of "
        "the root mean square)",
        unit="1",
        better="lower",
        protocol=f"{_TENSORS}; with `where`, the mean over the n windows in which the tensor is "
        "not constant",
        source="Pearson 1905",
    ),
    Definition(
        name="outlier.mean_pearson_kurtosis",
        definition="mean of `outlier.pearson_kurtosis` over the tensors that are not silent; NaN "
        "if all are",
        unit="1",
        better="lower",
        protocol="as `outlier.pearson_kurtosis`",
    ),
    Definition(
        name="outlier.max_pearson_kurtosis",
        definition="maximum of `outlier.pearson_kurtosis` over the tensors that are not silent",
        unit="1",
        better="lower",
        protocol="as `outlier.pearson_kurtosis`",
    ),
    Definition(
        name="outlier.silent_tensors",
        definition="how many tensors are silent: constant in every window, or with a standard "
        "deviation (mean over windows) of at most 1e-3 of the median tensor's",
        unit="tensors",
        protocol=f"{_TENSORS}; 1 at each such tensor (`where`)",
    ),
    Definition(
        name="outlier.understated_kurtosis",
        definition="how many tensors are so small that the 1e-6 at least halves their "
        "`outlier.kurtosis`: s^4 <= 1e-6, s the mean over windows of the standard deviation",
        unit="tensors",
        protocol=f"{_TENSORS}; 1 at each such tensor (`where`)",
    ),
    Definition(
        name="outlier.massive",
        definition="how many values of layer outputs are above 100 and above 1000 medians of |x| "
        "of their window",
        unit="values",
        better="lower",
        protocol="`diagnose`: sum over layers and windows",
        source="arXiv 2402.17762 (Sun et al. 2024), section 2",
    ),
    Definition(
        name="outlier.non_finite",
        definition="how many values are NaN or infinite",
        unit="values",
        better="lower",
        protocol=f"{_TENSORS}; with `where` of one tensor, without it the sum",
    ),
)

SINKS = (
    Definition(
        name="sink.mass",
        definition="attention probability of the first position, mean over later queries",
        unit="probability",
        better="lower",
        protocol=_HEADS,
    ),
    Definition(
        name="sink.mass_renormalised",
        definition="`sink.mass` of rows divided by their sum; rows whose sum is at most 1e-6 are "
        "left out",
        unit="probability",
        better="lower",
        protocol=_HEADS,
    ),
    Definition(
        name="sink.rate@<eps>",
        definition="share of (window, layer, head) whose mean probability of the first position "
        "over the first 64 queries, its own included, is above eps",
        unit="share",
        better="lower",
        protocol=f"{_HEADS}; only where windows have 64 tokens",
        source="arXiv 2410.10781 (Gu et al. 2024), with k = 1 and T = 64",
    ),
    Definition(
        name="sink.rate_window@<eps>",
        definition="`sink.rate@<eps>` over all queries of the window",
        unit="share",
        better="lower",
        protocol=_HEADS,
    ),
    Definition(
        name="sink.value_weighted",
        definition="|| sum_h A_h(t, 0) f_h(x_0) ||: what the first position adds to attention's "
        "output, biases and output gates left out; mean over later queries",
        unit="activation",
        better="lower",
        protocol=_HEADS.replace(" and heads", ""),
        source="arXiv 2004.10102 (Kobayashi et al. 2020)",
    ),
    Definition(
        name="sink.secondary_tokens@<rule>",
        definition="how many tokens of a window are secondary sinks.  h is a token's states after "
        "each of L layers, the last after the final norm; b, of the first two tokens, the one with "
        "the larger mean |h|; states from the steepest rise of |h_b| to its steepest fall after "
        "that count.  A later token is a secondary sink if |cos(h_t, h_b)| > 0.9 in n of these, "
        "4 < n < L - 15.  Where no n is in between (L <= 19), the limit is L / 2 (`@L/2`)",
        unit="tokens",
        better="lower",
        protocol=_WINDOWS,
        source="arXiv 2512.22213 for `@L-15`; this library for `@L/2`",
    ),
    Definition(
        name="sink.first_copies@<rule>",
        definition="how many tokens are copies of b: as a secondary sink, but n >= L - 15 (L / 2)",
        unit="tokens",
        better="lower",
        protocol=_WINDOWS,
        source="arXiv 2512.22213 (its 'bos' sinks) for `@L-15`; this library for `@L/2`",
    ),
    Definition(
        name="sink.secondary_score@<rule>",
        definition="attention probability that a secondary sink receives, mean over the queries "
        "from it on and the heads of the layers in which it is one",
        unit="probability",
        better="lower",
        protocol="`diagnose`: mean over secondary sinks, n sinks; absent where there are none",
        source="arXiv 2512.22213; which queries and layers is this library's reading",
    ),
    Definition(
        name="sink.secondary",
        definition="later tokens whose state has a cosine above 0.9 to the first token's in a "
        "layer in which that one's norm is at least 3 times the median of the others'",
        unit="tokens",
        better="lower",
        protocol=f"{_WINDOWS}; replaced by `sink.secondary_tokens@<rule>`",
        retired=True,
    ),
    Definition(
        name="null.mass",
        definition="probability of the null option, mean over queries; absent without a null",
        unit="probability",
        protocol=_HEADS,
    ),
)

DEPTH = (
    Definition(
        name="depth.sink_rate@<eps>",
        definition="share of (window, router) whose mean weight on the embedding is above eps",
        unit="share",
        better="lower",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.entropy",
        definition="entropy of a router's weights brought to sum 1, mean over tokens",
        unit="nats",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.entropy_normalised",
        definition="`depth.entropy` / log S, S the number of sources",
        unit="1",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.null",
        definition="null mass of the depth normaliser, mean over tokens",
        unit="probability",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.signal",
        definition="standard deviation, over a token's sources, of what the null signal adds to "
        "their logits; mean over tokens",
        unit="nats",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.causal",
        definition="loss without a source (`where`) less the loss with it",
        unit="nats per token",
        protocol="`diagnose --causal`: a pass for each source; mean over windows, n windows",
    ),
)

JOINT = (
    Definition(
        name="joint.mass",
        definition="Z = sum q(i, j), q = alpha_i p_i(j): weight of source i, and of position j in "
        "what source i has read",
        unit="probability",
        protocol=_JOINT,
        source="OASIS (2605.17887), assumption D.4, by this library's protocol",
    ),
    Definition(
        name="joint.<part>",
        definition="leakage sum_i q(i, 0), concentration max q, neg_entropy sum q log q",
        unit="probability; nats for neg_entropy",
        better="lower",
        protocol=_JOINT,
        source="OASIS (2605.17887), assumption D.4, by this library's protocol",
    ),
    Definition(
        name="joint.<part>_renormalised",
        definition="`joint.<part>` of q / Z",
        unit="probability; nats for neg_entropy",
        better="lower",
        protocol=_JOINT,
    ),
    Definition(
        name="joint.mass_no_op@<eps>",
        definition="`joint.mass` over near-no-op queries: for each sublayer and window the share "
        "eps of tokens with the smallest update |v| / |h|",
        unit="probability",
        protocol=_JOINT,
    ),
    Definition(
        name="joint.<part>_no_op@<eps>",
        definition="`joint.<part>` over the queries of `joint.mass_no_op@<eps>`",
        unit="probability; nats for neg_entropy",
        better="lower",
        protocol=_JOINT,
    ),
    Definition(
        name="joint.<part>_renormalised_no_op@<eps>",
        definition="`joint.<part>_renormalised` over the queries of `joint.mass_no_op@<eps>`",
        unit="probability; nats for neg_entropy",
        better="lower",
        protocol=_JOINT,
    ),
)
