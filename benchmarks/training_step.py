#!/usr/bin/env python
"""
Where the time of a training step goes: forward and backward against everything around them.

    python benchmarks/training_step.py --config training/configs/flowmo_small.yaml --train_batch_size 8 \
        --perceptual lpips-alex --mixed_precision bf16

Takes the options of `training/train_flowmo.py`, builds what that builds, and steps on random images.
"""

import argparse
import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import median

import torch

from flowmo_diffusers.engine.training import Trainer, start


SCRIPT = Path(__file__).parents[1] / "training" / "train_flowmo.py"


def load_script():
    spec = importlib.util.spec_from_file_location("train_flowmo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stopwatch:
    """Seconds by name, the device waited for before and after."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += self.now() - started

        return run


def parse_args() -> tuple[argparse.Namespace, argparse.Namespace]:
    """Those of this script, and those of the training script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--json", type=Path)
    own, others = parser.parse_known_args()
    unused = ["--output_dir", "unused", "--dataset_name", "emoji", "--report_to", "none"]
    return own, load_script().parse_args([*others, *unused])


def main(own: argparse.Namespace, args: argparse.Namespace) -> None:
    script = load_script()
    model_config = script.read_model_config(args)
    accelerator = start(args)
    side = args.resolution or model_config["sample_size"]
    images = torch.rand(args.train_batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline = script.build_pipeline(args, model_config)
    task = script.TokenizerTraining(args, accelerator, pipeline, images, images[:1])
    step = Trainer(task, args, accelerator, {}).step

    watch = Stopwatch(accelerator.device)
    objective = watch.timed("forward", task.losses)
    accelerator.backward = watch.timed("backward", accelerator.backward)
    step.optimizer.step = watch.timed("optimizer", step.optimizer.step)
    step.optimizer.zero_grad = watch.timed("zero_grad", step.optimizer.zero_grad)
    step.ema.update = watch.timed("ema", step.ema.update)
    if step.norm_rescaler is not None:
        step.norm_rescaler.step = watch.timed("norm rescaling", step.norm_rescaler.step)
    call = watch.timed("step", step)

    records = []
    for number in range(own.steps + 1):
        watch.seconds.clear()
        first = number * args.train_batch_size
        batch = {"images": images, "visits": torch.arange(first, first + args.train_batch_size)}
        call([batch] * args.gradient_accumulation_steps, objective)
        records.append(dict(watch.seconds))
    parts = {name: median(record.get(name, 0.0) for record in records[1:]) for name in records[0] if name != "ema"}
    # The first step updates the average, most of the others do not: an even share of it.
    parts["ema"] = records[0]["ema"] / args.ema_update_every
    outside = median(r["step"] - r["forward"] - r["backward"] - r.get("ema", 0.0) for r in records[1:]) + parts["ema"]
    total = parts["forward"] + parts["backward"] + outside
    named = sum(seconds for name, seconds in parts.items() if name not in ("step", "forward", "backward"))
    rows = {name: parts[name] for name in parts if name != "step"} | {"checks and the rest": outside - named}

    joint = args.train_batch_size * args.gradient_accumulation_steps
    place = f"{accelerator.device}, {torch.get_num_threads()} threads, mixed precision {accelerator.mixed_precision}"
    millions = task.model.num_parameters() / 1e6
    print(f"{millions:.0f} M parameters, {joint} images of {side} x {side}; {place}; ", end="")
    print(f"median of {own.steps} steps\n")
    print("| part | seconds | share |\n|---|---|---|")
    for name, seconds in sorted(rows.items(), key=lambda row: -row[1]):
        print(f"| {name} | {seconds:.3f} | {100 * seconds / total:.1f} % |")
    print(f"| **outside forward and backward** | {outside:.3f} | **{100 * outside / total:.1f} %** |")
    if own.json:
        record = {"seconds": rows, "outside_share": outside / total, "images_per_second": joint / total}
        own.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(*parse_args())
