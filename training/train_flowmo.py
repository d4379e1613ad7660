#!/usr/bin/env python
"""
Trains a FlowMo tokenizer: stage 1A (`--stage pretrain`) and stage 1B (`--stage posttrain`).

    accelerate launch training/train_flowmo.py --config training/configs/starter.yaml --stage pretrain \
        --train_data_dir my_images --output_dir my_tokenizer

The output folder is what `FlowMoPipeline.from_pretrained` loads.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm.auto import tqdm

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.data.images import hold_out, load_images, load_streams, stack_images
from flowmo_diffusers.data.loading import BadImages, ShuffledImages, StreamedImages, image_batches
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.best import Best
from flowmo_diffusers.engine.checkpoints import (
    Checkpoints,
    Progress,
    check_config,
    choose_checkpoint,
    find_checkpoints,
    read_step,
)
from flowmo_diffusers.engine.digests import config_entries
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.files import atomic_file, atomic_folder, remove_partial
from flowmo_diffusers.engine.launch import build_accelerator, launched_with
from flowmo_diffusers.engine.meter import Meter
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.engine.processes import on_any_process
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.engine.sharding import whole_state_dict
from flowmo_diffusers.engine.signals import StopRequest
from flowmo_diffusers.engine.step import Losses, TrainStep
from flowmo_diffusers.engine.tracking import RunningMeans, log_picture, tolerant_of_full_disk
from flowmo_diffusers.hub.cards import TrainingRun, write_model_card
from flowmo_diffusers.hub.upload import check_push, push_folder
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.validation import Validation
from flowmo_diffusers.objectives.cost import posttraining_flops, pretraining_flops
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.joint import JointCodeDistribution
from flowmo_diffusers.objectives.perceptual import load_perceptual_network
from flowmo_diffusers.objectives.posttrain import ChainDraws, posttraining_loss
from flowmo_diffusers.objectives.pretrain import LossWeights, pretraining_loss


logger = logging.getLogger("train_flowmo")

# The paper's values where the two stages differ.
STAGES = {
    "pretrain": {"learning_rate": 1e-4, "train_batch_size": 128, "perceptual": "lpips-vgg", "perceptual_weight": 0.1},
    "posttrain": {"learning_rate": 5e-5, "train_batch_size": 64, "perceptual": "resnet50", "perceptual_weight": 0.01},
}

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

# What may change when a run is resumed; everything else decides its course. The batch counts as a whole, however it is
# spread over processes and accumulation.
FREE_OPTIONS = {
    *("config", "output_dir", "resume_from_checkpoint", "cache_dir", "logging_dir", "report_to", "logging_steps"),
    *("train_data_dir", "pretrained_model_name_or_path", "model_config", "perceptual_weights", "guard_weights"),
    *("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile"),
    *("dataloader_num_workers", "validation_steps", "num_inference_steps", "checkpointing_steps"),
    *("checkpoints_total_limit", "max_bad_fraction", "max_skipped_steps", "early_stopping_patience"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "license", "tracker_project_name"),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=list(STAGES), default="pretrain")
    add("--output_dir", type=Path, required=True, help="where the trained pipeline is written")

    model = parser.add_argument_group("model").add_argument
    model("--pretrained_model_name_or_path", help="pipeline to start from; required for posttrain")
    model("--model_config", help="JSON file or text with FlowMoAutoencoder's fields, to start anew; default FlowMo-Lo")

    data = parser.add_argument_group("data").add_argument
    data("--dataset_name", help="Hub id, local dataset, or 'emoji' for the embedded images")
    data("--dataset_config_name")
    data("--train_data_dir", help="folder of images, parquet file(s), .tar shards, or ImageNet's .tar files")
    data("--image_column", default="image", help="column, or extension in .tar shards that hold several images a key")
    data("--split", default="train")
    data("--validation_split", help="default: 'validation' or 'test' if there is one, else images of the split itself")
    data("--cache_dir")
    data("--streaming", action="store_true", help="read a data set as it is downloaded, without keeping it")
    data("--shuffle_buffer", type=int, help="images within which order is random; default: all, 10000 for .tar shards")
    data("--max_bad_fraction", type=float, default=0.01, help="stop when more images than this cannot be read")
    data("--resolution", type=int, help="default: the model's sample_size")
    data("--center_crop", action="store_true", help="crop at the centre instead of at random")
    data("--random_scale", type=float, default=1.0, help="resize by up to this factor before the random crop")
    data("--random_flip", action=argparse.BooleanOptionalAction, default=True)
    data("--dataloader_num_workers", type=int, default=0)

    optim = parser.add_argument_group("optimisation").add_argument
    optim("--train_batch_size", type=int, help="images per process and step; default 128, posttrain 64")
    optim("--gradient_accumulation_steps", type=int, default=1)
    optim("--max_train_steps", type=int, default=200_000)
    optim("--learning_rate", type=float, help="default 1e-4, posttrain 5e-5")
    optim("--lr_scheduler", choices=SCHEDULES, default="constant", help="'polynomial' falls to --lr_end")
    optim("--lr_warmup_steps", type=int, default=0)
    optim("--lr_end", type=float, default=0.0, help="last learning rate of the polynomial schedule")
    optim("--lr_power", type=float, default=1.0, help="power of the polynomial schedule; 1 is linear")
    optim("--adam_beta1", type=float, default=0.9)
    optim("--adam_beta2", type=float, default=0.95, help="higher values are unstable (paper section 4)")
    optim("--adam_epsilon", type=float, default=1e-8)
    optim("--max_grad_norm", type=float, help="clip gradients to this norm; default: no clipping, as published")
    optim("--max_skipped_steps", type=int, default=10, help="steps in a row whose loss or gradient may not be finite")
    optim("--ema_decay", type=float, default=0.9999)
    optim("--ema_update_every", type=int, default=10)
    optim(
        "--norm_rescaling", action=argparse.BooleanOptionalAction, default=True, help="hold the blocks' weight norms"
    )
    optim("--freeze_encoder_steps", type=int, default=200_000, help="pretrain: freeze the encoder after these steps")
    optim("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: Accelerate's configuration")
    optim("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="default: on for posttrain")
    optim("--compile", action="store_true", help="compile the repeated blocks by torch.compile")
    optim("--seed", type=int, default=0)

    loss = parser.add_argument_group("loss").add_argument
    loss("--perceptual", help="lpips-vgg, lpips-alex, resnet50, none, or a transformers classifier")
    loss("--perceptual_weights", type=Path, help="local file with the perceptual network's weights")
    loss("--perceptual_weight", type=float, help="default 0.1, posttrain 0.01")
    loss("--entropy_weight", type=float, default=LossWeights.entropy)
    loss("--global_entropy", action="store_true", help="LFQ's batch entropy over processes and accumulation")
    loss("--commit_weight", type=float, default=LossWeights.commit)
    loss("--kl_weight", type=float, default=LossWeights.kl)
    loss("--code_dropout", type=float, default=0.1, help="share of images whose codes are dropped, for guidance")
    loss("--chain_steps", type=int, default=8, help="posttrain: Euler steps of the sampling chain")

    watch = parser.add_argument_group("validation").add_argument
    watch("--validation_steps", type=int, default=1000, help="0 validates only at the end")
    watch("--num_validation_images", type=int, default=64)
    watch("--num_inference_steps", type=int, default=25, help="of validation")
    watch(
        "--guard",
        help="what decides which weights are best: 'psnr', or a perceptual network that is not optimised; 'none' "
        "keeps the last. Default: none for pretrain; lpips-alex for posttrain, or psnr where that is optimised",
    )
    watch("--guard_weights", type=Path, help="local file with the guard's weights")
    watch("--early_stopping_patience", type=int, help="validations without a better one after which to stop")

    run = parser.add_argument_group("run").add_argument
    run("--checkpointing_steps", type=int, default=5000)
    run("--checkpoints_total_limit", type=int, default=2)
    run("--resume_from_checkpoint", help="'latest' or a checkpoint's path")
    run("--report_to", default="tensorboard", help="tensorboard, wandb, all or none")
    run("--tracker_project_name", default="flowmo")
    run("--logging_dir", default="logs", help="inside the output folder")
    run("--logging_steps", type=int, default=10)

    hub = parser.add_argument_group("publishing").add_argument
    hub("--license", help="of the weights, as the Hub names it; stands in the model card")
    hub("--push_to_hub", action="store_true")
    hub("--hub_model_id", help="default: the name of the output folder")
    hub("--hub_token")
    hub("--hub_private_repo", action="store_true", default=None)

    args = parse_with_config(parser, argv, section="stage")
    for name, value in STAGES[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.stage == "posttrain"
    if args.guard is None:
        not_optimised = "psnr" if args.perceptual == "lpips-alex" else "lpips-alex"
        args.guard = not_optimised if args.stage == "posttrain" else "none"
    args.hub_model_id = args.hub_model_id or args.output_dir.name
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before data or model are loaded."""
    at_least_one = (
        *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "chain_steps", "ema_update_every"),
        *("num_validation_images", "num_inference_steps", "checkpointing_steps", "logging_steps", "shuffle_buffer"),
        *("checkpoints_total_limit", "early_stopping_patience", "resolution"),
    )
    not_negative = (
        *("lr_warmup_steps", "lr_end", "perceptual_weight", "entropy_weight", "commit_weight", "kl_weight", "seed"),
        *("validation_steps", "max_skipped_steps", "freeze_encoder_steps", "dataloader_num_workers"),
    )
    shares = ("code_dropout", "max_bad_fraction", "ema_decay", "adam_beta1", "adam_beta2")
    positive = ("learning_rate", "adam_epsilon", "max_grad_norm", "lr_power")
    for names, fits, wanted in (
        (at_least_one, lambda value: value >= 1, "at least 1"),
        (not_negative, lambda value: value >= 0, "at least 0"),
        (shares, lambda value: 0 <= value < 1, "at least 0 and less than 1"),
        (positive, lambda value: value > 0, "positive"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name} {value} must be {wanted}")

    posttrain = args.stage == "posttrain"
    networks = ("none", "psnr")
    rules = (
        (posttrain and args.pretrained_model_name_or_path is None,
         "--stage posttrain starts from a pre-trained pipeline: give --pretrained_model_name_or_path"),
        (posttrain and args.perceptual == "none",
         "--stage posttrain needs a perceptual network: --perceptual none leaves nothing to seek modes by"),
        (args.pretrained_model_name_or_path and args.model_config,
         "give --model_config or --pretrained_model_name_or_path, not both: the pipeline has its own"),
        ((args.dataset_name is None) == (args.train_data_dir is None),
         "give exactly one of --dataset_name and --train_data_dir"),
        (args.dataset_config_name and args.dataset_name is None, "--dataset_config_name belongs to --dataset_name"),
        (args.streaming and args.dataset_name == "emoji", "--streaming: the embedded images are here already"),
        (args.random_scale < 1 or (args.random_scale > 1 and args.center_crop),
         "--random_scale must be at least 1, and 1 with --center_crop"),
        (args.lr_scheduler != "polynomial" and (args.lr_end or args.lr_power != 1.0),
         "--lr_end and --lr_power belong to --lr_scheduler polynomial"),
        (args.lr_end > args.learning_rate, f"--lr_end {args.lr_end} is above --learning_rate {args.learning_rate}"),
        (args.lr_scheduler == "constant" and args.lr_warmup_steps,
         "--lr_warmup_steps belongs to a schedule with a warmup: --lr_scheduler constant_with_warmup"),
        (args.lr_warmup_steps > args.max_train_steps,
         f"--lr_warmup_steps {args.lr_warmup_steps} is more than --max_train_steps {args.max_train_steps}"),
        (Path(args.guard).name == Path(args.perceptual).name and args.guard not in networks,
         f"--guard {args.guard} is what --perceptual optimises: it cannot tell whether that is being hacked"),
        (args.guard_weights and args.guard in networks, f"--guard_weights: --guard {args.guard} has no weights"),
        (args.perceptual_weights and args.perceptual == "none", "--perceptual_weights: --perceptual none has none"),
        (args.early_stopping_patience and (args.guard == "none" or not args.validation_steps),
         "--early_stopping_patience needs a --guard and --validation_steps"),
        (args.report_to not in ("none", "all", *map(str, get_available_trackers())),
         f"--report_to {args.report_to} is no tracker that is installed: {get_available_trackers()}"),
        (launched_with("deepspeed") and not posttrain and 0 < args.freeze_encoder_steps < args.max_train_steps,
         "--freeze_encoder_steps: DeepSpeed cannot freeze the encoder on the way. Train for so many steps, then go on "
         "from that folder with --freeze_encoder_steps 0"),
        (args.mixed_precision == "fp16" and not torch.cuda.is_available(),
         "--mixed_precision fp16 needs a GPU; bf16 runs on a CPU too"),
    )  # fmt: skip
    for wrong, message in rules:
        if wrong:
            parser.error(message)


def read_model_config(args: argparse.Namespace) -> dict:
    """The model's fields, without its weights."""
    if args.pretrained_model_name_or_path:
        path = args.pretrained_model_name_or_path
        config = FlowMoAutoencoder.load_config(path, subfolder="autoencoder")
    else:
        config = args.model_config or {}
        if isinstance(config, str):
            config = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text())
    with torch.device("meta"):
        model = FlowMoAutoencoder.from_config(config)
    if (args.resolution or 0) % model.config.patch_size:
        raise ValueError(f"--resolution {args.resolution} must be a multiple of patch_size={model.config.patch_size}")
    if args.global_entropy and model.config.quantizer != "lfq":
        raise ValueError(f"--global_entropy: quantizer={model.config.quantizer!r} has no entropy term, 'lfq' has")
    return config_entries(model)


def course(args: argparse.Namespace, model_config: dict, num_processes: int) -> dict:
    """What decides the course of a run: a checkpoint of another one is refused."""
    options = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    if args.lr_scheduler.startswith("constant"):
        del options["max_train_steps"]  # such a run may be made longer
    if args.streaming:  # readers share the shards of a stream, images that of everything else
        options |= {"num_processes": num_processes, "dataloader_num_workers": args.dataloader_num_workers}
    options["joint_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    options |= {f"model.{name}": value for name, value in model_config.items()}
    return json.loads(json.dumps(options, default=str))


def accelerator_for(args: argparse.Namespace) -> Accelerator:
    # An encoder frozen on the way leaves parameters that DDP would wait for.
    freezes = args.stage == "pretrain" and 0 < args.freeze_encoder_steps < args.max_train_steps
    return build_accelerator(
        args.output_dir,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        args.mixed_precision,
        args.max_grad_norm,
        find_unused_parameters=freezes,
        project={"logging_dir": str(args.output_dir / args.logging_dir)},
        log_with=None if args.report_to == "none" else args.report_to,
    )


def build_pipeline(args: argparse.Namespace, model_config: dict) -> FlowMoPipeline:
    if args.pretrained_model_name_or_path:
        return FlowMoPipeline.from_pretrained(args.pretrained_model_name_or_path)
    return FlowMoPipeline(FlowMoAutoencoder.from_config(model_config), FlowMoScheduler())


def build_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=model.device.type in ("cpu", "cuda"),
    )


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    if args.lr_scheduler == "polynomial":
        return get_polynomial_decay_schedule_with_warmup(optimizer, **steps, lr_end=args.lr_end, power=args.lr_power)
    return get_scheduler(args.lr_scheduler, optimizer, **steps)


def build_data(args: argparse.Namespace, resolution: int) -> tuple[ShuffledImages | StreamedImages, torch.Tensor]:
    """The endless training images, and the held-out ones as a tensor."""
    place = (args.dataset_name, args.train_data_dir, args.split, args.dataset_config_name, args.cache_dir)
    found = (load_streams if args.streaming else load_images)(*place, args.image_column)
    train, held_out = hold_out(found, args.split, args.validation_split, args.num_validation_images)
    transform = ImageTransform(resolution, not args.center_crop, args.random_flip, args.random_scale)
    endless = StreamedImages if args.streaming else ShuffledImages
    return endless(train, transform, args.seed, args.shuffle_buffer), stack_images(held_out, resolution)


def build_networks(args: argparse.Namespace, device: torch.device) -> dict[str, torch.nn.Module]:
    """The perceptual network that is optimised, and the one that is not, by the last part of their names."""
    named = {args.perceptual: args.perceptual_weights, args.guard: args.guard_weights}
    return {
        Path(name).name: load_perceptual_network(name, weights).to(device)
        for name, weights in named.items()
        if name not in ("none", "psnr")
    }


@dataclass
class Run:
    """What the parts of a run have in common."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipeline: FlowMoPipeline
    trained: torch.nn.Module  # the pipeline's autoencoder as Accelerate wraps it
    step: TrainStep
    best: Best
    bad: BadImages
    checkpoints: Checkpoints
    meter: Meter
    validation: Validation
    last_save_failed: bool = False

    @property
    def model(self) -> FlowMoAutoencoder:
        return self.pipeline.autoencoder

    @property
    def progress(self) -> Progress:
        return self.step.progress

    @property
    def joint_batch_size(self) -> int:
        """Images of one step, of all processes."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes


def compute_losses(run: Run, perceptual, weights: LossWeights, batch: dict) -> dict[str, torch.Tensor]:
    args, device = run.args, run.accelerator.device
    x = batch["images"].to(device, non_blocking=True)
    generators = [keyed_generator(args.seed, args.stage, visit, device) for visit in batch["visits"].tolist()]
    draws = FlowDraws.sample(x, generators, args.code_dropout)
    if args.stage == "pretrain":
        return pretraining_loss(run.trained, x, draws, perceptual, weights, generators)
    chain = ChainDraws.sample(x, generators, args.chain_steps)
    return posttraining_loss(run.trained, x, draws, chain, perceptual, weights, generators)


def flops_per_image(run: Run) -> float:
    args, config, side = run.args, run.model.config, run.validation.originals.shape[-1]
    if args.stage == "posttrain":
        return posttraining_flops(config, side, side, args.chain_steps)
    encoder_trained = run.progress.step < args.freeze_encoder_steps
    return pretraining_flops(config, side, side, encoder_trained)


def due(args: argparse.Namespace, step: int) -> bool:
    """Whether to validate after so many steps. What is to be improved on is measured before the first."""
    if step == args.max_train_steps:
        return True
    return bool(args.validation_steps) and step % args.validation_steps == 0 and (step > 0 or args.guard != "none")


def train(run: Run, loader, objective, joint: JointCodeDistribution | None, stop: StopRequest) -> bool:
    """Validates, steps, logs and saves. Returns whether the run came to its end."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    batches, means, last = iter(loader), RunningMeans(), time.perf_counter()
    bar = tqdm(total=args.max_train_steps, initial=progress.step, disable=not accelerator.is_main_process)
    bar.set_description(args.stage)
    while True:
        # First of all, so that a resumed run validates where the one that was killed would have.
        if due(args, progress.step):
            with run.meter.paused():
                validate(run)
        if progress.step >= args.max_train_steps or run.best.exhausted:
            bar.close()
            return True
        if args.stage == "pretrain" and progress.step >= args.freeze_encoder_steps:
            run.model.encoder.requires_grad_(False)
        run.meter.flops_per_image = flops_per_image(run)

        with run.meter.waiting():
            group = list(itertools.islice(batches, args.gradient_accumulation_steps))
        for batch in group:
            run.bad.add(batch["bad"])
        if joint is not None and len(group) > 1:
            with accelerator.autocast():
                joint.observe(lambda x: run.trained(images=x.to(accelerator.device)), [b["images"] for b in group])
        losses = run.step(group, objective)
        run.meter.step(run.joint_batch_size)
        if not progress.skipped_in_a_row:
            means.add(losses)
        bar.update()

        now = time.perf_counter()
        progress.seconds, last = progress.seconds + now - last, now
        stopping = on_any_process(accelerator, stop.requested)[0]
        if progress.step % args.logging_steps == 0:
            log_step(run, means, bar)
        if stopping or progress.step % args.checkpointing_steps == 0:
            with run.meter.paused():
                save_checkpoint(run, must=stopping)
        if stopping:
            logger.info(f"asked to stop: step {progress.step} is saved, --resume_from_checkpoint latest goes on there")
            return False


def log_step(run: Run, means: RunningMeans, bar: tqdm) -> None:
    accelerator, progress = run.accelerator, run.progress
    if accelerator.num_processes > 1:
        run.bad.add(gather_object(list(run.bad.reasons.items())))
    run.bad.check(progress.step * run.joint_batch_size)
    figures = means.read(accelerator)
    measured = run.meter.read()
    shown = {name: f"{value:.4f}" for name, value in figures.items() if name.endswith("loss")}
    bar.set_postfix(shown | {"images/s": f"{measured['images_per_second']:.1f}"})
    figures |= measured | {
        "lr": run.step.lr_scheduler.get_last_lr()[0],
        "skipped_steps": progress.skipped,
        "bad_images": len(run.bad),
    }
    with tolerant_of_full_disk(accelerator):
        accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=progress.step)


def save_checkpoint(run: Run, must: bool) -> None:
    """
    A disk that is full now may have room by the next time: training goes on. Not if it is about to end, if there is no
    checkpoint yet, or if the last time was no better.
    """
    try:
        run.checkpoints.save(run.progress.step)
        run.last_save_failed = False
    except OSError as error:
        if must or run.last_save_failed or not find_checkpoints(run.args.output_dir):
            raise
        logger.error(error)
        run.last_save_failed = True


def validate(run: Run) -> None:
    """Measures the averaged weights, shows them, and keeps them where they are the best so far."""
    args, accelerator, step = run.args, run.accelerator, run.progress.step
    with run.step.ema.applied(run.model.parameters()):
        run.model.eval()
        reconstructions, figures = run.validation(run.pipeline)
        run.model.train()
        figures = {f"val/{name}": value for name, value in figures.items()}
        if args.guard == "none":
            if step == args.max_train_steps:
                save_pipeline(run, args.output_dir, figures)
        else:
            value = -figures["val/psnr"] if args.guard == "psnr" else figures[f"val/{Path(args.guard).name}"]
            if run.best.update(value, step):
                save_pipeline(run, args.output_dir / "best", figures)
    if not accelerator.is_main_process:
        return
    originals = run.validation.originals
    picture = labelled_rows({"original": originals[:12], f"{args.stage}, step {step}": reconstructions[:12]})
    with tolerant_of_full_disk(accelerator):
        with atomic_file(args.output_dir / "validation" / f"{args.stage}-{step:07d}.png") as path:
            picture.save(path, format="PNG")
        log_picture(accelerator, "validation", picture, step)
        accelerator.log(figures, step=step)
    logger.info(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def save_pipeline(run: Run, folder: Path, figures: dict[str, float]) -> None:
    """The weights as they are now, and the figures that belong to them. Every process must call this."""
    weights = whole_state_dict(run.model)
    if not run.accelerator.is_main_process:
        return
    with torch.device("meta"):
        model = FlowMoAutoencoder.from_config(run.model.config)
    model.load_state_dict(weights, assign=True)
    record = {"stage": run.args.stage, "steps": run.progress.step, "images": len(run.validation.originals), **figures}
    with atomic_folder(folder) as unfinished:
        FlowMoPipeline(model, run.pipeline.scheduler).save_pretrained(unfinished)
        (unfinished / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")


def finish(run: Run) -> None:
    """The trained pipeline into the output folder, the best where a guard chose it; its card; all of it to the Hub."""
    args, output_dir = run.args, run.args.output_dir
    if args.guard != "none":
        if run.best.step is None:
            raise FloatingPointError(f"no validation gave a finite --guard {args.guard}: there are no best weights")
        with atomic_folder(output_dir) as unfinished:
            shutil.copytree(output_dir / "best", unfinished, dirs_exist_ok=True)
    record = json.loads((output_dir / "metrics.json").read_text())
    pictures = sorted((output_dir / "validation").glob(f"{args.stage}-{record['steps']:07d}.png"))
    facts = TrainingRun(
        stage=args.stage,
        dataset=args.dataset_name or Path(args.train_data_dir),
        base_model=args.pretrained_model_name_or_path,
        resolution=run.validation.originals.shape[-1],
        steps=record["steps"],
        images_seen=record["steps"] * run.joint_batch_size,
        train_images=run.progress.images or None,
        held_out_images=record["images"],
        num_inference_steps=args.num_inference_steps,
        figures={name: value for name, value in record.items() if name.startswith("val/")},
        options=vars(args),
        command=sys.argv,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        num_processes=run.accelerator.num_processes,
        seconds=run.progress.seconds,
    )
    repo_id = args.hub_model_id if args.push_to_hub else None
    write_model_card(output_dir, run.pipeline, facts, pictures, repo_id, args.license)
    logger.info(f"step {record['steps']} is written to {output_dir}")
    if args.push_to_hub:
        push_folder(output_dir, args.hub_model_id, private=args.hub_private_repo, token=args.hub_token)


def build_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: FlowMoPipeline,
    originals: torch.Tensor,
    image_count: int | None,
    config: dict,
) -> tuple[Run, Callable[[dict], Losses]]:
    """The run, and its objective: a batch to its losses."""
    device = accelerator.device
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.autoencoder.requires_grad_(True).train().to(device)
    if args.stage == "posttrain" or args.freeze_encoder_steps == 0:
        model.encoder.requires_grad_(False)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        model.compile_repeated_blocks()
    networks = build_networks(args, device)
    optimizer = build_optimizer(args, model)
    lr_scheduler = build_lr_scheduler(args, optimizer)
    trained, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        register_fsdp_forward_method(model, "encode")

    # After `prepare`: sharded parameters are others than those they were made of.
    ema = EMA(model.parameters(), args.ema_decay, args.ema_update_every)
    norms = NormRescaler(model.block_weights())
    progress, best = Progress(image_count or 0), Best(args.early_stopping_patience)
    bad = BadImages(args.max_bad_fraction, image_count)
    states = {"lr_scheduler": lr_scheduler, "ema": ema, "norms": norms, "progress": progress, "best": best, "bad": bad}
    step = TrainStep(
        accelerator,
        trained,
        optimizer,
        lr_scheduler,
        progress,
        ema,
        norms if args.norm_rescaling else None,
        args.max_grad_norm,
        args.max_skipped_steps,
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    run = Run(
        args=args,
        accelerator=accelerator,
        pipeline=pipeline,
        trained=trained,
        step=step,
        best=best,
        bad=bad,
        checkpoints=Checkpoints(accelerator, args.output_dir, states, config, args.checkpoints_total_limit),
        meter=Meter(device, dtype=dtype, num_processes=accelerator.num_processes),
        validation=Validation(
            accelerator, originals, networks, args.num_inference_steps, args.train_batch_size, args.seed
        ),
    )
    weights = LossWeights(args.perceptual_weight, args.entropy_weight, args.commit_weight, args.kl_weight)
    return run, partial(compute_losses, run, networks.get(Path(args.perceptual).name), weights)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    model_config = read_model_config(args)
    accelerator = accelerator_for(args)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)
    config = course(args, model_config, accelerator.num_processes)
    checkpoint = choose_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_config(checkpoint, config)
        if read_step(checkpoint) > args.max_train_steps:
            raise ValueError(f"--max_train_steps {args.max_train_steps} is less than what {checkpoint} has behind it")
    if accelerator.is_main_process:
        if args.push_to_hub:
            args.hub_model_id = check_push(args.hub_model_id, args.hub_private_repo, args.hub_token)
        remove_partial(args.output_dir)
    accelerator.wait_for_everyone()
    set_seed(args.seed)

    pipeline = build_pipeline(args, model_config)
    with accelerator.local_main_process_first():  # the others find caches and indices made
        images, originals = build_data(args, args.resolution or model_config["sample_size"])
    image_count = None if args.streaming else len(images)
    run, objective = build_run(args, accelerator, pipeline, originals, image_count, config)
    progress, best = run.progress, run.best
    if checkpoint is not None:
        if args.stage == "pretrain" and read_step(checkpoint) >= args.freeze_encoder_steps:
            run.model.encoder.requires_grad_(False)  # as it was saved: sharded moments come only with a gradient
        run.checkpoints.load(checkpoint)
        logger.info(f"going on from {checkpoint}")
        if best.step is not None and not (args.output_dir / "best").is_dir():
            raise OSError(f"{args.output_dir / 'best'} is missing: the best weights so far, of step {best.step}")
    tracked = {name: value if isinstance(value, int | float) else str(value) for name, value in config.items()}
    wandb = {"dir": str(args.output_dir / args.logging_dir), "name": f"{args.output_dir.name}-{args.stage}"}
    accelerator.init_trackers(args.tracker_project_name, tracked, {"wandb": wandb})

    accumulation = args.gradient_accumulation_steps
    loader = image_batches(
        images,
        args.train_batch_size,
        progress.step * accumulation,
        args.max_train_steps * accumulation,
        accelerator.process_index,
        accelerator.num_processes,
        args.dataloader_num_workers,
    )
    joint = None
    if args.global_entropy:
        joint = JointCodeDistribution(run.model, partial(accelerator.reduce, reduction="mean"))
    count, size = image_count or "streamed", run.model.num_parameters() / 1e6
    logger.info(f"{args.stage}: {count} images, {len(originals)} held out, {size:.1f} M parameters")
    try:
        with StopRequest() as stop:
            finished = train(run, loader, objective, joint, stop)
    except Exception:
        logger.error(f"stopped at step {progress.step}; {run.checkpoints.last_good()}")
        raise
    finally:
        accelerator.end_training()
    if finished and accelerator.is_main_process:  # alone: an upload may take longer than others would wait
        finish(run)


if __name__ == "__main__":
    main(parse_args())
