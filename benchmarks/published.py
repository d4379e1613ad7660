"""
The published FlowMo code at work, imported from a checkout outside this repository, for comparison.

It is written for CUDA and a few packages that nothing here needs. What is changed, from outside and for this process:

- `mup`, `lpips`, `omegaconf`, `torchvision`, `psutil`, `fsspec` and `torch.utils.tensorboard` are stand-ins while its
  modules are imported; `mup.MuReadout` is a linear layer, which is what it computes where a model is its own base
  shape, as in the published training. `einops` must be installed.
- In its modules the name `torch` is a copy of the module, in which `torch.autocast` is that of the device and dtype in
  use, whatever it is asked for, and random draws can be given.
- Without its compilation `torch.compile` leaves functions as they are while its modules are imported.
- On a CPU `.cuda()` of tensors and modules returns them as they are.
- What its training script sets for all of torch on import (`float32_matmul_precision`, cuDNN's benchmark) is set back.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from operations import Operation, Workload, moments_of, take_gradients, trained_names, weights_of
from torch import nn

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.models.published import published_name, published_shapes


STAND_INS = (
    *("mup", "lpips", "omegaconf", "psutil", "fsspec", "torch.utils.tensorboard"),
    *("torchvision", "torchvision.models", "torchvision.models.feature_extraction", "torchvision.transforms"),
)
WIDTH = 192  # channels of one unit of its width
QUANTIZERS = {"lfq": "lfq", "kl": "kl", "none": "noop"}
DRAWS = ("rand", "randn", "rand_like", "randn_like")


class StandIn(ModuleType):
    """A module of which any name can be imported."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Readout(nn.Linear):
    """muP's output layer where its multiplier is 1."""

    def __init__(self, *args, readout_zero_init: bool = False, **kwargs):
        super().__init__(*args, **kwargs)


def published_config(base: dict[str, Any], work: Workload) -> SimpleNamespace:
    """
    Its configuration of a model of ours.

    Args:
        base: Its `configs/base.yaml`.

    Raises:
        ValueError: If it has no such model; every field is named.
    """
    ours = work.model_config
    proportions = tuple(axis * 64 / sum(ours["rope_axes"]) for axis in ours["rope_axes"])
    even = 2 * WIDTH  # rotary widths of an odd multiple are odd
    limits = {
        "in_channels": ("3", ours["in_channels"] == 3),
        "mlp_ratio": ("4", ours["mlp_ratio"] == 4),
        "num_attention_heads": ("12", ours["num_attention_heads"] == 12),
        "rope_axes": ("the proportions (8, 28, 28)", proportions == (8, 28, 28)),
        "rope_theta": ("10000", ours["rope_theta"] == 10000),
        "encoder_hidden_size": (f"a multiple of {even}", ours["encoder_hidden_size"] % even == 0),
        "decoder_hidden_size": (f"a multiple of {even}", ours["decoder_hidden_size"] % even == 0),
        "quantizer": (f"one of {list(QUANTIZERS)}", ours["quantizer"] in QUANTIZERS),
    }
    wrong = [f"{name}={ours[name]!r} must be {fits}" for name, (fits, right) in limits.items() if not right]
    if wrong:
        raise ValueError(f"the published code has no such model: {'; '.join(wrong)}")
    config = {section: SimpleNamespace(**values) for section, values in base.items() if isinstance(values, dict)}
    sampling = SimpleNamespace(**base["eval"]["sampling"])
    sampling.sample_steps, sampling.cfg = work.num_inference_steps, work.guidance_scale
    config["eval"].sampling = sampling
    config["data"].image_size = work.image_size
    model, opt = config["model"], config["opt"]
    model.patch_size = ours["patch_size"]
    model.mup_width, model.enc_mup_width = ours["decoder_hidden_size"] // WIDTH, ours["encoder_hidden_size"] // WIDTH
    model.enc_depth, model.dec_depth = ours["encoder_num_layers"], ours["decoder_num_layers"]
    model.code_length, model.context_dim = ours["num_latent_tokens"], ours["latent_channels"]
    model.quantization_type = QUANTIZERS[ours["quantizer"]]
    model.codebook_size_for_entropy = ours["codebook_bits"]
    model.posttrain_sample_k = work.chain_steps
    opt.n_grad_acc = 1
    return SimpleNamespace(**config)


class Published:
    """
    The published code, once in a process.

    Args:
        path: The folder that holds its package `flowmo`.
        device: It runs on.
        dtype: Of its autocast; float32 is none.
        compiled: Whether its `torch.compile` stays.

    Raises:
        OSError: If it is not there.
        ValueError: If einops is not installed.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, compiled: bool):
        if not (path / "flowmo" / "models.py").is_file():
            raise OSError(f"--reference {path} holds no flowmo/models.py: give a checkout of the published code")
        if importlib.util.find_spec("einops") is None:
            raise ValueError("--reference needs einops, which the published code imports: pip install einops")
        self.device, self.dtype, self.compiled = device, dtype, compiled
        self.given: list[torch.Tensor] = []
        self.base = yaml.safe_load((path / "flowmo" / "configs" / "base.yaml").read_text())
        if device.type == "cpu":
            torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
        with _importing(path.resolve(), compiled):
            self.models = importlib.import_module("flowmo.models")
            self.lfq = importlib.import_module("flowmo.lookup_free_quantize")
            self.train = importlib.import_module("flowmo.train")
            self.train_utils = importlib.import_module("flowmo.train_utils")
        self.models.torch = self.train.torch = self._torch()
        self.train.BFLOAT16_IS_AVAILABLE = dtype == torch.bfloat16

    def autocast(self, *_, **__) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled)

    def _torch(self) -> ModuleType:
        copy = ModuleType("torch")
        copy.__dict__.update(torch.__dict__)
        copy.autocast = self.autocast
        for name in DRAWS:
            setattr(copy, name, self._drawing(getattr(torch, name)))
        return copy

    def _drawing(self, draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The given draws one by one, `draw`'s own when there is none."""

        def drawn(*args, **kwargs):
            return self.given.pop(0) if self.given else draw(*args, **kwargs)

        return drawn

    @contextlib.contextmanager
    def drawing(self, *draws: torch.Tensor) -> Iterator[None]:
        """Within this context its random draws are these, all of them."""
        self.given = list(draws)
        yield
        if self.given:
            raise RuntimeError(f"the published code left {len(self.given)} of {len(draws)} draws: it has changed")

    def model(self, work: Workload, ours: FlowMoAutoencoder) -> tuple[nn.Module, SimpleNamespace]:
        """Its model with the weights of ours, in float32; those that nothing depends on are as they were made."""
        config = published_config(self.base, work)
        with self.device:
            theirs = self.models.FlowMo(width=config.model.mup_width, config=config)
        weights = {published_name(name): tensor.detach().float() for name, tensor in ours.state_dict().items()}
        missing, unknown = theirs.load_state_dict(weights, strict=False)
        dead = published_shapes(work.model_config).keys() - weights.keys()
        if unknown or set(missing) != dead:
            raise ValueError(
                f"the published model lacks {unknown} or has {set(missing) ^ dead} besides: it has changed"
            )
        return theirs, config

    def check(self, name: str, work: Workload) -> None:
        """Raises `ValueError` if it cannot do this operation as the workload asks for it."""
        if name in REFERENCE and name != "lfq_loss":
            published_config(self.base, work)
        if name in ("pretrain_step", "posttrain_step") and work.model_config["quantizer"] == "kl":
            weight = work.training_args(name.removesuffix("_step")).kl_weight
            if weight != 1:
                raise ValueError(f"kl_weight={weight} must be 1 beside the published code, which has no other")

    def build(self, name: str, work: Workload, ours: FlowMoAutoencoder | None) -> Operation:
        return REFERENCE[name](self, work, ours)


@contextlib.contextmanager
def _importing(path: Path, compiled: bool) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in STAND_INS}
    precision, benchmark, compile = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.compile
    sys.modules.update({name: StandIn(name) for name in STAND_INS})
    sys.modules["mup"].MuReadout = Readout
    sys.path.insert(0, str(path))
    if not compiled:
        torch.compile = lambda function: function
    try:
        yield
    finally:
        torch.compile = compile
        sys.path.remove(str(path))
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark


def encode(code: Published, work: Workload, ours: FlowMoAutoencoder) -> Operation:
    model, _ = code.model(work, ours)
    model.requires_grad_(False).eval()
    images = work.images()

    @torch.no_grad()
    def run():
        with code.autocast():
            latents, _ = model.encode(images)
            model._quantize(latents)
            return latents

    return _inference(work, model, run, lambda: {"latents": run()})


def decode(code: Published, work: Workload, ours: FlowMoAutoencoder) -> Operation:
    model, _ = code.model(work, ours)
    model.requires_grad_(False).eval()
    noise, tokens = work.noise(), nn.functional.pad(work.codes(), (0, 1), value=1.0)
    times = work.time().repeat(work.batch_size)

    @torch.no_grad()
    def run():
        with code.autocast():
            return model.decode(img=noise, timesteps=times, code=tokens)[0]

    return _inference(work, model, run, lambda: {"velocity": run()})


def reconstruct(code: Published, work: Workload, ours: FlowMoAutoencoder) -> Operation:
    model, _ = code.model(work, ours)
    model.requires_grad_(False).eval()
    images = work.images()

    def run():
        return model.reconstruct(images, dtype=code.dtype)

    def outputs():
        with code.drawing(work.noise()):
            return {"images": model.reconstruct(images, dtype=code.dtype, code=work.codes())}

    return _inference(work, model, run, outputs)


def _inference(work: Workload, model: nn.Module, run: Callable, outputs: Callable) -> Operation:
    return Operation(run, work.batch_size, None, work.training_precision, lambda: weights_of(model), outputs)


def pretrain_step(code: Published, work: Workload, ours: FlowMoAutoencoder) -> Operation:
    return _training_step(code, work, ours, "pretrain")


def posttrain_step(code: Published, work: Workload, ours: FlowMoAutoencoder) -> Operation:
    return _training_step(code, work, ours, "posttrain")


def _training_step(code: Published, work: Workload, ours: FlowMoAutoencoder, stage: str) -> Operation:
    """What its training loop does once it has a batch, without DDP and logging."""
    args, posttrain = work.training_args(stage), stage == "posttrain"
    model, config = code.model(work, ours)
    model.train()
    network = work.perceptual_network(stage)
    config.model.posttrain_sample, config.opt.freeze_encoder = posttrain, posttrain
    config.model.entropy_loss_weight, config.model.commit_loss_weight = args.entropy_weight, args.commit_weight
    config.opt.lpips_weight = 0.0 if network is None else args.perceptual_weight
    model.encoder.requires_grad_(not posttrain)
    trained = [model.decoder] if posttrain else [model.encoder, model.decoder]
    groups = [{"params": list(part.parameters())} for part in trained]
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, betas=betas, weight_decay=config.opt.weight_decay)
    average = code.train_utils.SimpleEMA(model, decay=config.model.ema_decay)
    norms = {name: torch.linalg.norm(weight).detach() for name, weight in code.models.get_weights_to_fix(model)}
    batch, state = {"image": work.images()}, {"lpips_model": network}
    step = 0

    def run():
        nonlocal step
        model.train()
        loss, _ = code.train.train_step(config, model, batch, optimizer, state)
        for name, weight in code.models.get_weights_to_fix(model):
            weight.data = weight / torch.linalg.norm(weight) * norms[name]
        average.update(model, step=step)
        step += 1
        return loss

    def outputs():
        draws, b = work.flow_draws(), work.batch_size
        zeros, ones = torch.zeros(b, device=code.device), torch.ones(b, device=code.device)
        given = [zeros, ones, draws.t, draws.z]  # a selector of one takes the uniform time
        if work.model_config["quantizer"] == "kl":
            given.append(work.gaussian().flatten(1))
        given.append(draws.code_mask)
        if posttrain:
            given += [work.chain_noise(), work.chain_uniform()]
        with code.drawing(*given), code.autocast():
            loss, _ = code.models.rf_loss(config, model, batch, state)
        loss.backward()
        return {"loss": loss.detach(), **take_gradients(model, map(published_name, trained_names(ours)))}

    def held():
        return [*weights_of(model, average.model), *moments_of(optimizer)]

    return Operation(run, work.batch_size, None, work.training_precision, held, outputs)


def lfq_loss(code: Published, work: Workload, ours: None) -> Operation:
    vectors = work.lfq_vectors().float().requires_grad_()
    with code.device:
        codebook = code.lfq.LFQ(codebook_size=2 ** vectors.shape[1], dim=vectors.shape[1]).codebook

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        per_sample, mean, _ = code.lfq.entropy_loss(2 * x @ codebook.T)
        return per_sample - mean

    entropy = torch.compile(loss_of) if code.compiled else loss_of

    def step() -> torch.Tensor:
        vectors.grad = None
        loss = entropy(vectors)
        loss.backward()
        return loss.detach()

    def run():
        with code.autocast():
            return step()

    def outputs():
        # Without autocast, as ours: a third of a gradient through logits in bfloat16 is rounding.
        return {"entropy_loss": step(), "gradient": vectors.grad}

    return Operation(run, work.batch_size, None, work.training_precision, lambda: [vectors, codebook], outputs)


REFERENCE = {
    operation.__name__: operation
    for operation in (encode, decode, reconstruct, pretrain_step, posttrain_step, lfq_loss)
}
