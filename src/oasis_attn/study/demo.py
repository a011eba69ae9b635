"""The demo: diagnose and quantize a pretrained model, train three small models, write a report.

Sentences about results in the report are computed from the records.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from oasis_attn.data import HeldOut, held_out_windows, load_corpus
from oasis_attn.errors import check_whole
from oasis_attn.files import staged_folder
from oasis_attn.hub.loading import load_model
from oasis_attn.measure import diagnose
from oasis_attn.quantization import quantize
from oasis_attn.quantization.record import quantization_record
from oasis_attn.report import Table, comparison
from oasis_attn.report.figures import overview, save_figures, save_png
from oasis_attn.study.demo_page import ModelResults, write_demo_page
from oasis_attn.training import TrainingConfig, train

VARIANTS = ("vanilla", "attn_residual", "oasis")
SCHEME = "w8a8-static-linear"
COLUMNS = {
    "loss (nats)": ("diagnosis", "loss.windowed", ""),
    "perplexity": ("diagnosis", "perplexity.windowed", ""),
    "max inf-norm": ("diagnosis", "outlier.max_inf_norm", ""),
    "avg kurtosis": ("diagnosis", "outlier.avg_kurtosis", ""),
    "sink mass": ("diagnosis", "sink.mass", ""),
    "W8A8 perplexity": ("quantization", "perplexity.windowed", "after"),
}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The results of a demo.

    Attributes:
        models: the records of each model, in the order of the table.
    """

    models: dict[str, ModelResults]

    @property
    def table(self) -> Table:
        """One row per model."""
        return comparison({name: each.records for name, each in self.models.items()}, COLUMNS)

    def numbers(self) -> dict[str, dict[str, float]]:
        """The numbers of the table: model -> column -> value."""
        return {
            name: {
                head: record.metric(metric, where).value
                for head, (kind, metric, where) in COLUMNS.items()
                for record in each.records
                if record.kind == kind
            }
            for name, each in self.models.items()
        }


def run_demo(
    out: str | Path,
    *,
    pretrained: str = "smollm2",
    prose: str = "pydoc",
    window: int = 512,
    windows: int = 16,
    size: str = "nano",
    corpus: str = "stdlib",
    block_length: int = 256,
    batch_size: int = 8,
    steps: int = 250,
    seed: int = 0,
) -> Demo:
    """Run the demo and write `out`: index.html, overview.png, records/, figures/, models/.

    Args:
        out: a new folder; it is created when all results are complete.
        pretrained: the pretrained model, for `load_model`.
        prose: corpus for its measurement and calibration (train split; the model was not trained
            on it).
        window: tokens per window of this corpus.
        windows: maximum number of windows for measurement, and for calibration.
        size: size of the small models.
        corpus: corpus for training (train split), measurement and calibration (validation split)
            of the small models.
        block_length: tokens per training sequence and per window of the small models.
        batch_size: sequences per step.
        steps: training steps of each small model.
        seed: random seed of initial weights and data order.

    Raises:
        UserError: `out` exists, or a value is invalid.
    """
    check_whole("window", window, 2)
    check_whole("windows", windows, 1)
    stages = _Stages(total=3 * (1 + len(VARIANTS)))
    models: dict[str, ModelResults] = {}
    name = Path(pretrained).name
    if name in VARIANTS:
        name = f"pretrained-{name}"
    with staged_folder(out) as stage:
        # Constructed first, so that an invalid value is reported at once.
        trainings = [
            TrainingConfig(
                variant=variant,
                size=size,
                corpus=corpus,
                steps=steps,
                seed=seed,
                block_length=block_length,
                batch_size=batch_size,
                out=stage / "models" / variant,
            )
            for variant in VARIANTS
        ]
        with stages.working(f"{name}: loading (a GGUF file is converted the first time)"):
            model, tokenizer = load_model(pretrained)
            text = held_out_windows(
                load_corpus(prose, "train"), tokenizer, window=window, windows=windows
            )
        models[name] = _measure(name, None, model, text, stages)
        del model

        for training in trainings:
            stages.next(f"{training.variant}: training {steps} steps")
            trained = train(training)
            model, tokenizer = load_model(training.out)
            # The same number of tokens as for the pretrained model.
            reach = max(1, windows * window // block_length)
            text = held_out_windows(
                load_corpus(corpus, "validation"), tokenizer, window=block_length, windows=reach
            )
            title = f"{size} {training.variant}"
            measured = _measure(title, training.variant, model, text, stages)
            trained = replace(trained, model=measured.diagnosis.model)
            models[training.variant] = replace(measured, training=trained)

        demo = Demo(models=models)
        _write(demo, stage)
    return demo


class _Stages:
    """Shows the current stage, the number of stages and the elapsed time on standard error."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        self._total = total
        self._number = 0
        self._start = time.monotonic()

    def next(self, what: str) -> None:
        self._number += 1
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        self._console.print(
            f"[dim]{minutes:2}:{seconds:02}  {self._number:2}/{self._total}[/dim]  {escape(what)}",
            highlight=False,
        )

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        self.next(what)
        with self._console.status(escape(what)):
            yield


def _measure(
    name: str, variant: str | None, model: PreTrainedModel, text: HeldOut, stages: _Stages
) -> ModelResults:
    """Diagnose the model and its quantized copy; records call the model `name`."""
    with stages.working(f"{variant or name}: diagnosing on {len(text.measured)} windows of text"):
        before = diagnose(model, text.measured)
    with stages.working(f"{variant or name}: quantizing to {SCHEME} and measuring again"):
        quantized = quantize(model, SCHEME, calibration=text.calibration.ids_NT.split(1))
        after = diagnose(quantized, text.measured)
    quantization = quantization_record(
        model,
        quantized,
        data=before.data,
        calibration=text.calibration.info,
        metrics=tuple(
            replace(metric, where=where)
            for where, record in (("before", before), ("after", after))
            for metric in record.metrics
            if not metric.where
        ),
    )
    named = replace(before.model, name=name, variant=variant)
    return ModelResults(
        diagnosis=replace(before, model=named), quantization=replace(quantization, model=named)
    )


def _write(demo: Demo, folder: Path) -> None:
    for name, each in demo.models.items():
        for record in each.records:
            record.save(folder / "records" / f"{name}-{record.kind}.json")
        save_figures(each.diagnosis, folder / "figures" / name)
    pairs = [(each.diagnosis, each.quantization) for each in demo.models.values()]
    save_png(overview(pairs), folder / "overview.png")
    write_demo_page(folder / "index.html", demo.table, list(demo.models.values()))
