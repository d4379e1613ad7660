"""A training run from its first line to its last, whatever is trained."""

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ModelMixin
from torch._functorch import config as functorch_config
from tqdm.auto import tqdm

from flowmo_diffusers.engine.adapters import Adapter, save_and_merge_adapter
from flowmo_diffusers.engine.best import Best
from flowmo_diffusers.engine.checkpoints import (
    Checkpoints,
    Progress,
    Stateful,
    check_config,
    choose_checkpoint,
    find_checkpoints,
    read_step,
)
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.files import atomic_file, atomic_folder, remove_partial
from flowmo_diffusers.engine.launch import build_accelerator
from flowmo_diffusers.engine.meter import Meter
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.processes import on_any_process
from flowmo_diffusers.engine.sharding import reshard, whole_state_dict
from flowmo_diffusers.engine.signals import StopRequest
from flowmo_diffusers.engine.step import Losses, TrainStep
from flowmo_diffusers.engine.tracking import RunningMeans, log_picture, tolerant_of_full_disk
from flowmo_diffusers.engine.training_options import build_lr_scheduler, build_optimizer, joint_batch_size


logger = logging.getLogger(__name__)


class Task(ABC):
    """
    What a training script brings to a [`Trainer`]: model, data, losses, validation, and what becomes of the result.
    Every process calls every method, but for [`~Task.save`] and [`~Task.publish`].

    Args:
        name: In the names of pictures and in the figures' record.
        model: To be trained.
        num_images: Of the training set; `None` where it is not known.
        num_held_out: Images of the validation.
    """

    norm_rescaler: NormRescaler | None = None
    adapter: Adapter | None = None  # to be trained in place of the model's weights
    weight_decay = 0.0

    def __init__(self, name: str, model: ModelMixin, num_images: int | None, num_held_out: int):
        self.name = name
        self.model = model
        self.num_images = num_images
        self.num_held_out = num_held_out
        self.states: dict[str, Stateful] = {}  # what else goes on after a resume, by name
        self.trained: torch.nn.Module = model  # as Accelerate wraps it

    def prepared(self, trained: torch.nn.Module) -> None:
        """The model is as Accelerate wraps it: what depends on its parameters can be made now."""
        self.trained = trained

    def before_step(self, step: int) -> None:  # noqa: B027
        """Before the optimiser is made (as step 0), and before each step: the place to freeze weights."""

    def before_group(self, batches: Sequence[dict]) -> None:  # noqa: B027
        """Before the batches that a step accumulates are trained on."""

    def check(self, images_seen: int) -> dict[str, float]:
        """Further figures to be logged, from time to time. What it raises ends the run."""
        return {}

    @abstractmethod
    def batches(self, first: int, last: int) -> Iterable[dict]:
        """This process's batches of number first ... last - 1."""

    @abstractmethod
    def losses(self, batch: dict) -> Losses:
        """Scalars by name, "loss" to be minimised."""

    @abstractmethod
    def flops_per_image(self, step: int) -> float:
        """Model FLOPs of training on one image at this step."""

    @abstractmethod
    def validate(self, step: int) -> tuple[dict[str, float], PIL.Image.Image]:
        """Figures and a picture of the held-out images with the weights as they are now."""

    @abstractmethod
    def guarded(self, figures: Mapping[str, float]) -> float:
        """Of a validation's figures, what decides which weights are best; less is better. Only with a --guard."""

    @abstractmethod
    def save(self, model: ModelMixin, folder: Path) -> None:
        """Writes the pipeline around these weights."""

    @abstractmethod
    def publish(self, facts: dict[str, Any], pictures: list[Path]) -> None:
        """
        Once the pipeline is in the output folder: its card, and the Hub.

        Args:
            facts: As [`~flowmo_diffusers.hub.cards.TrainingRun`] names them, those that every run has.
            pictures: In the output folder, of the validation of these weights.
        """


def start(args: argparse.Namespace, find_unused_parameters: bool = False) -> Accelerator:
    """The log of the main process, and the Accelerator that the options ask for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    accelerator = build_accelerator(
        args.output_dir,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        args.mixed_precision,
        args.max_grad_norm,
        find_unused_parameters=find_unused_parameters,
        project={"logging_dir": str(args.output_dir / args.logging_dir)},
        log_with=None if args.report_to == "none" else args.report_to,
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)
    return accelerator


def starting_point(args: argparse.Namespace, config: Mapping[str, Any]) -> Path | None:
    """
    The checkpoint to go on from, `None` for a new run.

    Raises:
        OSError: If it does not exist.
        ValueError: If it is of another run, or ahead of this one.
    """
    checkpoint = choose_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_config(checkpoint, config)
        if read_step(checkpoint) > args.max_train_steps:
            raise ValueError(f"--max_train_steps {args.max_train_steps} is less than what {checkpoint} has behind it")
    return checkpoint


def make_ready(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """An output folder without what a killed run left half written, and the seed of new weights."""
    if accelerator.is_main_process:
        remove_partial(args.output_dir)
    accelerator.wait_for_everyone()
    set_seed(args.seed)


class Trainer:
    """
    Validates, steps, logs, saves, and ends with the pipeline in the output folder.

    Args:
        task: What is trained.
        args: Options of [`~flowmo_diffusers.engine.training_options`], and `guard`: "none" keeps the last weights.
        accelerator: Of [`start`].
        config: What decides the course of the run, plain JSON. See
            [`~flowmo_diffusers.engine.training_options.course`].
    """

    def __init__(self, task: Task, args: argparse.Namespace, accelerator: Accelerator, config: Mapping[str, Any]):
        self.task, self.args, self.accelerator, self.config = task, args, accelerator, config
        model = task.model.requires_grad_(True).train().to(accelerator.device)
        if task.adapter is not None:
            task.adapter.attach(model)
        self.model_class = type(model)  # sharding makes it another
        task.before_step(0)
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.compile:
            functorch_config.activation_memory_budget = args.activation_memory_budget
            model.compile_repeated_blocks()
        optimizer = build_optimizer(args, model, task.weight_decay)
        lr_scheduler = build_lr_scheduler(args, optimizer)
        trained, optimizer = accelerator.prepare(model, optimizer)
        task.prepared(trained)

        # After `prepare`: sharded parameters are others than those they were made of.
        ema = EMA(model.parameters(), args.ema_decay, args.ema_update_every)
        self.progress = Progress(task.num_images or 0)
        self.best = Best(args.early_stopping_patience)
        states = {"lr_scheduler": lr_scheduler, "ema": ema, "progress": self.progress, "best": self.best}
        self.checkpoints = Checkpoints(
            accelerator, args.output_dir, states | task.states, config, args.checkpoints_total_limit
        )
        self.step = TrainStep(
            accelerator,
            trained,
            optimizer,
            lr_scheduler,
            self.progress,
            ema,
            task.norm_rescaler,
            args.max_grad_norm,
            args.max_skipped_steps,
        )
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        self.meter = Meter(accelerator.device, dtype=dtype, num_processes=accelerator.num_processes)
        self.joint_batch_size = joint_batch_size(args, accelerator.num_processes)
        self.last_save_failed = False

    def run(self, checkpoint: Path | None) -> None:
        """
        Trains to the end, or until it is asked to stop.

        Args:
            checkpoint: To go on from. See [`starting_point`].

        Raises:
            FloatingPointError: If too many steps in a row are not finite, or no validation gave a finite guard.
            OSError: If the best weights of the checkpoint's run are missing, or what must be written cannot be.
        """
        task, accelerator = self.task, self.accelerator
        if checkpoint is not None:
            self._resume(checkpoint)
        self._init_trackers()
        count, size = task.num_images or "streamed", task.model.num_parameters() / 1e6
        logger.info(f"{task.name}: {count} images, {task.num_held_out} held out, {size:.1f} M parameters")
        try:
            with StopRequest() as stop:
                finished = self._train(stop)
        except Exception:
            logger.error(f"stopped at step {self.progress.step}; {self.checkpoints.last_good()}")
            raise
        finally:
            accelerator.end_training()
        if finished and accelerator.is_main_process:  # alone: an upload may take longer than others would wait
            self._finish()

    def _resume(self, checkpoint: Path) -> None:
        best = self.args.output_dir / "best"
        self.task.before_step(read_step(checkpoint))  # as it was saved: sharded moments come only with a gradient
        self.checkpoints.load(checkpoint)
        logger.info(f"going on from {checkpoint}")
        if self.best.step is not None and not best.is_dir():
            raise OSError(f"{best} is missing: the best weights so far, of step {self.best.step}")

    def _init_trackers(self) -> None:
        args = self.args
        tracked = {
            name: value if isinstance(value, int | float) else str(value) for name, value in self.config.items()
        }
        wandb = {"dir": str(args.output_dir / args.logging_dir), "name": f"{args.output_dir.name}-{self.task.name}"}
        self.accelerator.init_trackers(args.tracker_project_name, tracked, {"wandb": wandb})

    def _train(self, stop: StopRequest) -> bool:
        """Whether the run came to its end."""
        args, progress = self.args, self.progress
        accumulation = args.gradient_accumulation_steps
        batches = iter(self.task.batches(progress.step * accumulation, args.max_train_steps * accumulation))
        means, last = RunningMeans(), time.perf_counter()
        bar = tqdm(
            total=args.max_train_steps,
            initial=progress.step,
            desc=self.task.name,
            disable=not self.accelerator.is_main_process,
        )
        while True:
            # First of all, so that a resumed run validates where the one that was killed would have.
            if self._due():
                with self.meter.paused():
                    self._validate()
            if progress.step >= args.max_train_steps or self.best.exhausted:
                bar.close()
                return True
            self.task.before_step(progress.step)
            self.meter.flops_per_image = self.task.flops_per_image(progress.step)

            with self.meter.waiting():
                group = list(itertools.islice(batches, accumulation))
            self.task.before_group(group)
            losses = self.step(group, self.task.losses)
            self.meter.step(self.joint_batch_size)
            if not progress.skipped_in_a_row:
                means.add(losses)
            bar.update()

            now = time.perf_counter()
            progress.seconds, last = progress.seconds + now - last, now
            stopping = on_any_process(self.accelerator, stop.requested)[0]
            if progress.step % args.logging_steps == 0:
                self._log(means, bar)
            if stopping or progress.step % args.checkpointing_steps == 0:
                with self.meter.paused():
                    self._save_checkpoint(must=stopping)
            if stopping:
                step = f"step {progress.step}"
                logger.info(f"asked to stop: {step} is saved, --resume_from_checkpoint latest goes on there")
                return False

    def _due(self) -> bool:
        """Whether to validate after so many steps. What is to be improved on is measured before the first."""
        args, step = self.args, self.progress.step
        if step == args.max_train_steps:
            return True
        return bool(args.validation_steps) and step % args.validation_steps == 0 and (step > 0 or args.guard != "none")

    def _log(self, means: RunningMeans, bar: tqdm) -> None:
        accelerator, progress = self.accelerator, self.progress
        checked = self.task.check(progress.step * self.joint_batch_size)
        figures = means.read(accelerator)
        measured = self.meter.read()
        shown = {name: f"{value:.4f}" for name, value in figures.items() if name.endswith("loss")}
        bar.set_postfix(shown | {"images/s": f"{measured['images_per_second']:.1f}"})
        figures |= measured | {"lr": self.step.lr_scheduler.get_last_lr()[0], "skipped_steps": progress.skipped}
        figures |= checked
        with tolerant_of_full_disk(accelerator):
            accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=progress.step)

    def _save_checkpoint(self, must: bool) -> None:
        """
        A disk that is full now may have room by the next time: training goes on. Not if it is about to end, if there
        is no checkpoint yet, or if the last time was no better.
        """
        try:
            self.checkpoints.save(self.progress.step)
            self.last_save_failed = False
        except OSError as error:
            if must or self.last_save_failed or not find_checkpoints(self.args.output_dir):
                raise
            logger.error(error)
            self.last_save_failed = True

    def _validate(self) -> None:
        """Measures the averaged weights, shows them, and keeps them where they are the best so far."""
        args, accelerator, step, model = self.args, self.accelerator, self.progress.step, self.task.model
        with self.step.ema.applied(model.parameters()):
            model.eval()
            measured, picture = self.task.validate(step)
            reshard(model)  # whose weights are about to be others
            model.train()
            figures = {f"val/{name}": value for name, value in measured.items()}
            if args.guard == "none":
                if step == args.max_train_steps:
                    self._export(args.output_dir, figures)
            elif self.best.update(self.task.guarded(measured), step):
                self._export(args.output_dir / "best", figures)
        if not accelerator.is_main_process:
            return
        with tolerant_of_full_disk(accelerator):
            with atomic_file(args.output_dir / "validation" / f"{self.task.name}-{step:07d}.png") as path:
                picture.save(path, format="PNG")
            log_picture(accelerator, "validation", picture, step)
            accelerator.log(figures, step=step)
        logger.info(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def _export(self, folder: Path, figures: dict[str, float]) -> None:
        """The weights as they are now, and the figures that belong to them. Every process must call this."""
        task = self.task
        weights = whole_state_dict(task.model)
        if not self.accelerator.is_main_process:
            return
        with torch.device("meta"):
            model = self.model_class.from_config(task.model.config)
            if task.adapter is not None:
                task.adapter.attach(model)
        model.load_state_dict(weights, assign=True)
        record = {"stage": task.name, "steps": self.progress.step, "images": task.num_held_out, **figures}
        with atomic_folder(folder) as unfinished:
            if task.adapter is not None:
                save_and_merge_adapter(model, unfinished)
            task.save(model, unfinished)
            (unfinished / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")

    def _finish(self) -> None:
        """The trained pipeline into the output folder, the best where a guard chose it; its card; all to the Hub."""
        args, output_dir, progress = self.args, self.args.output_dir, self.progress
        if args.guard != "none":
            if self.best.step is None:
                raise FloatingPointError(
                    f"no validation gave a finite --guard {args.guard}: there are no best weights"
                )
            with atomic_folder(output_dir) as unfinished:
                shutil.copytree(output_dir / "best", unfinished, dirs_exist_ok=True)
        record = json.loads((output_dir / "metrics.json").read_text())
        pictures = sorted((output_dir / "validation").glob(f"{self.task.name}-{record['steps']:07d}.png"))
        logger.info(f"step {record['steps']} is written to {output_dir}")
        if self.task.adapter is not None:
            self.task.model.unload_lora()  # the card is that of the plain model, as it was saved
        facts = {
            "stage": self.task.name,
            "steps": record["steps"],
            "images_seen": record["steps"] * self.joint_batch_size,
            "train_images": progress.images or None,
            "held_out_images": record["images"],
            "figures": {name: value for name, value in record.items() if name.startswith("val/")},
            "options": vars(args),
            "command": sys.argv,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
            "num_processes": self.accelerator.num_processes,
            "seconds": progress.seconds,
        }
        self.task.publish(facts, pictures)
