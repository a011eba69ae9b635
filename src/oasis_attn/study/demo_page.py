"""The demo's page: figures with what they mean, and sentences computed from the records."""

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

_MAP = "One trial per layer and head, averaged over the windows; the scale runs from 0 to 1."


@dataclass(frozen=True, kw_only=True)
class ModelResults:
    """The records of one model.

    Attributes:
        diagnosis: of the model in floating point.
        quantization: every whole-model measure of it, at `before` and `after` quantisation.
        training: of a model that the demo trained.
    """

    diagnosis: DiagnosisRecord
    quantization: QuantizationRecord
    training: TrainingRecord | None = None

    @property
    def records(self) -> list[ModelRecord]:
        """All that there are."""
        found = (self.training, self.diagnosis, self.quantization)
        return [record for record in found if record is not None]


def write_demo_page(path: Path, table: Table, models: Sequence[ModelResults]) -> Path:
    """Write the page.

    Args:
        path: of the file.
        table: one row per model.
        models: the pretrained one first, then those that were trained.
    """
    pretrained, *small = models
    return write_page(
        path,
        title="Attention sinks, outliers, and a null option",
        lead=(
            "A softmax must give its attention to something. Heads with nothing to read are known "
            "to park it on the first token (Xiao et al. 2023), by way of a few enormous "
            "activations (Sun et al. 2024), which are hard to hold in 8 bits beside the rest."
        ),
        sections=[
            ("The numbers", _numbers(table, pretrained, small)),
            ("A pretrained model", _pretrained(pretrained)),
            ("Three small models, trained alike", _small(small)),
            ("The null option and depth routing", _oasis(small)),
            ("What the measures are", _measures()),
        ],
        footer=_footer(pretrained.diagnosis),
    )


def _numbers(table: Table, pretrained: ModelResults, small: Sequence[ModelResults]) -> list[Block]:
    return [
        table_block(table),
        paragraph(
            f"`{label(pretrained.diagnosis)}` is measured on {_text(pretrained.diagnosis)}; "
            f"the small models on {_text(small[0].diagnosis)}. Loss and perplexity compare "
            "only within the same text and tokenizer: among the small models, or before and after "
            "quantisation. Max inf-norms compare within one residual form only: with depth routing "
            "the state is a weighted mean of sublayer outputs, in a vanilla model their sum."
        ),
        paragraph(
            "The small models share seed, data and budget. One seed each says nothing about "
            "chance: a difference between two rows is an observation, not a finding "
            f"({small[0].diagnosis.data.tokens_scored:,} tokens scored)."
        ),
    ]


def _pretrained(model: ModelResults) -> list[Block]:
    record, quantization = model.diagnosis, model.quantization
    heads = [float(mass) for layer in record.tables["sink.mass"] for mass in layer]
    held = sum(mass > 0.5 for mass in heads)
    peaks = [float(peak) for peak in record.tables["outlier.inf_norm_layer"]]
    before, after = quantization.before_after("perplexity.windowed")
    return [
        paragraph(
            f"In {held} of {len(heads)} heads the first token takes more than half of the "
            f"attention; over all heads it takes {number(record['sink.mass'])} on average. "
            "If attention were spread evenly, it would take one part in the number of tokens seen."
        ),
        figure_block(sink_map(record), f"{_MAP} Bright trials are heads that look at the start."),
        paragraph(
            f"The largest value leaving a layer goes from {number(min(peaks))} to "
            f"{number(max(peaks))}. Static 8-bit ranges give every tensor 256 levels, so a value "
            "that large sets a step in which ordinary values may vanish."
        ),
        figure_block(
            outlier_lines([record]),
            "Logarithmic scales. The kurtosis of a normal distribution is 3; the higher it is, "
            "the more of the tensor's energy sits in few entries.",
        ),
        paragraph(
            f"Rounded by `{quantization.scheme['name']}` (weights and inputs of the "
            f"{len(quantization.targets)} linear layers, one range per tensor, "
            f"calibrated on {quantization.calibration.windows} windows of "
            f"other text), the perplexity goes from {number(before)} to {number(after)}: "
            f"{number(after / before)} times."
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
            "`vanilla` is the usual transformer. `attn_residual` replaces the residual sum by "
            "attention over depth: each sublayer chooses, per token, among the outputs of those "
            "before it. `oasis` adds a null option to both softmaxes and tells the depth router "
            "which outputs came from attention that had nothing to say."
        ),
        figure_block(
            loss_lines([model.training for model in small if model.training]),
            "Loss on the training text. Same order of data for all.",
        ),
        figure_block(
            outlier_lines(diagnoses),
            "Held-out text, one line per model. A mean and a sum differ in scale by construction, "
            "which the left panel shows; kurtosis does not depend on scale.",
        ),
        paragraph(f"Perplexity before and after 8-bit quantisation: {changes}."),
        *(figure_block(sink_map(record), _MAP) for record in diagnoses),
    ]


def _oasis(small: Sequence[ModelResults]) -> list[Block]:
    diagnoses = [model.diagnosis for model in small]
    return [
        paragraph(
            "The null option is one more entry in the softmax, with the logit 0 and no value: "
            "what it takes, no token gets. The first map shows how much it takes. Models without "
            "it have no such map."
        ),
        *(
            figure_block(null_map(record), f"{_MAP} Bright trials are heads that mostly abstain.")
            for record in diagnoses
            if "null.mass" in record.tables
        ),
        paragraph(
            "A depth router reads the embedding and the sublayers' outputs. A row is one router, "
            "from the first sublayer at the top to the output at the bottom; a column one source."
        ),
        *(
            figure_block(
                depth_map(record), "Mean weight over tokens and windows; the scale runs 0 to 1."
            )
            for record in diagnoses
            if "depth.weights" in record.tables
        ),
    ]


def _measures() -> list[Block]:
    return [
        paragraph(
            "`loss.windowed` and `perplexity.windowed`: mean loss of the next token over disjoint "
            "windows, in nats, and its exponential."
        ),
        paragraph(
            "`outlier.max_inf_norm`: the largest absolute value of a tensor, averaged over "
            "windows; then the largest over layer outputs, MLP outputs, attention output "
            "projections and norms (Bondarenko et al. 2023). `outlier.avg_kurtosis`: the fourth "
            "moment over the squared variance plus 1e-6, averaged over windows and the same "
            "tensors. Beside it stands the number of tensors that are too small for the 1e-6 "
            "(understated) or silent."
        ),
        paragraph(
            "`sink.mass`: attention probability on the first token, averaged over the later "
            "queries, heads and layers. `null.mass`: the share of attention given to the null "
            "option."
        ),
        paragraph(
            "Everything on this page is read from the records in `records/`, which also hold "
            "the numbers of every tensor, settings, versions, hardware and content hashes."
        ),
    ]


def _text(record: DiagnosisRecord) -> str:
    data = record.data
    return f"{data.windows} windows of {data.window} tokens of `{data.corpus}`"


def _footer(record: DiagnosisRecord) -> str:
    versions = record.environment.versions.items()
    named = ", ".join(f"{package} {version}" for package, version in versions)
    return f"{record.created} · {record.environment.device} · {named}"
