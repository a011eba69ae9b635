"""The claims of the paper, the rules that test them, and the verdicts, computed from records.

Claims and rules are data.  The text of a rule in a report is generated from the same data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oasis_attn.study.results import Results
from oasis_attn.study.statistics import LEVEL, Comparison, holm
from oasis_attn.study.study_metrics import study_metrics

BASELINES = ("vanilla", "clipped_softmax", "gated_attention", "softmax1", "attn_residual")
SUPPORTED, NOT_SUPPORTED, CLAIM_INCONCLUSIVE, CLAIM_NOT_TESTED = (
    "supported",
    "not supported",
    "inconclusive at this scale",
    "not tested by this plan",
)
PASSED, FAILED, INCONCLUSIVE, NOT_TESTED = "passed", "failed", "inconclusive", "not tested"
OUTCOMES = (PASSED, FAILED, INCONCLUSIVE, NOT_TESTED)
SIGNIFICANCE = 0.05
MIN_PAIRS = 6
"""A bootstrap interval from fewer pairs is too narrow to exclude an effect."""
RULE = (
    f"A test is passed if the change has the claimed direction, its p-value (paired t-test with "
    f"Holm's correction for all tests of this table) is below {SIGNIFICANCE}, and the change is "
    "larger than the noise floor. A test is failed if the change is significant in the opposite "
    f"direction. It is also failed if the change is not significant and its {LEVEL:.0%} interval, "
    f"from at least {MIN_PAIRS} pairs, contains only changes smaller than the claimed one. "
    "Otherwise the test is inconclusive. "
    "A claim is supported if all of its tests are passed, and not supported if one is failed. "
    "Otherwise it is inconclusive, or not tested if the study lacks the data for a test."
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A change that a claim predicts.

    Attributes:
        metric: name of the metric in the record of a trial.
        variant: the variant that the claim is about.
        baselines: the variants that it is compared with; several are averaged.
        sign: -1 if the claim says lower, 1 if it says higher.
        size: the relative change in the paper; None if the paper gives no number.
    """

    metric: str
    variant: str
    baselines: tuple[str, ...]
    sign: int
    size: float | None = None

    @property
    def text(self) -> str:
        """The prediction as a sentence."""
        direction = "higher" if self.sign > 0 else "lower"
        names = [f"`{name}`" for name in self.baselines]
        baseline = names[0] if len(names) == 1 else f"the mean of {', '.join(names)}"
        size = "" if self.size is None else f" (paper: {self.size:+.2%})"
        return f"`{self.metric}` of `{self.variant}` is {direction} than that of {baseline}{size}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper.

    Attributes:
        text: the claim.
        tests: the predictions that must all be passed.
    """

    text: str
    tests: tuple[Prediction, ...]


def _headline(text: str, metric: str, size: float) -> Claim:
    sign = int(math.copysign(1, size))
    test = Prediction(metric=metric, variant="oasis", baselines=BASELINES, sign=sign, size=size)
    return Claim(text=text, tests=(test,))


def _each(metric: str, variant: str, *baselines: str, sign: int) -> tuple[Prediction, ...]:
    """One prediction for each baseline."""
    return tuple(
        Prediction(metric=metric, variant=variant, baselines=(baseline,), sign=sign)
        for baseline in baselines
    )


CLAIMS = (
    _headline("OASIS lowers the largest activation.", "outlier.max_inf_norm", -0.0926),
    _headline("OASIS lowers kurtosis.", "outlier.avg_kurtosis", -0.0260),
    _headline("OASIS lowers W8A8 perplexity.", "perplexity.windowed@w8a8-static", -0.7585),
    _headline("OASIS raises W4A4 Pass@1 on GSM8K.", "gsm8k.pass@1.strict@w4a4", 0.1242),
    _headline(
        "OASIS raises W4A4 Pass@1 on `arith`, which has easier problems.",
        "arith.pass@1.strict@w4a4",
        0.1242,
    ),
    Claim(
        text="Normalizing over tokens and over depth intensifies sinks, compared with a residual "
        "sum and with depth routing without normalization.",
        tests=_each("sink.mass", "attn_residual", "vanilla", "depth_sigmoid_only", sign=1),
    ),
    Claim(
        text="It also intensifies sinks in the joint distribution over sources and positions "
        "(assumption D.4).",
        tests=_each(
            "joint.leakage_renormalized", "attn_residual", "vanilla", "depth_sigmoid_only", sign=1
        ),
    ),
    Claim(
        text="The null signal between layers, not Softmax1 alone, lowers the largest activation: "
        "it is lower than without the signal and than with a shuffled signal.",
        tests=_each(
            "outlier.max_inf_norm", "oasis", "oasis_signal_off", "oasis_signal_shuffled", sign=-1
        ),
    ),
    Claim(
        text="The null signal, not Softmax1 alone, lowers kurtosis.",
        tests=_each(
            "outlier.avg_kurtosis", "oasis", "oasis_signal_off", "oasis_signal_shuffled", sign=-1
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class PredictionResult:
    """The result of one test.

    Attributes:
        test: the prediction.
        comparison: the statistics; None if the study has no pair for it.
        p_holm: p-value with Holm's correction for all tests of the verdict.
        noise_floor: relative change that a different seed alone causes.
        outcome: one of `OUTCOMES`.
    """

    test: Prediction
    comparison: Comparison | None
    p_holm: float
    noise_floor: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, the results of its tests, and the verdict that follows from them."""

    claim: Claim
    results: tuple[PredictionResult, ...]
    verdict: str


def judge(results: Results, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Judge each claim by `RULE`; the p-values of all tests are corrected together."""
    known = {metric.name: metric for metric in study_metrics(results.plan.schemes)}
    tests = [test for claim in claims for test in claim.tests]
    comparisons = [
        results.compare(known[test.metric], test.variant, test.baselines)
        if test.metric in known
        else None
        for test in tests
    ]
    corrected = holm(math.nan if each is None else each.p for each in comparisons)
    tested = []
    for test, comparison, p in zip(tests, comparisons, corrected, strict=True):
        floor = results.noise_floor(known[test.metric])[0] if test.metric in known else math.nan
        outcome = decide(test, comparison, p, floor)
        tested.append(
            PredictionResult(
                test=test, comparison=comparison, p_holm=p, noise_floor=floor, outcome=outcome
            )
        )
    verdicts, position = [], 0
    for claim in claims:
        own = tuple(tested[position : position + len(claim.tests)])
        position += len(claim.tests)
        verdict = conclude([result.outcome for result in own])
        verdicts.append(Verdict(claim=claim, results=own, verdict=verdict))
    return verdicts


def decide(
    test: Prediction, comparison: Comparison | None, p_holm: float, noise_floor: float
) -> str:
    """The outcome of one test, by `RULE`."""
    if comparison is None:
        return NOT_TESTED
    claimed = test.sign * (comparison.mean - comparison.baseline_mean) > 0
    significant = p_holm < SIGNIFICANCE
    if significant and not claimed:
        return FAILED
    if significant and abs(comparison.change) > noise_floor:
        return PASSED
    if not significant and test.size is not None and comparison.n >= MIN_PAIRS:
        ends = (comparison.low, comparison.high)
        if all(test.sign * end < abs(test.size) for end in ends):
            return FAILED
    return INCONCLUSIVE


def conclude(outcomes: Sequence[str]) -> str:
    """The verdict on a claim from the outcomes of its tests, by `RULE`."""
    if FAILED in outcomes:
        return NOT_SUPPORTED
    if NOT_TESTED in outcomes:
        return CLAIM_NOT_TESTED
    return SUPPORTED if all(each == PASSED for each in outcomes) else CLAIM_INCONCLUSIVE
