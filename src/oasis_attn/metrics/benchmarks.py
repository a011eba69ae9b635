"""The metrics of the scripts in `benchmarks/`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_SPEED = "`benchmarks/run.py`: medians of interleaved rounds on one machine, n rounds"
_HEALING = (
    "`benchmarks/healing.py`: WikiText-2 test, 16 windows of 512, cut as the record's `data` says; "
    "`where` is the recipe"
)
_ENGINE = (
    "`experiments/engines.py`: SmolLM2, WikiText-2 test, 2 windows of 256; `where` is the model"
)

BENCHMARKS = (
    Definition(
        name="attention.time_over_sdpa",
        definition="time of null attention / time of SDPA, forward and backward",
        unit="1",
        better="lower",
        protocol=f"{_SPEED}; 4 x 8 heads x 2048 x 64, float32",
    ),
    Definition(
        name="attention.speed_over_naive",
        definition="time of the backend `naive` / time of null attention, forward and backward",
        unit="1",
        better="higher",
        protocol="as `attention.time_over_sdpa`",
    ),
    Definition(
        name="attention.memory_over_sdpa",
        definition="peak memory of null attention / peak memory of SDPA, forward and backward",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`: each in a new process, 2048 tokens",
    ),
    Definition(
        name="attention.mebibytes@<length>",
        definition="peak memory of null attention, forward and backward, with <length> tokens",
        unit="MiB",
        better="lower",
        protocol="`benchmarks/run.py`: each in a new process",
    ),
    Definition(
        name="training_step.vanilla_seconds",
        definition="time of a training step of the vanilla variant",
        unit="seconds",
        better="lower",
        protocol=f"{_SPEED}; 12 layers of width 512, 2 x 1024 tokens",
    ),
    Definition(
        name="training_step.<model>_time_over_<other>",
        definition="time of a training step of one model / time of the other",
        unit="1",
        better="lower",
        protocol="as `training_step.vanilla_seconds`; `authors` is the form of the authors' code",
    ),
    Definition(
        name="training_step.<model>_memory_over_<other>",
        definition="peak memory of a training step of one model / peak memory of the other",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`: new processes; the model of `training_step.vanilla_seconds`",
    ),
    Definition(
        name="decoding.generate_<model>_speed_over_stock",
        definition="tokens per second in decoding, converted SmolLM2 / original",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; one thread, 128 new tokens after a prompt of 16",
    ),
    Definition(
        name="decoding.prefill_<model>_speed_over_stock",
        definition="tokens per second in prefill, converted SmolLM2 / original",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; one thread, 1024 tokens",
    ),
    Definition(
        name="decoding.generate_<model>_speed_over_pytorch",
        definition="tokens decoded per second with the C kernels / with PyTorch operations",
        unit="1",
        better="higher",
        protocol="as `decoding.generate_<model>_speed_over_stock`",
    ),
    Definition(
        name="decoding.prefill_<model>_speed_over_pytorch",
        definition="tokens per second in prefill with the C kernels / with PyTorch operations",
        unit="1",
        better="higher",
        protocol="as `decoding.prefill_<model>_speed_over_stock`",
    ),
    Definition(
        name="diagnosis.time_over_forward",
        definition="time of `diagnose` / time of the forward pass, SmolLM2",
        unit="1",
        better="lower",
        protocol=f"{_SPEED}; one thread, one window of 1024 tokens",
    ),
    Definition(
        name="integer.simulated_<scheme>_speed_over_float",
        definition="tokens per second in prefill, SmolLM2 with simulated quantization / in float",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; 4 x 512 tokens",
    ),
    Definition(
        name="integer.int8_<scheme>_speed_over_float",
        definition="tokens per second in prefill, SmolLM2 with torchao's int8 kernels / in float",
        unit="1",
        better="higher",
        protocol=f"{_SPEED}; 4 x 512 tokens",
    ),
    Definition(
        name="integer.size_over_float",
        definition="size on disk of SmolLM2 in w8a8-dynamic / in float",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`",
    ),
    Definition(
        name="loading.<case>_memory_over_weights",
        definition="peak memory of loading or converting SmolLM2 / size of its weights",
        unit="1",
        better="lower",
        protocol="`benchmarks/run.py`: each in a new process",
    ),
    Definition(
        name="start.import_seconds_beyond_torch",
        definition="time to import torch and oasis_attn minus time to import torch",
        unit="seconds",
        better="lower",
        protocol=_SPEED,
    ),
    Definition(
        name="start.help_seconds",
        definition="time of `oasis --help`",
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
        definition="exp of the mean loss of a token, of the model quantized by <scheme>",
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
    Definition(
        name="engine.perplexity",
        definition="exp of the mean loss of a token, by the log-probabilities of an engine",
        unit="1",
        better="lower",
        protocol=_ENGINE,
    ),
    Definition(
        name="engine.reference_perplexity",
        definition="the same by this library in float32",
        unit="1",
        better="lower",
        protocol=_ENGINE,
    ),
    Definition(
        name="engine.logprob_difference",
        definition="mean |log p of a token in the engine - log p in this library in float32|",
        unit="nats",
        better="lower",
        protocol=_ENGINE,
    ),
    Definition(
        name="engine.max_logprob_difference",
        definition="the largest such difference, also of the 10 tokens most probable in the engine",
        unit="nats",
        better="lower",
        protocol=_ENGINE,
    ),
    Definition(
        name="engine.top1_agreement",
        definition="share of places with the same most probable next token",
        unit="share",
        better="higher",
        protocol=_ENGINE,
    ),
    Definition(
        name="engine.rounding_noise",
        definition="the same between two forms in this library that only round differently",
        unit="nats",
        protocol=f"{_ENGINE}; llama.cpp: inputs of layers as they are, and rounded; vLLM: this"
        " library and transformers, or in bfloat16: transformers in float32 and in bfloat16",
    ),
    Definition(
        name="engine.different_texts",
        definition="number of n texts that the engine cuts into other tokens than transformers",
        unit="texts",
        better="lower",
        protocol=_ENGINE,
    ),
)
