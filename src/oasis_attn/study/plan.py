"""A study as data: which models are trained, on what, how they are measured and compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from oasis_attn.data import load_corpus
from oasis_attn.errors import UserError, check_choice, check_seed, check_whole, shown
from oasis_attn.evaluation import EvaluationConfig
from oasis_attn.modeling.configuration import OasisConfig, check_settings
from oasis_attn.modeling.sizes import text_config
from oasis_attn.modeling.variants import settings_of, variants
from oasis_attn.quantization.schemes import schemes
from oasis_attn.training import TrainingConfig

_OF_THE_GRID = {"out", "from_model", "variant", "settings", "corpus", "size", "seed", "resume"}
_BUDGET = tuple(f.name for f in fields(TrainingConfig) if f.name not in _OF_THE_GRID)
_OF_A_ROW = ("learning_rate", "learning_rates", "outlier_penalty")  # the data stay those of others
_TASK_SETTINGS = ("limit", "shots", "max_new_tokens", "batch_size")
_LONGEST_NAME = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.+-]{{0,{_LONGEST_NAME - 1}}}")
_MOST_THREADS = 1024
_LONGEST_ID = 200  # bytes; names of files, which hold it and more, have at most 255


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a study: trained, measured, quantised and evaluated as said here.

    Attributes:
        row: what the plan calls this variant.
        variant, settings, size, corpus, seed: as `TrainingConfig` takes them.
        training: its other settings.
        windows: of held-out text that are measured; as many others calibrate static ranges.
        schemes: of quantisation, each measured and evaluated beside the float model.
        tasks: names in `oasis_attn.evaluation.TASKS`.
        evaluation: settings of `EvaluationConfig` for these.
        threads: of the processor; they decide the last digits.
    """

    row: str
    variant: str
    settings: Mapping[str, Any]
    size: str
    corpus: str
    seed: int
    training: Mapping[str, Any]
    windows: int
    schemes: tuple[str, ...]
    tasks: tuple[str, ...]
    evaluation: Mapping[str, Any]
    threads: int

    @cached_property
    def id(self) -> str:
        """A readable name, and a hash of all that is said here."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        corpus, size = (Path(name).stem for name in (self.corpus, self.size))
        return f"{corpus}-{size}-{self.row}-s{self.seed}-{digest[:8]}"

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def unit(self) -> tuple[str, str, int]:
        """Corpus, size and seed: cells that share them are compared."""
        return self.corpus, self.size, self.seed

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return json.loads(json.dumps(asdict(self)))

    def training_config(self, out: Path, *, resume: bool = False) -> TrainingConfig:
        """The run that makes the model, in `out`."""
        return TrainingConfig(
            out=out,
            variant=self.variant,
            settings=self.settings,
            size=self.size,
            corpus=self.corpus,
            seed=self.seed,
            resume=resume,
            **self.training,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid of variants x corpora x sizes x seeds, and what is done with each cell.

    Attributes:
        name: of the study.
        about: what it asks, in a sentence or two.
        variants: row name -> {variant, settings}, and `training` where its rates or penalty are not
            the plan's; a row named after a variant is that variant.
        corpora: corpus -> the tasks that models trained on it are evaluated on.
        seeds: of each cell: initial weights and order of data.
        compare: row -> the rows it is compared with, one by one and (from two on) with their mean.
        bar: rows that are held against the bar of `oasis_attn.study.bar`.
        sizes: of the backbone.
        noise_seeds: further seeds of the row `reference`, from which the noise floor is taken.
        reference: see there.
        training: settings of `TrainingConfig` shared by all cells but where a row says otherwise.
        windows, schemes, evaluation, threads: see `Cell`.

    Raises:
        UserError: at construction, for any value that a cell could not run with.
    """

    name: str
    about: str
    variants: Mapping[str, Mapping[str, Any]]
    corpora: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    compare: Mapping[str, tuple[str, ...]]
    bar: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("nano",)
    noise_seeds: tuple[int, ...] = ()
    reference: str = "vanilla"
    training: Mapping[str, Any] = field(default_factory=dict)
    windows: int = 32
    schemes: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        for named in (self.name, *self.variants):
            if not _NAME.fullmatch(named):
                raise UserError(
                    f"name: {shown(named)} is not up to {_LONGEST_NAME} letters, digits, _ . + -"
                    " (a file name)"
                )
        for argument in ("variants", "corpora", "seeds", "sizes"):
            if not getattr(self, argument):
                raise UserError(f"{argument}: a study needs at least one")
        for argument in ("seeds", "sizes", "schemes", "noise_seeds"):
            values = getattr(self, argument)
            if len(set(values)) < len(values):
                raise UserError(f"{argument}: {list(values)} names one twice")
        for seed in (*self.seeds, *self.noise_seeds):
            check_seed("seeds", seed)
        for seed in self.noise_seeds:
            if seed in self.seeds:
                raise UserError(f"noise_seeds: {seed} is among seeds {list(self.seeds)} already")
        check_whole("windows", self.windows, 2)
        check_whole("threads", self.threads, 1, _MOST_THREADS)
        if self.noise_seeds or self.reference != "vanilla":
            check_choice("reference", self.reference, self.variants)
        for subject, baselines in self.compare.items():
            for row in (subject, *baselines):
                check_choice("compare", row, self.variants)
            if not baselines or subject in baselines:
                raise UserError(f"compare: {subject!r} needs rows other than itself")
        for row in self.bar:
            check_choice("bar", row, self.variants)
        for scheme in self.schemes:
            check_choice("schemes", scheme, schemes())
        for setting in self.training:
            check_choice("training", setting, _BUDGET)
        for setting in self.evaluation:
            check_choice("evaluation", setting, _TASK_SETTINGS)
        EvaluationConfig(tasks=("arith",), **self.evaluation)
        for corpus, tasks in self.corpora.items():
            for split in ("train", self.eval_split):
                load_corpus(corpus, split)
            if "perplexity" in tasks:
                raise UserError(
                    f"tasks of {corpus!r}: 'perplexity' is measured in every study, on its own text"
                )
            if tasks:
                EvaluationConfig(tasks=tasks, **self.evaluation)
        for row in self.variants:
            self._check_row(row)
        for cell in self.cells:
            if len(cell.id.encode()) > _LONGEST_ID:
                raise UserError(f"name: {shown(cell.id)}, of a cell, is too long for a file")

    @property
    def eval_split(self) -> str:
        """The split of each corpus that is measured and calibrated on."""
        return str(self.training.get("eval_split", "validation"))

    def _check_row(self, row: str) -> None:
        given = self.variants[row]
        variant, settings = given["variant"], given["settings"]
        for name in given.get("training", ()):
            check_choice(f"training of {row!r}", name, _OF_A_ROW)
        if row in variants() and (variant != row or settings or "training" in given):
            raise UserError(f"variants: {row!r} is the name of a variant; name this one otherwise")
        check_settings(settings)
        chosen = settings_of(variant) | dict(settings)
        for size in self.sizes:
            OasisConfig(text_config=text_config(size), **chosen)
        next(cell for cell in self.cells if cell.row == row).training_config(Path(row))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, seed by seed: a study that is cut short has compared whole grids."""
        return tuple(self._cells())

    def _cells(self) -> Iterator[Cell]:
        for seed in (*self.seeds, *self.noise_seeds):
            for corpus, tasks in self.corpora.items():
                for size in self.sizes:
                    for row, chosen in self.variants.items():
                        if seed in self.noise_seeds and row != self.reference:
                            continue
                        yield Cell(
                            row=row,
                            variant=chosen["variant"],
                            settings=chosen["settings"],
                            size=size,
                            corpus=corpus,
                            seed=seed,
                            training={**self.training, **chosen.get("training", {})},
                            windows=self.windows,
                            schemes=self.schemes,
                            tasks=tasks,
                            evaluation=self.evaluation,
                            threads=self.threads,
                        )

    def cell(self, cell_id: str) -> Cell:
        """The cell of this id; `UserError` with the nearest one if there is none."""
        found = {cell.id: cell for cell in self.cells}
        if cell_id not in found:
            check_choice("cell", cell_id, tuple(found))
        return found[cell_id]

    def to_dict(self) -> dict[str, Any]:
        """As YAML and JSON take it, and `from_dict` reads it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, given: Any) -> Plan:
        """A plan from plain values.

        Rows of `variants` may be empty (the variant of that name) or lack any of their entries;
        `corpora` may be a list, where no tasks are asked for.

        Raises:
            UserError: see the class; fields missing, unknown or of another kind.
        """
        if not isinstance(given, Mapping):
            raise UserError("plan: it is not a mapping of fields to values")
        known = {f.name: f for f in fields(cls)}
        for name in given:
            check_choice("plan", name, known)
        for name in ("name", "about", "variants", "corpora", "seeds", "compare"):
            if name not in given:
                raise UserError(f"plan: field {name!r} is missing")
        plain = dict(given)
        for name in ("name", "about", "reference"):
            if not isinstance(plain.get(name, ""), str):
                raise UserError(f"{name}: {shown(plain[name])} is not text")
        kinds = {"seeds": int, "noise_seeds": int, "bar": str, "sizes": str, "schemes": str}
        for name, kind in kinds.items():
            if name in plain:
                plain[name] = _sequence(name, plain[name], kind)
        plain["variants"] = {
            row: _row(row, chosen) for row, chosen in _mapping("variants", plain["variants"])
        }
        plain["corpora"] = {
            corpus: _sequence(f"tasks of {corpus!r}", tasks or (), str)
            for corpus, tasks in _mapping("corpora", plain["corpora"])
        }
        plain["compare"] = {
            row: _sequence(f"compare[{row!r}]", others, str)
            for row, others in _mapping("compare", plain["compare"])
        }
        for name in ("training", "evaluation"):
            plain[name] = dict(_mapping(name, plain.get(name) or {}))
        return cls(**plain)


def _row(row: str, chosen: Any) -> dict[str, Any]:
    given = dict(_mapping(f"variants[{row!r}]", chosen or {}))
    for name in given:
        check_choice(f"variants[{row!r}]", name, ("variant", "settings", "training"))
    settings = dict(_mapping(f"settings of {row!r}", given.get("settings") or {}))
    plain: dict[str, Any] = {"variant": given.get("variant", row), "settings": settings}
    if given.get("training"):
        plain["training"] = dict(_mapping(f"training of {row!r}", given["training"]))
    return plain


def _mapping(argument: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Its items; a sequence of names is a mapping of each to nothing."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = dict.fromkeys(_sequence(argument, value, str))
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{argument}: {shown(value)} is not a mapping of names to values")
    return iter(value.items())


def _sequence(argument: str, value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{argument}: {shown(value)} is not a list")
    for item in value:
        if not isinstance(item, kind) or isinstance(item, bool):
            kinds = {int: "a whole number", str: "text"}
            raise UserError(f"{argument}: {shown(item)} is not {kinds[kind]}")
    return tuple(value)
