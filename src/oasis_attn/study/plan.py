"""The plan of a study: which models are trained, on what, and how they are compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from oasis_attn.data.tasks import is_task
from oasis_attn.errors import UserError, check_choice, check_seed, check_whole, shown
from oasis_attn.modeling.variants import variants
from oasis_attn.study.claim import Claim, Criterion, read_claims, read_criteria
from oasis_attn.study.plan_checks import check_model, check_names, check_variant
from oasis_attn.study.plan_claims import check_claims, check_criteria
from oasis_attn.study.reading import read_fields, read_list, read_mapping
from oasis_attn.study.study_metrics import residual_form
from oasis_attn.training import TrainingConfig

_MAX_NAME_LENGTH = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.+-]{{0,{_MAX_NAME_LENGTH - 1}}}")
_MAX_THREADS = 1024
_MAX_ID_LENGTH = 200  # bytes; file names contain the id, and can have 255 bytes
_MIN_WINDOWS = 2


class Condition(NamedTuple):
    """What two trials must share so that they are compared as a pair."""

    corpus: str
    size: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One model of a study: how it is trained, measured, quantized and evaluated.

    Attributes:
        variant: name of the variant in the plan.
        base: the variant of `oasis variants` that it is built from.
        overrides: `OasisConfig` settings that replace those of `base`.
        size, corpus, seed: see `TrainingConfig`; or a size of `oasis_attn.lab.LAB_SIZES` and a
            task of `oasis_attn.data.trigger`.
        training: the other fields of `TrainingConfig`; for a task, those of `DecoderTraining`.
        windows: number of held-out windows (for a task, sequences) to measure on; as many others
            calibrate static ranges.
        schemes: quantization schemes; the model is measured and evaluated with each.
        tasks: names in `oasis_attn.evaluation.TASKS`.
        evaluation: fields of `EvaluationConfig` for these tasks.
        threads: CPU threads; the last digits of the results depend on their number.
    """

    variant: str
    base: str
    overrides: Mapping[str, Any]
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
        """A readable name with a hash of all fields."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        corpus, size = (Path(name).stem for name in (self.corpus, self.size))
        return f"{corpus}-{size}-{self.variant}-s{self.seed}-{digest[:8]}"

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def condition(self) -> Condition:
        """Trials with the same condition are compared as pairs."""
        return Condition(self.corpus, self.size, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def on_task(self) -> bool:
        """Whether it is a decoder on a generated task, not a language model on a corpus."""
        return is_task(self.corpus)

    def training_config(self, out: Path, *, resume: bool = False) -> TrainingConfig:
        """The training run of a language model, in the folder `out`."""
        return TrainingConfig(
            out=out,
            variant=self.base,
            settings=self.overrides,
            size=self.size,
            corpus=self.corpus,
            seed=self.seed,
            resume=resume,
            **self.training,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid of variants x corpora x sizes x seeds: one trial for each combination.

    Attributes:
        name: name of the study.
        about: the question that it answers, in a sentence or two.
        variants: name -> {base, overrides, training}.  `training` changes learning rates, the
            outlier penalty or the trained parameters for this variant, see `training_of`.  A name
            of `oasis variants` means that variant.
        corpora: corpus -> the tasks that models trained on it are evaluated on; or names of
            generated tasks (`oasis_attn.data.trigger`), none of which is text.
        seeds: random seeds; each sets the initial weights and the data order.
        compare: variant -> its baselines; it is compared with each and, from two on, with their
            mean.
        claims: what the study is to decide; see `claim.read_claims`.
        criteria: what each candidate must reach; see `claim.read_criteria`.
        candidates: variants that are checked against the criteria.
        sizes: sizes of the backbone.
        noise_seeds: additional seeds of `reference`, for the noise floor only.
        reference: the variant that the noise floor is estimated from, except for metrics that it
            lacks; by default, `vanilla`, or the first variant if there is no variant of this name.
        training: fields of `TrainingConfig` for all trials.
        windows, schemes, evaluation, threads: see `Trial`.

    Raises:
        UserError: at construction, for values that contradict each other.  `check` raises it for
            values that a trial cannot run with.
    """

    name: str
    about: str
    variants: Mapping[str, Mapping[str, Any]]
    corpora: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    compare: Mapping[str, tuple[str, ...]]
    claims: tuple[Claim, ...] = ()
    criteria: tuple[Criterion, ...] = ()
    candidates: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("nano",)
    noise_seeds: tuple[int, ...] = ()
    reference: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    windows: int = 32
    schemes: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        for name in (self.name, *self.variants):
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"name: {shown(name)} is not a file name of at most {_MAX_NAME_LENGTH} letters,"
                    " digits and _ . + -, with a letter or digit first"
                )
        for argument in ("variants", "corpora", "seeds", "sizes"):
            if not getattr(self, argument):
                raise UserError(f"{argument}: a study requires at least one")
        for argument in ("seeds", "sizes", "schemes", "noise_seeds"):
            values = getattr(self, argument)
            if len(set(values)) < len(values):
                raise UserError(f"{argument}: {list(values)} has duplicates")
        for seed in (*self.seeds, *self.noise_seeds):
            check_seed("seeds", seed)
        for seed in self.noise_seeds:
            if seed in self.seeds:
                raise UserError(f"noise_seeds: {seed} is already one of seeds {list(self.seeds)}")
        if len({is_task(corpus) for corpus in self.corpora}) > 1:
            raise UserError(
                f"corpora: {', '.join(self.corpora)} are corpora of text and generated tasks;"
                " a study has only one of the two"
            )
        check_whole("windows", self.windows, _MIN_WINDOWS)
        check_whole("threads", self.threads, 1, _MAX_THREADS)
        if not self.reference:
            default = "vanilla" if "vanilla" in self.variants else next(iter(self.variants))
            object.__setattr__(self, "reference", default)
        check_choice("reference", self.reference, self.variants)
        for variant, baselines in self.compare.items():
            for name in (variant, *baselines):
                check_choice("compare", name, self.variants)
            if not baselines or variant in baselines:
                raise UserError(f"compare: {variant!r} requires baselines other than itself")
        for name in self.candidates:
            check_choice("candidates", name, self.variants)
        if bool(self.criteria) != bool(self.candidates):
            raise UserError("criteria: they require candidates, and candidates require criteria")
        check_claims(self)
        check_criteria(self)
        for trial in self.trials:
            if len(trial.id.encode()) > _MAX_ID_LENGTH:
                raise UserError(
                    f"name: trial id {shown(trial.id)} has more than {_MAX_ID_LENGTH} bytes"
                )

    def check(self, variants: Iterable[str] | None = None) -> None:
        """Check that trials can run; a plan of published results need not be runnable.

        Args:
            variants: names of the variants whose trials will run; by default, all.

        Raises:
            UserError: a setting, scheme, task, size or corpus is unknown or invalid.
        """
        check_names(self)
        names = self.variants if variants is None else variants
        settings = {name: check_variant(self, name) for name in names}
        for name, given in settings.items():
            trial = next(trial for trial in self.trials if trial.variant == name)
            check_model(trial, self.sizes, given)  # imports torch

    @property
    def on_task(self) -> bool:
        """Whether the trials are decoders on generated tasks, not language models on corpora."""
        return any(map(is_task, self.corpora))

    @property
    def eval_split(self) -> str:
        """The split of each corpus that is used for measurement and calibration."""
        return str(self.training.get("eval_split", "validation"))

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial, ordered by seed, so that a partial study contains all variants."""
        return tuple(self._trials())

    def _trials(self) -> Iterator[Trial]:
        for seed in (*self.seeds, *self.noise_seeds):
            for corpus, tasks in self.corpora.items():
                for size in self.sizes:
                    for name, given in self.variants.items():
                        if seed in self.noise_seeds and name != self.reference:
                            continue
                        yield Trial(
                            variant=name,
                            base=given["base"],
                            overrides=given["overrides"],
                            size=size,
                            corpus=corpus,
                            seed=seed,
                            training=self.training_of(name),
                            windows=self.windows,
                            schemes=self.schemes,
                            tasks=tasks,
                            evaluation=self.evaluation,
                            threads=self.threads,
                        )

    def training_of(self, variant: str) -> dict[str, Any]:
        """The training of a variant: its own fields in place of those of all trials.

        Its own learning rates are added to those of all trials, or replace those of the same group.
        """
        own = self.variants[variant].get("training", {})
        found = {**self.training, **own}
        common, rates = (each.get("learning_rates") for each in (self.training, own))
        if isinstance(common, Mapping) and isinstance(rates, Mapping):
            found["learning_rates"] = {**common, **rates}
        return found

    def trial(self, trial_id: str) -> Trial:
        """The trial with this id; `UserError` with the nearest id if there is none."""
        found = {trial.id: trial for trial in self.trials}
        if trial_id not in found:
            check_choice("trial", trial_id, tuple(found))
        return found[trial_id]

    def residual_form(self, variant: str) -> str | None:
        """The residual form of a variant; None if its base is not a variant of this version."""
        given = self.variants[variant]
        base = variants().get(given["base"])
        return None if base is None else residual_form(base | given["overrides"])

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, which `from_dict` reads."""
        given = json.loads(json.dumps(asdict(self)))
        return given | {name: _without_defaults(given[name]) for name in ("claims", "criteria")}

    @classmethod
    def from_dict(cls, given: Any) -> Plan:
        """Build a plan from JSON or YAML values.

        An entry of `variants` may be empty (the variant of that name) or have any subset of its
        fields.  `corpora` may be a list if there are no tasks.

        Raises:
            UserError: as the class; a field is missing, unknown or of a wrong type.
        """
        required = ("name", "about", "variants", "corpora", "seeds", "compare")
        plain = read_fields("plan", given, {f.name: f for f in fields(cls)}, required)
        for name in ("name", "about", "reference"):
            if not isinstance(plain.get(name, ""), str):
                raise UserError(f"{name}: {shown(plain[name])} is not text")
        kinds = {
            "seeds": int, "noise_seeds": int, "candidates": str, "sizes": str, "schemes": str,
        }  # fmt: skip
        for name, kind in kinds.items():
            if name in plain:
                plain[name] = read_list(name, plain[name], kind)
        plain["variants"] = {
            variant: _variant(variant, given)
            for variant, given in read_mapping("variants", plain["variants"])
        }
        plain["corpora"] = {
            corpus: read_list(f"tasks of {corpus!r}", tasks or (), str)
            for corpus, tasks in read_mapping("corpora", plain["corpora"])
        }
        plain["compare"] = {
            variant: read_list(f"compare[{variant!r}]", baselines, str)
            for variant, baselines in read_mapping("compare", plain["compare"])
        }
        plain["claims"] = read_claims(plain.get("claims") or ())
        plain["criteria"] = read_criteria(plain.get("criteria") or ())
        for name in ("training", "evaluation"):
            plain[name] = dict(read_mapping(name, plain.get(name) or {}))
        try:
            json.dumps({name: plain[name] for name in plain if name not in ("claims", "criteria")})
        except (TypeError, ValueError) as error:  # YAML has types such as dates and bytes
            raise UserError(f"plan: {error}") from None
        return cls(**plain)


def _variant(name: str, value: Any) -> dict[str, Any]:
    given = dict(read_mapping(f"variants[{name!r}]", value or {}))
    for field_name in given:
        check_choice(f"variants[{name!r}]", field_name, ("base", "overrides", "training"))
    overrides = dict(read_mapping(f"overrides of {name!r}", given.get("overrides") or {}))
    base = given.get("base", name)
    if not isinstance(base, str):
        raise UserError(f"base of {name!r}: {shown(base)} is not text")
    plain: dict[str, Any] = {"base": base, "overrides": overrides}
    if given.get("training"):
        plain["training"] = dict(read_mapping(f"training of {name!r}", given["training"]))
    return plain


def _without_defaults(value: Any) -> Any:
    """Claims and criteria without the fields that are None, False or empty."""
    if isinstance(value, list):
        return [_without_defaults(each) for each in value]
    if isinstance(value, dict):
        return {
            name: _without_defaults(each)
            for name, each in value.items()
            if not (each is None or each is False or each == [])
        }
    return value
