"""The demo: why one token breaks a model in 8 bits, why it exists, and what prevents it.

Two parts.  A pretrained model is diagnosed, quantized to static 8 bits, and quantized again with a
prefix.  Small decoders are trained on a task for which softmax attention needs a sink; they are
trials of the study `necessity`.  Sentences in the report are computed from the records.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import HeldOut, held_out_windows, load_corpus
from oasis_attn.data.tokens import prompt_ids
from oasis_attn.errors import check_seed, check_whole
from oasis_attn.files import staged_folder, write_text
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.prefix import compute_prefix, with_prefix
from oasis_attn.lab import attention_maps
from oasis_attn.measure import diagnose
from oasis_attn.measure.loss import measure_loss
from oasis_attn.quantization import quantize, schemes
from oasis_attn.quantization.prefix_search import find_prefix
from oasis_attn.quantization.record import quantization_record
from oasis_attn.records import DiagnosisRecord, QuantizationRecord, Record, TrialRecord
from oasis_attn.study.decoder_trial import measure_trial, measured_batch, train_trial
from oasis_attn.study.plan import Trial
from oasis_attn.study.plan_file import load_plan

PLAN = "necessity"
VARIANTS = ("vanilla", "attn_residual", "oasis", "strong")
"""The variants of the plan that the demo trains."""
SCHEME = schemes()["w8a8-static-linear"].with_options(
    {"weight.granularity": "channel", "observer": "percentile"}
)
PROMPT = "Once upon a time, there was"
_CORPUS = ("pydoc", "train")  # prose that comes with Python; SmolLM2 was not trained by us on it
_NEW_TOKENS = 16
_SEARCH_WINDOWS, _SEARCH_TOKENS = 4, 48
_DIGITS = 4  # of the probabilities in a stored attention map


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The records of the pretrained model.

    Attributes:
        plain, prefixed: diagnoses of the model without and with the prefix.
        broken, repaired: the model without and with the prefix, before and after quantization, with
            the table `continuation`: `prompt`, `before` and `after`.
    """

    plain: DiagnosisRecord
    prefixed: DiagnosisRecord
    broken: QuantizationRecord
    repaired: QuantizationRecord

    @property
    def records(self) -> tuple[Record, ...]:
        return self.plain, self.prefixed, self.broken, self.repaired


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The results of a demo.

    Attributes:
        pretrained: the pretrained model; None if there is none.
        lab: the trials, in the order of `VARIANTS`, with the table `attention.map` [T][1 + T]: one
            sequence and the head with most attention on the first token; the first key is the null.
            The table `attention.head` has its `layer`, its `head` and the `triggers`.
    """

    pretrained: Pretrained | None
    lab: tuple[TrialRecord, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """All records."""
        return *(self.pretrained.records if self.pretrained else ()), *self.lab

    def save(self, path: Path) -> Path:
        """Write the records, one JSON object per line, without what was measured per tensor."""
        lines = (f"{_whole_model(record).to_json(indent=None)}\n" for record in self.records)
        return write_text(path, "".join(lines))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of `save`."""
        lines = path.read_text(encoding="utf-8").splitlines()
        records: list[Any] = [Record.from_json(line, path) for line in lines]
        kinds = ("plain", "prefixed", "broken", "repaired")
        pretrained, lab = records[: -len(VARIANTS)], records[-len(VARIANTS) :]
        found = Pretrained(**dict(zip(kinds, pretrained, strict=True))) if pretrained else None
        return cls(pretrained=found, lab=tuple(lab))


def run_demo(
    out: str | Path,
    *,
    pretrained: str | None = "smollm2",
    window: int = 256,
    windows: int = 8,
    steps: int = 500,
    seed: int = 0,
    device: str = "auto",
) -> Demo:
    """Run the demo and write `out`: index.html, overview.png and records.jsonl.

    It computes with one thread.

    Args:
        out: a new folder; it is created when all results are complete.
        pretrained: a model with massive activations, for `load_model`; None for the lab alone.
        window, windows: tokens per window of Python's documentation, and number of windows to
            measure on; as many others are calibrated on.
        steps: training steps of each decoder.
        seed: random seed of the decoders.
        device: where the pretrained model runs, see `load_model`; the decoders run on the CPU.

    Raises:
        UserError: `out` exists, a value is invalid, or no prefix helps the pretrained model.
    """
    from oasis_attn.study.demo_page import write_demo  # imports this module

    check_whole("window", window, 2)
    check_whole("windows", windows, 1)
    check_whole("steps", steps, 1)
    check_seed("seed", seed)
    stages = _Stages(total=len(VARIANTS) + (5 if pretrained else 0))
    with staged_folder(out) as stage, _one_thread():
        found = _pretrained(pretrained, device, window, windows, stages) if pretrained else None
        lab = []
        for trial in lab_trials(steps, seed):
            with stages.working(f"{trial.variant}: training {steps} steps"):
                lab.append(run_lab_trial(trial, f"oasis demo --steps {steps} --seed {seed}"))
        demo = Demo(pretrained=found, lab=tuple(lab))
        demo.save(stage / "records.jsonl")
        write_demo(demo, stage)
    return demo


def lab_trials(steps: int, seed: int) -> list[Trial]:
    """The trials of the lab: those of the plan, with this number of steps and this seed."""
    plan = load_plan(PLAN)
    plan = replace(plan, seeds=(seed,), training=dict(plan.training) | {"steps": steps})
    trials = {trial.variant: trial for trial in plan.trials}
    return [trials[variant] for variant in VARIANTS]


def run_lab_trial(trial: Trial, command: str) -> TrialRecord:
    """Run a trial, and add the attention map of its head with most attention on the first token."""
    trained = train_trial(trial)
    record = measure_trial(trial, trained, command)
    idle_LH = torch.tensor(record.tables["sink.idle"])
    layer, head = divmod(int(idle_LH.argmax()), idle_LH.shape[1])
    first = measured_batch(trial).first(1)
    map_TS = attention_maps(trained.model, first)[layer, 0, head]
    triggers = first.trigger_BT[0].nonzero().flatten().tolist()
    tables = {
        "attention.map": [[round(p, _DIGITS) for p in row] for row in map_TS.tolist()],
        "attention.head": {"layer": layer, "head": head, "triggers": triggers},
    }
    return replace(record, tables=record.tables | tables)


def _pretrained(name: str, device: str, window: int, windows: int, stages: _Stages) -> Pretrained:
    with stages.working(f"{name}: loading (a GGUF file is converted the first time)"):
        model, tokenizer = load_model(name, device=device)
        text = held_out_windows(load_corpus(*_CORPUS), tokenizer, window=window, windows=windows)
    with stages.working(f"{name}: searching for a prefix of one token"):
        search_BT = text.calibration.ids_NT[:_SEARCH_WINDOWS, :_SEARCH_TOKENS].contiguous()
        prefix = compute_prefix(model, find_prefix(model, search_BT, length=1))
    prefixed = with_prefix(model, prefix)
    with stages.working(f"{name}: diagnosing it without and with the prefix"):
        diagnoses = [
            _named(diagnose(each, text.measured, tokenizer=tokenizer), Path(name).name)
            for each in (model, prefixed)
        ]
    quantizations = []
    for what, each in (("", model), (" with the prefix", prefixed)):
        with stages.working(f"{name}: quantizing it{what} to static 8 bits"):
            record = _quantization(each, tokenizer, text)
            quantizations.append(_named(record, Path(name).name))
    plain, with_it = diagnoses
    broken, repaired = quantizations
    return Pretrained(plain=plain, prefixed=with_it, broken=broken, repaired=repaired)


def _quantization(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: HeldOut
) -> QuantizationRecord:
    quantized = quantize(model, SCHEME, calibration=text.calibration.ids_NT.split(1))
    both = {"before": model, "after": quantized}
    return quantization_record(
        model,
        quantized,
        data=text.measured.info,
        calibration=text.calibration.info,
        metrics=tuple(
            replace(metric, where=where)
            for where, each in both.items()
            for metric in measure_loss(each, text.measured)
        ),
        tables={
            "continuation": {"prompt": PROMPT}
            | {where: _continuation(each, tokenizer) for where, each in both.items()}
        },
    )


@torch.no_grad()
def _continuation(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The most likely next tokens after the prompt, on one line."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = prompt_ids(PROMPT, tokenizer)
    ids_1T = torch.tensor([ids if ids[:1] == begin else begin + ids], device=model.device)
    output_1T = model.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(output_1T[0, ids_1T.shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).split())


def _named(record: Any, name: str) -> Any:
    return replace(record, model=replace(record.model, name=name))


def _whole_model(record: Record) -> Record:
    """The record without the metrics of single tensors; places in a pair of models remain."""
    keep = ("", "before", "after")
    return replace(record, metrics=tuple(m for m in record.metrics if m.where in keep))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Context in which torch computes with one thread: more gain little here, and they wait busily
    for each other if another process takes a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Stages:
    """Shows the current stage, the number of stages and the elapsed time on standard error."""

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        self._total = total
        self._number = 0
        self._start = time.monotonic()

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        self._number += 1
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        self._console.print(
            f"[dim]{minutes:2}:{seconds:02}  {self._number:2}/{self._total}[/dim]  {escape(what)}",
            highlight=False,
        )
        with self._console.status(escape(what)):
            yield
