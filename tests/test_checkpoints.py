"""Checkpoints hold all of a run, are whole whenever they are there, and go on with no other run."""

import copy
import ctypes
import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from processes import forget_accelerators, on_processes, own_accelerators
from torch import nn

from flowmo_diffusers.engine.best import Best
from flowmo_diffusers.engine.checkpoints import (
    Checkpoints,
    Progress,
    check_config,
    choose_checkpoint,
    find_checkpoints,
)
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.files import remove_partial
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.step import TrainStep


CONFIG = {"stage": "pretrain", "learning_rate": 0.1, "rope_axes": [4, 6, 6], "guard": None}


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: TrainStep
    best: Best
    checkpoints: Checkpoints

    @property
    def accelerator(self) -> Accelerator:
        return self.step.accelerator


def start(
    folder: Path, accumulation: int = 1, config: dict | None = None, limit: int | None = None, side: int = 3
) -> Run:
    """A run at its beginning, the same each time but for what stands in a checkpoint."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    model = nn.Linear(side, side)
    schedule = torch.optim.lr_scheduler
    raw = torch.optim.Adam(model.parameters(), lr=0.1)
    lr_scheduler = schedule.LambdaLR(raw, lambda step: 1 / (1 + step))
    trained, optimizer = accelerator.prepare(model, raw)
    ema, norms = EMA(model.parameters(), 0.9, 2), NormRescaler([model.weight])
    progress, best = Progress(images=50), Best()
    states = {"lr_scheduler": lr_scheduler, "ema": ema, "norms": norms, "progress": progress, "best": best}
    step = TrainStep(accelerator, trained, optimizer, lr_scheduler, progress, ema, norms)
    checkpoints = Checkpoints(accelerator, folder, states, CONFIG if config is None else config, limit)
    return Run(model, raw, step, best, checkpoints)


def advance(run: Run, steps: int) -> None:
    """Steps whose data are drawn from every global generator there is."""
    for _ in range(steps):
        x = torch.randn(4, run.model.in_features) + random.random() + float(np.random.rand())
        run.best.update(1 / (1 + run.step.progress.step), run.step.progress.step)
        batches = x.chunk(run.accelerator.gradient_accumulation_steps)
        run.step(batches, lambda batch: {"loss": run.step.model(batch).square().mean()})


def everything(run: Run) -> dict:
    """All that a run's course depends on, and what it draws next."""
    return {
        "weights": [p.detach().clone() for p in run.model.parameters()],
        "moments": [dict(run.optimizer.state[p]) for p in run.model.parameters()],
        "ema": run.step.ema.state_dict(),
        "norms": run.step.norm_rescaler.state_dict(),
        "lr": run.step.lr_scheduler.get_last_lr(),
        "lr of the optimizer": [group["lr"] for group in run.optimizer.param_groups],
        "schedule": run.step.lr_scheduler.last_epoch,
        "progress": run.step.progress.state_dict(),
        "best": run.best.state_dict(),
        "draws": [torch.rand(1), random.random(), float(np.random.rand())],
    }


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def separate() -> Iterator[None]:
    with own_accelerators():
        yield


# What a checkpoint holds


def go_through(folder: Path) -> dict:
    """What a run comes to that saves on its way."""
    run = start(folder)
    advance(run, 3)
    assert run.checkpoints.save(3) == folder / "checkpoint-3"
    advance(run, 4)
    return everything(run)


def resume(folder: Path) -> dict:
    """What the run comes to that goes on from there."""
    run = start(folder)
    advance(run, 1)
    run.checkpoints.load(folder / "checkpoint-3")
    assert run.step.progress.step == 3
    advance(run, 4)
    return everything(run)


def test_resumed_run_is_the_run(tmp_path):
    """Catches weights, moments, averages, norms, schedule, progress or random states missing from a checkpoint."""
    through = go_through(tmp_path)
    assert {type(value) for value in through["moments"][0].values()} == {torch.Tensor}
    forget_accelerators()
    assert_same(resume(tmp_path), through)


def test_resumed_run_of_two_processes(tmp_path):
    """Catches random states of one process that another takes over, or processes that go apart after a resume."""
    through = on_processes(2, go_through, tmp_path)
    assert through[0]["draws"] != through[1]["draws"]
    torch.testing.assert_close(through[0]["weights"], through[1]["weights"], rtol=0, atol=0)
    for ours, theirs in zip(on_processes(2, resume, tmp_path), through, strict=True):
        assert_same(ours, theirs)


def save_once(folder: Path) -> None:
    run = start(folder)
    advance(run, 3)
    run.checkpoints.save(3)


def weights_after_resume(folder: Path) -> list[torch.Tensor]:
    run = start(folder)
    run.checkpoints.load(folder / "checkpoint-3")
    return [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resuming_on_other_processes(tmp_path, before, after):
    """Catches weights saved under a wrapper's names, which a run on another number of processes does not find."""
    on_processes(before, save_once, tmp_path)
    (expected,) = on_processes(1, weights_after_resume, tmp_path)
    for found in on_processes(after, weights_after_resume, tmp_path):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(expected[0], start(tmp_path).model.weight)


def test_resuming_with_other_accumulation(tmp_path):
    """Catches batches counted on from before: updates would fall between accumulated batches, or not take place."""
    save_once(tmp_path)
    forget_accelerators()
    run = start(tmp_path, accumulation=2)
    run.checkpoints.load(tmp_path / "checkpoint-3")
    before = run.model.weight.detach().clone()
    x = torch.randn(4, 3)
    run.step(x.chunk(2), lambda batch: {"loss": run.step.model(batch).square().mean()})
    assert not torch.equal(run.model.weight, before)

    forget_accelerators()
    other = start(tmp_path)
    other.checkpoints.load(tmp_path / "checkpoint-3")
    other.step([x], lambda batch: {"loss": other.step.model(batch).square().mean()})
    torch.testing.assert_close(run.model.weight, other.model.weight)


# Written whole or not at all


def test_a_step_is_saved_once(tmp_path):
    """Catches a checkpoint that is replaced by its like, and gone if the run is killed in between."""
    run = start(tmp_path)
    run.checkpoints.save(3)
    (tmp_path / "checkpoint-3" / "here before").touch()
    assert run.checkpoints.save(3) == tmp_path / "checkpoint-3"
    assert (tmp_path / "checkpoint-3" / "here before").exists()


def test_rotation(tmp_path):
    """Catches checkpoints sorted as text, more of them than the limit, or the limit removing the newest."""
    run = start(tmp_path, limit=2)
    (tmp_path / "checkpoint-best").mkdir()
    for step, left in ((8, [8]), (9, [8, 9]), (10, [9, 10]), (100, [10, 100])):
        run.checkpoints.save(step)
        assert [path.name for path in find_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-best"]
    run.checkpoints.total_limit = None
    run.checkpoints.save(101)
    assert len(find_checkpoints(tmp_path)) == 3


def fail_to_save(folder: Path, limits: list[tuple[int, list[int]]]) -> list[tuple[str, list[str]]]:
    """
    Saves while no file may grow beyond a limit, in bytes, on some of the processes: a write beyond it fails as one to
    a full disk does, in whatever library. Returns errors, and what was in the folder then.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = start(folder, side=200)
    advance(run, 1)
    run.checkpoints.save(1)
    found = []
    for limit, failing in limits:
        if run.accelerator.process_index in failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            run.checkpoints.save(2)
        except OSError as error:
            found.append((str(error), names(folder)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.accelerator.wait_for_everyone()
    run.checkpoints.save(3)
    run.checkpoints.load(folder / "checkpoint-1")
    run.checkpoints.load(folder / "checkpoint-3")
    return found


@pytest.mark.parametrize(
    ("count", "failing"), [(1, [0]), (2, [0]), (2, [1]), (2, [0, 1])], ids=["one", "main", "other", "both"]
)
def test_failing_write(tmp_path, count, failing):
    """Catches a process that waits for ever for one that failed, a checkpoint half written, or no word of the last."""
    # The weights fail, the moments, the states; of the other process its random states.
    limits = [10_000, 170_000] if failing != [1] else [1000]
    for found in on_processes(count, fail_to_save, tmp_path, [(limit, failing) for limit in limits]):
        assert len(found) == len(limits)
        for error, left in found:
            assert f"{tmp_path / 'checkpoint-2'} could not be written" in error and "MiB free" in error
            assert f"the last good checkpoint is {tmp_path / 'checkpoint-1'}" in error
            assert left == ["checkpoint-1"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def fill_disk(folder: Path, fractions: list[float]) -> list[tuple[str, list[str]]] | None:
    """
    Saves twice, on disks of this process alone with room for one checkpoint and a fraction of the second; `None` where
    it may not mount them.
    """
    libc, new_mounts, all_private = ctypes.CDLL(None), 0x20000, 0x44000
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, all_private, None):
        return None
    run = start(folder, side=200)
    advance(run, 1)
    size = sum(path.stat().st_size for path in run.checkpoints.save(1).iterdir())
    found = []
    for fraction in fractions:
        if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={int(size * (1 + fraction))}".encode()):
            return None
        run.checkpoints.save(1)
        try:
            run.checkpoints.save(2)
            error = "none"
        except OSError as caught:
            error = str(caught)
        found.append((error, names(folder)))
        run.checkpoints.load(folder / "checkpoint-1")
    return found


def test_full_disk(tmp_path):
    """Catches a disk that runs full at any file of a checkpoint and takes the last good one along, or unsaid."""
    (found,) = on_processes(1, fill_disk, tmp_path, [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 2.0])
    if found is None:
        pytest.skip("this process may not mount a file system")
    for error, left in found[:-1]:
        assert "its disk having 0 MiB free" in error
        assert f"the last good checkpoint is {tmp_path / 'checkpoint-1'}" in error
        assert left == ["checkpoint-1"]
    assert found[-1] == ("none", ["checkpoint-1", "checkpoint-2"])


def test_first_checkpoint_fails(tmp_path):
    """Catches a checkpoint named as good that is not there."""
    run = start(tmp_path / "new")
    (tmp_path / "new").touch()
    with pytest.raises(OSError):
        run.checkpoints.save(1)
    (tmp_path / "new").unlink()
    assert run.checkpoints.last_good() == "there is no earlier checkpoint"


FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def save_until(folder: Path, killed_at: int | None) -> int:
    """Goes on from checkpoint 2 to 3 and saves that, but kills itself before the so-and-so-many-th file operation."""
    run = start(folder, limit=2)
    run.checkpoints.load(folder / "checkpoint-2")
    advance(run, 1)
    seen = 0

    def watch(event: str, _) -> None:
        nonlocal seen
        if event in FILE_OPERATIONS:
            if seen == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    run.checkpoints.save(3)
    return seen


def test_killed_at_every_file_operation(tmp_path):
    """Catches a moment in which a killed run leaves half a checkpoint under a checkpoint's name, or none at all."""
    before, expected = tmp_path / "before", {}
    run = start(before, limit=2)
    for step in (1, 2, 3):
        advance(run, 1)
        if step < 3:
            run.checkpoints.save(step)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        expected[step] = copy.deepcopy(everything(run))
        for setter, state in zip((torch.set_rng_state, random.setstate, np.random.set_state), states, strict=True):
            setter(state)

    shutil.copytree(before, tmp_path / "counted")
    (operations,) = on_processes(1, save_until, tmp_path / "counted", None)
    left = []
    for number in range(operations):
        folder = tmp_path / str(number)
        shutil.copytree(before, folder)
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            on_processes(1, save_until, folder, number)
        steps = []
        for checkpoint in find_checkpoints(folder):
            run.checkpoints.load(checkpoint)
            steps.append(run.step.progress.step)
            assert_same(everything(run), expected[steps[-1]])
        left.append(steps)
        run.checkpoints.output_dir = folder
        run.checkpoints.save(3)
        remove_partial(folder)
        assert names(folder)[-1] == "checkpoint-3"
    # The moments before the new one is there, before the oldest is gone, and after that.
    assert [steps for steps, _ in itertools.groupby(left)] == [[1, 2], [1, 2, 3], [2, 3]]


# Of this run and of no other


def test_another_configuration_is_refused(tmp_path):
    """Catches a run that goes on with another model or another recipe, or an error that names one difference only."""
    start(tmp_path).checkpoints.save(3)
    check_config(tmp_path / "checkpoint-3", CONFIG)
    check_config(tmp_path / "checkpoint-3", CONFIG | {"rope_axes": (4, 6, 6)})  # as JSON has it
    other = {"stage": "posttrain", "learning_rate": 0.1, "rope_axes": [4, 6, 8], "guard": "psnr", "seed": 1}
    forget_accelerators()
    run = start(tmp_path, config=other)
    before = everything(run)
    with pytest.raises(ValueError, match="checkpoint-3 is of another configuration") as error:
        run.checkpoints.load(tmp_path / "checkpoint-3")
    for field in (
        "stage is 'pretrain' there and 'posttrain' here",
        "rope_axes is [4, 6, 6] there and [4, 6, 8] here",
        "guard is None there and 'psnr' here",
        "seed is None there and 1 here",
    ):
        assert field in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert_same(before | {"draws": None}, everything(run) | {"draws": None})
    with pytest.raises(OSError, match="run.json"):
        check_config(tmp_path, CONFIG)


def test_other_states_are_refused(tmp_path):
    """Catches a run whose averages, say, are not in the checkpoint, and that goes on with new ones in silence."""
    run = start(tmp_path)
    del run.checkpoints.states["best"]
    run.checkpoints.save(3)
    forget_accelerators()
    run = start(tmp_path)
    with pytest.raises(ValueError, match=r"holds the states \['ema', .*\]; this run has \['best', 'ema', .*\]"):
        run.checkpoints.load(tmp_path / "checkpoint-3")


def test_another_data_set_is_refused():
    """Catches a run that goes on at a place in other data, which has images twice or never."""
    with pytest.raises(ValueError, match="a run on 50 training images, now there are 49"):
        Progress(images=49).load_state_dict(Progress(images=50).state_dict())


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """An output folder with checkpoints 9 and 10, and another run's checkpoint 3."""
    output_dir, elsewhere = tmp_path / "out", tmp_path / "other" / "checkpoint-3"
    for name in ("checkpoint-9", "checkpoint-10", ".partial-checkpoint-11", "checkpoint-best"):
        (output_dir / name).mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    return output_dir, elsewhere


def test_what_a_run_starts_from(tmp_path, folders):
    """Catches a run that starts at 0 unasked, or from what was being written when it was killed."""
    output_dir, elsewhere = folders
    assert choose_checkpoint(output_dir, "latest") == output_dir / "checkpoint-10"
    assert choose_checkpoint(output_dir, str(output_dir / "checkpoint-10")) == output_dir / "checkpoint-10"
    for empty in (tmp_path / "not there", tmp_path):
        assert choose_checkpoint(empty, None) is None
        assert choose_checkpoint(empty, "latest") is None
        assert choose_checkpoint(empty, str(elsewhere)) == elsewhere


def test_what_no_run_starts_from(folders, monkeypatch):
    """Catches checkpoints of two runs in one folder, from which "latest" would later choose the wrong one."""
    output_dir, elsewhere = folders
    with pytest.raises(ValueError, match=r"holds checkpoints of another run, \['checkpoint-9', 'checkpoint-10'\]"):
        choose_checkpoint(output_dir, None)
    for path in (output_dir / "checkpoint-9", output_dir / ".." / "out" / "checkpoint-9"):
        with pytest.raises(ValueError, match=r"holds \['checkpoint-10'\], newer than checkpoint-9"):
            choose_checkpoint(output_dir, str(path))
    with pytest.raises(ValueError, match="to go on from .*checkpoint-3 it must hold no checkpoints"):
        choose_checkpoint(output_dir, str(elsewhere))
    with pytest.raises(
        OSError, match=r"checkpoint-8 does not exist; there are \['.*checkpoint-9', '.*checkpoint-10'\]"
    ):
        choose_checkpoint(output_dir, str(output_dir / "checkpoint-8"))
    monkeypatch.chdir(output_dir)
    with pytest.raises(ValueError, match="newer than checkpoint-9"):
        choose_checkpoint(output_dir, "checkpoint-9")


# Nothing in a checkpoint is run


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["run_state.pt", "optimizer.bin", "random_states_0.pkl", "pytorch_model.bin"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, name):
    """Catches a checkpoint from elsewhere that runs code when it is read, by this library or by Accelerate."""
    run = start(tmp_path)
    advance(run, 1)
    checkpoint = run.checkpoints.save(3)
    if name == "pytorch_model.bin":  # what Accelerate reads where there are no safetensors
        (checkpoint / "model.safetensors").unlink()
    else:
        assert (checkpoint / name).exists()
    torch.save(Malicious(tmp_path / "harm"), checkpoint / name)
    try:
        run.checkpoints.load(checkpoint)
    except pickle.UnpicklingError:
        assert name != "random_states_0.pkl"
    else:
        assert name == "random_states_0.pkl"  # Accelerate goes on without them
    assert not (tmp_path / "harm").exists()
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "harm").exists()  # it would have been


def test_only_known_files_are_written(tmp_path):
    """Catches objects that Accelerate would pickle and unpickle whole (`register_for_checkpointing`)."""
    run = start(tmp_path)
    advance(run, 1)
    assert names(run.checkpoints.save(3)) == [
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
        "run.json",
        "run_state.pt",
    ]
