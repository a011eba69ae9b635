"""The paper's claims, the rules they are judged by, and the judgement: all from records.

Claims and rules are data; what the report says about a rule is made from the rule itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oasis_attn.study.measures import measures
from oasis_attn.study.results import Results
from oasis_attn.study.statistics import LEVEL, Comparison, holm

BASELINES = ("vanilla", "clipped_softmax", "gated_attention", "softmax1", "attn_residual")
SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_TESTED = (
    "supported",
    "not supported",
    "undecided at this scale",
    "not tested by this plan",
)
SIGNIFICANCE = 0.05
LEAST = 6  # pairs: a bootstrap interval from fewer is too narrow to exclude anything
RULE = (
    f"A test is won if the change has the claimed direction, its p-value (paired t-test, corrected "
    f"by Holm for all tests in this table) is below {SIGNIFICANCE}, and the change is larger than "
    "the noise floor, what a change of seed alone makes of two runs of the reference. It is lost "
    "if the change is significant the other way; or if it is not significant and its "
    f"{LEVEL:.0%} interval, from at least {LEAST} pairs, wholly falls short of the claimed size. "
    "Otherwise it is open. "
    "A claim is supported if all of its tests are won, not supported if one is lost, and undecided "
    "if none is lost and one is open."
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A change that a claim predicts.

    Attributes:
        measure: name in a cell's record.
        subject: row of the plan.
        against: rows, whose mean is compared with if there are several.
        sign: -1 where the claim is of less, 1 of more.
        size: relative change that the paper reports; None where it reports none.
    """

    measure: str
    subject: str
    against: tuple[str, ...]
    sign: int
    size: float | None = None

    @property
    def words(self) -> str:
        """The prediction as a sentence part."""
        more = "higher" if self.sign > 0 else "lower"
        others = (
            f"`{self.against[0]}`"
            if len(self.against) == 1
            else f"the mean of {', '.join(f'`{row}`' for row in self.against)}"
        )
        size = "" if self.size is None else f" (the paper: {self.size:+.2%})"
        return f"`{self.measure}` of `{self.subject}` is {more} than of {others}{size}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says, and what must be seen for it.

    Attributes:
        text: the claim.
        tests: all must be won.
    """

    text: str
    tests: tuple[Prediction, ...]


def _headline(text: str, measure: str, size: float) -> Claim:
    sign = int(math.copysign(1, size))
    test = Prediction(measure=measure, subject="oasis", against=BASELINES, sign=sign, size=size)
    return Claim(text=text, tests=(test,))


def _lower(measure: str, subject: str, *others: str) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(measure=measure, subject=subject, against=(other,), sign=-1) for other in others
    )


def _higher(measure: str, subject: str, *others: str) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(measure=measure, subject=subject, against=(other,), sign=1) for other in others
    )


CLAIMS = (
    _headline("The largest activation is smaller.", "outlier.max_inf_norm", -0.0926),
    _headline("Kurtosis is lower.", "outlier.avg_kurtosis", -0.0260),
    _headline("W8A8 perplexity is lower.", "perplexity.windowed@w8a8-static", -0.7585),
    _headline("W4A4 Pass@1 is higher, on GSM8K.", "gsm8k.pass@1.strict@w4a4", 0.1242),
    _headline("The same on easier problems, `arith`.", "arith.pass@1.strict@w4a4", 0.1242),
    Claim(
        text="Normalising over tokens and over depth intensifies sinks: more than a residual sum, "
        "and more than depth routing without a normaliser.",
        tests=_higher("sink.mass", "attn_residual", "vanilla", "depth_sigmoid_only"),
    ),
    Claim(
        text="The same of the joint distribution over sources and positions (assumption D.4).",
        tests=_higher(
            "joint.leakage_renormalised", "attn_residual", "vanilla", "depth_sigmoid_only"
        ),
    ),
    Claim(
        text="The inter-layer signal, not Softmax1 alone, makes the largest activation smaller: "
        "more than without it, and more than with its information shuffled away.",
        tests=_lower("outlier.max_inf_norm", "oasis", "oasis_signal_off", "oasis_signal_shuffled"),
    ),
    Claim(
        text="The same of kurtosis.",
        tests=_lower("outlier.avg_kurtosis", "oasis", "oasis_signal_off", "oasis_signal_shuffled"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A test with its numbers: None where the study has no unit for it.

    Attributes:
        test: what was predicted.
        numbers: what was seen.
        p: corrected for all tests of the verdict.
        floor: the noise floor, relative.
        outcome: `won`, `lost`, `open` or `untested`.
    """

    test: Prediction
    numbers: Comparison | None
    p: float
    floor: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, what was found of each of its tests, and what that says of it."""

    claim: Claim
    findings: tuple[Finding, ...]
    verdict: str


def judge(results: Results, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Each claim by `RULE`; the p-values of all tests are corrected together."""
    known = {measure.name: measure for measure in measures(results.plan.schemes)}
    tests = [test for claim in claims for test in claim.tests]
    seen = [
        results.compare(known[test.measure], test.subject, test.against)
        if test.measure in known
        else None
        for test in tests
    ]
    corrected = holm(math.nan if numbers is None else numbers.p for numbers in seen)
    tested = []
    for test, numbers, p in zip(tests, seen, corrected, strict=True):
        floor = results.floor(known[test.measure])[0] if test.measure in known else math.nan
        outcome = decide(test, numbers, p, floor)
        tested.append(Finding(test=test, numbers=numbers, p=p, floor=floor, outcome=outcome))
    found, position = [], 0
    for claim in claims:
        own = tuple(tested[position : position + len(claim.tests)])
        position += len(claim.tests)
        verdict = conclude([finding.outcome for finding in own])
        found.append(Verdict(claim=claim, findings=own, verdict=verdict))
    return found


def decide(test: Prediction, numbers: Comparison | None, p: float, floor: float) -> str:
    """The outcome of one test, by `RULE`."""
    if numbers is None:
        return "untested"
    claimed = test.sign * (numbers.subject - numbers.baseline) > 0
    significant = p < SIGNIFICANCE
    if significant and not claimed:
        return "lost"
    if significant and abs(numbers.change) > floor:
        return "won"
    if not significant and test.size is not None and numbers.n >= LEAST:
        short = (test.sign * end < abs(test.size) for end in (numbers.low, numbers.high))
        if all(short):
            return "lost"
    return "open"


def conclude(outcomes: Sequence[str]) -> str:
    """What the outcomes of a claim's tests say of it, by `RULE`."""
    if "lost" in outcomes:
        return NOT_SUPPORTED
    if "untested" in outcomes:
        return NOT_TESTED
    return SUPPORTED if all(outcome == "won" for outcome in outcomes) else UNDECIDED
