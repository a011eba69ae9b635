import pytest
import torch

from tiny_models import VOCABULARY


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
