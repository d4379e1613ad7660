#!/usr/bin/env python
"""
Trains a class-conditional generator on the tokens that `tokenize_images.py` has written.

    accelerate launch training/train_generator.py --config training/configs/generator/base.yaml \
        --train_tokens_dir my_tokens --tokenizer my_tokenizer --output_dir my_generator

The output folder is what `FlowMoGenerationPipeline.from_pretrained` loads.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator

from flowmo_diffusers import (
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoTokenGenerator,
    FlowMoTokenScheduler,
)
from flowmo_diffusers.data.images import hold_out
from flowmo_diffusers.data.loading import image_batches
from flowmo_diffusers.data.tokens import (
    ShuffledTokens,
    TokenSet,
    check_tokenizer,
    load_tokens,
    read_descriptions,
    tokenizer_identity,
)
from flowmo_diffusers.engine.adapters import Adapter, adapter_rules, add_adapter_options
from flowmo_diffusers.engine.digests import config_entries
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.engine.step import Losses
from flowmo_diffusers.engine.training import Task, Trainer, make_ready, start, starting_point
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
from flowmo_diffusers.metrics.class_samples import class_samples
from flowmo_diffusers.metrics.token_validation import TokenValidation
from flowmo_diffusers.objectives.cost import generator_training_flops
from flowmo_diffusers.objectives.tokens import TokenDraws, token_loss
from flowmo_diffusers.schedulers.scheduling_flowmo_tokens import MASK_SCHEDULES


# What may change when a run is resumed, beside what may in every script.
FREE_OPTIONS = (
    *("train_tokens_dir", "cache_dir", "tokenizer", "pretrained_model_name_or_path", "model_config"),
    *("num_inference_steps", "guidance_scale", "decoder_num_inference_steps"),
)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the trained pipeline is written")

    model = parser.add_argument_group("model").add_argument
    model("--tokenizer", required=True, help="FlowMo pipeline whose tokens these are, a folder or Hub id")
    model("--pretrained_model_name_or_path", help="generation pipeline to start from")
    model(
        "--model_config",
        help="JSON file or text with FlowMoTokenGenerator's fields, to start anew; the form of the tokens and the "
        "classes are those of --train_tokens_dir",
    )

    data = parser.add_argument_group("data").add_argument
    data("--train_tokens_dir", type=Path, required=True, help="folder that tokenize_images.py has written")
    data("--split", default="train")
    data("--cache_dir")
    data("--validation_split", help="default: 'validation' or 'test' if there is one, else images of the split itself")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--train_batch_size", type=int, default=128, help="images per process and step")
    optim.add_argument("--learning_rate", type=float, default=1e-4)
    optim.add_argument("--adam_weight_decay", type=float, default=0.045, help="of the matrices of linear layers")
    add_optimisation_options(optim)
    parser.set_defaults(
        adam_beta2=0.96, lr_scheduler="cosine", lr_warmup_steps=1000, ema_update_every=1, max_grad_norm=1.0
    )

    loss = parser.add_argument_group("loss").add_argument
    loss("--label_smoothing", type=float, default=0.1)
    loss("--class_dropout", type=float, default=0.1, help="share of images whose class is dropped, for guidance")
    loss("--mask_schedule", choices=MASK_SCHEDULES, default="arccos", help="of training, and then of sampling")

    add_adapter_options(parser.add_argument_group("adapter"))

    watch = parser.add_argument_group("validation")
    add_validation_options(watch)
    watch.add_argument(
        "--guard", choices=["none", "token_loss"], default="none", help="decides which weights are best"
    )
    watch.add_argument("--num_inference_steps", type=int, help="of the picture; default: the pipeline's")
    watch.add_argument("--guidance_scale", type=float, default=2.0, help="of the picture")
    watch.add_argument(
        "--decoder_num_inference_steps", type=int, help="of the picture; default: those of the tokenizer's scheduler"
    )

    add_run_options(parser.add_argument_group("run"))
    add_publishing_options(parser.add_argument_group("publishing"))

    args = parse_with_config(parser, argv)
    args.hub_model_id = args.hub_model_id or args.output_dir.name
    limits = {
        "at least 1": ("num_inference_steps", "decoder_num_inference_steps"),
        "at least 0": ("adam_weight_decay",),
        "at least 0 and less than 1": ("label_smoothing", "class_dropout"),
    }
    both = args.pretrained_model_name_or_path and args.model_config
    rules = [(both, "give --model_config or --pretrained_model_name_or_path, not both: the pipeline has its own")]
    check_options(parser, args, limits, [*rules, *adapter_rules(args)])
    return args


def build_pipeline(
    args: argparse.Namespace, tokens: TokenSet, model_config: dict[str, Any]
) -> FlowMoGenerationPipeline:
    """
    A generator for these tokens and the tokenizer they are of.

    Raises:
        ValueError: If they are of another tokenizer.
        OSError: If there is no such pipeline.
    """
    tokenizer = FlowMoPipeline.from_pretrained(args.tokenizer)
    check_tokenizer(tokens.identity, tokenizer_identity(tokenizer.autoencoder))
    if args.pretrained_model_name_or_path:
        return FlowMoGenerationPipeline.from_pretrained(args.pretrained_model_name_or_path, **tokenizer.components)
    generator = FlowMoTokenGenerator.from_config(model_config)
    scheduler = FlowMoTokenScheduler(mask_schedule=args.mask_schedule)
    return FlowMoGenerationPipeline(generator, scheduler, **tokenizer.components)


def read_model_config(args: argparse.Namespace, tokens: TokenSet) -> dict[str, Any]:
    """
    The generator's fields, without its weights: some are given, the tokens determine the others.

    Raises:
        ValueError: If a field is wrong, or the generator to start from is for other tokens or classes, or its order
            does not go with the options.
    """
    identity, names = tokens.identity, tokens.class_names
    determined = {
        **{name: identity[name] for name in ("num_tokens", "token_groups", "group_bits")},
        "num_classes": tokens.num_classes,
        "id2label": None if names is None else dict(enumerate(names)),
        "tokenizer": identity["digest"],
    }
    path = args.pretrained_model_name_or_path
    given = FlowMoTokenGenerator.load_config(path, subfolder="generator") if path else read_config(args.model_config)
    for name in determined.keys() & given.keys() - {"id2label"}:
        if given[name] != determined[name]:
            source = "--pretrained_model_name_or_path" if path else "--model_config"
            raise ValueError(
                f"{source} has a generator of {name}={given[name]!r}; --train_tokens_dir has {determined[name]!r}"
            )
    with torch.device("meta"):
        config = config_entries(FlowMoTokenGenerator.from_config({**determined, **given}))
    steps = args.num_inference_steps
    if config["order"] == "autoregressive" and steps not in (None, config["num_tokens"]):
        raise ValueError(
            f"--num_inference_steps {steps}: an autoregressive generator has as many steps as there are tokens, "
            f"{config['num_tokens']}"
        )
    return config


class GeneratorTask(Task):
    """A token generator on stored tokens; held-out ones measure it, and its samples are the picture."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipeline: FlowMoGenerationPipeline,
        train: TokenSet,
        held_out: TokenSet,
    ):
        super().__init__("generator", pipeline.generator, len(train), len(held_out))
        self.args = args
        self.accelerator = accelerator
        self.pipeline = pipeline
        self.tokens = train
        self.adapter = Adapter.of(args)
        self.weight_decay = args.adam_weight_decay
        self.validation = TokenValidation(
            accelerator,
            held_out.indices(range(len(held_out))),
            self._classes_of(held_out.labels),
            batch_size=args.train_batch_size,
            seed=args.seed,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.autoencoder.requires_grad_(False).eval().to(accelerator.device)

    def _classes_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels with the null class where an image has none."""
        return torch.where(labels < 0, self.pipeline.generator.null_class, labels)

    def batches(self, first: int, last: int) -> Iterable[dict]:
        accelerator, args = self.accelerator, self.args
        return image_batches(
            ShuffledTokens(self.tokens, args.seed),
            args.train_batch_size,
            first,
            last,
            accelerator.process_index,
            accelerator.num_processes,
            args.dataloader_num_workers,
        )

    def losses(self, batch: dict) -> Losses:
        args, device = self.args, self.accelerator.device
        indices = self.tokens.to_indices(batch["packed"].to(device, non_blocking=True))
        labels = self._classes_of(batch["labels"].to(device, non_blocking=True))
        generators = [keyed_generator(args.seed, self.name, visit, device) for visit in batch["visits"].tolist()]
        null = self.pipeline.generator.null_class
        draws = TokenDraws.sample(indices, labels, null, generators, args.mask_schedule, args.class_dropout)
        return token_loss(self.trained, indices, draws, self.pipeline.generator.config.order, args.label_smoothing)

    def flops_per_image(self, step: int) -> float:
        return generator_training_flops(self.pipeline.generator.config)

    def validate(self, step: int) -> tuple[dict[str, float], PIL.Image.Image]:
        figures = self.validation(self.pipeline.generator)
        names = ("num_inference_steps", "guidance_scale", "decoder_num_inference_steps")
        sampling = {name: getattr(self.args, name) for name in names}
        with self.accelerator.autocast():
            return figures, class_samples(self.pipeline, seed=self.args.seed, **sampling)

    def guarded(self, figures: Mapping[str, float]) -> float:
        return figures["token_loss"]

    def save(self, model: FlowMoTokenGenerator, folder: Path) -> None:
        parts = {name: part for name, part in self.pipeline.components.items() if name != "generator"}
        FlowMoGenerationPipeline(model, **parts).save_pretrained(folder)

    def publish(self, facts: dict[str, Any], pictures: list[Path]) -> None:
        args = self.args
        run = TrainingRun(
            dataset=args.train_tokens_dir,
            base_model=args.pretrained_model_name_or_path,
            tokenizer=args.tokenizer,
            resolution=self.pipeline.autoencoder.config.sample_size,
            **facts,
        )
        repo_id = args.hub_model_id if args.push_to_hub else None
        write_model_card(args.output_dir, self.pipeline, run, pictures, repo_id, args.license)
        if args.push_to_hub:
            push_folder(args.output_dir, args.hub_model_id, private=args.hub_private_repo, token=args.hub_token)


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    folder = args.train_tokens_dir
    with accelerator.local_main_process_first():  # the others find the cache made
        found = {split: load_tokens(folder, split, args.cache_dir) for split in read_descriptions(folder)}
    train, held_out = hold_out(found, args.split, args.validation_split, args.num_validation_images)
    model_config = read_model_config(args, train)
    facts = {f"model.{name}": value for name, value in model_config.items()} | {"tokens": train.checksum}
    config = course(args, accelerator.num_processes, FREE_OPTIONS, facts)
    checkpoint = starting_point(args, config)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = check_push(args.hub_model_id, args.hub_private_repo, args.hub_token)
    make_ready(args, accelerator)
    pipeline = build_pipeline(args, train, model_config)
    Trainer(GeneratorTask(args, accelerator, pipeline, train, held_out), args, accelerator, config).run(checkpoint)


if __name__ == "__main__":
    main(parse_args())
