"""The report of the demo: figures with explanations, and sentences computed from the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oasis_attn.records import DiagnosisRecord, ModelRecord, QuantizationRecord, TrainingRecord
from oasis_attn.report import Table, label, number
from oasis_attn.report.figures import (
    depth_map,
    loss_lines,
    null_map,
    outlier_lines,
    sink_map,
)
from oasis_attn.report.html import Block, figure_block, paragraph, table_block, write_page

_MAP = "One cell per layer and head, averaged over windows; the scale is from 0 to 1."


@dataclass(frozen=True, kw_only=True)
class ModelResults:
    """The records of one model.

    Attributes:
        diagnosis: the diagnosis of the unquantized model.
        quantization: all whole-model metrics `before` and `after` quantization.
        training: the training record, if the demo trained the model.
    """

    diagnosis: DiagnosisRecord
    quantization: QuantizationRecord
    training: TrainingRecord | None = None

    @property
    def records(self) -> list[ModelRecord]:
        """All records of the model."""
        found = (self.training, self.diagnosis, self.quantization)
        return [record for record in found if record is not None]


def write_demo_page(path: Path, table: Table, models: Sequence[ModelResults]) -> Path:
    """Write the HTML page.

    Args:
        path: path of the file.
        table: one row per model.
        models: the pretrained model, then those that the demo trained.
    """
    pretrained, *small = models
    return write_page(
        path,
        title="Attention sinks, outliers, and a null option",
        lead=(
            "Softmax weights sum to 1, so a head with nothing relevant to read puts its weight on "
            "the first token (Xiao et al. 2023). A few very large activations cause this (Sun et "
            "al. 2024), and they make quantization to 8 bits difficult."
        ),
        sections=[
            ("Results", _numbers(table, pretrained, small)),
            ("A pretrained model", _pretrained(pretrained)),
            ("Three small models, trained from scratch", _small(small)),
            ("The null option and depth routing", _oasis(small)),
            ("Definitions of the metrics", _metrics()),
        ],
        footer=_footer(pretrained.diagnosis),
    )


def _numbers(table: Table, pretrained: ModelResults, small: Sequence[ModelResults]) -> list[Block]:
    return [
        table_block(table),
        paragraph(
            f"`{label(pretrained.diagnosis)}` was measured on {_text(pretrained.diagnosis)}, and "
            f"the small models on {_text(small[0].diagnosis)}. Compare loss and perplexity only "
            "for the same text and tokenizer, that is, between the small models, or before and "
            "after quantization. Compare max inf-norms only for the same residual form: with depth "
            "routing a hidden state is a weighted mean of sublayer outputs, and in a vanilla model "
            "it is their sum."
        ),
        paragraph(
            "The small models were trained with the same seed, data and budget. One seed per model "
            "does not show whether a difference between two models is significant "
            f"({small[0].diagnosis.data.tokens_scored:,} tokens scored)."
        ),
    ]


def _pretrained(model: ModelResults) -> list[Block]:
    record, quantization = model.diagnosis, model.quantization
    heads = [float(mass) for layer in record.tables["sink.mass"] for mass in layer]
    sinks = sum(mass > 0.5 for mass in heads)
    peaks = [float(peak) for peak in record.tables["outlier.inf_norm_layer"]]
    before, after = quantization.before_after("perplexity.windowed")
    return [
        paragraph(
            f"In {sinks} of {len(heads)} heads the first token has more than half of the "
            f"attention. Its mean attention over all heads is {number(record['sink.mass'])}. If "
            "attention were uniform, it would be 1 / (number of visible tokens)."
        ),
        figure_block(sink_map(record), f"{_MAP} Bright cells are heads with a sink."),
        paragraph(
            f"The largest value of a layer's output is between {number(min(peaks))} and "
            f"{number(max(peaks))}. A static 8-bit range gives a tensor 256 levels. If one value "
            "is very large, the step between two levels is larger than ordinary values."
        ),
        figure_block(
            outlier_lines([record]),
            "Logarithmic scales. The kurtosis of a normal distribution is 3. A higher kurtosis "
            "means that fewer entries contain most of the tensor's energy.",
        ),
        paragraph(
            f"Quantization with `{quantization.scheme['name']}` (weights and inputs of the "
            f"{len(quantization.targets)} linear layers, one range per tensor, calibrated on "
            f"{quantization.calibration.windows} windows of other text) changes the perplexity "
            f"from {number(before)} to {number(after)}, a factor of {number(after / before)}."
        ),
    ]


def _small(small: Sequence[ModelResults]) -> list[Block]:
    diagnoses = [model.diagnosis for model in small]
    changes = "; ".join(
        f"`{label(model.diagnosis)}` "
        + " to ".join(map(number, model.quantization.before_after("perplexity.windowed")))
        for model in small
    )
    return [
        paragraph(
            "`vanilla` is a standard transformer. `attn_residual` replaces the residual sum with "
            "attention over depth: for each token, each sublayer computes a weighted mean of the "
            "outputs of previous sublayers. `oasis` adds a null option to both softmaxes, and the "
            "depth router uses the null probability of the attention layers."
        ),
        figure_block(
            loss_lines([model.training for model in small if model.training]),
            "Loss on the training text. All models have the same order of data.",
        ),
        figure_block(
            outlier_lines(diagnoses),
            "Held-out text, one line per model. A mean and a sum have different scales by "
            "construction (left). Kurtosis does not depend on scale (right).",
        ),
        paragraph(f"Perplexity before and after 8-bit quantization: {changes}."),
        *(figure_block(sink_map(record), _MAP) for record in diagnoses),
    ]


def _oasis(small: Sequence[ModelResults]) -> list[Block]:
    diagnoses = [model.diagnosis for model in small]
    return [
        paragraph(
            "The null option is an additional entry of the softmax with the logit 0 and no value: "
            "its probability is attention that no token receives. The first map shows this "
            "probability. Models without a null option have no such map."
        ),
        *(
            figure_block(null_map(record), f"{_MAP} Bright cells are heads that mostly abstain.")
            for record in diagnoses
            if "null.mass" in record.tables
        ),
        paragraph(
            "A depth router reads the embedding and the outputs of the sublayers. Each row is one "
            "router, from the first sublayer at the top to the output at the bottom. Each column "
            "is one source."
        ),
        *(
            figure_block(
                depth_map(record),
                "Mean weight over tokens and windows; the scale is from 0 to 1.",
            )
            for record in diagnoses
            if "depth.weights" in record.tables
        ),
    ]


def _metrics() -> list[Block]:
    return [
        paragraph(
            "`loss.windowed` and `perplexity.windowed`: the mean loss of the next token over "
            "disjoint windows spread over the text, in nats, and its exponential."
        ),
        paragraph(
            "`outlier.max_inf_norm`: the largest absolute value of a tensor, averaged over "
            "windows, then the maximum over layer outputs, MLP outputs, attention output "
            "projections and norms (Bondarenko et al. 2023). `outlier.avg_kurtosis`: the fourth "
            "moment divided by the squared variance plus 1e-6, averaged over windows and the same "
            "tensors. The numbers in parentheses count tensors that are so small that the 1e-6 "
            "lowers their kurtosis (understated) or that are zero (silent)."
        ),
        paragraph(
            "`sink.mass`: attention probability of the first token, averaged over later queries, "
            "heads and layers. `null.mass`: attention probability of the null option."
        ),
        paragraph(
            "All numbers of this page are from the records in `records/`. The records also contain "
            "the values of every tensor, settings, versions, hardware and content hashes."
        ),
    ]


def _text(record: DiagnosisRecord) -> str:
    data = record.data
    return f"{data.windows} windows of {data.window} tokens of `{data.corpus}`"


def _footer(record: DiagnosisRecord) -> str:
    versions = record.environment.versions.items()
    named = ", ".join(f"{package} {version}" for package, version in versions)
    return f"{record.created} · {record.environment.device} · {named}"
