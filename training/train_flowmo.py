#!/usr/bin/env python
"""
Trains a FlowMo tokenizer: stage 1A (`--stage pretrain`), stage 1B (`--stage posttrain`), and stage 1C (`--stage
distill`), after which it reconstructs in a few steps.

    accelerate launch training/train_flowmo.py --config training/configs/cpu.yaml --stage pretrain \
        --train_data_dir my_images --output_dir my_tokenizer

The output folder is what `FlowMoPipeline.from_pretrained` loads.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.data.image_task import ImageTask
from flowmo_diffusers.data.loading import ShuffledImages, StreamedImages
from flowmo_diffusers.data.options import (
    DATA_LIMITS,
    FREE_DATA_OPTIONS,
    add_training_data_options,
    build_training_images,
    data_rules,
    reader_facts,
)
from flowmo_diffusers.data.samples import SampleCache
from flowmo_diffusers.engine.adapters import Adapter, adapter_rules, add_adapter_options
from flowmo_diffusers.engine.digests import config_entries, json_digest, module_digest
from flowmo_diffusers.engine.launch import launched_with
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.engine.step import Losses
from flowmo_diffusers.engine.training import Trainer, make_ready, start, starting_point
from flowmo_diffusers.engine.training_options import (
    add_optimisation_options,
    add_publishing_options,
    add_run_options,
    add_validation_options,
    check_options,
    course,
    read_config,
)
from flowmo_diffusers.hub.cards import TrainingRun, write_model_card
from flowmo_diffusers.hub.upload import check_push, push_folder
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.validation import Validation
from flowmo_diffusers.objectives.cost import distillation_flops, posttraining_flops, pretraining_flops
from flowmo_diffusers.objectives.distill import DistillationWeights, distillation_loss
from flowmo_diffusers.objectives.flow import NOISE_LEVELS, FlowDraws
from flowmo_diffusers.objectives.joint import JointCodeDistribution
from flowmo_diffusers.objectives.perceptual import PerceptualDistance, load_perceptual_network
from flowmo_diffusers.objectives.posttrain import ChainDraws, posttraining_loss
from flowmo_diffusers.objectives.pretrain import LossWeights, pretraining_loss


# Where the stages differ: the paper's values of the first two.
STAGES = {
    "pretrain": {"learning_rate": 1e-4, "train_batch_size": 128, "perceptual": "lpips-vgg", "perceptual_weight": 0.1},
    "posttrain": {"learning_rate": 5e-5, "train_batch_size": 64, "perceptual": "resnet50", "perceptual_weight": 0.01},
    "distill": {"learning_rate": 5e-5, "train_batch_size": 64, "perceptual": "lpips-vgg", "perceptual_weight": 0.1},
}

# Beside those of every training script, what may change when a run is resumed.
FREE_OPTIONS = FREE_DATA_OPTIONS | {
    *("pretrained_model_name_or_path", "model_config"),
    *("perceptual_weights", "guard_weights", "num_inference_steps", "teacher_cache"),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=list(STAGES), default="pretrain")
    add("--output_dir", type=Path, required=True, help="where the trained pipeline is written")

    model = parser.add_argument_group("model").add_argument
    model("--pretrained_model_name_or_path", help="pipeline to start from; required for posttrain and distill")
    model("--model_config", help="JSON file or text with FlowMoAutoencoder's fields, to start anew; default FlowMo-Lo")

    add_training_data_options(parser.add_argument_group("data"))

    optim = parser.add_argument_group("optimisation")
    add = optim.add_argument
    add("--train_batch_size", type=int, help="images per process and step; default 128, 64 after pretrain")
    add("--learning_rate", type=float, help="default 1e-4, 5e-5 after pretrain")
    add("--norm_rescaling", action=argparse.BooleanOptionalAction, default=True, help="hold the blocks' weight norms")
    add("--freeze_encoder_steps", type=int, default=200_000, help="pretrain: freeze the encoder after these steps")
    add_optimisation_options(optim)
    parser.set_defaults(gradient_checkpointing=None)  # on after pretrain

    add_loss_options(parser.add_argument_group("loss"))
    add_distillation_options(parser.add_argument_group("distillation"))
    add_adapter_options(parser.add_argument_group("adapter"))

    watch = parser.add_argument_group("validation")
    add_validation_options(watch)
    watch.add_argument("--num_inference_steps", type=int, help="of validation; default: the scheduler's, 25")
    watch.add_argument(
        "--guard",
        help="what decides which weights are best: 'psnr', or a perceptual network that is not optimised; 'none' "
        "keeps the last. Default: none for pretrain; lpips-alex after it, or psnr where that is optimised",
    )
    watch.add_argument("--guard_weights", type=Path, help="local file with the guard's weights")

    add_run_options(parser.add_argument_group("run"))
    add_publishing_options(parser.add_argument_group("publishing"))

    args = parse_with_config(parser, argv, section="stage")
    for name, value in STAGES[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.stage != "pretrain"
    if args.guard is None:
        not_optimised = "psnr" if args.perceptual == "lpips-alex" else "lpips-alex"
        args.guard = not_optimised if args.stage != "pretrain" else "none"
    args.hub_model_id = args.hub_model_id or args.output_dir.name
    check_args(parser, args)
    return args


def add_loss_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--perceptual", help="lpips-vgg, lpips-alex, resnet50, none, or a transformers classifier")
    add("--perceptual_weights", type=Path, help="local file with the perceptual network's weights")
    add("--perceptual_weight", type=float, help="default 0.1, posttrain 0.01")
    add("--entropy_weight", type=float, default=LossWeights.entropy)
    add("--global_entropy", action="store_true", help="LFQ's batch entropy over processes and accumulation")
    add("--commit_weight", type=float, default=LossWeights.commit)
    add("--kl_weight", type=float, default=LossWeights.kl)
    add("--code_dropout", type=float, default=0.1, help="share of images whose codes are dropped, for guidance")
    add("--noise_levels", choices=NOISE_LEVELS, default="thick-tailed", help="of the flow loss; 'one' is regression")
    add("--chain_steps", type=int, default=8, help="posttrain: Euler steps of the sampling chain")


def add_distillation_options(group: argparse._ArgumentGroup) -> None:
    """Of stage 1C, beside --perceptual_weight."""
    add, weights = group.add_argument, DistillationWeights
    add("--student_steps", type=int, nargs="+", default=[1, 2, 4], help="one of these in each training step; the "
        "largest becomes the default of the pipeline")  # fmt: skip
    add("--student_rho", type=float, help="power of the student's grid; default: the teacher's")
    add("--teacher_num_inference_steps", type=int, help="default: those of the pipeline to start from")
    add("--teacher_cache", type=Path, help="folder that keeps the teacher's sample of each image, from one noise each")
    add("--teacher_guidance_scale", type=float, help="default: that of the pipeline to start from")
    add("--sample_weight", type=float, default=weights.sample, help="of the squared distance to the teacher's")
    add("--image_weight", type=float, default=weights.image, help="of the perceptual distance to the image")
    add("--flow_weight", type=float, default=weights.flow, help="of the flow loss")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before data or model are loaded."""
    limits = {
        "at least 1": (
            *("chain_steps", "num_inference_steps", "teacher_num_inference_steps", *DATA_LIMITS["at least 1"]),
        ),
        "at least 0": (
            *("perceptual_weight", "entropy_weight", "commit_weight", "kl_weight", "freeze_encoder_steps"),
            *("sample_weight", "image_weight", "flow_weight"),
        ),
        "positive": ("student_rho",),
        "at least 0 and less than 1": ("code_dropout", *DATA_LIMITS["at least 0 and less than 1"]),
    }
    posttrain, pretrain = args.stage == "posttrain", args.stage == "pretrain"
    networks = ("none", "psnr")
    rules = (
        (not pretrain and args.pretrained_model_name_or_path is None,
         f"--stage {args.stage} starts from a trained pipeline: give --pretrained_model_name_or_path"),
        (posttrain and args.perceptual == "none",
         "--stage posttrain needs a perceptual network: --perceptual none leaves nothing to seek modes by"),
        (args.pretrained_model_name_or_path and args.model_config,
         "give --model_config or --pretrained_model_name_or_path, not both: the pipeline has its own"),
        *data_rules(args),
        (Path(args.guard).name == Path(args.perceptual).name and args.guard not in networks,
         f"--guard {args.guard} is what --perceptual optimises: it cannot tell whether that is being hacked"),
        (args.guard_weights and args.guard in networks, f"--guard_weights: --guard {args.guard} has no weights"),
        (args.teacher_cache and args.stage != "distill", "--teacher_cache belongs to --stage distill"),
        (args.teacher_cache and (args.streaming or args.random_flip or not args.center_crop),
         "--teacher_cache keeps one sample an image: give --center_crop and --no-random_flip, and no --streaming"),
        (min(args.student_steps) < 1, f"--student_steps {args.student_steps} must all be at least 1"),
        (args.perceptual_weights and args.perceptual == "none", "--perceptual_weights: --perceptual none has none"),
        (launched_with("deepspeed") and pretrain and 0 < args.freeze_encoder_steps < args.max_train_steps,
         "--freeze_encoder_steps: DeepSpeed cannot freeze the encoder on the way. Train for so many steps, then go on "
         "from that folder with --freeze_encoder_steps 0"),
        *adapter_rules(args),
    )  # fmt: skip
    check_options(parser, args, limits, rules)


def read_model_config(args: argparse.Namespace) -> dict:
    """The model's fields, without its weights."""
    if args.pretrained_model_name_or_path:
        path = args.pretrained_model_name_or_path
        config = FlowMoAutoencoder.load_config(path, subfolder="autoencoder")
    else:
        config = read_config(args.model_config)
    with torch.device("meta"):
        model = FlowMoAutoencoder.from_config(config)
    if (args.resolution or 0) % model.config.patch_size:
        raise ValueError(f"--resolution {args.resolution} must be a multiple of patch_size={model.config.patch_size}")
    if args.global_entropy and model.config.quantizer != "lfq":
        raise ValueError(f"--global_entropy: quantizer={model.config.quantizer!r} has no entropy term, 'lfq' has")
    if args.teacher_cache and model.config.quantizer == "kl":
        raise ValueError("--teacher_cache: quantizer='kl' draws other codes at each visit, the others do not")
    return config_entries(model)


def run_config(args: argparse.Namespace, model_config: dict, num_processes: int) -> dict:
    """What decides the course of the run."""
    facts = {f"model.{name}": value for name, value in model_config.items()}
    facts["teacher_cached"] = args.teacher_cache is not None  # where noise is an image's, not a visit's
    return course(args, num_processes, FREE_OPTIONS, facts | reader_facts(args, num_processes))


def build_pipeline(args: argparse.Namespace, model_config: dict) -> FlowMoPipeline:
    if args.pretrained_model_name_or_path:
        return FlowMoPipeline.from_pretrained(args.pretrained_model_name_or_path)
    return FlowMoPipeline(FlowMoAutoencoder.from_config(model_config), FlowMoScheduler())


def build_networks(args: argparse.Namespace, device: torch.device) -> dict[str, torch.nn.Module]:
    """The perceptual network that is optimised, and the one that is not, by the last part of their names."""
    named = {args.perceptual: args.perceptual_weights, args.guard: args.guard_weights}
    return {
        Path(name).name: load_perceptual_network(name, weights).to(device)
        for name, weights in named.items()
        if name not in ("none", "psnr")
    }


def build_teacher(args: argparse.Namespace, pipeline: FlowMoPipeline, device: torch.device) -> FlowMoPipeline:
    """The pipeline as it is before training, with a sampler as the options ask for."""
    changes = {"num_inference_steps": args.teacher_num_inference_steps, "guidance_scale": args.teacher_guidance_scale}
    given = {name: value for name, value in changes.items() if value is not None}
    scheduler = FlowMoScheduler.from_config(pipeline.scheduler.config, **given)
    model = copy.deepcopy(pipeline.autoencoder).requires_grad_(False).eval().to(device)
    if args.compile:
        model.compile_repeated_blocks()
    teacher = FlowMoPipeline(model, scheduler)
    teacher.set_progress_bar_config(disable=True)
    return teacher


def build_cache(
    args: argparse.Namespace, teacher: FlowMoPipeline, images: ShuffledImages, resolution: int, precision: str
) -> SampleCache:
    """Of a sample for each training image."""
    model = teacher.autoencoder
    identity = {
        "images": images.source.fingerprint(),
        "teacher": json_digest([config_entries(model), module_digest(model)]),
        "sampler": config_entries(teacher.scheduler),
        "precision": precision,
        "seed": args.seed,
    }
    return SampleCache(args.teacher_cache, (len(images), model.config.in_channels, resolution, resolution), identity)


def student_scheduler(args: argparse.Namespace, teacher: FlowMoScheduler) -> FlowMoScheduler:
    """Few steps without guidance, which the student has learnt from its teacher."""
    rho = args.student_rho or teacher.config.rho
    recipe = {"num_inference_steps": max(args.student_steps), "guidance_scale": 1.0, "rho": rho, "solver": "euler"}
    return FlowMoScheduler.from_config(teacher.config, **recipe)


class TokenizerTraining(ImageTask):
    """
    Any stage of a tokenizer.

    Args:
        images: To train on.
        originals: Held-out images (n, 3, h, w) in [-1, 1].
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: FlowMoPipeline,
        images: ShuffledImages | StreamedImages,
        originals: torch.Tensor,
    ):
        super().__init__(args.stage, pipeline.autoencoder, args, accelerator, images, originals)
        self.pipeline = pipeline
        self.adapter = Adapter.of(args)
        pipeline.set_progress_bar_config(disable=True)
        networks = build_networks(args, accelerator.device)
        self.perceptual: PerceptualDistance | None = networks.get(Path(args.perceptual).name)
        self.weights = LossWeights(args.perceptual_weight, args.entropy_weight, args.commit_weight, args.kl_weight)
        self.validation = Validation(
            accelerator, originals, networks, args.num_inference_steps, args.train_batch_size, args.seed
        )
        self.joint: JointCodeDistribution | None = None
        self.teacher = build_teacher(args, pipeline, accelerator.device) if args.stage == "distill" else None
        if self.teacher is not None:
            pipeline.scheduler = student_scheduler(args, pipeline.scheduler)
        self.teacher_forwards = 0  # of the last batch
        self.cache: SampleCache | None = None
        if args.teacher_cache is not None:
            with accelerator.local_main_process_first():
                self.cache = build_cache(args, self.teacher, images, originals.shape[-1], accelerator.mixed_precision)
        self.student_steps = max(args.student_steps)

    def prepared(self, trained: torch.nn.Module) -> None:
        super().prepared(trained)
        if self.accelerator.is_fsdp2:
            register_fsdp_forward_method(self.model, "encode")
        norms = NormRescaler(self.model.block_weights())
        self.norm_rescaler = norms if self.args.norm_rescaling else None
        self.states["norms"] = norms
        if self.args.global_entropy:
            self.joint = JointCodeDistribution(self.model, partial(self.accelerator.reduce, reduction="mean"))

    def before_step(self, step: int) -> None:
        args = self.args
        if args.stage != "pretrain" or step >= args.freeze_encoder_steps:
            self.model.encoder.requires_grad_(False)
        generator = keyed_generator(args.seed, "student steps", step)  # the same for all processes
        self.student_steps = args.student_steps[torch.randint(len(args.student_steps), (), generator=generator)]

    def before_group(self, batches: Sequence[dict]) -> None:
        super().before_group(batches)
        if self.joint is not None and len(batches) > 1:
            with self.accelerator.autocast():
                self.joint.observe(self._encode, [batch["images"] for batch in batches])

    def _encode(self, images: torch.Tensor) -> None:
        self.trained(images=images.to(self.accelerator.device))

    def losses(self, batch: dict) -> Losses:
        args, device = self.args, self.accelerator.device
        x = batch["images"].to(device, non_blocking=True)
        generators = [keyed_generator(args.seed, args.stage, visit, device) for visit in batch["visits"].tolist()]
        draws = FlowDraws.sample(x, generators, args.code_dropout, args.noise_levels)
        if args.stage == "pretrain":
            return pretraining_loss(self.trained, x, draws, self.perceptual, self.weights, generators)
        if args.stage == "posttrain":
            chain = ChainDraws.sample(x, generators, args.chain_steps)
            return posttraining_loss(self.trained, x, draws, chain, self.perceptual, self.weights, generators)
        return self._distillation_losses(batch, x, draws, generators)

    def _distillation_losses(
        self, batch: dict, x: torch.Tensor, draws: FlowDraws, generators: list[torch.Generator]
    ) -> Losses:
        args, scheduler = self.args, self.pipeline.scheduler
        with torch.no_grad():
            codes = self.trained(images=x, generator=generators).codes
        z, target = self._teach(batch, codes, generators)
        scheduler.set_timesteps(self.student_steps)
        chain = ChainDraws(z, scheduler.times.to(x.device).expand(len(x), -1))
        weights = DistillationWeights(args.sample_weight, args.perceptual_weight, args.image_weight, args.flow_weight)
        return distillation_loss(self.trained, x, codes, target, draws, chain, self.perceptual, weights)

    def _teach(
        self, batch: dict, codes: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise, and the teacher's samples from it."""
        shape, device = batch["images"].shape, codes.device
        numbers = None
        if self.cache is not None and not batch["bad"]:  # in whose place others are shown
            numbers = [self.images.number(visit) for visit in batch["visits"].tolist()]
            generators = [keyed_generator(self.args.seed, "teacher", number, device) for number in numbers]
        z = randn_tensor(shape, generators, device)
        target = None if numbers is None else self.cache.read(numbers)
        self.teacher_forwards = 0
        if target is None:
            self.teacher_forwards = self.teacher.num_forwards()
            target = self.teacher.decode(codes, *shape[-2:], latents=z, output_type="latent")
            if numbers is not None:
                target = self.cache.write(numbers, target)
        return z, target.to(device)

    def flops_per_image(self, step: int) -> float:
        args, config, side = self.args, self.model.config, self.validation.originals.shape[-1]
        if args.stage == "posttrain":
            return posttraining_flops(config, side, side, args.chain_steps)
        if args.stage == "distill":
            steps = (self.student_steps, self.teacher_forwards)
            return distillation_flops(config, side, side, *steps, flow=args.flow_weight > 0)
        return pretraining_flops(config, side, side, encoder_trained=step < args.freeze_encoder_steps)

    def validate(self, step: int) -> tuple[dict[str, float], PIL.Image.Image]:
        reconstructions, figures = self.validation(self.pipeline)
        originals = self.validation.originals
        rows = {"original": originals[:12], f"{self.name}, step {step}": reconstructions[:12]}
        return figures, labelled_rows(rows)

    def guarded(self, figures: Mapping[str, float]) -> float:
        guard = self.args.guard
        return -figures["psnr"] if guard == "psnr" else figures[Path(guard).name]

    def save(self, model: FlowMoAutoencoder, folder: Path) -> None:
        FlowMoPipeline(model, self.pipeline.scheduler).save_pretrained(folder)

    def publish(self, facts: dict[str, Any], pictures: list[Path]) -> None:
        args = self.args
        run = TrainingRun(
            dataset=args.dataset_name or Path(args.train_data_dir),
            base_model=args.pretrained_model_name_or_path,
            resolution=self.validation.originals.shape[-1],
            num_inference_steps=args.num_inference_steps or self.pipeline.scheduler.config.num_inference_steps,
            **facts,
        )
        repo_id = args.hub_model_id if args.push_to_hub else None
        write_model_card(args.output_dir, self.pipeline, run, pictures, repo_id, args.license)
        if args.push_to_hub:
            push_folder(args.output_dir, args.hub_model_id, private=args.hub_private_repo, token=args.hub_token)


def main(args: argparse.Namespace) -> None:
    model_config = read_model_config(args)
    # An encoder frozen on the way leaves parameters that DDP would wait for.
    freezes = args.stage == "pretrain" and 0 < args.freeze_encoder_steps < args.max_train_steps
    accelerator = start(args, find_unused_parameters=freezes)
    config = run_config(args, model_config, accelerator.num_processes)
    checkpoint = starting_point(args, config)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = check_push(args.hub_model_id, args.hub_private_repo, args.hub_token)
    make_ready(args, accelerator)

    pipeline = build_pipeline(args, model_config)
    with accelerator.local_main_process_first():  # the others find caches and indices made
        images, originals = build_training_images(args, args.resolution or model_config["sample_size"])
    task = TokenizerTraining(args, accelerator, pipeline, images, originals)
    Trainer(task, args, accelerator, config).run(checkpoint)


if __name__ == "__main__":
    main(parse_args())
