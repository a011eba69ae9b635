"""Two gloo processes against one with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from oasis_attn import SinkCallback, diagnose
from oasis_attn.records import TrainingRecord
from oasis_attn.training import train
from oasis_attn.training.checkpoints import last_checkpoint
from oasis_attn.training.prepare import prepare
from training import processes

STEPS = {"steps": 6, "save_every": 2}
KEYS = {"token_normalizer": "key_value_null"}


def losses(record: TrainingRecord) -> list[float]:
    return [row["loss"] for row in record.tables["loss"]]


@pytest.fixture(scope="module")
def alone():
    """Records of one process, by settings."""
    found: dict[str, TrainingRecord] = {}

    def of(configure, **settings) -> TrainingRecord:
        key = repr(settings)
        if key not in found:
            found[key] = train(configure("alone", **STEPS, settings=settings), progress=False)
        return found[key]

    return of


@pytest.mark.parametrize(
    ("engine", "settings", "options"),
    [
        (processes.DDP, {}, {}),
        (processes.DDP, {"depth_block_size": 3}, {"activation_checkpointing": True}),
        (processes.FSDP2, {}, {}),
        (processes.FSDP2, KEYS | {"depth_block_size": 3}, {"activation_checkpointing": True}),
    ],
    ids=["ddp", "ddp, checkpointed blocks", "fsdp2", "fsdp2, checkpointed blocks"],
)
def test_two_processes_are_one(configure, alone, engine, settings, options):
    expected = alone(configure, **settings)
    config = configure("two", **STEPS, settings=settings, batch_size=2, **options)
    processes.launch(config, engine)
    record = TrainingRecord.load(config.out / "record.json")
    assert losses(record) == pytest.approx(losses(expected), abs=2e-5)
    assert record["loss.windowed"] == pytest.approx(expected["loss.windowed"], abs=2e-5)
    assert record.processes == 2
    assert record.model.parameters == expected.model.parameters

    model, info = AutoModelForCausalLM.from_pretrained(config.out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    checkpoint = config.out / "checkpoints" / "checkpoint-4"
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() is (engine is processes.FSDP2)
    earlier = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(earlier).__name__ == type(model).__name__ == "OasisForCausalLM"
    assert model.config.architectures == ["OasisForCausalLM"]
    with torch.inference_mode():
        tokens = torch.arange(20).view(1, 20)
        assert not torch.equal(model(tokens).logits, earlier(tokens).logits)


@pytest.mark.parametrize("engine", [processes.DDP, processes.FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_resume(configure, engine):
    config = configure("two", **STEPS, batch_size=2)
    processes.launch(config, engine)
    whole = TrainingRecord.load(config.out / "record.json")
    # As if killed after the last checkpoint.
    (config.out / "record.json").unlink()
    (config.out / "config.json").unlink()
    processes.launch(configure("two", **STEPS, batch_size=2, resume=True), engine)
    resumed = TrainingRecord.load(config.out / "record.json")
    assert resumed.created >= whole.created
    assert losses(resumed) == losses(whole)
    assert resumed["loss.windowed"] == whole["loss.windowed"]
    assert last_checkpoint(config.out / "checkpoints", {"processes": 2}) is not None


@pytest.mark.parametrize("engine", [processes.DDP, processes.FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_log_the_sinks_of_one(configure, alone, engine):
    config = configure("two", **STEPS, batch_size=2)
    processes.launch(config, engine, callbacks=(partial(SinkCallback, every=2),))
    record = TrainingRecord.load(config.out / "record.json")
    assert losses(record) == pytest.approx(losses(alone(configure)), abs=2e-5)
    state = json.loads((config.out / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    logged = {row["step"]: row for row in state["log_history"] if "sink.mass" in row}
    assert list(logged) == [0, 2, 4]
    checkpoint = AutoModelForCausalLM.from_pretrained(config.out / "checkpoints/checkpoint-4")
    first = prepare(config, 1).blocks[0]
    expected = diagnose(checkpoint, first[None])
    for name in ("sink.mass", "null.mass", "outlier.max_inf_norm", "loss.windowed"):
        assert logged[4][name] == pytest.approx(expected[name], rel=1e-5)


def test_accelerate_launch(corpus, size, tmp_path):
    out = tmp_path / "launched"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "--main_process_port=0"]
    command += ["-m", "oasis_attn", "train", "--size", size, "--vocab-size", "270", "--corpus"]
    command += [corpus, "--steps", "3", "--block-length", "32", "--batch-size", "2", "--log-every"]
    command += ["1", "--save-every", "2", "--eval-windows", "2", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1, done.stdout
    assert done.stderr.count("step 3 of 3") == 1, done.stderr
    assert TrainingRecord.load(out / "record.json").processes == 2
