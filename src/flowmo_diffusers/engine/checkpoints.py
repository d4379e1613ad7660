"""Checkpoints of a whole run, in Accelerate's format."""

import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator


class Progress:
    """The number of finished optimiser steps, as an object that checkpoints hold."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int | None) -> Path:
    """
    Writes `checkpoint-{step}` (everything prepared and registered with the accelerator) under a temporary name and
    renames it, then removes the oldest other ones until `total_limit` are left (`None` keeps all).
    """
    target = Path(output_dir) / f"checkpoint-{step}"
    temporary = target.with_name(f".partial-{target.name}")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        if total_limit:
            # Not by number alone: a run that went back to an older checkpoint writes smaller ones than are there.
            others = [path for path in find_checkpoints(output_dir) if path != target]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, output_dir: str | Path, which: str) -> Path | None:
    """
    Restores a run.

    Args:
        which: "latest" for the newest checkpoint in `output_dir` (`None` is returned if there is none), or a path.

    Raises:
        OSError: If the path does not exist.
    """
    if which == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            return None
        path = checkpoints[-1]
    else:
        path = Path(which)
    if not path.is_dir():
        there = [str(checkpoint) for checkpoint in find_checkpoints(output_dir)]
        raise OSError(f"--resume_from_checkpoint {path} does not exist; there are {there}")
    accelerator.load_state(str(path))
    return path
