"""Time and memory of a training step, relative to vanilla and to the authors' form."""

from __future__ import annotations

import json
import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from authors_form import AuthorsForm
from harness import in_new_process, medians, peak_memory
from oasis_attn import OasisConfig, OasisForCausalLM, variants

FORMS = ("vanilla", "oasis_block", "oasis", "authors")


def build(form: str):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    if form == "authors":
        return AuthorsForm(config)
    return OasisForCausalLM(OasisConfig(text_config=config, **variants()[form]))


def step(model, ids) -> float:
    model.zero_grad(set_to_none=True)
    if isinstance(model, AuthorsForm):
        logits = model(ids)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    else:
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def tokens() -> torch.Tensor:
    return torch.randint(8192, (2, 1024), generator=torch.Generator().manual_seed(0))


def check(models, ids) -> None:
    """Check first that zero queries without a null give the vanilla model."""
    exact = {"null_logit": -1e4, "mix_scale": "sum"}
    with torch.no_grad():
        expected = models["vanilla"](ids[:, :64]).logits
        for form in ("oasis", "oasis_block"):
            config = models["vanilla"].config.text_config
            model = OasisForCausalLM(OasisConfig(text_config=config, **variants()[form], **exact))
            model.load_state_dict(models["vanilla"].state_dict(), strict=False)
            torch.testing.assert_close(model(ids[:, :64]).logits, expected, rtol=1e-3, atol=1e-3)


def measure(rounds: int) -> dict[str, float]:
    ids = tokens()
    models = {form: build(form) for form in FORMS}
    check(models, ids)
    seconds = medians(
        {form: lambda model=model: step(model, ids) for form, model in models.items()}, rounds
    )
    del models
    memory = {form: in_new_process(__file__, form) for form in FORMS}
    ratios = {"training_step.vanilla_seconds": seconds["vanilla"]}
    for form, other in (("oasis_block", "vanilla"), ("oasis", "vanilla"), ("oasis", "authors")):
        ratios[f"training_step.{form}_time_over_{other}"] = seconds[form] / seconds[other]
        ratios[f"training_step.{form}_memory_over_{other}"] = memory[form] / memory[other]
    return ratios


if __name__ == "__main__":
    model, ids = build(sys.argv[1]), tokens()
    print(json.dumps(peak_memory(lambda: step(model, ids))))
