"""The trigger-conditional task, against its definition token by token."""

import pytest
import torch

from oasis_attn.data.tasks import task_by_name
from oasis_attn.data.trigger import TriggerTask
from oasis_attn.data.trigger_words import TriggerWordsTask
from oasis_attn.errors import UserError


@pytest.mark.parametrize(
    "task",
    [
        TriggerTask(),
        TriggerTask(length=33, width=8, rate=0.25),
        TriggerTask(length=9, width=12, rate=0.25, content=True),
    ],
)
def test_tokens_and_targets(task):
    batch = task.batch(64, torch.Generator().manual_seed(1))
    x_BTN, y_BTN, trigger_BT, start, probabilities = batch
    assert not probabilities
    assert x_BTN.shape == y_BTN.shape == (64, task.length, task.width)
    for x_TN, y_TN, trigger_T in zip(x_BTN, y_BTN, trigger_BT, strict=True):
        assert not trigger_T[:2].any()
        assert task.rate is not None or trigger_T.sum() == 1
        assert x_TN[0, [0, 1, -1]].tolist() == [1, 0, 0]
        assert not y_TN[0].any()
        for t in range(1, task.length):
            assert x_TN[t, 0] == 0
            assert x_TN[t, 1] == trigger_T[t]
            assert x_TN[t, -1] != trigger_T[t]
            target_N = x_TN[1 : t + 1].mean(0) if trigger_T[t] else torch.zeros(task.width)
            torch.testing.assert_close(y_TN[t], target_N + x_TN[t] * task.content)
    assert 0.9 * task.content <= x_BTN[:, 0, 2:-1].abs().max() <= task.content
    assert start == task.content
    assert batch.targets.shape == (64, task.length - start, task.width)
    differences_BTN = (x_BTN - y_BTN)[:, start:]
    torch.testing.assert_close(batch.errors(x_BTN), differences_BTN.square().mean(-1))
    torch.testing.assert_close(batch.values(x_BTN) - batch.targets, differences_BTN)
    assert [len(each) for each in batch.first(3)[:3]] == [3, 3, 3]
    noise = x_BTN[:, 1:, 2:-1]
    assert noise.min() < -0.9
    assert noise.max() > 0.9
    assert noise.abs().max() <= 1
    assert (batch.idle_BT == ~trigger_BT & (torch.arange(task.length) > 0)).all()


def test_words_and_their_probabilities():
    task = TriggerWordsTask(length=12, words=9, features=4)
    x_BTN, y_BTN, trigger_BT, start, probabilities = task.batch(
        400, torch.Generator().manual_seed(1)
    )
    assert probabilities
    assert start == 1
    assert x_BTN.shape == y_BTN.shape == (400, 12, 11)
    logits_WW = task.logits()
    assert torch.linalg.matrix_rank(logits_WW) == 4
    for x_TN, y_TN, trigger_T in zip(x_BTN[:50], y_BTN, trigger_BT, strict=False):
        assert x_TN[:, 0].tolist() == [1] + [0] * 11
        assert x_TN[0].sum() == 2
        assert x_TN[0, 2:].sum() == 1
        assert not y_TN[0].any()
        read = []  # log-probabilities after the words so far, without the first token
        for t in range(1, 12):
            assert x_TN[t].sum() == 1
            if trigger_T[t]:
                assert t >= 3
                assert not trigger_T[t - 1]
                logits_W, rate = 3 * torch.stack(read).mean(0), 0.0
            else:
                logits_W = logits_WW[x_TN[t, 2:].argmax()]
                rate = 0.25 if t >= 2 else 0.0
                read.append(logits_W)
            expected_N = torch.cat([torch.tensor([0, rate]), (1 - rate) * logits_W.softmax(-1)])
            torch.testing.assert_close(y_TN[t], expected_N)
            assert trigger_T[t] == x_TN[t, 1]
    # the sequences follow these probabilities: the mean log-probability is minus the entropy
    log_p_BTN = y_BTN[:, 1:-1].clamp(min=1e-30).log()
    surprise = -(log_p_BTN * x_BTN[:, 2:]).sum(-1).mean()
    entropy = -(log_p_BTN * y_BTN[:, 1:-1]).sum(-1).mean()
    assert surprise == pytest.approx(float(entropy), rel=0.02)


def test_the_error_of_probabilities_is_their_divergence():
    batch = TriggerWordsTask(length=6, words=5, features=3).batch(8)
    output_BTN = torch.randn_like(batch.x_BTN)
    predicted = torch.distributions.Categorical(logits=output_BTN[:, 1:])
    true = torch.distributions.Categorical(probs=batch.targets)
    expected_BT = torch.distributions.kl_divergence(true, predicted)
    torch.testing.assert_close(batch.errors(output_BTN), expected_BT)
    torch.testing.assert_close(batch.values(output_BTN), predicted.probs)
    exact_BTN = batch.y_BTN.log().clamp(min=-100)
    assert batch.errors(exact_BTN).abs().max() < 1e-6


def test_trigger_position():
    positions = (
        TriggerTask(length=5).batch(300, torch.Generator().manual_seed(0))[2].nonzero()[:, 1]
    )
    assert set(positions.tolist()) == {2, 3, 4}
    assert TriggerTask().batch(3, trigger=8).trigger_BT.nonzero()[:, 1].tolist() == [8, 8, 8]
    rate = TriggerTask(length=100, rate=0.25).batch(100).trigger_BT[:, 2:].float().mean()
    assert abs(rate - 0.25) < 0.02


def test_same_seed_same_batch():
    a, b = (TriggerTask().batch(4, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.x_BTN, b.x_BTN)
    assert torch.equal(a.trigger_BT, b.trigger_BT)


def test_names():
    assert task_by_name("trigger") == TriggerTask()
    assert task_by_name("trigger-64") == TriggerTask(length=64)
    assert task_by_name("trigger-every-32") == TriggerTask(length=32, rate=0.25)
    content = TriggerTask(length=32, width=48, rate=0.25, content=True)
    assert task_by_name("trigger-content-32") == content
    assert task_by_name("trigger-words-32") == TriggerWordsTask(length=32)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TriggerTask(length=3), "length"),
        (lambda: TriggerTask(width=3), "width"),
        (lambda: TriggerTask(rate=1.5), "rate"),
        (lambda: TriggerTask(content=3), "content"),
        (lambda: TriggerTask().batch(1, trigger=16), "trigger"),
        (lambda: TriggerWordsTask(length=3), "length"),
        (lambda: TriggerWordsTask(words=1), "words"),
        (lambda: TriggerWordsTask(features=0), "features"),
        (lambda: TriggerWordsTask(rate=-1), "rate"),
        (lambda: task_by_name("triger"), "task"),
        (lambda: task_by_name("trigger-3"), "length"),
    ],
)
def test_wrong_values_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
