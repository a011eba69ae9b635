"""The metrics of decoders on generated tasks."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_TASK = (
    "`study` of a task: the same generated sequences for all trials, different from those of "
    "training; n sequences"
)
_ERRORS = f"{_TASK}; mean over the tokens that have a target"
_IDLE = (
    "idle queries are all but the first token and the triggers.  At length T, uniform attention of "
    "all heads gives mean 1 / (t + 1) over their positions t, about 0.1 for T = 32"
)
_HEADS = f"{_TASK}; mean over the queries of all sequences, then over layers and heads"
_SIGNAL = f"{_TASK}; the trained model is run with the null signal and with psi = 0"
_ROUTERS = "depth routers with at least two sources"
_QUANTIZED = (
    f"{_TASK}; the same model quantized with <scheme>, calibrated on other sequences.  The linear "
    "maps in and out of the decoder are not quantized"
)
_LAW = (
    "`experiments/null_law_decoders.py`: decoders of `where` are trained on the trigger task with "
    "constant null logits; p is `sink.idle_largest`"
)
_FIT = f"{_LAW}; least squares over n thresholds, decoders of 4 layers"
_CELLS = (
    "`experiments/null_law_cells.py`: language models on the corpus `majority`, trained and "
    "measured on windows of one length; mean over n seeds"
)
_SINK = "arXiv 2603.11487 (the measure of its figures)"

LAB = (
    Definition(
        name="task.error",
        definition="mean square difference between output and target, averaged over coordinates; "
        "of `trigger-words`, Kullback-Leibler divergence of the predicted probabilities of the "
        "next token from the true ones, in nats",
        unit="target^2 or nats",
        better="lower",
        protocol=_ERRORS,
    ),
    Definition(
        name="task.relative_error",
        definition="`task.error` / that of an output of 0",
        unit="1",
        better="lower",
        protocol=_ERRORS,
    ),
    Definition(
        name="task.error_trigger",
        definition="`task.error` of the triggers only",
        unit="target^2 or nats",
        better="lower",
        protocol=_ERRORS,
    ),
    Definition(
        name="task.error_idle",
        definition="`task.error` of the idle tokens only",
        unit="target^2 or nats",
        better="lower",
        protocol=_ERRORS,
    ),
    Definition(
        name="task.largest_error",
        definition="largest absolute difference between output and target, or between predicted "
        "and true probability",
        unit="target",
        better="lower",
        protocol=f"{_TASK}; maximum over tokens, coordinates and sequences",
    ),
    Definition(
        name="sink.idle",
        definition="probability of the first token at idle queries",
        unit="probability",
        better="lower",
        protocol=f"{_HEADS}; {_IDLE}",
        source=_SINK,
    ),
    Definition(
        name="sink.idle_largest",
        definition="`sink.idle` of the head in which it is largest",
        unit="probability",
        better="lower",
        protocol=f"{_TASK}; mean over the queries of all sequences, then maximum over layers and "
        "heads",
    ),
    Definition(
        name="sink.trigger",
        definition="probability of the first token at triggers",
        unit="probability",
        protocol=_HEADS,
    ),
    Definition(
        name="null.idle",
        definition="null probability of attention at idle queries",
        unit="probability",
        protocol=_HEADS,
    ),
    Definition(
        name="null.trigger",
        definition="null probability of attention at triggers",
        unit="probability",
        protocol=_HEADS,
    ),
    Definition(
        name="outlier.max_over_median",
        definition="largest absolute value of a layer's output / median absolute value of that "
        "output, in the layer in which it is largest",
        unit="1",
        better="lower",
        protocol=f"{_TASK}; mean over sequences, then maximum over layers",
        source="arXiv 2402.17762, section 2: above 1000, and the value above 100, an activation is "
        "massive",
    ),
    Definition(
        name="signal.beta",
        definition="beta, the learned strength of the null signal",
        unit="1",
        protocol=f"`study` of a task; mean over {_ROUTERS}",
    ),
    Definition(
        name="signal.beta_largest",
        definition="the largest beta",
        unit="1",
        protocol=f"`study` of a task; maximum over {_ROUTERS}",
    ),
    Definition(
        name="signal.weights_change",
        definition="half the sum of absolute changes of the depth weights, which are divided by "
        "their sum, when the null signal is switched off",
        unit="probability",
        protocol=f"{_SIGNAL}; mean over tokens, sequences and {_ROUTERS}",
    ),
    Definition(
        name="signal.output_change",
        definition="mean square change of the output (of `trigger-words`, of the predicted "
        "probabilities) when the null signal is switched off / mean square of the target",
        unit="1",
        protocol=_SIGNAL,
    ),
    Definition(
        name="signal.error_change",
        definition="`task.error` with the null signal switched off - `task.error`",
        unit="target^2 or nats",
        protocol=_SIGNAL,
    ),
    Definition(
        name="task.error_increase@<scheme>",
        definition="`task.error@<scheme>` - `task.error`",
        unit="target^2 or nats",
        better="lower",
        protocol=_QUANTIZED,
    ),
    Definition(
        name="task.error_ratio@<scheme>",
        definition="`task.error@<scheme>` / `task.error`",
        unit="1",
        better="lower",
        protocol=_QUANTIZED,
    ),
    Definition(
        name="null_law_decoder.threshold@<eps>",
        definition="c*: the null logit above which p is below eps; interpolated linearly in "
        "log(p / (1 - p)) between the largest trained null logit with p at least eps and the next",
        unit="logit",
        protocol=f"{_LAW}; mean over n seeds",
    ),
    Definition(
        name="null_law_decoder.slope@<eps>",
        definition="b of `null_law_decoder.threshold@<eps>` = a + b log(length)",
        unit="logit",
        protocol=_FIT,
    ),
    Definition(
        name="null_law_decoder.intercept@<eps>",
        definition="a of `null_law_decoder.threshold@<eps>` = a + b log(length)",
        unit="logit",
        protocol=_FIT,
    ),
    Definition(
        name="null_law_decoder.margin@<eps>",
        definition="largest difference of a threshold and log(length)",
        unit="logit",
        protocol=f"{_LAW}; maximum over all lengths, layers and n seeds",
    ),
    Definition(
        name="null_law_decoder.median_margin@<eps>",
        definition="median difference of a threshold and log(length)",
        unit="logit",
        protocol=f"{_LAW}; median over all lengths, layers and n seeds",
    ),
    Definition(
        name="null_law_cell.sink_largest",
        definition="mean probability of the first token over later queries, of the head in which "
        "it is largest",
        unit="probability",
        better="lower",
        protocol=_CELLS,
    ),
    Definition(
        name="null_law_cell.null_mass",
        definition="null probability, mean over layers, heads and queries but the first",
        unit="probability",
        protocol=_CELLS,
    ),
    Definition(
        name="null_law_cell.loss_increase",
        definition="mean loss of tokens that are no answers - that of softmax with the same seed",
        unit="nats",
        better="lower",
        protocol=_CELLS,
    ),
    Definition(
        name="null_law_cell.answer_loss",
        definition="mean loss of the answers",
        unit="nats",
        better="lower",
        protocol=_CELLS,
    ),
    Definition(
        name="null_law_cell.accuracy",
        definition="share of answers that have the largest logit",
        unit="1",
        better="higher",
        protocol=_CELLS,
    ),
)
