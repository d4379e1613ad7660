"""Checkpoints of a whole run: complete or not there at all, and only of the run that goes on."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException

from flowmo_diffusers.engine.digests import differences
from flowmo_diffusers.engine.files import flush
from flowmo_diffusers.engine.processes import on_any_process


CONFIG_FILE = "run.json"
STATE_FILE = "run_state.pt"


class Stateful(Protocol):
    """What a checkpoint can hold: tensors and plain values by name."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Progress:
    """
    How far a run has come: finished optimiser steps, and how many of them were skipped. Its place in the data is a
    function of the step.

    Args:
        images: Size of the data set, which must stay what it was; 0 where it is not known.
    """

    def __init__(self, images: int = 0) -> None:
        self.images = images
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises `ValueError` if the state is of a run on another number of images."""
        if state["images"] != self.images:
            raise ValueError(
                f"the checkpoint is of a run on {state['images']} training images, now there are {self.images}: the "
                "place in the data cannot be found again (the same images, and --num_validation_images, are needed)"
            )
        vars(self).update(state)


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def choose_checkpoint(output_dir: str | Path, which: str | None) -> Path | None:
    """
    The checkpoint a run in `output_dir` starts from.

    Args:
        which: `None` for a new run, "latest" for the newest checkpoint (`None` is returned if there is none), or a
            path.

    Raises:
        OSError: If the path does not exist.
        ValueError: If checkpoints in `output_dir` would be left behind the run, or ahead of it. "latest" would later
            pick them.
    """
    there = find_checkpoints(output_dir)
    names = [path.name for path in there]
    if which == "latest":
        return there[-1] if there else None
    if which is None:
        if there:
            raise ValueError(
                f"output_dir={output_dir} holds checkpoints of another run, {names}: "
                "--resume_from_checkpoint latest goes on with it; a new run needs a folder of its own"
            )
        return None
    path = Path(which)
    if not path.is_dir():
        raise OSError(f"--resume_from_checkpoint {path} does not exist; there are {[str(path) for path in there]}")
    newer = [other.name for other in there if _step(other) > _step(path)]
    if newer and path.resolve().parent == Path(output_dir).resolve():
        raise ValueError(f"output_dir={output_dir} holds {newer}, newer than {path.name}: move them away first")
    if there and path.resolve().parent != Path(output_dir).resolve():
        raise ValueError(f"output_dir={output_dir} holds {names}: to go on from {path} it must hold no checkpoints")
    return path


def read_step(checkpoint: str | Path) -> int:
    """How many steps are finished in a checkpoint."""
    return json.loads((Path(checkpoint) / CONFIG_FILE).read_text())["step"]


def check_config(checkpoint: str | Path, config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: If the checkpoint is of a run of another configuration, with every field that differs.
        OSError: If the checkpoint has none.
    """
    saved = json.loads((Path(checkpoint) / CONFIG_FILE).read_text())["config"]
    if differing := differences(saved, config):
        raise ValueError(f"{checkpoint} is of another configuration: {'; '.join(differing)}")


class Checkpoints:
    """
    Writes and reads `output_dir/checkpoint-STEP`: what Accelerate holds of a run (weights, optimiser, random states),
    and `states`. A checkpoint is written under a temporary name and renamed: killed at any moment, a run leaves only
    whole ones.

    Args:
        accelerator: Model and optimiser are prepared by it.
        output_dir: On a file system that all processes share.
        states: What else goes on after a resume, by name.
        config: What decides the course of the run, plain JSON. See [`check_config`].
        total_limit: The oldest checkpoints beyond so many are removed; `None` keeps all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        states: Mapping[str, Stateful],
        config: Mapping[str, Any],
        total_limit: int | None = None,
    ):
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.states = dict(states)
        self.config = dict(config)
        self.total_limit = total_limit

    def save(self, step: int) -> Path:
        """
        Every process must call this. A step that is saved already is not saved again.

        Raises:
            OSError: If the checkpoint cannot be written, say because the disk is full: on every process, with the last
                good checkpoint, which is as it was.
        """
        target = self.output_dir / f"checkpoint-{step}"
        if on_any_process(self.accelerator, target.is_dir())[0]:
            return target
        temporary = target.with_name(f".partial-{target.name}")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        states = {name: state.state_dict() for name, state in self.states.items()}
        self._together(target, temporary, lambda: self._write(temporary, step, states))
        self._together(target, temporary, lambda: self._publish(temporary, target))
        return target

    def load(self, checkpoint: str | Path) -> None:
        """
        Restores everything from a checkpoint.

        Raises:
            ValueError: If it is of another configuration or holds other states.
        """
        check_config(checkpoint, self.config)
        saved = torch.load(Path(checkpoint) / STATE_FILE, map_location="cpu", weights_only=True)
        if saved.keys() != self.states.keys():
            raise ValueError(f"{checkpoint} holds the states {sorted(saved)}; this run has {sorted(self.states)}")
        self.accelerator.load_state(str(checkpoint))
        # Accelerate's count of batches: a step begins here, even if now it accumulates another number of them.
        self.accelerator.step = 0
        for name, state in self.states.items():
            state.load_state_dict(saved[name])

    def last_good(self) -> str:
        """Where a stopped run can go on, in words."""
        there = find_checkpoints(self.output_dir)
        return f"the last good checkpoint is {there[-1]}" if there else "there is no earlier checkpoint"

    def _together(self, target: Path, temporary: Path, part: Callable[[], None]) -> None:
        """Fails everywhere where `part` fails on one process. It must not wait for others: they may have failed."""
        error = None
        try:
            part()
        except (Exception, CheckpointException) as caught:  # a full disk has many names
            error = caught
        if on_any_process(self.accelerator, error is not None)[0]:
            free = shutil.disk_usage(self.output_dir).free / 2**20
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            raise OSError(
                f"{target} could not be written, its disk having {free:,.0f} MiB free "
                f"({error or 'another process failed'}); {self.last_good()}"
            ) from error

    def _write(self, temporary: Path, step: int, states: dict[str, dict[str, Any]]) -> None:
        self.accelerator.save_state(str(temporary))
        if self.accelerator.is_main_process:
            torch.save(states, temporary / STATE_FILE)
            record = {"step": step, "config": self.config}
            (temporary / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")

    def _publish(self, temporary: Path, target: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        os.replace(temporary, target)
        flush(self.output_dir)
        for old in find_checkpoints(self.output_dir)[: -self.total_limit] if self.total_limit else []:
            # A removal that is cut short must not leave half a checkpoint.
            doomed = old.with_name(f".partial-{old.name}")
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
