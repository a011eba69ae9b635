"""Questions, and answers with their working, in the form of GSM8K (Cobbe et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oasis_attn.data.corpora import Corpus
from oasis_attn.errors import UserError

_QUESTION, _ANSWER = "Question: ", "\nAnswer: "


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question, and an answer with its working, whose last line is `#### N`."""

    question: str
    answer: str


def read_problems(corpus: Corpus) -> Iterator[Problem]:
    """The documents of a corpus as problems.

    Raises:
        UserError: a document is not a problem.
    """
    for number, text in enumerate(corpus.texts(), 1):
        question, separator, answer = text.partition(_ANSWER)
        if not (question.startswith(_QUESTION) and separator):
            raise UserError(
                f"corpus: document {number} of {corpus.name!r} is not a question with an answer; "
                "use rows with the fields question and answer"
            )
        yield Problem(question=question.removeprefix(_QUESTION), answer=answer)
