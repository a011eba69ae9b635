"""Find out why a quantization scheme breaks a model, and what helps: a diagnosis, and tries.

1. Diagnose the model, and measure the scheme alone.  If it is good enough, stop.
2. Measure the sensitivity to each kind of tensor, on every fourth window.
3. Try the remedies one by one: those first that the diagnosis promises to help, and of these the
   fastest first.  Stop at the first good one.
4. If none is good, combine those that help: add one after the other to the best one, and keep it if
   that is better.

Each result is stored when it is complete, so that a second run continues after the last one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import Windows, calibration_corpora, read_windows
from oasis_attn.errors import UserError, one_line
from oasis_attn.files import lock
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import check_lengths, describe_model, fingerprint
from oasis_attn.hub.prefix import (
    check_can_have_prefix,
    compute_prefix,
    prefix_of,
    with_prefix,
)
from oasis_attn.hub.tokenizer_prefix import check_no_prefix_in_tokenizer
from oasis_attn.measure import diagnose
from oasis_attn.progress import Progress, no_progress
from oasis_attn.quantization.hf_quantizer import get_quantization_config
from oasis_attn.quantization.options import check_doctor
from oasis_attn.quantization.prefix_checkpoint import search_rows
from oasis_attn.quantization.prefix_search import find_prefix
from oasis_attn.quantization.remedies import REMEDIES, Remedy, combine, per_channel
from oasis_attn.quantization.schemes import Scheme, get_scheme
from oasis_attn.quantization.sensitivity import perplexity, sensitivity_table
from oasis_attn.quantization.simulate import check_unquantized_config, quantize
from oasis_attn.records import DiagnosisRecord, DoctorRecord, Metric, Try, current_environment
from oasis_attn.report.conclusion import scheme_breaks
from oasis_attn.report.remedies import PLAIN, increase, is_good
from oasis_attn.study.doctor_folder import (
    DIAGNOSIS,
    RECORD,
    check_config,
    resumed,
    stored_results,
)

LENGTH = 4  # at most so many tokens in a prefix, as by default in `oasis prefix`
SHARE = 4  # one of so many windows is read for the sensitivity
_DIAGNOSIS, _PLAIN, _SENSITIVITY = 1.5, 2, 4
"""Efforts, as those of `Remedy`."""


@dataclass(frozen=True, kw_only=True)
class Consultation:
    """The results of `doctor`: the diagnosis, and the record of the tries."""

    diagnosis: DiagnosisRecord
    record: DoctorRecord


def doctor(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | Scheme = "w8a8-static-linear",
    tolerance: float = 0.05,
    try_all: bool = False,
    calibration: str = "stdlib",
    calibration_split: str = "train",
    evaluation: str | None = None,
    evaluation_split: str = "test",
    window: int = 256,
    windows: int = 8,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Consultation:
    """Diagnose `model` and try what makes it good enough with `scheme`; see the module.

    Quantization is simulated.  Perplexities are those that `quantize_checkpoint` and
    `prefix_checkpoint` measure with the same arguments.

    Args:
        model: see `load_model`.
        out: a folder for `diagnosis.json` and `record.json`.  If it has the results of an earlier
            run with the same arguments, they are not measured again; `tolerance` and `try_all` may
            differ.
        scheme: see `quantize`; weights get one scale per output channel instead of one per tensor.
        tolerance: largest increase of perplexity, relative to the unquantized model, that is good
            enough.
        try_all: try everything, also when something is good enough.
        calibration, calibration_split: corpus and split for calibration and the search of a prefix.
        evaluation, evaluation_split: corpus and split for the diagnosis and for perplexity; the
            default corpus is that of `calibration`.
        window: tokens per window.
        windows: maximum number of windows for calibration, and for perplexity; they are spread over
            the split.
        seed: random seed of the rotation.
        device: see `load_model`.
        trust_remote_code: see `load_model`.
        progress: see `Progress`; a step names the time left.

    Returns:
        The diagnosis and the tries.  A remedy that is not possible is a try with a `problem`.

    Raises:
        UserError: unusable arguments, a model that cannot be diagnosed or quantized with `scheme`,
            or `out` has other results.
    """
    scheme = per_channel(get_scheme(scheme))
    check_doctor(tolerance=tolerance, window=window, windows=windows, seed=seed)
    out = Path(out)
    corpora = calibration_corpora(calibration, calibration_split, evaluation, evaluation_split)
    stored = stored_results(
        out, scheme=scheme, seed=seed, corpora=corpora, window=window, windows=windows
    )

    def check(config: PreTrainedConfig) -> None:
        check_unquantized_config(config)
        if stored is not None:
            check_config(config, out=out, stored=stored, trust_remote_code=trust_remote_code)

    progress("loading the model")
    loaded, tokenizer = load_model(
        model, device=device, trust_remote_code=trust_remote_code, check=check
    )
    check_no_prefix_in_tokenizer(tokenizer, model)
    check_lengths(loaded, [window], "window")
    seen, held_out = (
        read_windows(corpus, tokenizer, window=window, windows=windows) for corpus in corpora
    )
    record = DoctorRecord(
        environment=current_environment(loaded.device),
        model=describe_model(loaded),
        sha256=fingerprint(loaded),
        scheme=scheme.to_dict(),
        tolerance=tolerance,
        tries=(),
        data=held_out.info,
        calibration=seen.info,
        seed=seed,
    )
    place = out.resolve()
    with lock(place.with_name(f".{place.name}.lock"), f"out: {str(out)!r}"):
        visit = _Visit(loaded, seen, held_out, resumed(out, record), out, progress)
        diagnosis = visit.diagnose(tokenizer)
        plain = visit.attempt(None)
        if try_all or not is_good(visit.record, plain):
            visit.measure_sensitivity()
            _try_remedies(visit, plain, _ordered(scheme, diagnosis), try_all=try_all)
        visit.save()  # the tolerance may be another one
    return Consultation(diagnosis=diagnosis, record=visit.record)


def _ordered(scheme: Scheme, diagnosis: DiagnosisRecord) -> list[Remedy]:
    """The remedies that apply to the scheme, those first that the diagnosis promises to help."""
    promising: set[str] = set()
    breaks = scheme_breaks(diagnosis, scheme)
    if breaks["dynamic"] and breaks["rest"]:  # channels carry the outliers, not a few tokens
        promising |= {"smoothquant", "folded", "rotation"}
    if breaks["static"] and not breaks["dynamic"]:
        promising.add("dynamic")
    if breaks["static"] and not breaks["rest"]:
        promising.add("prefix")
    if scheme.weight.bits < 8:
        promising.add("gptq")
        if scheme.weight.scale_type != "e4m3":  # NVFP4 loses more with a rotation
            promising |= {"folded", "rotation"}
    found = [remedy for remedy in REMEDIES if remedy.applies_to(scheme)]
    return sorted(found, key=lambda remedy: remedy.name not in promising)


def _try_remedies(visit: _Visit, plain: Try, remedies: Sequence[Remedy], *, try_all: bool) -> None:
    helped: list[tuple[float, int]] = []
    for index, remedy in enumerate(remedies):
        tried = visit.attempt(
            remedy, later=(*remedies[index + 1 :], *_chain(remedies, visit.scheme))
        )
        if is_good(visit.record, tried) and not try_all:
            return
        if increase(visit.record, tried) < increase(visit.record, plain):
            helped.append((increase(visit.record, tried), index))
    if helped:
        least, _ = min(helped)
        _combine([remedies[index] for _, index in sorted(helped)], visit, least, try_all=try_all)


def _combine(helped: Sequence[Remedy], visit: _Visit, least: float, *, try_all: bool) -> None:
    """Add the remedies to the first one, whose increase is `least`; keep those that reduce it."""
    parts = list(helped[:1])
    for index, remedy in enumerate(helped[1:], 2):
        together = combine([*parts, remedy], visit.scheme)
        if together is None:
            continue
        tried = visit.attempt(together, later=_chain(helped, visit.scheme)[index - 1 :])
        if is_good(visit.record, tried) and not try_all:
            return
        if increase(visit.record, tried) < least:
            parts, least = [*parts, remedy], increase(visit.record, tried)


def _chain(remedies: Sequence[Remedy], scheme: Scheme) -> list[Remedy]:
    """What `_combine` tries at most."""
    found = (combine(remedies[:count], scheme) for count in range(2, len(remedies) + 1))
    return [remedy for remedy in found if remedy is not None]


class _Visit:
    """What was measured so far, and the measurements."""

    def __init__(
        self,
        model: PreTrainedModel,
        seen: Windows,
        held_out: Windows,
        record: DoctorRecord,
        out: Path,
        progress: Progress,
    ) -> None:
        self.record, self.scheme = record, Scheme.from_dict(record.scheme)
        self._model, self._seen, self._held_out = model, seen, held_out
        self._with_prefix: PreTrainedModel | None = None
        self._out, self._progress = out, progress
        self._start, self._done = time.monotonic(), 0.0
        self._remedies = _effort((*REMEDIES, *_chain(REMEDIES, self.scheme)))

    def diagnose(self, tokenizer: PreTrainedTokenizerBase) -> DiagnosisRecord:
        """Diagnose the model."""
        path = self._out / DIAGNOSIS
        if self.record.metrics and path.is_file():
            return DiagnosisRecord.load(path)
        with self._step("diagnosing", _DIAGNOSIS, later=_PLAIN + _SENSITIVITY + self._remedies):
            diagnosis = diagnose(self._model, self._held_out, tokenizer=tokenizer)
        diagnosis.save(path)
        of_tries = (metric for metric in self.record.metrics if metric.where)
        self.save(metrics=(diagnosis.metric("perplexity.windowed"), *of_tries))
        return diagnosis

    def measure_sensitivity(self) -> None:
        """Measure the sensitivity of the scheme to each kind of tensor."""
        if "sensitivity" in self.record.tables:
            return
        what = "measuring the sensitivity to each kind of tensor"
        with self._step(what, _SENSITIVITY, later=self._remedies):
            table = sensitivity_table(
                self._model,
                self.scheme,
                self._held_out.ids_NT[::SHARE],
                self._calibration(self.scheme),
                seed=self.record.seed or 0,
            )
        self.save(tables={"sensitivity": table})

    def attempt(self, remedy: Remedy | None, later: Sequence[Remedy] = ()) -> Try:
        """Try a remedy, or the scheme alone, unless it was tried before.

        Args:
            later: the remedies that may be tried afterwards.
        """
        name, effort = (remedy.name, remedy.effort) if remedy else (PLAIN, _PLAIN)
        for tried in self.record.tries:
            if tried.name == name:
                return tried
        later_effort = _effort(later) if remedy else _SENSITIVITY + self._remedies
        metrics: tuple[Metric, ...] = ()
        with self._step(f"trying {name}", effort, later=later_effort):
            try:
                tried, metrics = self._measured(name, remedy)
            except UserError as error:
                if remedy is None:
                    raise
                tried = Try(
                    name=name, scheme=self.record.scheme, prefix=(), problem=one_line(error)
                )
        self.save(tries=(*self.record.tries, tried), metrics=(*self.record.metrics, *metrics))
        return tried

    def save(self, **changes: Any) -> None:
        """Change fields of the record and write it."""
        self.record = replace(self.record, **changes)
        self.record.save(self._out / RECORD)

    def _measured(self, name: str, remedy: Remedy | None) -> tuple[Try, tuple[Metric, ...]]:
        start = time.perf_counter()
        scheme, model = self.scheme, self._model
        if remedy is not None:
            changed = remedy.apply_to(scheme)
            assert changed is not None
            scheme, model = changed, self._prefixed() if remedy.prefix else model
        quantized = self._quantized(model, scheme)
        stored = get_quantization_config(quantized)
        value = perplexity(quantized, self._held_out.ids_NT)
        linear = [target for target in stored.targets if ":" not in target]
        dynamic = scheme.activation is not None and not scheme.static
        work = len(stored.transforms) / len(linear) + dynamic
        values = {
            "perplexity.windowed": value,
            "doctor.increase": value / self.record["perplexity.windowed"] - 1,
            "doctor.run_time_work": work,
            "doctor.seconds": time.perf_counter() - start,
        }
        count = len(self._held_out)
        added = prefix_of(model) if model is not self._model else None
        tried = Try(
            name=name,
            scheme=stored.scheme,
            prefix=() if added is None else tuple(added.tokens),
            problem="",
        )
        return tried, tuple(
            Metric(name=metric, value=float(value), where=name, n=count)
            for metric, value in values.items()
        )

    def _quantized(self, model: PreTrainedModel, scheme: Scheme) -> PreTrainedModel:
        """The quantized model; if its family has no rotation `hadamard`, with `inputs` instead."""
        options: Any = {"calibration": self._calibration(scheme), "seed": self.record.seed or 0}
        try:
            return quantize(model, scheme, **options)
        except UserError:
            if scheme.rotation != "hadamard" or scheme.rotation == self.scheme.rotation:
                raise
            return quantize(model, scheme.with_options({"rotation": "inputs"}), **options)

    def _prefixed(self) -> PreTrainedModel:
        """The model with the prefix that `oasis prefix` finds."""
        if self._with_prefix is None:
            found = [tried.prefix for tried in self.record.tries if tried.prefix]
            tokens = found[0] if found else self._search()
            self._with_prefix = with_prefix(self._model, compute_prefix(self._model, tokens))
        return self._with_prefix

    def _search(self) -> tuple[int, ...]:
        check_can_have_prefix(self._model)
        check_lengths(self._model, [self._held_out.info.window + LENGTH], "window with the prefix")
        return find_prefix(self._model, search_rows(self._seen.ids_NT), length=LENGTH)

    def _calibration(self, scheme: Scheme) -> list[Tensor] | None:
        return list(self._seen.ids_NT.split(1)) if scheme.needs_calibration else None

    @contextmanager
    def _step(self, what: str, effort: float, *, later: float) -> Iterator[None]:
        """Context of one step, which reports the time left from the speed so far.

        Args:
            effort: of the step.
            later: effort of all steps that may follow.
        """
        left = effort + later
        if self._done:
            seconds = (time.monotonic() - self._start) / self._done * left
            what = f"{what}; at most {math.ceil(seconds / 60)} min left"
        self._progress(what, round(self._done), round(self._done + left))
        yield
        self._done += effort


def _effort(remedies: Sequence[Remedy]) -> float:
    return sum(remedy.effort for remedy in remedies)
