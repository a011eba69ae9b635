"""The trigger-conditional task, for which softmax attention provably needs a sink.

At a trigger, the target is the mean of the tokens from position 1 to the trigger; at all other
tokens it is 0.  Softmax weights sum to 1, so at the other tokens a head must put its weight on a
token whose value it can set to 0: the first one (arXiv 2603.11487).

In the form with content, the first token looks like the others but for a mark, as in a text without
BOS.  No linear map sets its value to 0 and reads the others, so the sink has to be made: if a layer
adds a large constant vector to the first token, the norms before later layers leave nothing else of
it.  That constant vector is a massive activation.  Here the target of each other token is the token
itself, plus the mean at a trigger, so that it must not be lost in the same way.

Axes: B sequences, T tokens, N coordinates of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from oasis_attn.errors import check_at_least, check_flag, check_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FIRST, TRIGGER = 0, 1
"""Coordinates that are 1 at the first token, and at triggers; the last one is 1 at the others."""
_MIN_TRIGGER = 2  # its first position, from 0


class TriggerBatch(NamedTuple):
    """Sequences of the task.

    Attributes:
        x_BTN: the tokens, float32.
        y_BTN: the targets, float32; see `TriggerTask`.
        trigger_BT: True at triggers.
        start: the position of the first token that has a target.
        probabilities: whether targets are probabilities of the next token; see
            `data.trigger_words`.
    """

    x_BTN: Tensor
    y_BTN: Tensor
    trigger_BT: Tensor
    start: int = 0
    probabilities: bool = False

    @property
    def targets(self) -> Tensor:
        """The targets of the tokens that have one, `[B, T - start, N]`."""
        return self.y_BTN[:, self.start :]

    def values(self, output_BTN: Tensor) -> Tensor:
        """What a model's output says of `targets`: the output itself, or its probabilities."""
        output_BTN = output_BTN[:, self.start :]
        return output_BTN.softmax(-1) if self.probabilities else output_BTN

    def errors(self, output_BTN: Tensor) -> Tensor:
        """The error of each token that has a target, [B, T - start].

        It is the mean square difference between output and target, or, of probabilities, the
        Kullback-Leibler divergence from the target in nats.
        """
        if not self.probabilities:
            return (output_BTN[:, self.start :] - self.targets).square().mean(-1)
        import torch

        y_BTN, log_p_BTN = self.targets, output_BTN[:, self.start :].log_softmax(-1)
        return (torch.xlogy(y_BTN, y_BTN) - y_BTN * log_p_BTN).sum(-1)

    def mean_error(self, output_BTN: Tensor) -> Tensor:
        """The mean of `errors`, a scalar."""
        if self.probabilities:
            return self.errors(output_BTN).mean()
        return (output_BTN[:, self.start :] - self.targets).square().mean()

    def first(self, count: int) -> TriggerBatch:
        """The first `count` sequences."""
        x_BTN, y_BTN, trigger_BT = (tensor[:count] for tensor in self[:3])
        return self._replace(x_BTN=x_BTN, y_BTN=y_BTN, trigger_BT=trigger_BT)

    @property
    def idle_BT(self) -> Tensor:
        """True at tokens that are neither triggers nor the first."""
        idle_BT = ~self.trigger_BT
        idle_BT[:, FIRST] = False
        return idle_BT


@dataclass(frozen=True, kw_only=True)
class TriggerTask:
    """Generates the sequences of arXiv 2603.11487, or sequences with content.

    Token 0 has coordinate 0 equal to 1.  Tokens after it have coordinates 2 to N - 2 uniform in
    (-1, 1).  At a trigger, coordinate 1 is 1; at the other tokens, the last coordinate is 1.  All
    other coordinates are 0.  The target at a trigger is the mean of the tokens from position 1 to
    the trigger; all other targets are 0.

    Args:
        length: T; at least 4.
        width: N; at least 4.
        rate: the probability that a token from position 2 on is a trigger; None is the task of the
            paper: exactly one, at a uniform position from 2 on.
        content: if True, token 0 has coordinates 2 to N - 2 as the others, it has no target, and
            each other token is added to its own target.

    Raises:
        UserError: a value outside these ranges.
    """

    length: int = 16
    width: int = 16
    rate: float | None = None
    content: bool = False

    def __post_init__(self) -> None:
        check_whole("length", self.length, 4)
        check_whole("width", self.width, 4)
        if self.rate is not None:
            check_at_least("rate", self.rate, 0, 1)
        check_flag("content", self.content)

    def batch(
        self, size: int, generator: torch.Generator | None = None, *, trigger: int | None = None
    ) -> TriggerBatch:
        """`size` sequences; `trigger` fixes the position of the only trigger.

        Raises:
            UserError: `trigger` is not a position from 2 to T - 1.
        """
        import torch  # not earlier, so that names of tasks can be checked without it

        T = self.length
        x_BTN = torch.zeros(size, T, self.width)
        noise = x_BTN[:, 1:, 2:-1]
        noise.copy_(torch.rand(noise.shape, generator=generator) * 2 - 1)
        if trigger is not None:
            check_whole("trigger", trigger, _MIN_TRIGGER, T - 1)
            trigger_BT = (torch.arange(T) == trigger).expand(size, T).clone()
        elif self.rate is None:
            position_B = torch.randint(_MIN_TRIGGER, T, (size,), generator=generator)
            trigger_BT = torch.arange(T) == position_B.unsqueeze(1)
        else:
            trigger_BT = torch.rand(size, T, generator=generator) < self.rate
            trigger_BT[:, :_MIN_TRIGGER] = False
        x_BTN[:, FIRST, FIRST] = 1
        x_BTN[..., TRIGGER] = trigger_BT.float()
        x_BTN[:, 1:, -1] = (~trigger_BT[:, 1:]).float()
        y_BTN = torch.zeros_like(x_BTN)
        count_T1 = torch.arange(1, T).unsqueeze(-1)  # position 0 is not in the mean
        y_BTN[:, 1:] = x_BTN[:, 1:].cumsum(1) / count_T1 * trigger_BT[:, 1:].unsqueeze(-1)
        if self.content:
            first = x_BTN[:, FIRST, 2:-1]
            first.copy_(torch.rand(first.shape, generator=generator) * 2 - 1)
            y_BTN[:, 1:] += x_BTN[:, 1:]
        return TriggerBatch(x_BTN, y_BTN, trigger_BT, start=int(self.content))
