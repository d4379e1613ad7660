"""What is measured: this library's operations on random weights and images, as its pipelines and training do them."""

import gc
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from data_loading import photo
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from flowmo_diffusers import (
    FlowMoAutoencoder,
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoScheduler,
    FlowMoTokenGenerator,
    FlowMoTokenScheduler,
)
from flowmo_diffusers.data.images import load_images
from flowmo_diffusers.data.loading import ShuffledImages, image_batches
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.checkpoints import Progress
from flowmo_diffusers.engine.digests import config_entries
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.engine.step import TrainStep
from flowmo_diffusers.engine.training import Trainer, start
from flowmo_diffusers.engine.training_options import build_lr_scheduler, build_optimizer, read_config
from flowmo_diffusers.models.attention import attend
from flowmo_diffusers.models.flops import decoder_flops, encoder_flops, generator_flops
from flowmo_diffusers.models.quantizers import lfq_entropies
from flowmo_diffusers.objectives.cost import generator_training_flops, posttraining_flops, pretraining_flops
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.perceptual import load_perceptual_network
from flowmo_diffusers.objectives.posttrain import ChainDraws, chain_times, posttraining_loss
from flowmo_diffusers.objectives.pretrain import Perceptual, pretraining_loss
from flowmo_diffusers.objectives.tokens import TokenDraws, token_loss


TRAINING = Path(__file__).parents[1] / "training"
GUIDANCE_INTERVAL = (0.17, 1.02)
GENERATOR_STEPS, GENERATOR_GUIDANCE, NUM_CLASSES = 64, 2.0, 1000
NUM_PHOTOS = 64
COMPILE_MODES = {"full": "default", "graphs": "reduce-overhead"}


@dataclass
class Operation:
    """
    Args:
        run: What is timed.
        images: That one call works on.
        flops: Of one call, counted from the configuration; `None` where it is no matter of matrix products.
        precision: Of its weights and products, in words.
        held: The tensors that stay between calls.
        outputs: Values by name that the other code is to agree with, given the workload's inputs and draws; to be
            called before `run`.
        model: Whose weights the other code is to take over.
        device: Where its time and memory are spent; `None` for the workload's.
    """

    run: Callable[[], Any]
    images: int
    flops: float | None
    precision: str
    held: Callable[[], Iterable[torch.Tensor]] = tuple
    outputs: Callable[[], dict[str, torch.Tensor]] | None = None
    model: FlowMoAutoencoder | None = None
    device: torch.device | None = None


@dataclass
class Workload:
    """
    Inputs of every operation; the same whenever they are asked for.

    Args:
        config: A tokenizer's training preset: its model, and the options of its training.
        overrides: Fields of [`FlowMoAutoencoder`] over the preset's.
        image_size: Side of the images; default: the model's sample size.
        dtype: Of matrix products: in inference that of the weights (or of autocast, see `autocast`), in training that
            of autocast over float32 weights.
        autocast: Keep float32 weights under autocast in inference too, as the published code does.
        compile: "none", "regional" (the repeated blocks), "full" (each trunk as a whole) or "graphs" (each trunk, its
            kernels started together as a CUDA graph).
        activation_memory_budget: Of compiled training steps.
        perceptual: "none", "pooled" (the distance of 4 x 4 means, which costs next to nothing) or a name that training
            takes. Post-training takes "pooled" for "none": nothing else has a gradient through its chain.
    """

    config: Path
    device: torch.device
    dtype: torch.dtype = torch.float32
    overrides: str | dict | None = None
    generator_config: Path | None = None
    batch_size: int = 1
    image_size: int | None = None
    autocast: bool = False
    compile: str = "none"
    activation_memory_budget: float = 1.0
    attention_backend: str | None = None
    perceptual: str = "none"
    num_inference_steps: int = 25
    guidance_scale: float = 1.5
    chain_steps: int = 8
    lfq_bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = read_config(self.training_args("pretrain").model_config) | read_config(self.overrides)
        with torch.device("meta"):
            self.model_config = config_entries(FlowMoAutoencoder.from_config(given))
        self.image_size = self.image_size or self.model_config["sample_size"]
        if self.image_size < 1 or self.image_size % self.model_config["patch_size"]:
            raise ValueError(
                f"image_size={self.image_size} must be a positive multiple of patch_size="
                f"{self.model_config['patch_size']}"
            )

    @property
    def name_of_dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def inference_precision(self) -> str:
        if self.autocast and self.dtype != torch.float32:
            return self.training_precision
        return f"{self.name_of_dtype} weights"

    @property
    def training_precision(self) -> str:
        if self.dtype == torch.float32:
            return "float32 weights"
        return f"float32 weights, {self.name_of_dtype} autocast"

    def autocasting(self) -> torch.autocast:
        """Around inference: on where `autocast` asks for it."""
        enabled = self.autocast and self.dtype != torch.float32
        return torch.autocast(self.device.type, torch.bfloat16 if not enabled else self.dtype, enabled=enabled)

    def training_args(self, stage: str):
        """What `train_flowmo.py` makes of the preset, one batch a step on random images, without a network."""
        options = ["--config", str(self.config), "--stage", stage, "--output_dir", "unused"]
        options += ["--mixed_precision", "no" if self.dtype == torch.float32 else "bf16"]
        options += ["--train_batch_size", str(self.batch_size), "--gradient_accumulation_steps", "1"]
        options += ["--chain_steps", str(self.chain_steps), "--report_to", "none"]
        if stage == "posttrain":
            options += ["--pretrained_model_name_or_path", "unused"]
        args = load_script("train_flowmo").parse_args([*options, "--dataset_name", "emoji"])
        args.perceptual = args.guard = "none"
        args.compile = self.compile == "regional"
        args.activation_memory_budget = self.activation_memory_budget
        args.freeze_encoder_steps = args.max_train_steps + 1
        return args

    def autoencoder(self, dtype: torch.dtype) -> FlowMoAutoencoder:
        """Of random weights, with noise on each: at their initial values, gates of zero would hide every block."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self.seed)
            with self.device:
                model = FlowMoAutoencoder.from_config(self.model_config)
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        if self.attention_backend:
            model.set_attention_backend(self.attention_backend)
        if self.compile in COMPILE_MODES:
            model.encoder.compile(mode=COMPILE_MODES[self.compile])
            model.decoder.compile(mode=COMPILE_MODES[self.compile])
        return nn.Module.to(model, dtype).eval()  # ModelMixin's own warns of every cast

    def inference_model(self) -> FlowMoAutoencoder:
        model = self.autoencoder(torch.float32 if self.autocast else self.dtype).requires_grad_(False)
        if self.compile == "regional":
            model.compile_repeated_blocks()
        return model

    def generator(self, purpose: str) -> torch.Generator:
        return keyed_generator(self.seed, purpose, 0)

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        return randn_tensor(shape, self.generator(purpose)).to(self.device)

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator(purpose)).to(self.device)

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, self.model_config["in_channels"], self.image_size, self.image_size

    def images(self) -> torch.Tensor:
        """In [-1, 1], float32."""
        return 2 * self.uniform("images", *self.image_shape) - 1

    def noise(self) -> torch.Tensor:
        return self.normal("noise", *self.image_shape)

    def codes(self) -> torch.Tensor:
        """Random ones, of two values where they are discrete: those of an encoder would differ by rounding alone."""
        config = self.model_config
        codes = self.normal("codes", self.batch_size, config["num_latent_tokens"], config["latent_channels"])
        return codes.sign() if config["quantizer"] in ("lfq", "fsq") else codes

    def time(self) -> torch.Tensor:
        return torch.tensor(0.6, device=self.device)

    def flow_draws(self) -> FlowDraws:
        keep = (torch.arange(self.batch_size, device=self.device) % 4 != 3).float()  # every fourth is dropped
        return FlowDraws(self.noise(), self.uniform("t", self.batch_size), keep)

    def chain_uniform(self) -> torch.Tensor:
        return self.uniform("chain", self.batch_size, self.chain_steps + 1)

    def chain_noise(self) -> torch.Tensor:
        return self.normal("chain noise", *self.image_shape)

    def gaussian(self) -> torch.Tensor:
        """The draw of a "kl" model, in the layout that this library draws it."""
        config = self.model_config
        return self.normal("kl", self.batch_size, config["latent_channels"], config["num_latent_tokens"], 1)

    def perceptual_network(self, stage: str) -> Perceptual | None:
        if self.perceptual == "pooled" or (self.perceptual == "none" and stage == "posttrain"):
            return pooled_distance
        if self.perceptual == "none":
            return None
        return load_perceptual_network(self.perceptual).to(self.device)

    def lfq_vectors(self) -> torch.Tensor:
        """(N, bits): the groups of a batch's tokens."""
        config = self.model_config
        bits = self.lfq_bits or config["codebook_bits"]
        groups = max(1, config["latent_channels"] // bits)
        return self.normal("lfq", self.batch_size * config["num_latent_tokens"] * groups, bits).to(self.dtype)


def pooled_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference (b,) of 4 x 4 means."""
    return (F.avg_pool2d(x, 4) - F.avg_pool2d(y, 4)).abs().mean((1, 2, 3))


def load_script(name: str) -> ModuleType:
    """A script of `training/` as a module."""
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights_of(*modules: nn.Module) -> list[torch.Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def moments_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def take_gradients(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """
    "gradient_norm" over all parameters of a model, and "gradient_norms" of those named, which must have gradients; all
    are then let go.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    each = torch.stack([gradients[name].norm() for name in names])
    whole = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients.values()]))
    model.zero_grad()
    return {"gradient_norm": whole, "gradient_norms": each}


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def encode(work: Workload) -> Operation:
    model = work.inference_model()
    images = work.images().to(model.dtype)

    @torch.no_grad()
    def run():
        with work.autocasting():
            return model.encode(images)

    flops = work.batch_size * encoder_flops(work.model_config, work.image_size, work.image_size)
    return _inference(work, model, flops, run, lambda: {"latents": run().latents})


def decode(work: Workload) -> Operation:
    model = work.inference_model()
    noise, codes, t = work.noise().to(model.dtype), work.codes().to(model.dtype), work.time()

    @torch.no_grad()
    def run():
        with work.autocasting():
            return model(noise, t, codes=codes).velocity

    flops = work.batch_size * decoder_flops(work.model_config, work.image_size, work.image_size)
    return _inference(work, model, flops, run, lambda: {"velocity": run()})


def reconstruct(work: Workload) -> Operation:
    model = work.inference_model()
    pipeline = FlowMoPipeline(model, FlowMoScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images, sampling = work.images(), {"num_inference_steps": work.num_inference_steps, "output_type": "latent"}
    sampling |= {"guidance_scale": work.guidance_scale, "guidance_interval": GUIDANCE_INTERVAL}

    def run():
        with work.autocasting():
            return pipeline(images, **sampling).images

    def outputs():
        with work.autocasting():
            side = work.image_size
            return {"images": pipeline.decode(work.codes(), side, side, latents=work.noise(), **sampling)}

    config, side, steps = work.model_config, work.image_size, work.num_inference_steps
    passes = pipeline.num_forwards(steps, work.guidance_scale, GUIDANCE_INTERVAL)
    flops = work.batch_size * (encoder_flops(config, side, side) + passes * decoder_flops(config, side, side))
    return _inference(work, model, flops, run, outputs)


def _inference(
    work: Workload, model: FlowMoAutoencoder, flops: float, run: Callable, outputs: Callable[[], dict]
) -> Operation:
    return Operation(run, work.batch_size, flops, work.inference_precision, lambda: weights_of(model), outputs, model)


def pretrain_step(work: Workload) -> Operation:
    flops = pretraining_flops(work.model_config, work.image_size, work.image_size)
    return _training_step(work, "pretrain", flops)


def posttrain_step(work: Workload) -> Operation:
    flops = posttraining_flops(work.model_config, work.image_size, work.image_size, work.chain_steps)
    return _training_step(work, "posttrain", flops)


def _training_step(work: Workload, stage: str, flops_per_image: float) -> Operation:
    """
    A step of `train_flowmo.py` without its data: draws, loss, backward, update, norms held, averages (which most steps
    pass over).
    """
    script, args = load_script("train_flowmo"), work.training_args(stage)
    accelerator = start(args)
    images, model = work.images(), work.autoencoder(torch.float32)
    pipeline = FlowMoPipeline(model, FlowMoScheduler())
    task = script.TokenizerTraining(args, accelerator, pipeline, images, images[:1])
    task.perceptual = work.perceptual_network(stage)
    step = Trainer(task, args, accelerator, {}).step
    visits = count(step=work.batch_size)

    def run():
        first = next(visits)
        batch = {"images": images, "visits": torch.arange(first, first + work.batch_size)}
        return step([batch], task.losses)

    def outputs():
        generator = work.generator("kl")
        with accelerator.autocast():
            given = (task.trained, images, work.flow_draws())
            if stage == "pretrain":
                losses = pretraining_loss(*given, task.perceptual, task.weights, generator)
            else:
                chain = ChainDraws(work.chain_noise(), chain_times(work.chain_uniform()))
                losses = posttraining_loss(*given, chain, task.perceptual, task.weights, generator)
        losses["loss"].backward()
        return {"loss": losses["loss"].detach(), **take_gradients(model, trained_names(model))}

    def held():
        return [*weights_of(model), *moments_of(step.optimizer.optimizer), *step.ema.shadow_params]

    flops = work.batch_size * flops_per_image
    return Operation(run, work.batch_size, flops, work.training_precision, held, outputs, model)


def _token_generator(work: Workload) -> tuple[Any, FlowMoTokenGenerator]:
    """A generator of the preset on this tokenizer's tokens, and what `train_generator.py` makes of the preset."""
    if work.generator_config is None:
        raise ValueError("generator_config is missing: the operations of a token generator need its preset")
    options = ["--config", str(work.generator_config), "--output_dir", "unused", "--report_to", "none"]
    options += ["--mixed_precision", "no" if work.dtype == torch.float32 else "bf16"]
    options += ["--train_batch_size", str(work.batch_size), "--gradient_accumulation_steps", "1"]
    args = load_script("train_generator").parse_args(
        [*options, "--tokenizer", "unused", "--train_tokens_dir", "unused"]
    )
    config = work.model_config
    if config["quantizer"] not in ("lfq", "fsq"):
        raise ValueError(f"quantizer={config['quantizer']!r} has no tokens for a generator; 'lfq' and 'fsq' have")
    with torch.device("meta"):
        groups = FlowMoAutoencoder.from_config(config).quantize.groups
    form = {"num_tokens": config["num_latent_tokens"], "token_groups": groups, "group_bits": config["codebook_bits"]}
    with work.device:
        model = FlowMoTokenGenerator.from_config(form | {"num_classes": NUM_CLASSES} | read_config(args.model_config))
    if work.attention_backend:
        model.set_attention_backend(work.attention_backend)
    if work.compile == "regional":
        model.compile_repeated_blocks()
    elif work.compile in COMPILE_MODES:
        model.compile(mode=COMPILE_MODES[work.compile])
    return args, model


def generator_step(work: Workload) -> Operation:
    """A step of `train_generator.py` without its data."""
    args, model = _token_generator(work)
    accelerator, config = start(args), model.config
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = build_optimizer(args, model, args.adam_weight_decay)
    lr_scheduler = build_lr_scheduler(args, optimizer)
    trained, optimizer = accelerator.prepare(model, optimizer)
    ema = EMA(model.parameters(), args.ema_decay, args.ema_update_every)
    step = TrainStep(accelerator, trained, optimizer, lr_scheduler, Progress(0), ema, None, args.max_grad_norm)
    shape = (work.batch_size, config.num_tokens, config.token_groups)
    indices = (work.uniform("tokens", *shape) * 2**config.group_bits).long()
    labels = torch.arange(work.batch_size, device=work.device) % config.num_classes
    visits = count(step=work.batch_size)

    def losses(first: int):
        numbers = range(first, first + work.batch_size)
        generators = [keyed_generator(args.seed, "generator", number, work.device) for number in numbers]
        null, schedule, dropout = model.null_class, args.mask_schedule, args.class_dropout
        draws = TokenDraws.sample(indices, labels, null, generators, schedule, dropout)
        return token_loss(trained, indices, draws, config.order, args.label_smoothing)

    def run():
        return step([next(visits)], losses)

    def held():
        return [*weights_of(model), *moments_of(optimizer.optimizer), *ema.shadow_params]

    return Operation(
        run, work.batch_size, work.batch_size * generator_training_flops(config), work.training_precision, held
    )


def generator_sample(work: Workload) -> Operation:
    """Classes to tokens, with guidance; what becomes of the tokens is `reconstruct`'s matter."""
    _, model = _token_generator(work)
    model.requires_grad_(False).eval()
    if not work.autocast:
        nn.Module.to(model, work.dtype)
    scheduler, config = FlowMoTokenScheduler(), model.config
    pipeline = FlowMoGenerationPipeline(model, scheduler, None, None)
    pipeline.set_progress_bar_config(disable=True)
    labels = [number % config.num_classes for number in range(work.batch_size)]
    steps = GENERATOR_STEPS if config.order == "masked" else None

    def run():
        with work.autocasting():
            return pipeline.generate_tokens(labels, steps, GENERATOR_GUIDANCE)

    flops = None  # a cache makes each step of the other order a different one
    if config.order == "masked":
        scheduler.set_timesteps(steps)
        passes = sum(1 if weight == 1 else 2 for weight in scheduler.guidance_weights(GENERATOR_GUIDANCE))
        flops = work.batch_size * passes * generator_flops(config)
    return Operation(run, work.batch_size, flops, work.inference_precision, lambda: weights_of(model))


def lfq_loss(work: Workload) -> Operation:
    """The two entropies alone, forward and backward."""
    vectors = work.lfq_vectors().requires_grad_()

    def run():
        vectors.grad = None
        per_sample, codebook = lfq_entropies(vectors)
        (per_sample - codebook).backward()
        return per_sample - codebook

    def outputs():
        return {"entropy_loss": run().detach(), "gradient": vectors.grad}

    return Operation(run, work.batch_size, None, "float32 whatever the latents", lambda: [vectors], outputs)


def attention(work: Workload) -> Operation:
    """Joint attention of one decoder block, forward and backward."""
    config = work.model_config
    heads, width = config["num_attention_heads"], config["decoder_hidden_size"] // config["num_attention_heads"]
    length = config["num_latent_tokens"] + (work.image_size // config["patch_size"]) ** 2
    shape = (work.batch_size, length, heads, width)
    query, key, value, grad = (work.normal(name, *shape).to(work.dtype) for name in ("q", "k", "v", "gradient"))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    backend = None if work.attention_backend is None else AttentionBackendName(work.attention_backend)

    def run():
        return torch.autograd.grad(attend(*inputs, 8 / width, backend), inputs, grad)

    flops = 3 * 4 * work.batch_size * heads * length**2 * width
    return Operation(run, work.batch_size, flops, f"{work.name_of_dtype} throughout", lambda: inputs)


def data_loading(work: Workload) -> Operation:
    """A batch of JPEGs of 500 x 375 pixels from the page cache, decoded, cropped and flipped by this process alone."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)
    pieces = load_images(dataset_name="emoji", cache_dir=path / "cache")["train"]
    numbers = cycle(range(len(pieces)))
    (path / "images").mkdir()
    for i in range(NUM_PHOTOS):
        (path / "images" / f"{i:03d}.jpg").write_bytes(photo(pieces[number] for number in numbers))
    found = load_images(data_dir=path / "images", cache_dir=path / "cache")["train"]
    images = ShuffledImages(found, ImageTransform(work.image_size, random_crop=True, random_flip=True))
    batches = iter(image_batches(images, work.batch_size, 0, sys.maxsize // work.batch_size))

    def run(folder: tempfile.TemporaryDirectory = folder):  # which is there as long as this is
        return next(batches)

    return Operation(run, work.batch_size, None, "float32 images", device=torch.device("cpu"))


OPERATIONS: dict[str, Callable[[Workload], Operation]] = {
    operation.__name__: operation
    for operation in (
        *(encode, decode, reconstruct, pretrain_step, posttrain_step),
        *(generator_step, generator_sample, attention, lfq_loss, data_loading),
    )
}


def let_go(device: torch.device) -> None:
    """After an operation: its memory, and the graphs compiled for it, whose number per function is limited."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
