"""The metrics of the attention-only models in `experiments/`."""

from __future__ import annotations

from oasis_attn.metrics.definition import Definition

_SOURCE = "arXiv 2603.11487"
_SEQUENCES = (
    "`experiments/source_result.py`: mean over n models that differ in their seed; 1000 sequences "
    "of 16 tokens with the trigger at position 8; idle queries are all but the first token and the "
    "trigger"
)
_LAW = (
    "`experiments/null_law.py`: a model of `where` is trained with constant null logits until its "
    "largest error is below 0.005, or for the most steps of its group (the record counts the runs "
    "that reached it); p is the mean probability of the first token at idle queries, of the head "
    "in which it is largest"
)
_FIT = "`experiments/null_law.py`: least squares over n thresholds, models of 1 layer of 1 head"

ATTENTION_ONLY = (
    Definition(
        name="attention_only.sink_idle",
        definition="mean attention weight of the first token at idle queries, of the head in which "
        "it is largest",
        unit="1",
        better="lower",
        protocol=_SEQUENCES,
        source=_SOURCE,
    ),
    Definition(
        name="attention_only.row_sum_idle",
        definition="mean sum of the attention weights of an idle query, mean over layers and heads",
        unit="1",
        protocol=_SEQUENCES,
        source=_SOURCE,
    ),
    Definition(
        name="attention_only.largest_error",
        definition="largest absolute difference between output and target",
        unit="target",
        better="lower",
        protocol=f"{_SEQUENCES}; maximum over tokens, coordinates and sequences",
    ),
    Definition(
        name="attention_only.steps",
        definition="optimizer steps until the largest error in a batch is below 0.005",
        unit="steps",
        protocol=_SEQUENCES,
        source=_SOURCE,
    ),
    Definition(
        name="null_law.threshold@<eps>",
        definition="c*: the null logit above which p is below eps; interpolated linearly in "
        "log(p / (1 - p)) between the largest trained null logit with p at least eps and the next",
        unit="logit",
        protocol=f"{_LAW}; mean over n seeds",
    ),
    Definition(
        name="null_law.slope@<eps>",
        definition="b of `null_law.threshold@<eps>` = a + b log(length)",
        unit="logit",
        protocol=_FIT,
    ),
    Definition(
        name="null_law.intercept@<eps>",
        definition="a of `null_law.threshold@<eps>` = a + b log(length)",
        unit="logit",
        protocol=_FIT,
    ),
    Definition(
        name="null_law.margin@<eps>",
        definition="largest difference of a threshold and log(length)",
        unit="logit",
        protocol="`experiments/null_law.py`: maximum over all models and n seeds",
    ),
)
