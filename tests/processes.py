"""Runs of several processes on this machine, without a launcher."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


# Processes fork from a server that has imported everything once, and that no test has touched.
START_METHOD = "forkserver"
multiprocessing.set_forkserver_preload(
    ["pytest", "flowmo_diffusers.engine.step", "flowmo_diffusers.metrics.validation"]
)


def on_processes(count: int, function: Callable, *args: Any) -> list[Any]:
    """What `function(*args)`, of a test module, returns on each of `count` processes, which Accelerate finds to be
    one run if they are more than one."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _enter, (count, function, args, Path(folder)), nprocs=count, start_method=START_METHOD
        )
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(count)]


def forget_accelerators() -> None:
    """Accelerate keeps what the first Accelerator of a process was made with, for all that follow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def own_accelerators() -> Iterator[None]:
    """Within this context a test's Accelerators have nothing to do with those of others."""
    forget_accelerators()
    yield
    forget_accelerators()


def _enter(rank: int, count: int, function: Callable, args: tuple, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "yes"
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}  # port is not used
        # A process that waits for one that never comes is to fail soon.
        store, limit = dist.FileStore(str(folder / "store"), count), timedelta(seconds=20)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
    torch.save(function(*args), folder / f"result-{rank}")
    if dist.is_initialized():  # what it ran may have ended it, as Accelerate does after training
        dist.destroy_process_group()


def launched(main: Callable, args: Any, start: Callable[[], None] | None) -> None:
    """What Accelerate's `debug_launcher` runs on each process."""
    torch.set_num_threads(1)  # the pool of threads did not survive the fork
    if start is not None:
        start()
    main(args)


def shard_blocks() -> None:
    """The Accelerators of this process shard models block by block by FSDP2: its launcher does so on GPUs only."""
    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
