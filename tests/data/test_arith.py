from __future__ import annotations

import hashlib
import operator
import re

import pytest

from oasis_attn.data import load_corpus
from oasis_attn.data.arith import COUNTS, arith_rows
from oasis_attn.data.problems import Problem, read_problems
from oasis_attn.errors import UserError

SPLITS = tuple(COUNTS)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def expression(answer: str) -> str:
    steps = STEP.findall(answer)
    return steps[0][0] + "".join(sign + b for _, sign, b, _, _ in steps)


@pytest.fixture(scope="module")
def rows():
    return {split: list(arith_rows(split)) for split in SPLITS}


def test_every_step_is_right_and_leads_to_the_next(rows):
    for row in rows["train"][:2000] + rows["test"]:
        value = None
        steps = STEP.findall(row["answer"])
        for a, sign, b, result, said in steps:
            assert value in (None, int(a))
            value = int(result)
            assert result == said
            assert OPERATIONS[sign](int(a), int(b)) == value
            assert 1 <= value <= 99
        assert row["answer"].endswith(f"\n#### {value}")
        assert len(steps) == row["steps"] == row["answer"].count("\n")
        numbers = re.findall(r"\d+", row["question"])
        assert numbers == re.findall(r"\d+", expression(row["answer"]))
        assert not re.search(r"[{}]", row["question"] + row["answer"])


def test_splits_share_no_expression_and_no_question_comes_twice(rows):
    used = {split: {expression(row["answer"]) for row in rows[split]} for split in SPLITS}
    assert not used["train"] & used["test"]
    assert not used["train"] & used["validation"]
    assert not used["validation"] & used["test"]
    assert len(used["test"]) > 700
    for split, count in COUNTS.items():
        assert len({row["question"] for row in rows[split]}) == len(rows[split]) == count


def test_all_kinds_occur_and_words_are_few(rows):
    signs = [sign for row in rows["test"] for _, sign, *_ in STEP.findall(row["answer"])]
    assert all(signs.count(sign) > 0.03 * len(signs) for sign in "+-*/")
    assert [row["steps"] for row in rows["test"][:4]] == [1, 2, 3, 1]
    words = {w for row in rows["train"] for w in re.findall(r"[A-Za-z]+", row["question"])}
    assert len(words) < 60


def test_the_text_never_changes():
    """The same for every Python: a draw made otherwise would change what models are trained on."""
    text = "\n".join(f"{r['question']}\n{r['answer']}" for r in arith_rows("validation"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a74bebeb77595fa7"


def test_another_seed_makes_other_problems_of_the_same_split(rows):
    other = list(arith_rows("test", seed=1))
    assert other[:5] != rows["test"][:5]
    train = {expression(row["answer"]) for row in rows["train"]}
    assert not train & {expression(row["answer"]) for row in other}


def test_it_is_a_corpus_of_problems(rows):
    problems = list(read_problems(load_corpus("arith", "test")))
    assert problems == [Problem(question=r["question"], answer=r["answer"]) for r in rows["test"]]


def test_a_corpus_of_prose_has_no_problems(tmp_path):
    (tmp_path / "test.txt").write_text("Question: none\n")
    with pytest.raises(UserError, match=r"document 1 of .* is not a question with an answer"):
        list(read_problems(load_corpus(tmp_path, "test")))
