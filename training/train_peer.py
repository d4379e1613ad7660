#!/usr/bin/env python
"""
Trains a peer of FlowMo on the same engine: diffusers' `VQModel`, or a 1D tokenizer in the manner of TiTok
(titok-pytorch), by what their packages have of losses: squared error and that of the codebook, with or without LPIPS.
There is no adversarial loss.

    accelerate launch training/train_peer.py --config training/configs/study/peers/vq_lo.yaml \
        --train_data_dir my_images --output_dir my_peer

The output folder is what `VQModel.from_pretrained` or `TiTokModel.from_pretrained` loads, and
`evaluate_reconstruction.py --baseline`.
"""

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from diffusers import ModelMixin, VQModel

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
from flowmo_diffusers.engine.digests import config_entries
from flowmo_diffusers.engine.options import parse_with_config
from flowmo_diffusers.engine.step import Losses
from flowmo_diffusers.engine.training import Trainer, make_ready, start, starting_point
from flowmo_diffusers.engine.training_options import (
    add_optimisation_options,
    add_run_options,
    add_validation_options,
    check_options,
    course,
    read_config,
)
from flowmo_diffusers.metrics.baselines import DiffusersReconstructor, TiTokReconstructor
from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.validation import PeerValidation
from flowmo_diffusers.models.titok import TiTokModel
from flowmo_diffusers.objectives.cost import peer_training_flops
from flowmo_diffusers.objectives.peer import peer_loss
from flowmo_diffusers.objectives.perceptual import PerceptualDistance, load_perceptual_network


MODELS: dict[str, type[ModelMixin]] = {"vqmodel": VQModel, "titok": TiTokModel}
RECONSTRUCTORS = {"vqmodel": DiffusersReconstructor, "titok": TiTokReconstructor}

MEASURED = "lpips-alex"  # at each validation, whatever is optimised

# Beside those of every training script, what may change when a run is resumed.
FREE_OPTIONS = FREE_DATA_OPTIONS | {"model_config", "perceptual_weights"}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="where the trained model is written")
    add("--architecture", choices=list(MODELS), default="vqmodel")
    add("--model_config", help="JSON file or text with the model's fields; default: its own")
    add_training_data_options(parser.add_argument_group("data"))

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--train_batch_size", type=int, default=32, help="images per process and step")
    optim.add_argument("--learning_rate", type=float, default=1e-3)
    add_optimisation_options(optim)

    loss = parser.add_argument_group("loss").add_argument
    loss("--perceptual", choices=["none", "lpips-alex", "lpips-vgg"], default="none")
    loss("--perceptual_weights", type=Path, help="local file with the perceptual network's weights")
    loss("--perceptual_weight", type=float, default=0.1)

    watch = parser.add_argument_group("validation")
    add_validation_options(watch)
    watch.add_argument("--guard", choices=["none", "psnr"], default="none", help="decides which weights are best")

    add_run_options(parser.add_argument_group("run"))
    args = parse_with_config(parser, argv)
    limits = {**DATA_LIMITS, "at least 0": ("perceptual_weight",)}
    rules = (
        *data_rules(args),
        (args.perceptual_weights and args.perceptual == "none", "--perceptual_weights: --perceptual none has none"),
        (args.gradient_checkpointing, "--gradient_checkpointing: a peer has none"),
        (args.compile, "--compile: a peer has no repeated blocks to be compiled"),
    )
    check_options(parser, args, limits, rules)
    return args


def read_model_config(args: argparse.Namespace) -> dict[str, Any]:
    """
    The model's fields, without its weights.

    Raises:
        ImportError: If the package of the model is not installed.
        ValueError: If a field is unknown, or the model is not for such images.
    """
    model_class = MODELS[args.architecture]
    given = {name: value for name, value in read_config(args.model_config).items() if name[0] != "_"}
    if unknown := sorted(given.keys() - inspect.signature(model_class).parameters.keys()):
        raise ValueError(f"--model_config: {model_class.__name__} has no fields {unknown}")
    with torch.device("meta"):
        config = config_entries(model_class(**given))
    if args.architecture == "vqmodel":
        check_vqmodel(config)
    return config


def check_vqmodel(config: Mapping[str, Any]) -> None:
    """What `VQModel` does not look at itself. Raises `ValueError`."""
    levels = len(config["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        if len(config[name]) != levels:
            raise ValueError(f"--model_config: {name} has {len(config[name])} entries, block_out_channels {levels}")
    if (config["in_channels"], config["out_channels"]) != (3, 3):
        raise ValueError("--model_config: in_channels and out_channels must be 3, those of images")
    if config["lookup_from_codebook"]:
        raise ValueError(
            "--model_config: lookup_from_codebook marks models of images in [0, 1]; here they are [-1, 1]"
        )


def image_side(args: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """Of the training images. Raises `ValueError` where the model does not take it."""
    side = args.resolution or config["sample_size"]
    if args.architecture == "titok" and side != config["sample_size"]:
        raise ValueError(f"--resolution {side}: the model takes its sample_size of {config['sample_size']} only")
    if args.architecture == "vqmodel" and side % (factor := 2 ** (len(config["block_out_channels"]) - 1)):
        raise ValueError(f"--resolution {side} must be a multiple of {factor}, by which the model divides it")
    return side


class PeerTraining(ImageTask):
    """The peer."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: ModelMixin,
        images: ShuffledImages | StreamedImages,
        originals: torch.Tensor,
        flops: int,
    ):
        super().__init__(args.architecture, model, args, accelerator, images, originals)
        files = {MEASURED: None, args.perceptual: args.perceptual_weights}
        networks = {
            name: load_perceptual_network(name, path).to(accelerator.device)
            for name, path in files.items()
            if name != "none"
        }
        for name, network in networks.items():
            if originals.shape[-1] < network.min_size:
                raise ValueError(
                    f"--resolution {originals.shape[-1]}: {name} needs at least {network.min_size} pixels"
                )
        self.perceptual: PerceptualDistance | None = networks.get(args.perceptual)
        self.validation = PeerValidation(accelerator, originals, networks, args.train_batch_size)
        self.flops = flops

    def losses(self, batch: dict) -> Losses:
        x = batch["images"].to(self.accelerator.device, non_blocking=True)
        return peer_loss(self.trained, x, self.perceptual, self.args.perceptual_weight)

    def flops_per_image(self, step: int) -> float:
        return self.flops

    def validate(self, step: int) -> tuple[dict[str, float], PIL.Image.Image]:
        reconstructions, figures = self.validation(RECONSTRUCTORS[self.args.architecture](self.model, self.name))
        rows = {"original": self.validation.originals[:12], f"{self.name}, step {step}": reconstructions[:12]}
        return figures, labelled_rows(rows)

    def guarded(self, figures: Mapping[str, float]) -> float:
        return -figures["psnr"]

    def save(self, model: ModelMixin, folder: Path) -> None:
        model.save_pretrained(folder)

    def publish(self, facts: dict[str, Any], pictures: list[Path]) -> None:
        """Nothing: the cards of this package are of FlowMo's pipelines."""


def main(args: argparse.Namespace) -> None:
    model_config = read_model_config(args)
    side = image_side(args, model_config)
    # Before there are other processes, with which a quantizer would talk.
    flops = peer_training_flops(MODELS[args.architecture], model_config, side, side)
    accelerator = start(args)
    facts = {f"model.{name}": value for name, value in model_config.items()}
    facts |= reader_facts(args, accelerator.num_processes)
    config = course(args, accelerator.num_processes, FREE_OPTIONS, facts)
    checkpoint = starting_point(args, config)
    make_ready(args, accelerator)

    model = MODELS[args.architecture](**model_config)
    with accelerator.local_main_process_first():  # the others find caches and indices made
        images, originals = build_training_images(args, side)
    task = PeerTraining(args, accelerator, model, images, originals, flops)
    Trainer(task, args, accelerator, config).run(checkpoint)


if __name__ == "__main__":
    main(parse_args())
