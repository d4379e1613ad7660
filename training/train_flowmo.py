#!/usr/bin/env python
"""
Trains a FlowMo tokenizer: stage 1A (`--stage pretrain`) and stage 1B (`--stage posttrain`).

    accelerate launch training/train_flowmo.py --config training/configs/starter.yaml --stage pretrain \
        --train_data_dir my_images --output_dir my_tokenizer

The output folder is what `FlowMoPipeline.from_pretrained` loads.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.data.images import ImageTransform, ShuffledImages, hold_out, load_images, stack_images
from flowmo_diffusers.engine.checkpoints import Progress, load_checkpoint, save_checkpoint
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.files import atomic_file, atomic_folder
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.engine.seeding import step_generator
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.perceptual import load_perceptual_network
from flowmo_diffusers.objectives.posttrain import ChainDraws, posttraining_loss
from flowmo_diffusers.objectives.pretrain import LossWeights, pretraining_loss


logger = logging.getLogger("train_flowmo")

# The paper's values where the two stages differ.
STAGES = {
    "pretrain": {"learning_rate": 1e-4, "train_batch_size": 128, "perceptual": "lpips-vgg", "perceptual_weight": 0.1},
    "posttrain": {"learning_rate": 5e-5, "train_batch_size": 64, "perceptual": "resnet50", "perceptual_weight": 0.01},
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
    data("--train_data_dir", type=Path, help="folder of images, or parquet file(s)")
    data("--image_column", default="image")
    data("--split", default="train")
    data("--validation_split", help="default: 'validation' or 'test' if there is one, else the end of the split")
    data("--cache_dir")
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
    optim("--lr_scheduler", default="constant", help="a diffusers schedule; 'polynomial' falls to --lr_end")
    optim("--lr_warmup_steps", type=int, default=0)
    optim("--lr_end", type=float, default=0.0, help="last learning rate of the polynomial schedule")
    optim("--lr_power", type=float, default=1.0, help="power of the polynomial schedule; 1 is linear")
    optim("--adam_beta1", type=float, default=0.9)
    optim("--adam_beta2", type=float, default=0.95, help="higher values are unstable (paper section 4)")
    optim("--adam_epsilon", type=float, default=1e-8)
    optim("--max_grad_norm", type=float, help="clip gradients to this norm; default: no clipping, as published")
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
    loss("--commit_weight", type=float, default=LossWeights.commit)
    loss("--kl_weight", type=float, default=LossWeights.kl)
    loss("--code_dropout", type=float, default=0.1, help="share of images whose codes are dropped, for guidance")
    loss("--chain_steps", type=int, default=8, help="posttrain: Euler steps of the sampling chain")

    run = parser.add_argument_group("run").add_argument
    run("--validation_steps", type=int, default=1000, help="0 validates only at the end")
    run("--num_validation_images", type=int, default=64)
    run("--num_inference_steps", type=int, default=25, help="of validation")
    run("--checkpointing_steps", type=int, default=5000)
    run("--checkpoints_total_limit", type=int, default=2)
    run("--resume_from_checkpoint", help="'latest' or a checkpoint's path")
    run("--report_to", default="tensorboard", help="tensorboard, wandb, all or none")
    run("--logging_dir", default="logs", help="inside the output folder")
    run("--logging_steps", type=int, default=10)

    args = parse_with_config(parser, argv, section="stage")
    for name, value in STAGES[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.stage == "posttrain"
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before data or model are loaded."""
    if args.stage == "posttrain" and args.pretrained_model_name_or_path is None:
        parser.error("--stage posttrain starts from a pre-trained pipeline: give --pretrained_model_name_or_path")
    if args.stage == "posttrain" and args.perceptual == "none":
        parser.error("--stage posttrain needs a perceptual network: --perceptual none leaves nothing to seek modes by")
    if args.pretrained_model_name_or_path and args.model_config:
        parser.error("give --model_config or --pretrained_model_name_or_path, not both: the pipeline has its own")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give exactly one of --dataset_name and --train_data_dir")
    positive = (
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "chain_steps",
        "ema_update_every",
    )
    for name in (*positive, "num_validation_images", "num_inference_steps", "checkpointing_steps", "logging_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if args.random_scale < 1 or (args.random_scale > 1 and args.center_crop):
        parser.error("--random_scale must be at least 1, and 1 with --center_crop")
    if args.lr_scheduler != "polynomial" and (args.lr_end or args.lr_power != 1.0):
        parser.error("--lr_end and --lr_power belong to --lr_scheduler polynomial")


def build_pipeline(args: argparse.Namespace) -> FlowMoPipeline:
    if args.pretrained_model_name_or_path:
        return FlowMoPipeline.from_pretrained(args.pretrained_model_name_or_path)
    config = args.model_config or {}
    if isinstance(config, str):
        config = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text())
    return FlowMoPipeline(FlowMoAutoencoder(**config), FlowMoScheduler())


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    if args.lr_scheduler == "polynomial":
        return get_polynomial_decay_schedule_with_warmup(optimizer, **steps, lr_end=args.lr_end, power=args.lr_power)
    return get_scheduler(args.lr_scheduler, optimizer, **steps)


def build_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=model.device.type in ("cpu", "cuda"),
    )


def build_data(args: argparse.Namespace, resolution: int) -> tuple[ShuffledImages, torch.Tensor]:
    """The endless training images, and the held-out ones as a tensor."""
    found = load_images(args.dataset_name, args.train_data_dir, args.split, args.dataset_config_name, args.cache_dir)
    train, held_out = hold_out(found, args.split, args.validation_split, args.num_validation_images)
    originals = stack_images(held_out, resolution, args.image_column)
    transform = ImageTransform(resolution, not args.center_crop, args.random_flip, args.random_scale)
    return ShuffledImages(train, transform, args.seed, args.image_column), originals


def compute_losses(args, model, x, perceptual, weights, generator) -> dict[str, torch.Tensor]:
    draws = FlowDraws.sample(x, generator, args.code_dropout)
    if args.stage == "pretrain":
        return pretraining_loss(model, x, draws, perceptual, weights, generator)
    chain = ChainDraws.sample(x, generator, args.chain_steps)
    return posttraining_loss(model, x, draws, chain, perceptual, weights, generator)


def train_step(args, accelerator, model, optimizer, x, perceptual, weights, generator) -> dict[str, torch.Tensor]:
    """Forward, backward and, when enough batches were accumulated, an update."""
    with accelerator.accumulate(model):
        with accelerator.autocast():
            losses = compute_losses(args, model, x, perceptual, weights, generator)
        accelerator.backward(losses["loss"])
        if accelerator.sync_gradients and args.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def log_step(accelerator, bar, losses, learning_rate, images_per_second, step) -> None:
    values = {name: value.item() for name, value in losses.items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']} at step {step}: {values}")
    shown = {name: f"{value:.4f}" for name, value in values.items() if name.endswith("loss")}
    bar.set_postfix(shown | {"images/s": f"{images_per_second:.1f}"})
    values |= {"lr": learning_rate, "images_per_second": images_per_second}
    accelerator.log({f"train/{name}": value for name, value in values.items()}, step=step)


@torch.no_grad()
def validate(args, accelerator, pipeline, ema, originals, perceptual, step) -> dict[str, float]:
    """Reconstructs the held-out images with the averaged weights on the main process; logs and returns figures."""
    figures = {}
    if accelerator.is_main_process:
        parameters = pipeline.autoencoder.parameters
        ema.store(parameters())
        ema.copy_to(parameters())
        figures = reconstruct(args, accelerator, pipeline, originals, perceptual, step)
        ema.restore(parameters())
        accelerator.log(figures, step=step)
        logger.info(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    accelerator.wait_for_everyone()
    return figures


def reconstruct(args, accelerator, pipeline, originals, perceptual, step) -> dict[str, float]:
    """Held-out images from fixed noise: writes a picture and returns mean figures."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.autoencoder.eval()
    reconstructions = []
    for start in range(0, len(originals), args.train_batch_size):
        batch = originals[start : start + args.train_batch_size].to(accelerator.device)
        generators = [step_generator(args.seed, 0, start + i) for i in range(len(batch))]
        with accelerator.autocast():
            steps = args.num_inference_steps
            images = pipeline(batch, num_inference_steps=steps, generator=generators, output_type="latent").images
        reconstructions.append(images.float().cpu())
    pipeline.autoencoder.train()
    y = torch.cat(reconstructions)
    figures = {"val/psnr": psnr(originals, y).mean().item()}
    if perceptual is not None:
        pairs = zip(originals.split(64), y.split(64), strict=True)
        distances = [perceptual(a.to(accelerator.device), b.to(accelerator.device)) for a, b in pairs]
        figures[f"val/{Path(args.perceptual).name}"] = torch.cat(distances).mean().item()
    picture = labelled_rows({"original": originals[:12], f"{args.stage}, step {step}": y[:12]})
    with atomic_file(args.output_dir / "validation" / f"{args.stage}-{step:07d}.png") as path:
        picture.save(path, format="PNG")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(picture), step, dataformats="HWC")
    return figures


def save(args, pipeline, ema, figures, step) -> None:
    ema.copy_to(pipeline.autoencoder.parameters())
    with atomic_folder(args.output_dir) as folder:
        pipeline.save_pretrained(folder)
        record = {"stage": args.stage, "steps": step, **figures}
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    logger.info(f"written to {args.output_dir}")


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # An encoder frozen on the way leaves parameters that DDP would wait for.
    freezes = args.stage == "pretrain" and args.freeze_encoder_steps < args.max_train_steps
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=freezes)],
    )
    set_seed(args.seed)

    pipeline = build_pipeline(args)
    model = pipeline.autoencoder.requires_grad_(True).train().to(accelerator.device)
    if args.stage == "posttrain":
        model.encoder.requires_grad_(False)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    perceptual = load_perceptual_network(args.perceptual, args.perceptual_weights)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    weights = LossWeights(args.perceptual_weight, args.entropy_weight, args.commit_weight, args.kl_weight)
    images, originals = build_data(args, args.resolution or model.config.sample_size)

    optimizer = build_optimizer(args, model)
    lr_scheduler = build_lr_scheduler(args, optimizer)
    ema = EMA(model.parameters(), args.ema_decay, args.ema_update_every)
    norms = NormRescaler(model.block_weights())
    progress = Progress()
    if args.compile:
        model.compile_repeated_blocks()
    trained, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, ema, norms, progress)
    if args.resume_from_checkpoint:
        path = load_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
        logger.info(f"continuing from {path}" if path else "no checkpoint yet: starting at step 0")
    accelerator.init_trackers(args.stage)

    accumulation, last = args.gradient_accumulation_steps, args.max_train_steps
    per_step = args.train_batch_size * accumulation * accelerator.num_processes
    visits = range(progress.step * per_step, last * per_step)
    workers = args.dataloader_num_workers
    loader = accelerator.prepare(DataLoader(images, args.train_batch_size, sampler=visits, num_workers=workers))
    size = model.num_parameters() / 1e6
    logger.info(f"{args.stage}: {len(images)} images, {len(originals)} held out, {size:.1f} M parameters")

    bar = tqdm(total=last, initial=progress.step, desc=args.stage, disable=not accelerator.is_main_process)
    started, seen = time.perf_counter(), 0
    for micro_step, x in enumerate(loader, start=progress.step * accumulation):
        if progress.step >= args.freeze_encoder_steps and args.stage == "pretrain":
            model.encoder.requires_grad_(False)
        generator = step_generator(args.seed, micro_step, accelerator.process_index, accelerator.device)
        losses = train_step(args, accelerator, trained, optimizer, x, perceptual, weights, generator)
        seen += len(x) * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        if args.norm_rescaling:
            norms.step()
        ema.update(model.parameters(), progress.step)
        progress.step += 1
        bar.update()

        if progress.step % args.logging_steps == 0:
            rate = seen / (time.perf_counter() - started)
            started, seen = time.perf_counter(), 0
            log_step(accelerator, bar, losses, lr_scheduler.get_last_lr()[0], rate, progress.step)
        if progress.step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, progress.step, args.checkpoints_total_limit)
        if args.validation_steps and progress.step % args.validation_steps == 0 and progress.step < last:
            paused = time.perf_counter()
            validate(args, accelerator, pipeline, ema, originals, perceptual, progress.step)
            started += time.perf_counter() - paused
    bar.close()

    figures = validate(args, accelerator, pipeline, ema, originals, perceptual, progress.step)
    if accelerator.is_main_process:
        save(args, pipeline, ema, {"images": len(originals), **figures}, progress.step)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
