"""The trigger-conditional task as a language: a model predicts the next token.

    <first> w w w w <?> w w <?> w ...

After a word, the next word depends on it: its log-probabilities are a linear function of the
features of this word.  A word may be followed by a trigger, `<?>`, and after a trigger the next
word depends on all words before it: its log-probabilities are the mean of those functions.  So a
head that predicts the word after a trigger must average over all words at triggers, and must do
nothing elsewhere.

The first token is a word too, on which nothing depends, and only its mark tells it apart: the
others must not read it.  See `data.trigger` for why a massive activation follows.

The language is known, so a model learns from the next-word probabilities themselves, not from
samples of them.

Axes: B sequences, T tokens, N coordinates of a token, W words, R features of a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oasis_attn.data.trigger import FIRST, TRIGGER, TriggerBatch
from oasis_attn.errors import check_at_least, check_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SPREAD = 2.0  # standard deviation of the log-probabilities after a word, before normalization
_GAIN = 3.0  # factor of the mean after a trigger
_MIN_TRIGGER = 3  # its first position, from 0
_FIRST_WORD = 2  # the coordinate of the first word


@dataclass(frozen=True, kw_only=True)
class TriggerWordsTask:
    """Generates sequences of a language that needs a sink.

    A token is the vector of its word, or of the trigger: 1 in one coordinate, and 0 in the others.
    Coordinate 0 is the mark, 1 at token 0 only.

    Args:
        length: T; at least 4.
        words: W; at least 2.
        features: R, the rank of the log-probabilities; at least 1.
        rate: the probability of a trigger after a word, from position 3 on.

    Raises:
        UserError: a value outside these ranges.
    """

    length: int = 32
    words: int = 128
    features: int = 48
    rate: float = 0.25

    def __post_init__(self) -> None:
        check_whole("length", self.length, 4)
        check_whole("words", self.words, 2)
        check_whole("features", self.features, 1)
        check_at_least("rate", self.rate, 0, 1)

    @property
    def width(self) -> int:
        """N: the mark, the trigger, and the words."""
        return _FIRST_WORD + self.words

    def logits(self) -> Tensor:
        """The log-probabilities of the next word after each word, up to a constant, [W, W].

        They are the same for all sequences and seeds.
        """
        import torch  # not earlier, so that names of tasks can be checked without it

        generator = torch.Generator().manual_seed(0)
        features_WR = torch.randn(self.words, self.features, generator=generator)
        weights_RW = torch.randn(self.features, self.words, generator=generator)
        return features_WR @ weights_RW * (_SPREAD / self.features**0.5)

    def batch(self, size: int, generator: torch.Generator | None = None) -> TriggerBatch:
        """`size` sequences; the targets are the probabilities of the next token."""
        import torch

        logits_WW = self.logits()
        word_BT, trigger_BT, mean_BTW = self._draw(size, logits_WW, generator)
        trigger_BT1 = trigger_BT.unsqueeze(-1)
        p_BTW = torch.where(trigger_BT1, mean_BTW, logits_WW[word_BT]).softmax(-1)
        may_follow_T1 = torch.arange(1, self.length + 1).unsqueeze(1) >= _MIN_TRIGGER
        rate_BT1 = self.rate * ~trigger_BT1 * may_follow_T1
        y_BTN = torch.cat([torch.zeros_like(rate_BT1), rate_BT1, p_BTW * (1 - rate_BT1)], -1)
        y_BTN[:, FIRST] = 0
        token_BT = torch.where(trigger_BT, TRIGGER, _FIRST_WORD + word_BT)
        x_BTN = torch.nn.functional.one_hot(token_BT, self.width).float()
        x_BTN[:, FIRST, FIRST] = 1
        return TriggerBatch(x_BTN, y_BTN, trigger_BT, start=1, probabilities=True)

    def _draw(
        self, size: int, logits_WW: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of `size` sequences.

        Returns:
            The words [B, T], at a trigger the word before it; where triggers are [B, T]; and the
            mean of the log-probabilities after the words so far, times `_GAIN`, [B, T, W].
        """
        import torch

        T, W = self.length, self.words
        up_to_WW = logits_WW.softmax(-1).cumsum(-1)
        chance_TB, drawn_TB = torch.rand(2, T, size, generator=generator)
        trigger_TB = chance_TB < self.rate
        trigger_TB[:_MIN_TRIGGER] = False
        word_TB = (drawn_TB * W).long().clamp_(max=W - 1)  # stays so for the first two tokens
        mean_TBW = torch.zeros(T, size, W)
        sum_BW, count_B1 = torch.zeros(size, W), torch.zeros(size, 1)
        for t in range(FIRST + 1, T):
            if t > FIRST + 1:
                asked_B1 = trigger_TB[t - 1].unsqueeze(1)
                trigger_TB[t] &= ~trigger_TB[t - 1]
                up_to_BW = torch.where(
                    asked_B1, mean_TBW[t - 1].softmax(-1).cumsum(-1), up_to_WW[word_TB[t - 1]]
                )
                next_B1 = torch.searchsorted(up_to_BW, drawn_TB[t].unsqueeze(1))
                next_B = next_B1.squeeze(1).clamp_(max=W - 1)  # the sum of all can be below 1
                word_TB[t] = torch.where(trigger_TB[t], word_TB[t - 1], next_B)
            is_word_B1 = ~trigger_TB[t].unsqueeze(1)
            sum_BW += logits_WW[word_TB[t]] * is_word_B1
            count_B1 += is_word_B1
            mean_TBW[t] = _GAIN * sum_BW / count_B1
        return word_TB.T, trigger_TB.T.contiguous(), mean_TBW.transpose(0, 1)
