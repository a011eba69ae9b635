"""Runs in other processes, forked from one that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import socket

from oasis_attn.training import TrainingConfig

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["oasis_attn.training.run", "oasis_attn.modeling.modeling_oasis"])

DDP: dict[str, str] = {}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2 ...` puts into the environment."""


def start(config: TrainingConfig, environment: dict[str, str], callbacks=()):
    """A process that runs `train(config)`."""
    process = _context.Process(
        target=_run, args=(config, dict(os.environ) | environment, callbacks)
    )
    process.start()
    return process


def launch(
    config: TrainingConfig, environment: dict[str, str], processes: int = 2, callbacks=()
) -> None:
    """`train(config)` on several processes at once; every one must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    started = [
        start(
            config, environment | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, callbacks
        )
        for rank in range(processes)
    ]
    for process in started:
        process.join(50)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * processes


def _run(config: TrainingConfig, environment: dict[str, str], callbacks) -> None:
    os.environ.clear()
    os.environ.update(environment)
    import torch
    import torch.distributed

    from oasis_attn.training import train

    torch.set_num_threads(1)
    train(config, progress=False, callbacks=callbacks)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
