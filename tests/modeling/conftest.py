import pytest
import torch

from tiny import VOCABULARY


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def pytest_configure(config):
    for name in ("accelerate", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_compile"):
        suffix = "tests" if name == "accelerate" else "test"
        config.addinivalue_line("markers", f"{name}_{suffix}: in transformers' own tests")
    for name in ("slow", "generate"):
        config.addinivalue_line("markers", f"{name}: in transformers' own tests")
