"""The values of published studies."""

from __future__ import annotations

from collections.abc import Callable

import lab_page
from oasis_attn.study.results import Results


def of_seeds(study: str, seeds: int) -> tuple[Results, Callable[[str, str], list[float]]]:
    """A published study, and the values of a metric for the seeds of a variant."""
    results = lab_page.published(study)
    assert results is not None
    known = {metric.name: metric for metric in results.metrics}

    def values(name: str, variant: str) -> list[float]:
        found = [*results.values(known[name], variant).values()]
        assert len(found) == seeds
        return found

    return results, values
