from __future__ import annotations

import os
import sys

import pytest

from oasis_attn.data import load_corpus
from oasis_attn.data.problems import Problem, read_problems
from oasis_attn.errors import UserError
from oasis_attn.evaluation.harness import HarnessGsm8k, check_harness

DATA = os.environ.get("OASIS_DATA")
PROBLEMS = [Problem(question=f"{i}?", answer=f"It is so.\n#### {i}") for i in range(4)]
EXAMPLES = [Problem(question=f"{i}!", answer=f"As told.\n#### {i}") for i in range(30, 39)]


@pytest.fixture(autouse=True)
def _lm_eval():
    pytest.importorskip("lm_eval")


def test_prompts_are_the_documents_that_models_train_on():
    harness = HarnessGsm8k(PROBLEMS, [], shots=0)
    assert harness.prompts == [f"Question: {i}?\nAnswer:" for i in range(4)]
    assert "Question:" in harness.stops


def test_shots_are_training_problems_and_the_same_each_time(capfd):
    harness = HarnessGsm8k(PROBLEMS, EXAMPLES, shots=3)
    for index, prompt in enumerate(harness.prompts):
        *shots, last = prompt.split("\n\n")
        assert last == f"Question: {index}?\nAnswer:"
        known = [f"Question: {p.question}\nAnswer: {p.answer}" for p in EXAMPLES]
        assert len({known.index(shot) for shot in shots}) == 3
    assert HarnessGsm8k(PROBLEMS, EXAMPLES, shots=3).prompts == harness.prompts
    assert HarnessGsm8k(PROBLEMS[:2], EXAMPLES, shots=3).prompts == harness.prompts[:2]
    assert capfd.readouterr() == ("", "")


def test_lm_eval_s_scores():
    harness = HarnessGsm8k(PROBLEMS, [], shots=0)
    responses = [" Thus\n#### 0", "It is 1 or 1", "#### 3\nor 2", ""]
    assert harness.scores(responses) == {"strict-match": 0.25, "flexible-extract": 0.75}
    right = [problem.answer for problem in PROBLEMS]
    assert harness.scores(right) == {"strict-match": 1.0, "flexible-extract": 1.0}


def test_more_shots_than_examples():
    with pytest.raises(UserError, match="shots: 10 are more than the 9 training problems"):
        HarnessGsm8k(PROBLEMS, EXAMPLES, shots=10)


def test_without_lm_eval_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    with pytest.raises(UserError, match=r"needs lm-eval: pip install 'oasis-attn\[evaluate\]'"):
        check_harness()


@pytest.mark.skipif(not DATA, reason="$OASIS_DATA is not set")
def test_gsm8k_s_own_solutions_are_right_for_lm_eval_too(monkeypatch):
    monkeypatch.setenv("OASIS_DATA", DATA)
    problems = list(read_problems(load_corpus("gsm8k", "test")))
    scores = HarnessGsm8k(problems, [], shots=0).scores([p.answer for p in problems])
    assert len(problems) == 1319
    assert scores == {"strict-match": 1.0, "flexible-extract": 1.0}
