"""Checks that a plan has what its claims and criteria need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from oasis_attn.errors import UserError, check_choice
from oasis_attn.hub.model_sizes import SIZES, text_config
from oasis_attn.study.claim import FIXED, REFERENCE, UNQUANTIZED, ClaimTest
from oasis_attn.study.study_metrics import StudyMetric, study_metrics

if TYPE_CHECKING:
    from oasis_attn.study.plan import Plan

_LAB_SIZE = re.compile(r"lab-([0-9]{1,4})")


def layers_of(size: str) -> int:
    """Number of decoder layers of a size of the plan."""
    if size in SIZES:
        return int(SIZES[size]["num_hidden_layers"])
    lab = _LAB_SIZE.fullmatch(size)
    return int(lab[1]) if lab else int(text_config(size).num_hidden_layers)


def check_claims(plan: Plan) -> None:
    """Raise `UserError` for an unknown metric or variant, or a test that cannot be made."""
    known = {metric.name: metric for metric in study_metrics(plan.schemes)}
    for claim in plan.claims:
        for test in claim.tests:
            argument = f"claim {claim.name!r}"
            check_choice(f"{argument}: metric", test.metric, known)
            for name in test.variants:
                check_choice(f"{argument}: variant", name, plan.variants)
            metric = known[test.metric]
            if test.kind == "slope":
                _check_slope(plan, argument, metric)
            _check_forms(plan, argument, test, metric)


def _check_slope(plan: Plan, argument: str, metric: StudyMetric) -> None:
    if metric.scale != "ratio":
        raise UserError(f"{argument}: a slope requires a positive metric, not {metric.name!r}")
    layers = {layers_of(size) for size in plan.sizes}
    if len(layers) < 2:
        raise UserError(
            f"{argument}: a slope requires sizes with different numbers of layers, not "
            f"{', '.join(plan.sizes)}"
        )


def _check_forms(plan: Plan, argument: str, test: ClaimTest, metric: StudyMetric) -> None:
    forms = {name: plan.residual_form(name) for name in test.variants}
    others = [name for name in test.baselines if forms[name] != forms[test.variant]]
    if None in forms.values():
        return  # the results of another version: not every variant is known
    if test.across_residual_forms:
        if not metric.within_form or not others:
            raise UserError(f"{argument}: across_residual_forms has no effect on {metric.name!r}")
    elif metric.within_form and others:
        raise UserError(
            f"{argument}: {metric.name} depends on the residual form, so that {test.variant!r} "
            f"({forms[test.variant]}) is not compared with {others[0]!r} ({forms[others[0]]}); "
            "choose baselines with the same form, or set across_residual_forms: true"
        )


def check_criteria(plan: Plan) -> None:
    """Raise `UserError` for an unknown metric or variant, or a metric without a direction."""
    known = {metric.name: metric for metric in study_metrics(plan.schemes)}
    keywords = (REFERENCE, UNQUANTIZED, FIXED)
    for criterion in plan.criteria:
        check_choice("criteria: metric", criterion.metric, known)
        if not known[criterion.metric].better:
            raise UserError(f"criteria: neither more nor less {criterion.metric} is better")
        _check_variant("against", criterion.against, (*keywords, *plan.variants))
        if criterion.against == UNQUANTIZED:
            check_choice("criteria: metric", criterion.unquantized_metric, known)
        premise = criterion.applies_if
        if premise is not None:
            check_choice("applies_if: metric", premise.metric, known)
            _check_variant("applies_if: variant", premise.variant, (REFERENCE, *plan.variants))


def _check_variant(argument: str, name: str, allowed: Iterable[str]) -> None:
    check_choice(f"criteria: {argument}", name, tuple(allowed))
