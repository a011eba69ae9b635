"""The threshold of the null, its search, and the gradients that decide it."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from oasis_attn.data.trigger import TriggerTask
from oasis_attn.errors import UserError
from oasis_attn.lab.attention_only import AttentionOnlyConfig, AttentionOnlyModels, Start
from oasis_attn.lab.attention_only_training import TrainingRule, measure, train
from oasis_attn.lab.null_law import crossing, fit_line, logit_gradients, next_logits
from oasis_attn.lab.runs import RunFile, run_in_processes, run_row


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_crossing_interpolates_log_odds():
    sinks = {c: sigmoid(4 * (2.7 - c)) for c in (2.0, 2.5, 3.0, 3.5, 4.0)}
    assert crossing(sinks, 0.5) == pytest.approx(2.7)
    assert crossing(sinks, 0.02) == pytest.approx(2.7 + math.log(49) / 4)
    assert crossing({2.0: 1.0, 3.0: 0.0}, 0.5) == pytest.approx(2.5)  # probabilities are clipped


def test_crossing_is_above_the_last_sink():
    sinks = {1.0: 0.9, 2.0: 0.1, 3.0: 0.9, 4.0: 0.1}
    assert crossing(sinks, 0.5) == pytest.approx(3.5)
    assert crossing({1.0: 0.9, 2.0: 0.8}, 0.5) is None
    assert crossing({1.0: 0.1, 2.0: 0.1}, 0.5) is None


def test_search_finds_the_thresholds():
    found, rounds = {}, 0
    options = {"spacing": 0.5, "resolution": 0.25, "limits": (0.0, 10.0)}
    levels, wanted = (0.5, 0.02), {2.0, 2.5}
    while wanted:
        found |= {c: sigmoid(2 * (3.3 - c)) for c in wanted}
        wanted = next_logits(found, levels, **options)
        rounds += 1
    assert rounds < 12
    for level, expected in ((0.5, 3.3), (0.02, 3.3 + math.log(49) / 2)):
        low = max(c for c in found if found[c] >= level)
        high = min(c for c in found if c > low)
        assert high - low <= 0.25
        assert crossing(found, level) == pytest.approx(expected)


def test_search_ends_at_the_limits():
    options = {"spacing": 0.5, "resolution": 0.25, "limits": (0.0, 3.0)}
    assert next_logits({2.5: 0.9}, [0.5], **options) == {3.0}
    assert next_logits({2.5: 0.9, 3.0: 0.9}, [0.5], **options) == set()
    assert next_logits({0.0: 0.1}, [0.5], **options) == set()


def test_fit_line():
    x, noise = [1.0, 2.0, 3.0, 4.0, 5.0], [0.1, -0.1, 0.0, 0.1, -0.1]
    fit = fit_line(x, [0.5 + 0.75 * a + e for a, e in zip(x, noise, strict=True)])
    assert fit.slope_interval[0] < 0.75 < fit.slope_interval[1]
    assert fit.intercept_interval[0] < 0.5 < fit.intercept_interval[1]
    assert fit.slope == pytest.approx(0.75, abs=0.05)
    assert fit.n == 5


def model(null_logit, **values):
    """A model of one head with logits of order 1."""
    generator = torch.Generator().manual_seed(0)
    config, starts = AttentionOnlyConfig(normalizer="softmax1"), [Start(0, null_logit)]
    models = AttentionOnlyModels.initial(config, starts, {0: generator})
    with torch.no_grad():
        for name in ("query", "key", "value", "output"):
            models.get_parameter(name).mul_(15)
        for name, value in values.items():
            models.get_parameter(name).copy_(value)
    return models


@pytest.mark.parametrize("null_logit", [0.0, 3.0])
def test_the_gradients_are_as_derived(null_logit):
    task, generator = TriggerTask(), torch.Generator().manual_seed(1)
    found = logit_gradients(model(null_logit), task, generator)
    assert found.raise_first == pytest.approx(found.raise_first_expected, rel=1e-4)
    assert found.lower_others == pytest.approx(found.lower_others_expected, rel=1e-4)


@pytest.mark.parametrize("c", [0.0, 1.0, 2.0, 3.0])
def test_the_null_decides_whether_the_first_logit_is_raised(c):
    """All logits are 0, all values equal but the first, which is 0.4 of them."""
    values = torch.zeros(1, 1, 16, 16)
    values[0, 0, 0, 0], values[0, 0, [1, 15], 0] = 0.4, 1.0
    models = model(c, query=torch.zeros(1, 1, 16, 16), value=values, output=torch.eye(16))
    found = logit_gradients(models, TriggerTask(), torch.Generator().manual_seed(1), size=2000)
    visible = range(2, 17)  # of the idle queries
    totals = [(n - 0.6) / (n + math.exp(c)) for n in visible]
    expected = sum(
        (o**2 - 0.4 * o) / (n + math.exp(c)) for n, o in zip(visible, totals, strict=True)
    )
    assert found.raise_first == pytest.approx(expected / 15, abs=2e-3)
    assert (found.raise_first > 0) == (c < 2.5)


def test_the_gradients_at_the_start():
    """All logits are 0: lse is log of the visible keys, and the share of the sink 1 / (1 + e^c)."""
    models = model(2.0, query=torch.zeros(1, 1, 16, 16))
    with torch.no_grad():
        models.value[0, 0, 0] = 0
    task = TriggerTask()
    found = logit_gradients(models, task, torch.Generator().manual_seed(1), size=2000)
    assert found.raise_first / found.lower_others == pytest.approx(1 / (1 + math.exp(2)), rel=1e-3)
    logs = [math.log(t + 1) for t in range(1, 16)]
    assert found.lse == pytest.approx(sum(logs) / 15, abs=0.05)


def test_nothing_to_train_or_measure_is_an_error():
    config, task = AttentionOnlyConfig(), TriggerTask()
    with pytest.raises(UserError, match="starts: at least one"):
        train(config, task, [])
    (trained,) = train(config, task, [Start(3)], TrainingRule(max_steps=1, batch_size=2))
    with pytest.raises(UserError, match="sequences: 0"):
        measure(trained.model, task, sequences=0)


@pytest.mark.parametrize("name", ["runs.jsonl", "runs.jsonl.gz"])
def test_runs_are_kept(tmp_path, name):
    config, task = AttentionOnlyConfig(), TriggerTask()
    (trained,) = train(config, task, [Start(3)], TrainingRule(max_steps=2, batch_size=2))
    row = run_row("a", trained, measure(trained.model, task, sequences=2))
    assert (row["seed"], row["steps"], row["solved"]) == (3, 2, False)
    assert row["null_logits"] == [["-inf"]]
    file = RunFile(tmp_path / "folder" / name)
    file.add([row])
    file.add([row | {"group": "b"}])
    again = RunFile(file.path)
    assert again.rows == file.rows
    assert again.of("a") == [row]
    damaged = bytearray(file.path.read_bytes())
    damaged[10] ^= 0xFF
    for data in (b'{"group"', b"3\n", bytes(damaged)):
        file.path.write_bytes(data)
        with pytest.raises(UserError, match=r"out: .* is not a file of runs"):
            RunFile(file.path)


def test_missing_units_are_run_in_order_and_a_failed_one_does_not_stop_the_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        "oasis_attn.lab.runs.ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers)
    )

    def missing(file):
        done = {row["unit"] for row in file.rows}
        return [unit for unit in (3, 1, 2) if unit not in done] or ([4] if 4 not in done else [])

    def run(unit):
        if unit == 1:
            raise ValueError("unit 1")
        return {"group": "a", "unit": unit}

    file = RunFile(tmp_path / "runs.jsonl.gz")
    run_in_processes(file, missing, run, workers=1, minutes=0)
    assert not file.rows
    with pytest.raises(RuntimeError, match="1 units failed"):
        run_in_processes(file, missing, run, workers=1)
    found = [(row["unit"], row["torch"]) for row in RunFile(file.path).rows]
    assert found == [(3, torch.__version__), (2, torch.__version__)]
    assert "ValueError: unit 1" in capsys.readouterr().err
