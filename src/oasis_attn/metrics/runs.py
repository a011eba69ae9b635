"""The metrics of `train`, `evaluate`, `quantize`, `prefix`, `doctor`, `convert` and `study`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_PROBLEMS = "`evaluate`: one prompt per problem; mean over problems, n problems"
_MAJORITY = (
    "`evaluate --tasks majority`: windows of the test split of `majority`, each a document; all "
    "earlier tokens are those of the text; sum over all windows, n windows"
)
_FAMILIES = "`experiments/retrofit_families.py`: texts of `majority` without EOS; mean over n seeds"
_TARGETS = "`quantize`: for each quantized target (`where`)"
_PREFIX = "`prefix`: `where` is `before` (without the prefix) or `after` (with the prefix)"
_CONVERSION = (
    "`convert --null-from-sink`: `where` is `before` or `after` the conversion, as for the other "
    "metrics in its records"
)
_DOCTOR = "`doctor`: for each try (`where`); the quantization is simulated"
_STUDY = "`study`: the same model quantized with <scheme>; otherwise as the metric before the @"

LANGUAGE = (
    Definition(
        name="loss.windowed",
        definition="mean over windows of the mean -log p(token | earlier tokens of the window)",
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
        protocol="as `loss.windowed`; `where` is `before` or `after` in records of `quantize`, "
        "`prefix` and `convert`, the try in records of `doctor`, and the scheme and method in the "
        "quantization benchmark",
    ),
    Definition(
        name="loss.strided",
        definition="sum of -log p over all scored tokens / number of scored tokens",
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
        definition="exp of the mean loss of the quantized model",
        unit="1",
        better="lower",
        protocol=f"{_PREFIX}; windows spread over the evaluation split; the model is quantized "
        "with the scheme in the record; n windows",
    ),
)

TASKS = (
    Definition(
        name="<task>.pass@<k>.<score>",
        definition="probability that at least one of k answers is correct.  strict: the number "
        "after the first `####` equals the reference; flexible: the last number does",
        unit="share",
        better="higher",
        protocol=_PROBLEMS,
        source="arXiv 2107.03374 (Chen et al. 2021), eq. 1; arXiv 2110.14168 (GSM8K)",
    ),
    Definition(
        name="gsm8k.lm_eval.<filter>",
        definition="exact match of the first answer with the filter of lm-eval",
        unit="share",
        better="higher",
        protocol=_PROBLEMS,
        source="lm-evaluation-harness, task gsm8k (its version is in `data`)",
    ),
    Definition(
        name="gsm8k.answer_loglik",
        definition="mean log-likelihood of the tokens of the reference answer, given the question",
        unit="nats per token",
        better="higher",
        protocol=_PROBLEMS,
    ),
    Definition(
        name="majority.accuracy",
        definition="answers with the largest logit of the whole vocabulary / number of answers",
        unit="share",
        better="higher",
        protocol=_MAJORITY,
    ),
    Definition(
        name="majority.answer_loss",
        definition="mean of -log p over the answers",
        unit="nats per token",
        better="lower",
        protocol=_MAJORITY,
    ),
    Definition(
        name="majority.other_loss",
        definition="mean of -log p over all other tokens, questions and EOS included",
        unit="nats per token",
        better="lower",
        protocol=_MAJORITY,
    ),
)

TRAINING = (
    Definition(
        name="training.loss",
        definition="mean loss of the last logged steps, without regularizers",
        unit="nats per token",
        better="lower",
        protocol="`train`: on training batches; the last logged value",
    ),
    Definition(
        name="training.tokens_per_second",
        definition="tokens trained on / seconds of training",
        unit="tokens per second",
        better="higher",
        protocol="`train`: since the run was started or resumed, on the hardware in the record",
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
        definition="|w^ - w|^2 / |w|^2 for a weight w and its quantized value w^",
        unit="1",
        better="lower",
        protocol=_TARGETS,
    ),
    Definition(
        name="quantization.activation_error",
        definition="|x^ - x|^2 / |x|^2 for activations x and their quantized values x^",
        unit="1",
        better="lower",
        protocol=f"{_TARGETS}; over all calibration windows, n windows",
    ),
    Definition(
        name="quantization.low",
        definition="lower bound of a static range",
        unit="activation",
        protocol=_TARGETS,
    ),
    Definition(
        name="quantization.high",
        definition="upper bound of a static range",
        unit="activation",
        protocol=_TARGETS,
    ),
    Definition(
        name="quantization.scale",
        definition="quantization step of a static range",
        unit="activation",
        protocol=_TARGETS,
    ),
    Definition(
        name="size.bytes",
        definition="size of the model: `before`, of the parameters in memory; `after`, of the "
        "saved weights",
        unit="bytes",
        better="lower",
        protocol="`quantize`: `where` is `before` or `after`",
    ),
    Definition(
        name="size.quantized_share",
        definition="number of quantized weights / number of all weights.  Weights are the entries "
        "of parameters with two or more dimensions, except embeddings and an output head that is "
        "not quantized",
        unit="share",
        better="higher",
        protocol="`quantize`; `float_weights` lists the weights that are not quantized",
    ),
    Definition(
        name="speed.over_unquantized",
        definition="time of a forward pass before quantization / time after quantization",
        unit="1",
        better="higher",
        protocol="`quantize`: median over evaluation windows, one at a time, with both models "
        "alternating; n windows",
    ),
    Definition(
        name="prefix.noise",
        definition="(r / 255)^2 / (12 s): noise-to-signal ratio of an 8-bit static range, where r "
        "is the range of a tensor over all windows and s the mean square of the median token",
        unit="1",
        better="lower",
        protocol=f"{_PREFIX}; mean over the inputs of linear layers and the layer outputs; "
        "n windows",
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

DOCTOR = (
    Definition(
        name="doctor.increase",
        definition="`perplexity.windowed` of the try / that of the unquantized model - 1",
        unit="1",
        better="lower",
        protocol=f"{_DOCTOR}; both on the same windows, n windows",
    ),
    Definition(
        name="doctor.run_time_work",
        definition="number of linear layers whose input is transformed at run time, plus number "
        "of those whose range is computed at run time, over the number of quantized linear layers",
        unit="1",
        better="lower",
        protocol=_DOCTOR,
    ),
    Definition(
        name="doctor.seconds",
        definition="time of the try: search, calibration, rounding and evaluation",
        unit="seconds",
        better="lower",
        protocol=f"{_DOCTOR}; on the hardware in the record",
    ),
)

CONVERSION = (
    Definition(
        name="outlier.max_activation",
        definition="max |x| over all layer outputs",
        unit="activation",
        better="lower",
        protocol=f"{_CONVERSION}; over all evaluation windows, n windows; without a prefix the "
        "same as `prefix.max_hidden`",
    ),
    Definition(
        name="retrofit.perplexity",
        definition="exp of the mean loss of all words but the first, which are the same with and "
        "without a token in front",
        unit="1",
        better="lower",
        protocol=_FAMILIES,
    ),
    Definition(
        name="retrofit.perplexity_ratio",
        definition="`retrofit.perplexity` / that of the original model on texts as in its training",
        unit="1",
        better="lower",
        protocol=_FAMILIES,
    ),
    Definition(
        name="retrofit.perplexity_ratio@<scheme>",
        definition="`retrofit.perplexity` quantized by <scheme> / the same without quantization",
        unit="1",
        better="lower",
        protocol=_FAMILIES,
    ),
    Definition(
        name="retrofit.accuracy",
        definition="answers with the largest logit of the whole vocabulary / number of answers",
        unit="share",
        better="higher",
        protocol=_FAMILIES,
    ),
)

STUDY_QUANTIZED = tuple(
    Definition(
        name=f"{name}@<scheme>",
        definition=f"`{name}` of the quantized model",
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
        ("task.error", "target^2", "lower"),
        ("majority.accuracy", "share", "higher"),
        ("majority.answer_loss", "nats per token", "lower"),
        ("majority.other_loss", "nats per token", "lower"),
    )
)
