"""The page of a study says first what was found, and shows everything else on request."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from oasis_attn.report.document import Badges, Fold, Gallery, Picture, walk
from oasis_attn.report.tables import Table
from oasis_attn.study.key_figures import at_floor, changes, key_metrics
from oasis_attn.study.reading_guide import notes
from oasis_attn.study.results import Results
from oasis_attn.study.study_page import study_page
from study import factories

NAMES = ("perplexity.windowed", "sink.mass", "outlier.avg_kurtosis", "sink.rate@0.3")
CRITERIA = [
    {"metric": "perplexity.windowed", "against": "reference", "limit": 0.1},
    {"metric": "sink.mass", "against": "fixed", "limit": 0.2},
]


def value(trial) -> float:
    return (0.05 if trial.variant == "oasis" else 0.5) + trial.seed / 1000


def made(names=NAMES, value=value, **changes) -> Results:
    return factories.results(factories.plan(**changes), value, names)


def headings(page):
    return [section.heading for section in page.sections]


def text_of(page):
    return [item for item in page.answers if isinstance(item, str)]


def test_a_study_with_claims_answers_them_first():
    page = study_page(made(names=(*NAMES, "outlier.max_inf_norm")))
    assert headings(page) == [
        "Verdicts on the claims", "Key figures", "Variants and their baselines", "All means",
        "How to read the numbers",
    ]  # fmt: skip
    said = text_of(page)
    assert len(said) == 3
    assert said[0] == "The claim of this study is supported."
    assert said[1] == (
        "Compared with `vanilla` (n = 6), `oasis` is significantly better in perplexity (-90 %) and"
        " sink mass (-90 %)."
    )
    assert said[2] == "The lowest mean perplexity of 6 variants is 0.05099, that of `oasis`."
    (badges,) = (item for item in page.answers if isinstance(item, Badges))
    assert badges.items == (("1 supported", "good"),)


def test_a_variant_that_diverged_is_not_the_best():
    page = study_page(
        made(value=lambda trial: math.nan if trial.variant == "vanilla" else value(trial))
    )
    said = text_of(page)
    assert (
        "The lowest mean perplexity of 5 variants is 0.05099, that of `oasis`. `vanilla` diverged."
        in said
    )
    assert not any("nan" in sentence for sentence in said)
    whole = made()
    part = {
        trial: factories.record(trial, dict.fromkeys(NAMES, value(trial)) | {NAMES[0]: math.nan})
        if trial.variant == "oasis"
        else record
        for trial, record in whole.records.items()
    }
    said = text_of(study_page(Results(whole.plan, part)))
    assert any("; the change in perplexity is not defined." in sentence for sentence in said)


def test_code_that_changed_while_the_study_ran_is_noted():
    results = made()
    assert not any("versions" in note for note in notes(results))
    first, *_ = results.records
    for digests in (["1", "2"], ["1", "1"]):
        records = {
            trial: replace(
                record,
                environment=replace(
                    record.environment, extensions={"mine.py": digests[trial != first]}
                ),
            )
            for trial, record in results.records.items()
        }
        found = notes(Results(results.plan, records))
        assert any("versions of mine.py" in note for note in found) == (digests == ["1", "2"])


def test_claims_that_were_not_tested_are_hidden_but_counted():
    page = study_page(made(names=("perplexity.windowed", "outlier.max_inf_norm")))
    items = list(walk(page.sections[:1]))
    claims, tests = (item for item in items if isinstance(item, Table))
    assert [row[2] for row in claims.rows] == ["supported"]
    assert [row[2] for row in tests.rows] == ["passed"]
    assert "One claim is not shown, because this study lacks the data for a test." in items
    page = study_page(made(names=("perplexity.windowed",)))
    assert "Verdicts on the claims" not in headings(page)
    assert len(text_of(page)) == 2


def test_criteria_come_first_if_the_study_has_candidates():
    page = study_page(made(claims=[], criteria=CRITERIA, candidates=["oasis", "softmax1"]))
    assert headings(page)[0] == "Acceptance criteria"
    matrix = next(item for item in walk(page.sections) if isinstance(item, Table))
    assert [row[:2] for row in matrix.rows] == [("oasis", "2 of 2"), ("softmax1", "1 of 2")]
    assert [matrix.tone(cell) for cell in matrix.rows[1]] == ["", "", "good", "bad"]
    assert text_of(page)[0] == (
        "1 of 2 candidates (`oasis`) fails no acceptance criterion; `oasis` meets 2 of 2 acceptance"
        " criteria that apply."
    )
    page = study_page(
        made(claims=[], criteria=CRITERIA, candidates=["gated_attention", "softmax1"])
    )
    assert text_of(page)[0] == (
        "None of 2 candidates meets every acceptance criterion; `gated_attention` comes closest: "
        "it meets 1 of 2 that apply."
    )


def test_a_study_without_claims_and_criteria_still_says_something():
    page = study_page(made(claims=[], compare={}))
    assert headings(page) == ["Key figures", "All means", "How to read the numbers"]
    assert all(sentence.startswith("The lowest mean") for sentence in text_of(page))
    assert len(text_of(page)) == 3


def test_four_key_figures_at_most_and_none_at_floor_level():
    results = made(names=(*NAMES, "perplexity.windowed@w8a8-static-full"))
    assert [metric.name for metric in key_metrics(results)] == [
        "perplexity.windowed", "sink.mass", "outlier.avg_kurtosis",
        "perplexity.windowed@w8a8-static-full",
    ]  # fmt: skip
    (gallery,) = (i for i in walk(study_page(results).sections) if isinstance(i, Gallery))
    assert len(gallery.pictures) == 4


@pytest.mark.parametrize(
    ("level", "noise", "floor"),
    [(0.0, 0.0, True), (0.01, 0.02, True), (0.01, 0.0001, False), (0.3, 0.3, False)],
)
def test_a_metric_at_floor_level(level, noise, floor):
    results = made(names=("sink.mass",), value=lambda trial: level + noise * (trial.seed == 1))
    (metric,) = results.metrics
    assert at_floor(results, metric) == floor
    assert bool(changes(results, "oasis")) != (floor or not level)


def test_a_metric_that_depends_on_the_form_is_compared_within_it():
    page = study_page(made(names=("outlier.avg_kurtosis",)))
    picture = next(i for i in walk(page.sections) if isinstance(i, Picture))
    (axes,) = picture.figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "clipped_softmax", "gated_attention", "softmax1", "oasis / attn_residual",
    ]  # fmt: skip


def test_variants_are_in_folds_that_say_what_they_hold():
    page = study_page(made())
    (section,) = (each for each in page.sections if each.heading.startswith("Variants"))
    (fold,) = section.items
    assert isinstance(fold, Fold)
    found = re.fullmatch(
        r"oasis against 5 baselines: (\d+) changes are significantly better, (\d+) worse, (\d+) not"
        r" significant",
        fold.summary,
    )
    assert found is not None
    (table,) = (item for item in fold.items if isinstance(item, Table))
    assert sum(map(int, found.groups())) == len(table.rows)
