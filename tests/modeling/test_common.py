"""transformers' own tests of a causal language model, on ours."""

import unittest

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from oasis_attn import OasisConfig, OasisForCausalLM
from oasis_attn.modeling.configuration_oasis import ATTENTION
from oasis_attn.modeling.task_heads import (
    OasisForQuestionAnswering,
    OasisForSequenceClassification,
    OasisForTokenClassification,
)
from oasis_attn.modeling.variants import settings_of
from tiny_models import VOCABULARY, tiny_config
from transformers_common import UNPACKED, import_common

if not UNPACKED:
    pytest.skip(
        "transformers' tests: run `make .venv/.transformers-tests`", allow_module_level=True
    )
ModelTesterMixin = import_common("test_modeling_common").ModelTesterMixin
ConfigTester = import_common("test_configuration_common").ConfigTester

TAKES_LABELS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": OasisForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": OasisForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": OasisForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": OasisForQuestionAnswering,
}
CANNOT_APPLY = {  # the test's exact name: why
    "test_can_set_attention_dynamically": "no attention function but ours has a null option",
    "test_config_attn_implementation_setter": "no attention function but ours has a null option",
    "test_generation_tester_mixin_inheritance": "the sdist leaves the tests of generation out",
    "test_tied_head_has_a_tp_plan_entry": "tensor parallelism would split the heads psi averages",
    "test_training_gradient_checkpointing_use_reentrant_true": (
        "reentrant checkpoints lose the gradients of depth sources, so they are refused"
    ),
}


@pytest.fixture(autouse=True)
def fitted(monkeypatch):
    """Listed as classes that take labels; `eager`, by which the tests ask for maps, is ours."""
    for names, kind in TAKES_LABELS.items():
        monkeypatch.setitem(getattr(modeling_auto, names), OasisConfig.model_type, kind.__name__)
    native = PreTrainedConfig._attn_implementation
    ours = property(native.fget, lambda config, _: native.fset(config, ATTENTION))
    monkeypatch.setattr(OasisConfig, "_attn_implementation", ours)


class Family:
    """What the tests ask of a family: its config, inputs, and sizes."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, name, variant, **changes):
        self.name, self.settings = name, settings_of(variant) | changes

    @property
    def has_experts(self):
        return hasattr(self.get_config().text_config, "num_experts_per_tok")

    def get_config(self):
        text = tiny_config(self.name, num_hidden_layers=self.num_hidden_layers)
        return OasisConfig(text_config=text, **self.settings)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, VOCABULARY, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin):
    all_model_classes = (OasisForCausalLM,)
    test_can_init_all_missing_weights_before_2023 = True
    model_tester: Family

    def setUp(self):
        if self._testMethodName in CANNOT_APPLY:
            self.skipTest(CANNOT_APPLY[self._testMethodName])
        if "batched_and_grouped" in self._testMethodName and not self.model_tester.has_experts:
            self.skipTest("it has no experts; the class cannot say so, for it is of all families")
        torch.manual_seed(0)

    def _set_subconfig_attributes(self, config, attribute_name, value):
        if attribute_name != "output_attentions":  # forward reads it off the top config
            super()._set_subconfig_attributes(config, attribute_name, value)

    def test_config(self):
        ConfigTester(self, config_class=OasisConfig).run_common_tests()


class TestLlama(Common, unittest.TestCase):
    model_tester = Family("llama", "oasis")


class TestTaskHeads(Common, unittest.TestCase):
    model_tester = Family("llama", "oasis")
    all_model_classes = tuple(TAKES_LABELS.values())[1:]


class TestQwen3(Common, unittest.TestCase):
    model_tester = Family("qwen3", "oasis_block", depth_block_size=3)


class TestGemma2(Common, unittest.TestCase):
    model_tester = Family("gemma2", "oasis")


class TestOlmo2(Common, unittest.TestCase):
    model_tester = Family("olmo2", "oasis", mix_scale="sum")


class TestMixtral(Common, unittest.TestCase):
    model_tester = Family("mixtral", "oasis")


def test_every_listed_test_exists():
    assert [name for name in CANNOT_APPLY if not hasattr(ModelTesterMixin, name)] == []
