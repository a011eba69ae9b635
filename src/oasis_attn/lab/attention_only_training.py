"""Trains stacked attention-only models on the trigger-conditional task, and measures their sinks.

The optimizer, the stop rule and the measurement are those of arXiv 2603.11487.  Each model stops
by itself; its result does not depend on the models that it is stacked with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oasis_attn.data.trigger import FIRST, TriggerTask
from oasis_attn.errors import UserError, check_at_least, check_whole
from oasis_attn.lab.attention_only import (
    AttentionOnlyConfig,
    AttentionOnlyModels,
    LayerAttention,
    Start,
)

_BETAS = 0.9, 0.95
_MEASURE_SEED = 2**31 - 1
_MAP_ENTRIES = 2**22  # the most attention weights that the measurement holds at once

Heads = tuple[tuple[float, ...], ...]
"""One number per layer and head."""


@dataclass(frozen=True, kw_only=True)
class TrainingRule:
    """How to train and when to stop.

    Args:
        learning_rate: of Adam with betas 0.9 and 0.95; arXiv 2603.11487 uses 1e-3 for one layer and
            1e-4 for several.
        batch_size: sequences per step, new ones in each step.
        tolerance: training stops when the largest absolute error of any output in a step's batch is
            below it.
        max_steps: training also stops after so many steps.

    Raises:
        UserError: a value is out of range.
    """

    learning_rate: float = 1e-3
    batch_size: int = 128
    tolerance: float = 5e-3
    max_steps: int = 50_000

    def __post_init__(self) -> None:
        check_at_least("learning_rate", self.learning_rate, 0, 1)
        check_at_least("tolerance", self.tolerance, 0)
        check_whole("batch_size", self.batch_size, 1)
        check_whole("max_steps", self.max_steps, 1)


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        start: its seed and the null logit that it started with.
        steps: of the optimizer.
        solved: whether the error reached the tolerance.
        model: the model, alone in its stack.
    """

    start: Start
    steps: int
    solved: bool
    model: AttentionOnlyModels


Observe = Callable[[int, AttentionOnlyModels, Sequence[Start]], None]


def train(
    config: AttentionOnlyConfig,
    task: TriggerTask,
    starts: Sequence[Start],
    rule: TrainingRule | None = None,
    *,
    observe: Observe | None = None,
    device: str = "cpu",
) -> list[Trained]:
    """Train one model per start; the results are in the order of `starts`.

    Args:
        config: shared by all models.
        task: generates the data; models with the same seed see the same sequences.
        starts: the seed and the null logit of each model.
        rule: default: `TrainingRule()` for one layer, with learning rate 1e-4 for several.
        observe: called before each step with the number of steps done, the models that are still
            in training, and their starts.
        device: where the models are trained; the data are drawn on the CPU.

    Raises:
        UserError: `starts` is empty, the width of the task is not that of the models, or the task
            has content, for which decoders are made.
    """
    if not starts:
        raise UserError("starts: at least one is required")
    if task.content:
        raise UserError("content: models of attention alone have no norm; it must be False")
    if task.width != config.width:
        raise UserError(f"width: the task has {task.width} and the models have {config.width}")
    rule = rule or TrainingRule(learning_rate=1e-3 if config.layers == 1 else 1e-4)
    generators = {start.seed: torch.Generator().manual_seed(start.seed) for start in starts}
    models = AttentionOnlyModels.initial(config, starts, generators).to(device)
    optimizer = _adam(models, rule)
    trained: dict[int, Trained] = {}
    running = list(range(len(starts)))
    for step in range(rule.max_steps + 1):
        if observe is not None:
            observe(step, models, [starts[index] for index in running])
        seeds = [starts[index].seed for index in running]
        batches = {
            seed: task.batch(rule.batch_size, generators[seed]) for seed in dict.fromkeys(seeds)
        }
        x_MBTN = torch.stack([batches[seed].x_BTN for seed in seeds]).to(device)
        y_MBTN = torch.stack([models.target(batches[seed]) for seed in seeds]).to(device)
        error_MBTN = models(x_MBTN) - y_MBTN
        largest_M = error_MBTN.detach().abs().amax((1, 2, 3))
        solved = (largest_M < rule.tolerance).tolist()
        for place, index in enumerate(running):
            if solved[place] or step == rule.max_steps:
                alone = models.select([place])
                trained[index] = Trained(starts[index], step, solved[place], alone)
        optimizer.zero_grad()
        error_MBTN.square().mean((1, 2, 3)).sum().backward()
        optimizer.step()
        kept = [place for place, index in enumerate(running) if index not in trained]
        if not kept:
            break
        if len(kept) < len(running):
            models, optimizer = _keep(models, optimizer, kept, rule)
            running = [running[place] for place in kept]
    return [trained[index] for index in range(len(starts))]


def _adam(models: AttentionOnlyModels, rule: TrainingRule) -> torch.optim.Adam:
    parameters = [each for each in models.parameters() if each.requires_grad]
    return torch.optim.Adam(parameters, lr=rule.learning_rate, betas=_BETAS)


def _keep(
    models: AttentionOnlyModels, optimizer: torch.optim.Adam, kept: list[int], rule: TrainingRule
) -> tuple[AttentionOnlyModels, torch.optim.Adam]:
    """The models at the places `kept`, and an optimizer that goes on with their moments."""
    fewer = models.select(kept)
    continued = _adam(fewer, rule)
    for name, parameter in models.named_parameters():
        if parameter.requires_grad:
            continued.state[fewer.get_parameter(name)] = {
                key: value[kept] if value.dim() else value
                for key, value in optimizer.state[parameter].items()
            }
    return fewer, continued


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured on one model; see `measure`.

    Attributes:
        sink_idle: mean weight on the first token at idle queries.
        row_sum_idle: mean sum of the weights at idle queries.
        null_idle: mean null probability at idle queries.
        sink_trigger, row_sum_trigger: the same at the trigger.
        sink_value: norm of the first token's value after W_O, relative to the mean over the others.
        largest_error: largest absolute error of an output.
        trigger_error: root mean square error at the trigger.
    """

    sink_idle: Heads
    row_sum_idle: Heads
    null_idle: Heads
    sink_trigger: Heads
    row_sum_trigger: Heads
    sink_value: Heads
    largest_error: float
    trigger_error: float

    @property
    def sink_idle_largest(self) -> float:
        """The largest `sink_idle` over layers and heads."""
        return max(max(layer) for layer in self.sink_idle)


@torch.no_grad()
def measure(model: AttentionOnlyModels, task: TriggerTask, *, sequences: int = 1000) -> Measurement:
    """Measure one model on sequences with the trigger in the middle, at position T / 2 (8 of 16).

    Idle queries are all but the first token and the trigger.

    Raises:
        UserError: `sequences` is not a positive integer.
    """
    check_whole("sequences", sequences, 1)
    generator = torch.Generator().manual_seed(_MEASURE_SEED)
    device = model.query.device
    trigger = task.length // 2
    size = max(1, _MAP_ENTRIES // (task.length**2 * model.config.heads))
    means: dict[str, Tensor] = {}
    largest = squares = 0.0
    for first in range(0, sequences, size):
        count = min(size, sequences - first)
        batch = task.batch(count, generator, trigger=trigger)
        layers: list[LayerAttention] = []
        output_BTN = model(batch.x_BTN.to(device).unsqueeze(0), layers)[0]
        error_BTN = output_BTN - model.target(batch).to(device)
        largest = max(largest, float(error_BTN.abs().max()))
        squares += float(error_BTN[:, trigger].square().mean()) * count / sequences
        for name, value in _layer_means(layers, batch.idle_BT[0].to(device), trigger).items():
            means[name] = means.get(name, 0) + value * count / sequences
    heads = {name: tuple(map(tuple, value.tolist())) for name, value in means.items()}
    return Measurement(**heads, largest_error=largest, trigger_error=squares**0.5)


def _layer_means(
    layers: Sequence[LayerAttention], idle_T: Tensor, trigger: int
) -> dict[str, Tensor]:
    """Means over sequences, `[L, H]`."""
    rows = []
    for weights_MBHTS, null_MBHT, value_norm_MBHS in layers:
        first_HT = weights_MBHTS[0, ..., FIRST].mean(0)
        row_sum_HT = weights_MBHTS[0].sum(-1).mean(0)
        value_norm_HS = value_norm_MBHS[0].mean(0)
        rows.append(
            {
                "sink_idle": first_HT[:, idle_T].mean(-1),
                "row_sum_idle": row_sum_HT[:, idle_T].mean(-1),
                "null_idle": null_MBHT[0].mean(0)[:, idle_T].mean(-1),
                "sink_trigger": first_HT[:, trigger],
                "row_sum_trigger": row_sum_HT[:, trigger],
                "sink_value": value_norm_HS[:, FIRST] / value_norm_HS[:, 1:].mean(-1),
            }
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
