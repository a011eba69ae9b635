import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from oasis_attn.hub.model_info import describe_model, eval_mode, fingerprint
from oasis_attn.quantization import quantize
from tiny_models import tiny_config, tiny_model


def test_fingerprints_tell_what_models_compute():
    model = tiny_model()
    same = copy.deepcopy(model)
    same.config.name_or_path = "elsewhere"
    assert fingerprint(same) == fingerprint(model)
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        next(nudged.parameters()).view(-1)[-1] += 1
    annealed = copy.deepcopy(model)
    annealed.config.null_logit = -3.0
    others = [nudged, annealed, tiny_model("vanilla"), copy.deepcopy(model).bfloat16()]
    others += [quantize(model, "w4a4"), quantize(model, "w8a8-dynamic")]
    assert len({fingerprint(m) for m in [model, *others]}) == 1 + len(others)


def test_a_wrapped_tensor_counts_by_what_it_holds():
    torchao = pytest.importorskip("torchao.quantization")
    models = [LlamaForCausalLM(tiny_config()) for _ in range(2)]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    first, second, again = map(fingerprint, models)
    assert first == again != second


def test_description_and_mode():
    model = tiny_model()
    facts = describe_model(model)
    assert facts.family == "llama"
    assert facts.config == model.config.settings
    assert facts.dtype == "float32"
    assert describe_model(LlamaForCausalLM(tiny_config())).config is None
    frozen = model.train().model.layers[1].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert {module for module in model.modules() if not module.training} == {*frozen.modules()}
