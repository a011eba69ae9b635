from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from oasis_attn.errors import UserError
from oasis_attn.evaluation.scoring import pass_at_k, score_answer, wilson_interval

DATA = os.environ.get("OASIS_DATA")


@pytest.mark.parametrize(
    ("text", "reference", "strict", "flexible"),
    [
        ("It is 18.\n#### 18", "18", True, True),
        ("#### 38", "28", False, False),
        ("#### 1,234", "1234", True, True),
        ("#### 1234", "1,234", True, True),
        ("#### 1,234,567.00", "1234567", True, True),
        ("#### $18", "18", True, True),
        ("#### $1,800.50", "1800.5", True, True),
        ("#### 18.", "18", True, True),
        ("#### 18 dollars", "18", True, True),
        ("#### 18kg", "18", True, True),
        ("#### 18%", "18", True, True),
        ("####18", "18", True, True),
        ("#### -5", "-5", True, True),
        ("#### -$5", "-5", True, True),
        ("#### $-5", "-5", True, True),
        ("#### \N{MINUS SIGN}5", "-5", True, True),
        ("#### 5", "-5", False, False),
        ("#### -5", "5", False, False),
        ("#### +5", "5", True, True),
        ("#### .5", "0.5", True, True),
        ("#### 0018", "18", True, True),
        ("#### 18\n\nOne more:\n#### 20", "18", True, False),
        ("#### 18\n\nOne more:\n#### 20", "20", False, True),
        ("#### 18 #### 18", "18", True, True),
        ("#### 3/4", "3", False, False),
        ("#### 3 + 4 = 7", "3", False, False),
        ("#### 3 + 4 = 7", "7", False, True),
        ("#### 3:30", "3", False, False),
        ("#### 3-4", "3", False, False),
        ("#### 3e8", "3", False, False),
        ("#### 1.2.3", "1.2", False, False),
        ("#### 1,2", "12", False, False),
        ("#### 1,2345", "12345", False, False),
        ("#### twenty 20", "20", False, True),
        ("#### x = 20", "20", False, True),
        ("### 20", "20", False, True),
        ("####\n20", "20", False, True),
        ("The answer is 20.", "20", False, True),
        ("10-3=7, so 10-7 = 3", "3", False, True),
        ("5-3", "3", False, True),
        ("none", "0", False, False),
        ("####", "0", False, False),
        ("", "0", False, False),
        ("#### 1" + "0" * 400, "1" + "0" * 399 + "1", False, False),
    ],
)
def test_formats(text, reference, strict, flexible):
    assert score_answer(text, f"Because.\n#### {reference}") == (strict, flexible)


def test_reference_without_a_number_is_refused():
    with pytest.raises(UserError, match="does not end in '#### N'"):
        score_answer("#### 1", "The answer is 1")


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12), st.booleans())
def test_numbers_are_compared_by_value(said, right, commas):
    text = f"#### {said:,}" if commas else f"#### {said}"
    assert score_answer(text, f"#### {right}") == (said == right, said == right)


@given(st.text())
def test_any_text_has_a_score(text):
    score_answer(text, "#### 1")


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_chance_that_a_draw_has_a_right_one(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations(range(n), k))
    share = sum(min(draw) < right for draw in draws) / len(draws)
    assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


@given(st.integers(1, 2000), st.data())
def test_wilson_interval_is_scipy_s(n, data):
    right = data.draw(st.integers(0, n))
    there = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((there.low, there.high), abs=1e-12)


@pytest.mark.skipif(not DATA, reason="$OASIS_DATA is not set")
@pytest.mark.parametrize(("split", "count"), [("test", 1319), ("train", 7473)])
def test_gsm8k_s_own_solutions_are_right(split, count):
    lines = Path(DATA, "gsm8k", f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == count
    assert all(score_answer(answer, answer) == (True, True) for answer in answers)
    # And not each other's.
    scores = [score_answer(a, b).strict for a, b in itertools.pairwise(answers)]
    assert sum(scores) < 0.05 * count
