"""How to read the tables of a study: the rules, the warnings that apply, and its progress."""

from __future__ import annotations

from collections.abc import Collection

from oasis_attn.study.results import Results
from oasis_attn.study.statistics import LEVEL, MIN_PAIRS

_PAIRS = (
    "A condition is one corpus, size and seed. Two variants are compared pair by pair in the same "
    "conditions; n is the number of pairs. For metrics that vary in proportion (perplexity, norms, "
    "kurtosis) the change is that of the geometric mean. For fractions, masses and "
    "log-likelihoods it is that of the arithmetic mean."
)
_INTERVALS = (
    f"Intervals are {LEVEL:.0%} bootstrap intervals (BCa) that resample conditions. They are too "
    "narrow if there are few conditions. p-values are from paired t-tests, with Holm's correction "
    "for all rows of their table. Hedges' g is the mean of the paired differences divided by their "
    "standard deviation, with a correction for small samples; it is not shown for fewer than "
    f"{MIN_PAIRS} pairs. Conditions with the same corpus are "
    "not independent samples of all text: the results hold for the corpora in the table."
)
_NOISE_FLOOR = (
    "The noise floor is the change that a different seed alone causes: the root mean square of the "
    "change between any two runs of the reference that differ only in their seed, or of the "
    "baseline if the reference lacks the metric (of several baselines, the largest)."
)
READING_TABLES = (_PAIRS, _INTERVALS, _NOISE_FLOOR)
"""How to read the numbers of the tables."""


def progress_text(results: Results) -> str:
    """How many trials of the plan are finished, and the size of its grid."""
    plan, done = results.plan, len(results.records)
    extra = ""
    if plan.noise_seeds:
        extra = f", and {_count(plan.noise_seeds, 'additional seed')} of {plan.reference}"
    return (
        f"{done} of {len(plan.trials)} trials: {_count(plan.variants, 'variant')} x "
        f"{_count(plan.corpora, 'corpus', 'corpora')} x {_count(plan.sizes, 'size')} x "
        f"{_count(plan.seeds, 'seed')}{extra}."
    )


def _count(items: Collection[object], singular: str, plural: str = "") -> str:
    n = len(items)
    return f"{n} {singular if n == 1 else plural or singular + 's'}"


def notes(results: Results) -> list[str]:
    """Warnings that apply to this study."""
    forms: dict[str, list[str]] = {}
    for variant in dict.fromkeys(trial.variant for trial in results.records):
        forms.setdefault(results.residual_form(variant) or "", []).append(variant)
    found = []
    if len(forms) > 1:
        named = "; ".join(f"{form}: {', '.join(variants)}" for form, variants in forms.items())
        metrics = [metric.label for metric in results.metrics if metric.within_form]
        found.append(
            "A residual sum grows with depth by construction, but a weighted mean of sources does "
            "not, and the following norm removes the scale of both. Metrics that depend on the "
            f"scale ({', '.join(metrics) or 'none here'}) are therefore compared, and averaged "
            "over baselines, only between variants with the same residual form, unless a claim or "
            "criterion says otherwise. The residual forms of this study are: "
            f"{named}."
        )
    versions: dict[str, set[str]] = {}
    for record in results.records.values():
        for name, digest in record.environment.extensions.items():
            versions.setdefault(name, set()).add(digest)
    changed = [name for name, digests in versions.items() if len(digests) > 1]
    if changed:
        found.append(
            f"Trials ran different versions of {', '.join(changed)}, and may therefore not be "
            "comparable."
        )
    configs = [record.model.config or {} for record in results.records.values()]
    if any(each["residual"] != "sum" and each["depth_normalizer"] == "sigmoid" for each in configs):
        found.append(
            "The depth sink rate counts weights above a threshold. Sigmoid weights do not sum to "
            "1, and each of them may be close to 1. Their depth sink rate cannot be compared with "
            "that of the other normalizers."
        )
    return found
