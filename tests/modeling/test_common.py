"""transformers' own tests of a causal language model, on ours."""

import unittest

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oasis_attn import OasisConfig, OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from tiny import VOCABULARY, tiny_config
from transformers_common import FOLDER, import_common

if not FOLDER.is_dir():
    pytest.skip(
        "transformers' tests: run `make .venv/.transformers-tests`", allow_module_level=True
    )

CANNOT_APPLY = {}


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """Where the tests look up that the class takes labels."""
    name = OasisForCausalLM.__name__
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, OasisConfig.model_type, name)


class Tester:
    """What the tests ask of a family: a config and inputs."""

    batch_size, seq_length, num_hidden_layers, is_training = 3, 7, 2, True

    def __init__(self, family, variant):
        self.family, self.variant = family, variant

    def get_config(self):
        text = tiny_config(self.family, num_hidden_layers=self.num_hidden_layers)
        return OasisConfig(text_config=text, **settings_of(self.variant))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, VOCABULARY, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(import_common("test_modeling_common").ModelTesterMixin):
    all_model_classes = (OasisForCausalLM,)
    test_can_init_all_missing_weights_before_2023 = True
    family, variant = "llama", "oasis"

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = Tester(self.family, self.variant)
        if self._testMethodName in CANNOT_APPLY:
            self.skipTest(CANNOT_APPLY[self._testMethodName])

    def test_config(self):
        tester = import_common("test_configuration_common").ConfigTester
        tester(self, config_class=OasisConfig).run_common_tests()


class TestLlama(Common, unittest.TestCase):
    pass


class TestQwen3(Common, unittest.TestCase):
    family, variant = "qwen3", "oasis_block"


class TestGemma2(Common, unittest.TestCase):
    family = "gemma2"


class TestOlmo2(Common, unittest.TestCase):
    family = "olmo2"
