"""The training loop, of a task that is as small as can be."""

import argparse
import json
import logging
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from processes import own_accelerators
from safetensors.torch import load_file

from flowmo_diffusers.engine.training import Task, Trainer, make_ready, start, starting_point


class Line(ModelMixin, ConfigMixin):
    """y = w x, to be 3 x."""

    @register_to_config
    def __init__(self, size: int = 1):
        super().__init__()
        self.linear = torch.nn.Linear(size, 1, bias=False)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Seen:
    """A state of the task's own: the last batch."""

    def __init__(self):
        self.number = -1

    def state_dict(self) -> dict:
        return {"number": self.number}

    def load_state_dict(self, state: dict) -> None:
        self.number = state["number"]


class LineTask(Task):
    """Batch n is the number n; what is called is noted."""

    def __init__(self, fails_at: int | None = None):
        super().__init__("line", Line(), 100, 7)
        self.fails_at = fails_at
        self.calls: list[tuple] = []
        self.published = None
        self.seen = Seen()
        self.states = {"seen": self.seen}

    def before_step(self, step: int) -> None:
        self.calls.append(("step", step))

    def before_group(self, batches) -> None:
        numbers = [batch["number"] for batch in batches]
        assert numbers[0] == self.seen.number + 1
        self.seen.number = numbers[-1]
        self.calls.append(("group", numbers))

    def check(self, images_seen: int) -> dict[str, float]:
        self.calls.append(("check", images_seen))
        return {"images_seen": images_seen}

    def batches(self, first: int, last: int):
        return ({"number": number} for number in range(first, last))

    def losses(self, batch: dict) -> dict[str, torch.Tensor]:
        if batch["number"] == self.fails_at:
            raise RuntimeError("broken")
        x = torch.tensor([[1.0 + batch["number"] % 3]])
        return {"loss": (self.trained(x) - 3 * x).square().mean()}

    def flops_per_image(self, step: int) -> float:
        return 2.0

    def validate(self, step: int) -> tuple[dict[str, float], PIL.Image.Image]:
        assert not self.model.training
        weight = self.model.linear.weight.item()
        self.calls.append(("validate", step))
        return {"weight": weight, "error": abs(weight - 1.0)}, PIL.Image.new("RGB", (4, 4))

    def guarded(self, figures) -> float:
        return figures["error"]

    def save(self, model: Line, folder: Path) -> None:
        model.save_pretrained(folder)

    def publish(self, facts: dict, pictures: list[Path]) -> None:
        self.published = facts, pictures


@pytest.fixture(autouse=True)
def _own_accelerators():
    with own_accelerators():
        yield


def options(folder: Path, **changes) -> argparse.Namespace:
    values = {
        "output_dir": folder,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 6,
        "learning_rate": 0.5,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_beta1": 0.0,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-8,
        "max_grad_norm": None,
        "max_skipped_steps": 0,
        "ema_decay": 0.5,
        "ema_update_every": 1,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "compile": False,
        "activation_memory_budget": 1.0,
        "seed": 0,
        "validation_steps": 3,
        "early_stopping_patience": None,
        "guard": "none",
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 9,
        "resume_from_checkpoint": None,
        "report_to": "none",
        "tracker_project_name": "test",
        "logging_dir": "logs",
        "logging_steps": 3,
    }
    return argparse.Namespace(**values | changes)


def train(folder: Path, task: LineTask, **changes) -> LineTask:
    args, config = options(folder, **changes), {"name": "line"}
    accelerator = start(args)
    checkpoint = starting_point(args, config)
    make_ready(args, accelerator)
    Trainer(task, args, accelerator, config).run(checkpoint)
    return task


def weight(folder: Path) -> float:
    return load_file(folder / "diffusion_pytorch_model.safetensors")["linear.weight"].item()


def test_what_is_called_when(tmp_path):
    """A task that is not asked in time, not with what its step accumulates, or once too often."""
    task = train(tmp_path, LineTask())
    steps = [[("step", step), ("group", [2 * step, 2 * step + 1])] for step in range(6)]
    assert task.calls == [
        ("step", 0),
        *steps[0], *steps[1], *steps[2], ("check", 12), ("validate", 3),
        *steps[3], *steps[4], *steps[5], ("check", 24), ("validate", 6),
    ]  # fmt: skip


def test_what_is_left_and_told(tmp_path):
    """Weights that are not the averaged ones, or figures, pictures and facts that belong to others."""
    task = train(tmp_path, LineTask())
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record == {"stage": "line", "steps": 6, "images": 7} | {
        "val/weight": weight(tmp_path),
        "val/error": abs(weight(tmp_path) - 1),
    }
    assert weight(tmp_path) != task.model.linear.weight.item()
    facts, pictures = task.published
    assert pictures == [tmp_path / "validation" / "line-0000006.png"] and pictures[0].is_file()
    assert facts["figures"] == {name: record[name] for name in ("val/weight", "val/error")}
    told = {name: facts[name] for name in ("stage", "steps", "images_seen", "train_images", "held_out_images")}
    assert told == {"stage": "line", "steps": 6, "images_seen": 24, "train_images": 100, "held_out_images": 7}


def test_best_weights(tmp_path):
    """The last weights where those of an earlier validation were better, or a run that does not stop when told to."""
    task = train(
        tmp_path, LineTask(), guard="error", validation_steps=1, early_stopping_patience=2, max_train_steps=20
    )
    validated = [call[1] for call in task.calls if call[0] == "validate"]
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert validated == list(range(record["steps"] + 3)) and 0 < record["steps"] < 18
    assert weight(tmp_path) == weight(tmp_path / "best") == record["val/weight"]
    assert task.published[0]["steps"] == record["steps"]


def test_resumed_run_is_the_same_run(tmp_path):
    """A task with states of its own that are not saved, or a resumed one that begins with other batches."""
    whole = train(tmp_path / "whole", LineTask())
    with pytest.raises(RuntimeError, match="broken"), own_accelerators():
        train(tmp_path / "broken", LineTask(fails_at=9))
    with own_accelerators():
        resumed = train(tmp_path / "broken", LineTask(), resume_from_checkpoint="latest")
    assert ("group", [8, 9]) in resumed.calls and ("group", [6, 7]) not in resumed.calls
    assert weight(tmp_path / "broken") == weight(tmp_path / "whole")
    assert whole.model.linear.weight.item() == resumed.model.linear.weight.item()


def test_failure_names_the_last_checkpoint(tmp_path, caplog):
    """A run that ends without a word on where it can go on."""
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, LineTask(fails_at=9))
    assert f"stopped at step 4; the last good checkpoint is {tmp_path / 'checkpoint-4'}" in caplog.text


def test_guard_that_is_never_finite(tmp_path):
    """A run that ends without any weights, and says it is done."""
    task = LineTask()
    task.guarded = lambda figures: float("nan")
    with pytest.raises(FloatingPointError, match="no validation gave a finite --guard error"):
        train(tmp_path, task, guard="error")
    assert task.published is None
