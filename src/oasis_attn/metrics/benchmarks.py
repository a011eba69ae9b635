"""The metrics of `benchmarks/`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_SPEED = "`benchmarks/run.py`: medians of interleaved rounds on one machine, n rounds"
_HEALING = (
    "`benchmarks/healing.py`: WikiText-2 test, 16 windows of 512, cut as the record's `data` says; "
    "`where` is the recipe"
)

BENCHMARKS = (
    Definition(
        name="attention.time_over_sdpa",
        definition="seconds of null attention, forward and backward / those of SDPA",
        unit="1",
        better="lower",
        protocol=f"{_SPEED}; 4 x 8 heads x 2048 x 64, float32",
    ),
    Definition(
        name="attention.speed_over_naive",
        definition="seconds of the naive form / those of null attention, forward and backward",
        unit="1",
        better="higher",
        protocol="as `attention.time_over_sdpa`",
    ),
    Definition(
        name="attention.memory_over_sdpa",
        definition="peak memory of null attention / that of SDPA, forward and backward",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`: a new process each, 2048 tokens",
    ),
    Definition(
        name="attention.mebibytes@<length>",
        definition="peak memory of null attention, forward and backward, at <length> tokens",
        unit="MiB",
        better="lower",
        protocol="`benchmarks/run.py`: a new process each",
    ),
    Definition(
        name="training_step.vanilla_seconds",
        definition="seconds of a training step of the vanilla variant",
        unit="seconds",
        better="lower",
        protocol=f"{_SPEED}; 12 layers of width 512, 2 x 1024 tokens",
    ),
    Definition(
        name="training_step.<model>_time_over_<other>",
        definition="seconds of a training step of one form / those of another",
        unit="1",
        better="lower",
        protocol="as `training_step.vanilla_seconds`; `authors` is the authors' own code's form",
    ),
    Definition(
        name="training_step.<model>_memory_over_<other>",
        definition="peak memory of a training step of one form / that of another",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`: new processes; the model of `training_step.vanilla_seconds`",
    ),
    Definition(
        name="decoding.generate_<model>_speed_over_stock",
        definition="tokens decoded per second by a converted SmolLM2 / by the original",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; one thread, 128 tokens after 16",
    ),
    Definition(
        name="decoding.prefill_<model>_speed_over_stock",
        definition="speed of reading a prompt, converted SmolLM2 / original",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; one thread, 1024 tokens",
    ),
    Definition(
        name="integer.simulated_<scheme>_speed_over_float",
        definition="speed of reading a prompt, SmolLM2 quantised in simulation / in float",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; 4 x 512 tokens",
    ),
    Definition(
        name="integer.int8_<scheme>_speed_over_float",
        definition="the same on torchao's integer kernels",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; 4 x 512 tokens",
    ),
    Definition(
        name="integer.size_over_float",
        definition="bytes on disk of SmolLM2 in w8a8-dynamic / in float",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`",
    ),
    Definition(
        name="loading.<case>_memory_over_weights",
        definition="peak memory of loading or converting SmolLM2 / bytes of its weights",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`: a new process each",
    ),
    Definition(
        name="start.import_seconds_beyond_torch",
        definition="seconds to import torch and oasis_attn less seconds to import torch",
        unit="seconds",
        better="lower",
        protocol=_SPEED,
    ),
    Definition(
        name="start.help_seconds",
        definition="seconds of `oasis --help`",
        unit="seconds",
        better="lower",
        protocol=_SPEED,
    ),
    Definition(
        name="perplexity",
        definition="exp of the mean loss of a token",
        unit="1",
        better="lower",
        protocol=_HEALING,
    ),
    Definition(
        name="perplexity, <scheme>",
        definition="exp of the mean loss of a token, of the model quantised by <scheme>",
        unit="1",
        better="lower",
        protocol=_HEALING,
    ),
    Definition(
        name="first-token mass",
        definition="`sink.mass`",
        unit="probability",
        better="lower",
        protocol=_HEALING,
    ),
    Definition(
        name="max inf-norm",
        definition="`outlier.max_inf_norm`",
        unit="activation",
        better="lower",
        protocol=_HEALING,
    ),
    Definition(
        name="mean kurtosis",
        definition="`outlier.avg_kurtosis`",
        unit="1",
        better="lower",
        protocol=_HEALING,
    ),
)
