"""The metrics of `train`, `evaluate`, `quantize`, `prefix` and `study`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_PROBLEMS = "`evaluate`: one prompt a problem; mean over problems, n problems"
_TARGETS = "`quantize`: for each quantised target (`where`)"
_PREFIX = "`prefix`: `where` is `before` or `after`: without the prefix, and with it"
_STUDY = "`study`: the same model quantised by <scheme>; otherwise as the name before the @"

LANGUAGE = (
    Definition(
        name="loss.windowed",
        definition="mean over windows of the mean -log p(token | earlier tokens of its window)",
        unit="nats per token",
        better="lower",
        protocol="disjoint windows, spread evenly over the text; BOS begins each window and EOS "
        "follows each document; each token but a window's first is scored; the record's `data` has "
        "the protocol (`choice` is `first` in older records of `train`)",
    ),
    Definition(
        name="perplexity.windowed",
        definition="exp(`loss.windowed`)",
        unit="1",
        better="lower",
        protocol="as `loss.windowed`; with `where` in records of `quantize` and `prefix`, of the "
        "model before and after; in the quantisation benchmark, of each scheme and method",
    ),
    Definition(
        name="loss.strided",
        definition="sum of -log p over all scored tokens / their number",
        unit="nats per token",
        better="lower",
        protocol="`evaluate --tasks perplexity --stride`: windows of the same tokens that overlap; "
        "each token is scored once, in the window in which it has most tokens before it; n "
        "windows, spread evenly over the text",
    ),
    Definition(
        name="perplexity.strided",
        definition="exp(`loss.strided`)",
        unit="1",
        better="lower",
        protocol="as `loss.strided`",
    ),
    Definition(
        name="perplexity.quantized",
        definition="exp of the mean loss of the quantised model",
        unit="1",
        better="lower",
        protocol=f"{_PREFIX}; windows spread over the evaluation split, model quantised by the "
        "record's scheme; n windows",
    ),
)

TASKS = (
    Definition(
        name="<task>.pass@<k>.<score>",
        definition="chance that one of k answers is right.  strict: the number after the first "
        "`####` is the reference's; flexible: the last number is",
        unit="share",
        better="higher",
        protocol=_PROBLEMS,
        source="arXiv 2107.03374 (Chen et al. 2021), eq. 1; arXiv 2110.14168 (GSM8K)",
    ),
    Definition(
        name="gsm8k.lm_eval.<filter>",
        definition="exact match of the first answer by lm-eval's own filter",
        unit="share",
        better="higher",
        protocol=_PROBLEMS,
        source="lm-evaluation-harness, task gsm8k (its version is in `data`)",
    ),
    Definition(
        name="gsm8k.answer_loglik",
        definition="mean log-likelihood of a reference answer's tokens after its question",
        unit="nats per token",
        better="higher",
        protocol=_PROBLEMS,
    ),
)

TRAINING = (
    Definition(
        name="training.loss",
        definition="mean loss of the last logged steps, regularisers left out",
        unit="nats per token",
        better="lower",
        protocol="`train`: on training batches, as last logged",
    ),
    Definition(
        name="training.tokens_per_second",
        definition="tokens trained on / seconds of training",
        unit="tokens per second",
        better="higher",
        protocol="`train`: this run, on the record's hardware",
    ),
    Definition(
        name="trial.seconds",
        definition="time that a trial took",
        unit="seconds",
        better="lower",
        protocol="`study`: from the start of training to the record, in the last process",
    ),
    Definition(
        name="trial.processor_seconds",
        definition="processor time that a trial took",
        unit="seconds",
        better="lower",
        protocol="as `trial.seconds`",
    ),
)

QUANTIZATION = (
    Definition(
        name="quantization.weight_error",
        definition="|w^ - w|^2 / |w|^2 of a weight and its quantised form",
        unit="1",
        better="lower",
        protocol=_TARGETS,
    ),
    Definition(
        name="quantization.activation_error",
        definition="|x^ - x|^2 / |x|^2 of activations and their quantised form",
        unit="1",
        better="lower",
        protocol=f"{_TARGETS}; over all calibration windows, n windows",
    ),
    Definition(
        name="quantization.low",
        definition="lower end of a static range",
        unit="activation",
        protocol=_TARGETS,
    ),
    Definition(
        name="quantization.high",
        definition="upper end of a static range",
        unit="activation",
        protocol=_TARGETS,
    ),
    Definition(
        name="quantization.scale",
        definition="step of a static range's grid",
        unit="activation",
        protocol=_TARGETS,
    ),
    Definition(
        name="size.bytes",
        definition="`before`: bytes of the parameters in memory; `after`: of the written weights",
        unit="bytes",
        better="lower",
        protocol="`quantize`: `where` is `before` or `after`",
    ),
    Definition(
        name="size.quantized_share",
        definition="entries of quantised weights / entries of all weights; weights are parameters "
        "of two or more dimensions, less embeddings and an output head that is not quantised",
        unit="share",
        better="higher",
        protocol="`quantize`; the other weights are listed in `float_weights`",
    ),
    Definition(
        name="speed.over_unquantized",
        definition="seconds of a forward pass before quantising / seconds after",
        unit="1",
        better="higher",
        protocol="`quantize`: median over evaluation windows, one at a time, both models in turn; "
        "n windows",
    ),
    Definition(
        name="prefix.noise",
        definition="(r / 255)^2 / (12 s): noise of an 8-bit static range over the signal; r the "
        "range of a tensor over all windows, s the median token's mean square",
        unit="1",
        better="lower",
        protocol=f"{_PREFIX}; mean over inputs of linear layers and layer outputs, n windows",
    ),
    Definition(
        name="prefix.max_linear",
        definition="max |x| over all inputs of linear layers",
        unit="activation",
        better="lower",
        protocol=f"{_PREFIX}; over all evaluation windows, n windows",
    ),
    Definition(
        name="prefix.max_hidden",
        definition="max |x| over all layer outputs",
        unit="activation",
        better="lower",
        protocol=f"{_PREFIX}; over all evaluation windows, n windows",
    ),
)

STUDY_QUANTIZED = tuple(
    Definition(
        name=f"{name}@<scheme>",
        definition=f"`{name}` of the quantised model",
        unit=unit,
        better=better,
        protocol=_STUDY,
    )
    for name, unit, better in (
        ("loss.windowed", "nats per token", "lower"),
        ("perplexity.windowed", "1", "lower"),
        ("<task>.pass@<k>.<score>", "share", "higher"),
        ("gsm8k.lm_eval.<filter>", "share", "higher"),
        ("gsm8k.answer_loglik", "nats per token", "higher"),
    )
)
