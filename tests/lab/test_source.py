"""The attention-only models, and the results of arXiv 2603.11487 for one layer."""

import math

import pytest
import torch

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.errors import UserError
from oasis_attn.lab.attention_only import AttentionOnlyConfig, AttentionOnlyModels, Start
from oasis_attn.lab.attention_only_training import TrainingRule, measure, train
from oasis_attn.ops.normalizers import TOKEN_NORMALIZERS

TASK = TriggerTask()
CLIPPED = {"name": "clipped_softmax", "gamma": -0.03}
OTHERS = {CLIPPED["name"], "value_null", "key_null", "key_value_null"}
NORMALIZERS = ["relu", CLIPPED, {"name": "softmax1"}, *sorted(set(TOKEN_NORMALIZERS) - OTHERS)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def large_models(config, starts):
    """Models whose logits and outputs are of order 1."""
    seeds = {start.seed: generator(start.seed) for start in starts}
    models = AttentionOnlyModels.initial(config, starts, seeds).double()
    with torch.no_grad():
        for name in ("query", "key", "value", "output"):
            models.get_parameter(name).mul_(20)
        for name in ("null_query", "null_value"):
            if name in dict(models.named_parameters()):
                models.get_parameter(name).normal_(generator=generator(9))
    return models


def by_definition(models, m, x_TN):
    """The outputs of model m for one sequence: loops over layers, heads and queries."""
    config = models.config
    H, N = config.heads, config.width
    for layer in range(config.layers):
        out_TN = torch.zeros_like(x_TN)
        for h in range(H):
            columns = slice(h * N, (h + 1) * N)
            q, k, v = (
                x_TN @ weight[m, layer, :, columns]
                for weight in (models.query, models.key, models.value)
            )
            for t in range(len(x_TN)):
                s = k[: t + 1] @ q[t]
                c = models.null_logit[m, layer, h]
                if config.null_term == "query":
                    c = c + models.null_query[m, layer, :, h] @ x_TN[t]
                if config.null_term == "log_visible":
                    c = c + math.log(t + 1)
                if config.normalizer == "relu":
                    mixed = s.relu() @ v[: t + 1] / max(t, 1)
                else:
                    total = s.exp().sum() + c.exp()
                    mixed = s.exp() @ v[: t + 1] / total
                    if config.null_value:
                        mixed = mixed + c.exp() / total * models.null_value[m, layer, h]
                out_TN[t] += mixed @ models.output[m, layer, columns]
        x_TN = x_TN + out_TN if config.layers > 1 else out_TN
    return x_TN


@pytest.mark.parametrize(
    "options",
    [
        {"normalizer": "relu"},
        {"normalizer": "softmax"},
        {"normalizer": "softmax1"},
        {"normalizer": "softmax1", "null_term": "query"},
        {"normalizer": "softmax1", "null_term": "log_visible", "null_value": True},
        {"normalizer": "learned_sink", "null_value": True},
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_the_definition(options, shape):
    config = AttentionOnlyConfig(layers=shape[0], heads=shape[1], width=6, **options)
    models = large_models(config, [Start(1, 0.5), Start(2, 2.0)])
    x_BTN = TriggerTask(length=7, width=6).batch(2, generator()).x_BTN.double()
    x_MBTN = torch.stack([x_BTN, x_BTN])
    expected = torch.stack(
        [torch.stack([by_definition(models, m, x_TN) for x_TN in x_BTN]) for m in range(2)]
    )
    layers = []
    for found in models(x_MBTN), models(x_MBTN, layers):  # fused where there is a kernel, and not
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(layers) == shape[0]
    assert layers[0].weights_MBHTS.shape == (2, 2, shape[1], 7, 7)


def test_a_normalizer_by_name_and_as_a_mapping_are_the_same():
    for normalizer in ("softmax1", {"name": "softmax1"}):
        config = AttentionOnlyConfig(normalizer=normalizer)
        models = AttentionOnlyModels.initial(config, [Start(0, 4.5)], {0: generator()})
        assert models.null_logit.eq(4.5).all()
        assert config.is_fused


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_every_normalizer_trains(normalizer):
    config = AttentionOnlyConfig(normalizer=normalizer, heads=2)
    (trained,) = train(config, TASK, [Start(0)], TrainingRule(max_steps=3))
    assert trained.steps == 3
    assert not trained.solved
    found = measure(trained.model, TASK, sequences=10)
    assert len(found.sink_idle[0]) == 2
    assert math.isfinite(found.largest_error)


@pytest.mark.parametrize(
    "config",
    [
        AttentionOnlyConfig(normalizer="learned_sink", layers=2, heads=2),
        AttentionOnlyConfig(normalizer="softmax1", null_term="query", null_value=True),
        AttentionOnlyConfig(normalizer="softpick"),
    ],
    ids=str,
)
def test_stacked_training_is_single_training(config):
    """In float64, and with models that stop at different steps."""
    starts = [Start(3, 0.0), Start(3, 2.5), Start(4, 1.0), Start(5, 4.5)]
    default, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.float64)
    try:
        rule = TrainingRule(learning_rate=1e-2, batch_size=8, tolerance=0.13, max_steps=60)
        task = TriggerTask(length=8)
        stacked = train(config, task, starts, rule)
        single = [train(config, task, [start], rule)[0] for start in starts]
    finally:
        torch.set_default_dtype(default)
    assert [t.steps for t in stacked] == [t.steps for t in single]
    for one, other in zip(stacked, single, strict=True):
        assert (one.start, one.solved) == (other.start, other.solved)
        for name, tensor in one.model.named_parameters():
            expected = other.model.get_parameter(name)
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-9)


def test_models_stop_by_themselves():
    rule = TrainingRule(learning_rate=1e-2, tolerance=0.1)
    stacked = train(AttentionOnlyConfig(), TASK, [Start(0), Start(1), Start(2)], rule)
    assert all(trained.solved for trained in stacked)
    assert len({trained.steps for trained in stacked}) > 1


def test_the_measurement():
    """Of a model whose attention is uniform."""
    models = AttentionOnlyModels.initial(
        AttentionOnlyConfig(normalizer="softmax1"), [Start(0, math.log(3))], {0: generator()}
    )
    with torch.no_grad():
        models.query.zero_()
        models.value.copy_(torch.eye(16))
        models.output.copy_(torch.eye(16))
    found = measure(models, TASK, sequences=5)
    idle = [t for t in range(1, 16) if t != 8]
    ((first,),), ((row_sum,),), ((null,),) = found.sink_idle, found.row_sum_idle, found.null_idle
    assert first == pytest.approx(sum(1 / (t + 4) for t in idle) / 14)
    assert null == pytest.approx(sum(3 / (t + 4) for t in idle) / 14)
    assert row_sum == pytest.approx(1 - null)
    assert found.sink_trigger[0][0] == pytest.approx(1 / 12)
    assert found.row_sum_trigger[0][0] == pytest.approx(9 / 12)
    assert 0.3 < found.sink_value[0][0] < 1  # the other tokens have noise
    assert found.largest_error > 0.1


def train_and_measure(config, starts):
    trained = train(config, TASK, starts)
    assert all(each.solved for each in trained)
    assert all(500 < each.steps < 2000 for each in trained)
    return [measure(each.model, TASK) for each in trained]


def test_softmax_has_a_sink():
    for found in train_and_measure(AttentionOnlyConfig(), [Start(seed) for seed in range(3)]):
        assert found.sink_idle_largest >= 0.95
        assert found.sink_value[0][0] < 0.05  # the sink does nothing
        assert found.largest_error < 0.02


def test_relu_has_no_sink():
    config = AttentionOnlyConfig(normalizer="relu")
    for found in train_and_measure(config, [Start(seed) for seed in range(3)]):
        assert found.sink_idle_largest <= 0.01
        assert found.row_sum_idle[0][0] <= 0.01


def test_only_a_strong_null_removes_the_sink():
    starts = [Start(seed, c) for c in (0.0, 2.0, 4.5) for seed in range(2)]
    found = train_and_measure(AttentionOnlyConfig(normalizer="softmax1"), starts)
    sinks = [each.sink_idle_largest for each in found]
    assert min(sinks[:2]) > 0.99
    assert min(sinks[2:4]) > 0.9
    assert max(sinks[4:]) < 0.002


def test_softpick_has_no_sink():
    (found,) = train_and_measure(AttentionOnlyConfig(normalizer="softpick"), [Start(1)])
    assert found.sink_idle_largest < 0.01


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AttentionOnlyConfig(layers=0), "layers"),
        (lambda: AttentionOnlyConfig(heads=0), "heads"),
        (lambda: AttentionOnlyConfig(normalizer="softmx"), "token_normalizer"),
        (lambda: AttentionOnlyConfig(normalizer="value_null"), "'value_null' is not supported"),
        (lambda: AttentionOnlyConfig(null_term="log"), "null_term"),
        (lambda: AttentionOnlyConfig(normalizer="softmax", null_value=True), "no null logit"),
        (lambda: TrainingRule(batch_size=0), "batch_size"),
        (lambda: TrainingRule(max_steps=0), "max_steps"),
        (lambda: TrainingRule(learning_rate=-1), "learning_rate"),
        (lambda: train(AttentionOnlyConfig(width=8), TASK, [Start(0)]), "width"),
    ],
)
def test_wrong_values_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
