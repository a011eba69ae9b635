"""The metrics of `diagnose`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_WINDOWS = "`diagnose`: disjoint windows; mean over windows, n windows"
_TENSORS = (
    "`diagnose`: the tensors are the outputs of each layer, its MLP, its attention output "
    "projection or linear attention, and its norms, and of the final norm; one value per window "
    "and tensor"
)
_HEADS = (
    "`diagnose`: mean over the heads of all layers with softmax attention, then over windows, n "
    "windows"
)
_ROUTERS = "`diagnose`: depth routers with at least two sources; mean over routers, then windows"
_JOINT = (
    "`diagnose --joint`: p_i is the mean over heads; mean over all queries but the first token, all"
    " sublayers but the first, and windows.  The protocol of the paper differs: it uses single "
    "heads and selects near-no-op pairs by a quantile over both models"
)

OUTLIERS = (
    Definition(
        name="outlier.max_inf_norm",
        definition="max |x| over the tokens and channels of a window",
        unit="activation",
        better="lower",
        protocol=f"{_TENSORS}; with `where`, the mean over windows for one tensor; without it, the "
        "largest of these means",
        source="arXiv 2306.12929 (Bondarenko et al. 2023)",
    ),
    Definition(
        name="outlier.max_inf_norm_mlp",
        definition="`outlier.max_inf_norm` of MLP outputs only",
        unit="activation",
        better="lower",
        protocol="as `outlier.max_inf_norm`",
    ),
    Definition(
        name="outlier.max_inf_norm_layer",
        definition="`outlier.max_inf_norm` of layer outputs only",
        unit="activation",
        better="lower",
        protocol="as `outlier.max_inf_norm`",
    ),
    Definition(
        name="outlier.kurtosis",
        definition="mean((x - mu)^4) / (s^4 + 1e-6), where s is the unbiased standard deviation; 3 "
        "for a normal distribution.  Because of the 1e-6 it depends on the scale of x: unless s^4 "
        "is much larger, the value is too low",
        unit="1",
        better="lower",
        protocol=f"{_TENSORS}; with `where`, the mean over windows for one tensor",
        source="arXiv 2306.12929 (Bondarenko et al. 2023), the exact formula",
    ),
    Definition(
        name="outlier.avg_kurtosis",
        definition="mean of `outlier.kurtosis` over all tensors, including silent and understated "
        "ones",
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
        definition="mean((x - mu)^4) / mean((x - mu)^2)^2.  It does not depend on the scale of x, "
        "is at least 1, and is 3 for a normal distribution.  It is not defined if x is constant "
        "(standard deviation at most 1e-12 of the root mean square)",
        unit="1",
        better="lower",
        protocol=f"{_TENSORS}; with `where`, the mean over the n windows in which the tensor is "
        "not constant",
        source="Pearson 1905",
    ),
    Definition(
        name="outlier.mean_pearson_kurtosis",
        definition="mean of `outlier.pearson_kurtosis` over the tensors that are not silent; NaN "
        "if all are silent",
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
        definition="number of silent tensors.  A tensor is silent if it is constant in every "
        "window, or if its standard deviation (mean over windows) is at most 1e-3 of that of the "
        "median tensor",
        unit="tensors",
        protocol=f"{_TENSORS}; with `where`, 1 for each such tensor",
    ),
    Definition(
        name="outlier.understated_kurtosis",
        definition="number of tensors with values so small that the 1e-6 halves their "
        "`outlier.kurtosis` or reduces it further: s^4 <= 1e-6, where s is the standard deviation "
        "(mean over windows)",
        unit="tensors",
        protocol=f"{_TENSORS}; with `where`, 1 for each such tensor",
    ),
    Definition(
        name="outlier.massive",
        definition="number of values in layer outputs with |x| above 100 and above 1000 times the "
        "median |x| of the window",
        unit="values",
        better="lower",
        protocol="`diagnose`: sum over layers and windows.  The table of this name lists layer, "
        "channel, token and position, and `outlier.largest` the same for the largest value of each "
        "layer",
        source="arXiv 2402.17762 (Sun et al. 2024), section 2",
    ),
    Definition(
        name="outlier.non_finite",
        definition="number of values that are NaN or infinite",
        unit="values",
        better="lower",
        protocol=f"{_TENSORS}; with `where`, for one tensor; without it, the sum",
    ),
)

SINKS = (
    Definition(
        name="sink.mass",
        definition="attention probability of the first position, mean over the later queries.  If "
        "the model has a stored prefix, the first position is that of the prefix, and all queries "
        "of the window are later",
        unit="probability",
        better="lower",
        protocol=_HEADS,
    ),
    Definition(
        name="sink.max_mass",
        definition="`sink.mass` of the head with the largest value",
        unit="probability",
        better="lower",
        protocol="`diagnose`: mean over windows for each head, then maximum over layers and heads; "
        "n windows",
    ),
    Definition(
        name="sink.max_layer_mass",
        definition="mean of `sink.mass` over the heads of the layer with the largest value",
        unit="probability",
        better="lower",
        protocol="`experiments/retrofit_training.py`: as `sink.max_mass`",
    ),
    Definition(
        name="sink.idle_heads",
        definition="number of idle heads: heads whose `sink.mass` plus `null.mass` is above 0.5",
        unit="heads",
        protocol="`diagnose`: mean over windows for each head, then the number over all layers",
    ),
    Definition(
        name="sink.silent_heads",
        definition="number of silent heads.  A head writes its part of the attention output, after "
        "any gate, times the output projection without bias.  It is silent if the root mean square "
        "over tokens of the norm of what it writes is at most a tenth of that of all heads of its "
        "layer",
        unit="heads",
        protocol="`diagnose`: over at most 16 evenly spaced tokens of each window.  The table "
        "`head.output` has this norm for each head",
    ),
    Definition(
        name="sink.mass_renormalized",
        definition="`sink.mass` with each row of probabilities divided by its sum; rows with a sum "
        "of at most 1e-6 are excluded",
        unit="probability",
        better="lower",
        protocol=_HEADS,
    ),
    Definition(
        name="sink.rate@<eps>",
        definition="share of (window, layer, head) in which the mean attention probability of the "
        "first position over the first 64 queries (including the first) is above eps",
        unit="share",
        better="lower",
        protocol=f"{_HEADS}; only if windows have at least 64 tokens",
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
        definition="|| sum_h A_h(t, 0) f_h(x_0) ||: norm of the contribution of the first position "
        "to the attention output, without biases and output gates; mean over the later queries",
        unit="activation",
        better="lower",
        protocol=_HEADS.replace("the heads of all", "all"),
        source="arXiv 2004.10102 (Kobayashi et al. 2020)",
    ),
    Definition(
        name="sink.tokens@<eps>",
        definition="number of sink tokens in a window.  The received attention of a token in a "
        "head is its probability, mean over the queries of the window (0 for queries before it); "
        "of windows longer than 64 tokens, over at most 64 evenly spaced queries.  A token is a "
        "sink if it exceeds eps in at least one head.  Tokens of a stored prefix count",
        unit="tokens",
        protocol=f"{_WINDOWS}.  The table `sink.tokens` lists the ten largest with position, "
        "heads and layers",
        source="arXiv 2410.10781 (Gu et al. 2024) for the threshold 0.3; this library for the rest",
    ),
    Definition(
        name="sink.secondary_tokens@<rule>",
        definition="number of secondary sinks in a window.  The states h of a token are the "
        "outputs of the L layers, the last one after the final norm; b is the one of the first two "
        "tokens with the larger mean |h|.  Only states from the steepest increase of |h_b| to the "
        "steepest decrease after it count.  A later token is a secondary sink if "
        "|cos(h_t, h_b)| > 0.9 in n of these states and 4 < n < L - 15.  If there is no such n "
        "(L <= 19), the limit is L / 2 instead of L - 15 (`@L/2`)",
        unit="tokens",
        better="lower",
        protocol=_WINDOWS,
        source="arXiv 2512.22213 for `@L-15`; this library for `@L/2`",
    ),
    Definition(
        name="sink.first_copies@<rule>",
        definition="number of tokens that are copies of b: as for a secondary sink, but with "
        "n >= L - 15 (or L / 2)",
        unit="tokens",
        better="lower",
        protocol=_WINDOWS,
        source="arXiv 2512.22213 (its 'bos' sinks) for `@L-15`; this library for `@L/2`",
    ),
    Definition(
        name="sink.secondary_score@<rule>",
        definition="attention probability of a secondary sink, mean over the queries from its own "
        "position on, and over the heads of the layers in whose output it is a sink",
        unit="probability",
        better="lower",
        protocol="`diagnose`: mean over secondary sinks, n sinks; not present if there are none",
        source="arXiv 2512.22213; the choice of queries and layers is by this library",
    ),
    Definition(
        name="sink.secondary",
        definition="number of later tokens whose state has a cosine above 0.9 to the state of the "
        "first token, in a layer in which the norm of the first token is at least 3 times the "
        "median norm of the others",
        unit="tokens",
        better="lower",
        protocol=f"{_WINDOWS}; replaced by `sink.secondary_tokens@<rule>`",
        retired=True,
    ),
    Definition(
        name="null.mass",
        definition="probability of the null option, mean over queries; not present without a null",
        unit="probability",
        protocol=_HEADS,
    ),
    Definition(
        name="null.max_mass",
        definition="`null.mass` of the head with the largest value; 0 without a null",
        unit="probability",
        protocol="`experiments/retrofit_families.py`: as `sink.max_mass`",
    ),
)

DEPTH = (
    Definition(
        name="depth.sink_rate@<eps>",
        definition="share of (window, router) in which the mean weight of the embedding is above "
        "eps",
        unit="share",
        better="lower",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.entropy",
        definition="entropy of the renormalized weights of a router, mean over tokens",
        unit="nats",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.entropy_normalized",
        definition="`depth.entropy` / log S, where S is the number of sources",
        unit="1",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.weight",
        definition="weight of the source `where`, mean over tokens.  Source 0 is the embedding.  "
        "Families of transformers with depth routing have it too: block attention residuals "
        "(inkling2), and hyper-connections (deepseek_v4, hy_v4), where it is the sum over streams "
        "of the weight of the stream times that of the source in the stream.  Gated residuals "
        "(qwen4_exp) weight each channel by itself, so that no source has one weight",
        unit="probability",
        protocol="`diagnose`: depth routers that read the source and at least one other; mean over "
        "routers, then windows",
    ),
    Definition(
        name="depth.null",
        definition="null probability of the depth normalizer, mean over tokens",
        unit="probability",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.signal",
        definition="standard deviation, over the sources of a token, of what the null signal adds "
        "to their logits; mean over tokens",
        unit="nats",
        protocol=_ROUTERS,
    ),
    Definition(
        name="depth.causal",
        definition="loss without the source `where`, minus the loss with it",
        unit="nats per token",
        protocol="`diagnose --causal`: one pass per source; mean over windows, n windows",
    ),
)

JOINT = (
    Definition(
        name="joint.mass",
        definition="Z = sum q(i, j) with q = alpha_i p_i(j), where alpha_i is the depth weight of "
        "source i and p_i(j) its attention probability of position j",
        unit="probability",
        protocol=_JOINT,
        source="OASIS (2605.17887), assumption D.4, with the protocol of this library",
    ),
    Definition(
        name="joint.<part>",
        definition="leakage: sum_i q(i, 0); concentration: max q; neg_entropy: sum q log q",
        unit="probability; nats for neg_entropy",
        better="lower",
        protocol=_JOINT,
        source="OASIS (2605.17887), assumption D.4, with the protocol of this library",
    ),
    Definition(
        name="joint.<part>_renormalized",
        definition="`joint.<part>` computed from q / Z",
        unit="probability; nats for neg_entropy",
        better="lower",
        protocol=_JOINT,
    ),
    Definition(
        name="joint.mass_no_op@<eps>",
        definition="`joint.mass` over near-no-op queries: for each sublayer and window, the share "
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
        name="joint.<part>_renormalized_no_op@<eps>",
        definition="`joint.<part>_renormalized` over the queries of `joint.mass_no_op@<eps>`",
        unit="probability; nats for neg_entropy",
        better="lower",
        protocol=_JOINT,
    ),
)
