"""Names of devices, and where a model and its record say that it ran."""

from __future__ import annotations

import pytest
import torch

from oasis_attn.devices import check_device, find_device, is_out_of_memory
from oasis_attn.errors import UserError
from oasis_attn.hub import loading
from oasis_attn.records import current_environment, processor
from oasis_attn.training import TrainingConfig


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(count)` lets PyTorch report so many GPUs."""

    def set_count(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return set_count


@pytest.mark.parametrize(
    ("count", "device", "found"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "cpu", "cpu"),
        (2, "auto", "cuda"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_a_device_that_exists(gpus, count, device, found):
    gpus(count)
    assert find_device(device) == torch.device(found)


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        *((2, each, "one of auto, cpu, cuda, cuda:N") for each in ("gpu", "cuda:x", "cuda:01", 1)),
        (0, "cuda", "'cuda' needs a GPU, and PyTorch finds none; allowed here: auto, cpu"),
        (0, "cuda:0", "'cuda:0' needs a GPU"),
        (2, "cuda:2", "'cuda:2' does not exist; allowed here: auto, cpu, cuda, cuda:0, cuda:1"),
    ],
)
def test_a_device_that_does_not_exist_is_refused_before_anything_is_read(
    gpus, monkeypatch, tmp_path, count, device, message
):
    gpus(count)
    with pytest.raises(UserError, match=f"^device: .*{message}"):
        check_device(device)
    monkeypatch.setattr(loading, "_resolve", pytest.fail)
    with pytest.raises(UserError, match=r"^device: "):
        loading.load_model(tmp_path, device=device)


def test_training_uses_all_gpus_or_none(gpus, tmp_path):
    gpus(2)
    for device in ("auto", "cpu", "cuda"):
        TrainingConfig(out=tmp_path, device=device)
    with pytest.raises(UserError, match=r"^device: 'cuda:1' is one of several GPUs"):
        TrainingConfig(out=tmp_path, device="cuda:1")


def test_a_record_names_the_device_of_the_model(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert current_environment().device == processor()
    assert current_environment(torch.device("cpu")).device == processor()
    assert current_environment(torch.device("cuda", 1)).device == "GPU 1"


def test_only_a_full_gpu_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(RuntimeError("out of memory"))
