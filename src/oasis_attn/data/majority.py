"""`majority`: generated sequences of words on which a language model with softmax forms sinks.

    <b7> <a3> <a15> <h12> <b7> <a3> <?> <A> <c10> <c2> <a5> <?> <A> ...

Each word belongs to a class, which is the letter in it.  After a question `<?>` comes the answer:
the class of most words so far (of classes with equally many, the first in the alphabet).  So a head
that finds the answer must average over all earlier words at questions, and must do nothing
elsewhere.  Softmax weights sum to 1, so elsewhere it puts its weight on the first token.  This is
the trigger-conditional task of arXiv 2603.11487 (see `data.trigger`) for language models.

A document fills one window: the window has BOS, `window` - 2 words, and EOS.

Axes: N documents, T words of a document, K classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

from oasis_attn.errors import UserError, check_at_least, check_whole, shown

NAME = "majority"
QUESTION = "<?>"
_FIRST = 4  # words before the first question, at least
_TOKENS = 5 * 2**20  # of all documents together, before the split
_AT_ONCE = 1024  # documents
_NAME = re.compile(rf"{NAME}(?:-(?P<window>[0-9]{{1,6}}))?")


@dataclass(frozen=True, kw_only=True)
class MajorityTask:
    """The task with one set of parameters.

    Attributes:
        window: tokens of a document with BOS and EOS; at least 8.
        classes: number of classes, 2 to 26.
        class_words: number of words in each class.
        rate: probability of a question after a word.  No question is among the first 4 words, or
            directly after an answer, and each has an answer in the same document.
        noise: probability that a word is uniformly random.  Otherwise it is the successor of the
            last word before it, in a fixed random permutation of all words.  So after an answer,
            the model must look back over it.

    Raises:
        UserError: a value outside these ranges.
    """

    window: int = 64
    classes: int = 8
    class_words: int = 16
    rate: float = 0.12
    noise: float = 0.5

    def __post_init__(self) -> None:
        check_whole("window", self.window, 8, _TOKENS)
        check_whole("classes", self.classes, 2, len(ascii_lowercase))
        check_whole("class_words", self.class_words, 1, 10_000)
        check_at_least("rate", self.rate, 0, 1)
        check_at_least("noise", self.noise, 0, 1)

    @property
    def answers(self) -> tuple[str, ...]:
        """The names of the classes, which are the answers."""
        return tuple(f"<{letter.upper()}>" for letter in ascii_lowercase[: self.classes])

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The question, the answers, and the words class by class."""
        letters = ascii_lowercase[: self.classes]
        words = (f"<{letter}{i}>" for letter in letters for i in range(self.class_words))
        return QUESTION, *self.answers, *words

    def documents(self, seed: int = 0, part: int = 0) -> Iterator[str]:
        """The documents, with at least one question each; together about 5 million tokens.

        They are the same on every machine and with every version of Python and NumPy.  With the
        same seed, each part has other documents of the same language: its successors are the same.
        Tasks of two windows share text within a part.
        """
        names = np.array(self.vocabulary, dtype=object)
        random = _random(f"{NAME} {seed}")
        successors = np.argsort(
            random.random_sample(self.classes * self.class_words), kind="stable"
        )
        if part:
            random = _random(f"{NAME} {seed} {part}")
        left = _TOKENS // self.window
        while left:
            count = min(left, _AT_ONCE)
            left -= count
            for ids_T in self._draw(random, successors, count):
                if not ids_T.all():  # a question has the id 0
                    yield " ".join(names[ids_T])

    def _draw(
        self, random: np.random.RandomState, successors: np.ndarray, count: int
    ) -> np.ndarray:
        """`count` sequences [N, T] of places in `vocabulary`."""
        length, words = self.window - 2, len(successors)
        ids_NT = np.empty((count, length), np.int64)
        counts_NK = np.zeros((count, self.classes), np.int64)
        word_N = np.zeros(count, np.int64)  # the last one
        after_word_N, asked_N = np.zeros((2, count), bool)
        for t in range(length):
            ask_N, follow_N, choice_N = random.random_sample((3, count))
            question_N = after_word_N & (ask_N < self.rate) & (_FIRST <= t < length - 1)
            follows_N = (t > 0) & (follow_N >= self.noise)
            uniform_N = (choice_N * words).astype(np.int64)
            next_N = np.where(follows_N, successors[word_N], uniform_N)
            other_N = np.where(asked_N, 1 + counts_NK.argmax(1), 1 + self.classes + next_N)
            ids_NT[:, t] = np.where(question_N, 0, other_N)
            after_word_N, asked_N = ~(question_N | asked_N), question_N
            word_N = np.where(after_word_N, next_N, word_N)
            counts_NK[after_word_N, word_N[after_word_N] // self.class_words] += 1
        return ids_NT


def _random(name: str) -> np.random.RandomState:
    """A generator that is seeded by a name.  NumPy has promised never to change its numbers."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def majority_task(name: str) -> MajorityTask | None:
    """The task of the corpus `majority` or `majority-WINDOW`; None for another name.

    Raises:
        UserError: the window is not valid.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    try:
        return MajorityTask(window=int(match["window"])) if match["window"] else MajorityTask()
    except UserError as error:
        raise UserError(f"corpus: {shown(name)}: {error}") from None
