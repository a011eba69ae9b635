"""The task `gsm8k` of lm-eval: its prompts, shots, stop strings and scores."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from functools import cached_property
from statistics import fmean
from typing import Any

from oasis_attn.data.problems import Problem
from oasis_attn.errors import UserError
from oasis_attn.modeling.hf_compat import lm_eval_task_file

SHOT_SEED = 1234  # the default of lm-eval, which chooses new shots for each problem


class HarnessGsm8k:
    """The task of lm-eval with given problems.

    Args:
        problems: the problems, in order.
        examples: the problems that shots are chosen from; may be empty if `shots` is 0.
        shots: worked examples in front of each problem.

    Raises:
        UserError: lm-eval is not installed, or there are fewer examples than shots.
    """

    def __init__(
        self, problems: Sequence[Problem], examples: Sequence[Problem], *, shots: int
    ) -> None:
        check_harness()
        if shots > len(examples):
            raise UserError(f"shots: {shots} are more than the {len(examples)} training problems")
        from datasets import Dataset, DatasetDict

        def dataset(**_: Any) -> DatasetDict:
            parts = {"train": examples or problems, "test": problems}
            return DatasetDict(
                {name: Dataset.from_list([asdict(p) for p in part]) for name, part in parts.items()}
            )

        with _quiet():
            from oasis_attn.modeling.hf_compat import ConfigurableTask

            self._config = _definition() | {"num_fewshot": shots, "custom_dataset": dataset}
            self._task = ConfigurableTask(config=dict(self._config))
            self._task.set_fewshot_seed(SHOT_SEED)
            self._task.build_all_requests(rank=0, world_size=1)

    @cached_property
    def prompts(self) -> list[str]:
        """One prompt for each problem."""
        return [instance.args[0] for instance in self._task.instances]

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return list(self._config["generation_kwargs"]["until"])

    @property
    def version(self) -> str:
        """The version of the task."""
        return str(self._config["metadata"]["version"])

    def scores(self, responses: Sequence[str]) -> dict[str, float]:
        """The exact match of lm-eval for each filter (`strict-match`, `flexible-extract`)."""
        for instance, response in zip(self._task.instances, responses, strict=True):
            instance.resps = [response]
        with _quiet():
            self._task.apply_filters()
            return {
                name: fmean(
                    self._task.process_results(instance.doc, [instance.filtered_resps[name]])[
                        "exact_match"
                    ]
                    for instance in self._task.instances
                )
                for name in self._task.instances[0].filtered_resps
            }


def check_harness() -> None:
    """Raise `UserError` unless lm-eval can be imported."""
    try:
        with _quiet():
            from oasis_attn.modeling.hf_compat import ConfigurableTask  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"tasks: 'gsm8k' needs lm-eval: pip install 'oasis-attn[evaluate]' ({error})"
        ) from error


def _definition() -> dict[str, Any]:
    import yaml

    config = yaml.safe_load(lm_eval_task_file("gsm8k").read_text(encoding="utf-8"))
    return {name: config[name] for name in config if name not in ("dataset_path", "dataset_name")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of lm-eval, and its log messages except errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
