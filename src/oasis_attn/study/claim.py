"""What a study is to decide: claims with their tests, and acceptance criteria.

They are data in the YAML file of a plan, or in a file of the package that the plan names.  The
text of the rules in a report is generated from these data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from oasis_attn.errors import UserError, check_at_least, check_choice, check_flag, shown
from oasis_attn.study.lookup import shipped_claims
from oasis_attn.study.reading import read_fields, read_list, read_text
from oasis_attn.study.yaml_text import parse_yaml

EXPECTED = ("lower", "higher", "equal")
KINDS = ("change", "slope")
REFERENCE, UNQUANTIZED, FIXED = "reference", "unquantized", "fixed"
NOISE_FLOOR = "noise floor"
_LARGEST = 1e6  # of sizes, margins and limits


@dataclass(frozen=True, kw_only=True)
class ClaimTest:
    """One prediction of a claim.

    Attributes:
        metric: name of the metric in the record of a trial.
        variant: the variant that the claim is about.
        expect: `lower` or `higher` than the baselines, or `equal` to them within `margin`.
        baselines: the variants that it is compared with; several are averaged in each condition.
            A slope without baselines is compared with 0.
        kind: `change` compares the values of the metric.  `slope` compares the slopes of its
            logarithm against the logarithm of the number of layers, over the sizes of the plan.
        size: the claimed relative change; None if the claim gives no number.
        margin: the smallest change that matters.  If a test for equivalence shows that the change
            is smaller, the two are equivalent.  A relative change for metrics that vary in
            proportion; an absolute difference for fractions, log-likelihoods and slopes.
        across_residual_forms: compare a metric that depends on the residual form also with
            baselines that have another form.
    """

    metric: str
    variant: str
    expect: str
    baselines: tuple[str, ...] = ()
    kind: str = "change"
    size: float | None = None
    margin: float | None = None
    across_residual_forms: bool = False

    def __post_init__(self) -> None:
        check_choice("expect", self.expect, EXPECTED)
        check_choice("kind", self.kind, KINDS)
        check_flag("across_residual_forms", self.across_residual_forms)
        if not self.baselines and self.kind == "change":
            raise UserError("baselines: a test of kind 'change' requires at least one")
        if self.variant in self.baselines or len(set(self.baselines)) < len(self.baselines):
            raise UserError(f"baselines: {list(self.baselines)} must be different other variants")
        if self.size is not None:
            check_at_least("size", self.size, -_LARGEST, _LARGEST)
            if self.size * self.sign <= 0:
                raise UserError(f"size: {self.size} is not a change that is {self.expect}")
        if self.margin is not None:
            check_at_least("margin", self.margin, 0, _LARGEST)
        if not self.margin and (self.expect == "equal" or self.margin == 0):
            raise UserError("margin: a number above 0 is required to test for equivalence")

    @property
    def sign(self) -> int:
        """1 for `higher`, -1 for `lower`, 0 for `equal`."""
        return {"lower": -1, "higher": 1, "equal": 0}[self.expect]

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that the test needs."""
        return self.variant, *self.baselines

    @property
    def text(self) -> str:
        """The prediction as a sentence."""
        subject = f"`{self.metric}` of `{self.variant}`"
        if self.kind == "slope":
            subject = f"the slope of log {subject} against log layers"
        names = [f"`{name}`" for name in self.baselines]
        baseline = "that of " + ("the mean of " if len(names) > 1 else "") + ", ".join(names)
        relation = "equal to" if self.expect == "equal" else f"{self.expect} than"
        extra = []
        if self.size is not None:
            size = f"{self.size:+g}" if self.kind == "slope" else f"{self.size:+.2%}"
            extra.append(f"claimed: {size}")
        if self.margin is not None:
            extra.append(f"margin: {self.margin:g}")
        if self.across_residual_forms:
            extra.append("across residual forms")
        note = f" ({'; '.join(extra)})" if extra else ""
        return f"{subject} is {relation} {baseline if names else '0'}{note}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, and the tests that must all be passed.

    Attributes:
        name: a short name, by which a plan chooses the claim from a file of the package.
        text: the claim as a sentence.
        tests: its predictions.
    """

    name: str
    text: str
    tests: tuple[ClaimTest, ...]


@dataclass(frozen=True, kw_only=True)
class Premise:
    """What must hold so that a criterion can fail: a metric of a variant is above a floor.

    Attributes:
        metric: name of the metric.
        above: the floor for the mean over all conditions.
        otherwise: why the criterion does not apply if the mean is not above the floor.
        variant: name of the variant, or `reference`.
    """

    metric: str
    above: float
    otherwise: str
    variant: str = REFERENCE

    def __post_init__(self) -> None:
        check_at_least("above", self.above, -_LARGEST, _LARGEST)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A limit that a candidate must not exceed (for metrics of which less is better) or reach.

    Attributes:
        metric: name of the metric in the record of a trial; it must have a better direction.
        against: name of a variant, `reference`, `unquantized` (the same model before
            quantization), or `fixed` (the value itself is compared with the limit).
        limit: the relative change from `against`, or the value for `fixed`; `noise floor` is the
            noise floor of the metric.
        applies_if: the premise; None if the criterion always applies.
        across_residual_forms: as in `ClaimTest`.
    """

    metric: str
    against: str
    limit: float | str
    applies_if: Premise | None = None
    across_residual_forms: bool = False

    def __post_init__(self) -> None:
        check_flag("across_residual_forms", self.across_residual_forms)
        if isinstance(self.limit, str):
            check_choice("limit (or a number)", self.limit, (NOISE_FLOOR,))
            if self.against == FIXED:
                raise UserError(f"limit: {self.limit!r} is relative; 'fixed' requires a number")
        else:
            check_at_least("limit", self.limit, -_LARGEST, _LARGEST)
        if self.against == UNQUANTIZED and "@" not in self.metric:
            raise UserError(f"against: {self.metric!r} is not a metric of a quantized model")

    @property
    def unquantized_metric(self) -> str:
        """The metric of the model before quantization."""
        return self.metric.rpartition("@")[0]


def read_claims(value: Any) -> tuple[Claim, ...]:
    """Claims from JSON or YAML values.

    Args:
        value: a list.  Each item is a claim, or the name of claims of the package: `FILE` for all
            claims of the file, `FILE/NAME` for one.  A single name may replace the list.

    Raises:
        UserError: an unknown name or field, a missing field, or a value that is not allowed.
    """
    found: list[Claim] = []
    for item in [value] if isinstance(value, str) else read_list("claims", value):
        found += _shipped_claims(item) if isinstance(item, str) else [_claim(item)]
    for kept, claim in enumerate(found):
        if claim.name in {other.name for other in found[:kept]}:
            raise UserError(f"claims: {claim.name!r} is stated twice")
    return tuple(found)


def read_criteria(value: Any) -> tuple[Criterion, ...]:
    """Criteria from JSON or YAML values; each item is a criterion, or a `FILE` of the package."""
    found: list[Criterion] = []
    for item in [value] if isinstance(value, str) else read_list("criteria", value):
        if isinstance(item, str):
            found += read_criteria(_shipped("criteria", item).get("criteria", []))
        else:
            found.append(_criterion(item))
    return tuple(found)


def _shipped(argument: str, name: str) -> dict[str, Any]:
    texts = shipped_claims()
    check_choice(argument, name, texts)
    return dict(parse_yaml(texts[name], "claims", name))


def _shipped_claims(reference: str) -> tuple[Claim, ...]:
    file, _, name = reference.partition("/")
    claims = {claim.name: claim for claim in read_claims(_shipped("claims", file)["claims"])}
    if not name:
        return tuple(claims.values())
    check_choice("claims", reference, [f"{file}/{each}" for each in claims])
    return (claims[name],)


def _claim(value: Any) -> Claim:
    given = read_fields("claims", value, ("name", "text", "tests"), ("name", "text", "tests"))
    name = read_text("name of a claim", given["name"])
    argument = f"claim {shown(name)}"
    tests = read_list(f"tests of {argument}", given["tests"])
    if not tests:
        raise UserError(f"{argument}: tests: a claim requires at least one")
    text = read_text(f"text of {argument}", given["text"])
    return Claim(name=name, text=text, tests=tuple(_test(argument, each) for each in tests))


def _test(argument: str, value: Any) -> ClaimTest:
    given = _fields(f"test of {argument}", value, ClaimTest, ("metric", "variant", "expect"))
    given["baselines"] = read_list("baselines", given.get("baselines", ()), str)
    return _constructed(argument, ClaimTest, given)


def _criterion(value: Any) -> Criterion:
    given = _fields("criteria", value, Criterion, ("metric", "against", "limit"))
    if given.get("applies_if") is not None:
        names = ("metric", "above", "otherwise")
        premise = _fields("applies_if", given["applies_if"], Premise, names)
        read_text("otherwise", premise["otherwise"])
        given["applies_if"] = _constructed("criteria", Premise, premise)
    return _constructed("criteria", Criterion, given)


def _fields(argument: str, value: Any, cls: Any, required: tuple[str, ...]) -> dict[str, Any]:
    given = read_fields(argument, value, [each.name for each in fields(cls)], required)
    for name in ("metric", "variant", "against", "expect", "kind"):
        if name in given:
            read_text(f"{argument}: {name}", given[name])
    return given


def _constructed(argument: str, cls: Any, given: Mapping[str, Any]) -> Any:
    try:
        return cls(**given)
    except UserError as error:
        raise UserError(f"{argument}: {error}") from None
