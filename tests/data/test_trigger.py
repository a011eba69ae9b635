"""The trigger-conditional task, against its definition token by token."""

import pytest
import torch

from oasis_attn.data.trigger import TriggerTask, trigger_task
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
    x_BTN, y_BTN, trigger_BT, start = batch = task.batch(64, torch.Generator().manual_seed(1))
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
    torch.testing.assert_close(batch.differences(x_BTN), (x_BTN - y_BTN)[:, start:])
    assert [len(each) for each in batch.first(3)[:3]] == [3, 3, 3]
    noise = x_BTN[:, 1:, 2:-1]
    assert noise.min() < -0.9
    assert noise.max() > 0.9
    assert noise.abs().max() <= 1
    assert (batch.idle_BT == ~trigger_BT & (torch.arange(task.length) > 0)).all()


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
    assert trigger_task("trigger") == TriggerTask()
    assert trigger_task("trigger-64") == TriggerTask(length=64)
    assert trigger_task("trigger-every-32") == TriggerTask(length=32, rate=0.25)
    content = TriggerTask(length=32, width=48, rate=0.25, content=True)
    assert trigger_task("trigger-content-32") == content


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TriggerTask(length=3), "length"),
        (lambda: TriggerTask(width=3), "width"),
        (lambda: TriggerTask(rate=1.5), "rate"),
        (lambda: TriggerTask(content=3), "content"),
        (lambda: TriggerTask().batch(1, trigger=16), "trigger"),
        (lambda: trigger_task("triger"), "task"),
        (lambda: trigger_task("trigger-3"), "length"),
    ],
)
def test_wrong_values_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
