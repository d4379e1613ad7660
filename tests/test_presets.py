"""The presets hold the paper's recipes, and every figure in their comments is one that can be counted."""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    patch_environment,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.models import quantizers, rotary
from flowmo_diffusers.models.checkpointing import KEPT
from flowmo_diffusers.models.published import published_shapes
from flowmo_diffusers.objectives.cost import posttraining_flops, pretraining_flops
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.posttrain import ChainDraws, posttraining_loss
from flowmo_diffusers.objectives.pretrain import LossWeights, pretraining_loss


CONFIGS = Path(__file__).parents[1] / "training" / "configs"
LAUNCHES = CONFIGS / "accelerate"
IMAGENET = 1_281_167
GIB = 2**30

PAPER = ("flowmo_lo", "flowmo_hi", "flowmo_small", "flowmo_continuous")
# Processes the batches are written for, and memory of a card in GB.
DEVICES = {name: (8, 80) for name in PAPER} | {"flowmo_small": (8, 40), "flowmo_small_1gpu": (1, 24)}


def read_preset(script, name: str, stage: str):
    source = ["--pretrained_model_name_or_path", "before"] if stage == "posttrain" else []
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--stage", stage, "--output_dir", "out", *source]
    return script.parse_args([*argv, "--train_data_dir", "images"])


def build_model(args) -> FlowMoAutoencoder:
    with torch.device("meta"):
        return FlowMoAutoencoder(**args.model_config)


def read_yaml(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def comments(path: Path) -> str:
    """The comment at the head of a file, as one line."""
    lines = path.read_text().split("\n")
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def figures(name: str, pattern: str) -> list[float]:
    """The groups of the pattern, in the one place in a preset's comments that fits it."""
    found = list(re.finditer(pattern, comments(CONFIGS / f"{name}.yaml")))
    assert len(found) == 1, f"{name}: {len(found)} places fit {pattern}"
    return [float(group) for group in found[0].groups()]


# The paper's recipes


@pytest.mark.parametrize(
    ("name", "bytes_per_image", "bits_per_pixel", "codebook_bits", "published_millions", "epochs"),
    [
        ("flowmo_lo", 576, 0.070, 9, 945, 130),
        ("flowmo_hi", 1792, 0.219, 14, 945, 80),
        ("flowmo_small", 576, 0.070, 9, 517, 40),
        ("flowmo_small_1gpu", 576, 0.070, 9, 517, 40),
    ],
)
def test_models_and_lengths_are_the_papers(
    script, name, bytes_per_image, bits_per_pixel, codebook_bits, published_millions, epochs
):
    """Catches a width, depth, patch or token that is another model's, and a run of another length."""
    args = read_preset(script, name, "pretrain")
    model = build_model(args)
    assert (model.config.sample_size, model.config.quantizer, model.config.codebook_bits) == (
        256,
        "lfq",
        codebook_bits,
    )
    assert model.bytes_per_image == bytes_per_image
    assert round(8 * bytes_per_image / 256**2, 3) == bits_per_pixel
    published = sum(math.prod(shape) for shape in published_shapes(model.config).values())
    assert published / 1e6 == pytest.approx(published_millions, abs=0.6)
    assert args.max_train_steps * 128 / IMAGENET == pytest.approx(epochs, rel=2e-3)
    if name in PAPER:
        tokens, bits, size, shown = figures(
            name, r"(\d+) tokens x (\d+) bits = (\d+) bytes an image of 256 x 256, ([\d.]+) bits per pixel"
        )
        assert (tokens, bits, size) == (model.config.num_latent_tokens, model.bits_per_token, bytes_per_image)
        assert shown == bits_per_pixel


@pytest.mark.parametrize("name", DEVICES)
def test_both_stages_are_the_papers(script, name):
    """Catches a preset that leaves the published recipe: batch, rate, losses, optimiser, EMA, freezing, chain."""
    processes, _ = DEVICES[name]
    recipes = {
        "pretrain": {"learning_rate": 1e-4, "perceptual": "lpips-vgg", "perceptual_weight": 0.1, "chain_steps": 8},
        "posttrain": {"learning_rate": 5e-5, "perceptual": "resnet50", "perceptual_weight": 0.01, "chain_steps": 8},
    }
    both = {
        "lr_scheduler": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": None,
        "ema_decay": 0.9999,
        "ema_update_every": 10,
        "norm_rescaling": True,
        "freeze_encoder_steps": 200_000,
        "entropy_weight": 0.0025,
        "commit_weight": 0.000625,
        "code_dropout": 0.1,
        "mixed_precision": "bf16",
        "random_flip": False,
        "center_crop": False,
        "num_inference_steps": None,  # the scheduler's 25
    }
    for stage, batch in (("pretrain", 128), ("posttrain", 64)):
        args = read_preset(script, name, stage)
        recipe = recipes[stage] | both
        assert {option: getattr(args, option) for option in recipe} == recipe
        assert processes * args.train_batch_size * args.gradient_accumulation_steps == batch
    assert args.max_train_steps * 64 / IMAGENET == pytest.approx(1.25, rel=2e-3)
    assert args.guard not in ("none", args.perceptual)


def test_the_small_model_is_the_same_on_one_card():
    """Catches a one-GPU preset that trains another model, or for another number of steps."""
    one, many = (read_yaml(name) for name in ("flowmo_small_1gpu", "flowmo_small"))
    assert one["pretrain"]["model_config"] == many["pretrain"]["model_config"]
    for stage in ("pretrain", "posttrain"):
        assert one[stage]["max_train_steps"] == many[stage]["max_train_steps"]


def test_the_continuous_model_differs_in_the_latent_only(script):
    """Catches a continuous preset that cannot be compared with FlowMo-Lo, or another latent than its comment's."""
    continuous, lo = (read_yaml(name) for name in ("flowmo_continuous", "flowmo_lo"))
    latent = ("latent_channels", "codebook_bits", "quantizer")
    assert continuous.pop("kl_weight") == 1e-6
    models = [preset["pretrain"]["model_config"] for preset in (continuous, lo)]
    assert [models[0].pop(key, None) for key in latent] == [16, None, "kl"]
    assert [models[1].pop(key, None) for key in latent] == [18, 9, "lfq"]
    assert continuous == lo
    tokens, channels, numbers, *sides = figures(
        "flowmo_continuous", r"(\d+) tokens x (\d+) = (\d+) numbers an image, .* of (\d+) x (\d+) x (\d+) kl_weight"
    )
    assert tokens * channels == numbers == math.prod(sides) == 256 * 16


# Cost


@pytest.mark.parametrize("name", DEVICES)
def test_cost_in_the_comments_is_that_of_the_preset(script, name):
    """Catches a figure left behind by a change of the model, the steps or the batch."""
    pretrain, posttrain = (read_preset(script, name, stage) for stage in ("pretrain", "posttrain"))
    image = (build_model(pretrain).config, 256, 256)
    cards = figures(name, r"on (\d+) H100 at an assumed")[0] if name in PAPER else 1
    speed = cards * figures(name, r"at an assumed (\d+) TFLOP/s")[0] * 1e12
    assert speed == (8 * 400e12 if name in PAPER else 80e12)

    trained, frozen = (pretraining_flops(*image, encoder_trained=flag) for flag in (True, False))
    early = pretrain.freeze_encoder_steps
    total = 128 * (early * trained + (pretrain.max_train_steps - early) * frozen)
    shown = figures(
        name,
        r"pretrain: ([\d.]+) TFLOP an image, ([\d.]+) with the encoder frozen; ([\d.e+]+) FLOP, ([\d.]+) hours",
    )
    assert shown == pytest.approx([trained / 1e12, frozen / 1e12, total, total / speed / 3600], rel=4e-3)

    model_work, work = (
        posttraining_flops(*image, posttrain.chain_steps, recomputed=recomputed) for recomputed in (False, True)
    )
    total = 64 * posttrain.max_train_steps * work
    shown = figures(
        name, r"posttrain: ([\d.]+) TFLOP an image, ([\d.]+) with recomputation; ([\d.e+]+) FLOP, ([\d.]+) hours"
    )
    assert shown == pytest.approx([model_work / 1e12, work / 1e12, total, total / speed / 3600], rel=1e-2)


def test_cost_of_the_cpu_preset_is_what_its_comment_works_out(script):
    """Catches arithmetic that is not that of the preset's own sizes and steps."""
    pretrain, posttrain = (read_preset(script, "cpu", stage) for stage in ("pretrain", "posttrain"))
    model = build_model(pretrain)
    image = (model.config, 64, 64)
    works = {"pretrain": pretraining_flops(*image), "posttrain": posttraining_flops(*image, posttrain.chain_steps)}
    for stage, args in (("pretrain", pretrain), ("posttrain", posttrain)):
        work, images, steps, rate, hours = figures(
            "cpu", rf"{stage}: ([\d.]+) GFLOP an image x (\d+) images x (\d+) steps / (\d+) GFLOP/s = ([\d.]+) hours"
        )
        assert work == pytest.approx(works[stage] / 1e9, abs=0.005)
        assert (images, steps) == (args.train_batch_size, args.max_train_steps)
        assert rate == 150
        assert hours == pytest.approx(work * images * steps / rate / 3600, abs=0.05)
    assert pretrain.freeze_encoder_steps > pretrain.max_train_steps  # the encoder is trained throughout
    millions, tokens, bits, size = figures(
        "cpu", r"64 x 64 pixels, ([\d.]+) M parameters, (\d+) tokens x (\d+) bits = (\d+) bytes an image"
    )
    assert millions == pytest.approx(model.num_parameters() / 1e6, abs=0.05)
    assert (tokens, bits) == (model.config.num_latent_tokens, model.bits_per_token)
    assert size == model.bytes_per_image


def test_the_table_of_presets_is_that_of_the_presets(script):
    """Catches a table in the documentation that the presets have left behind, or a preset that is not in it."""
    text = (CONFIGS.parents[1] / "docs" / "scaling.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if ".yaml` | " in line]
    table = {row[0].strip("`").removesuffix(".yaml"): row[1:] for row in rows if len(row) == 5}
    assert table.keys() == {path.stem for path in CONFIGS.glob("*.yaml")} - {"starter", "starter_photos", "nano"}
    for name, (parameters, batches, steps, hours) in table.items():
        stages = [read_preset(script, name, stage) for stage in ("pretrain", "posttrain")]
        processes = DEVICES.get(name, (1,))[0]
        spread = [f"{processes} x {a.train_batch_size} x {a.gradient_accumulation_steps}" for a in stages]
        assert batches == " / ".join(spread), name
        assert parameters == f"{build_model(stages[0]).num_parameters() / 1e6:.1f} M", name
        assert steps == " / ".join(str(args.max_train_steps) for args in stages), name
        shown = re.findall(r"([\d.]+) hours", comments(CONFIGS / f"{name}.yaml"))
        assert hours.split(" on ")[0] == " / ".join(shown), name


# Memory


# What the comments say of a stage, and the part of the model that it trains.
LEARNT = {
    "pretrain": (r"pretrain: ([\d.]+) GiB of weights, [^;]*; ([\d.]+) GiB of activations an image", lambda m: m),
    "posttrain": (
        r"posttrain: ([\d.]+) GiB and, checkpointed, ([\d.]+) GiB of activations an image",
        lambda m: m.decoder,
    ),
}


@pytest.fixture
def fake_tensors(monkeypatch) -> Iterator[None]:
    """Tensors that have sizes and no memory, and the autocast of a GPU: layer norms within it are in float32."""
    layer_norm = F.layer_norm

    def as_on_a_gpu(x, *args, **kwargs):
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", as_on_a_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    for cached in (rotary._cached_table, quantizers._bits_of_codes):
        cached.cache_clear()  # no later test may find a table without numbers


def saved_bytes(config: dict, batch: int, stage: str, chain_steps: int) -> int:
    """What a step keeps for its backward pass, weights apart."""
    model = FlowMoAutoencoder(**config).train()
    model.encoder.requires_grad_(stage == "pretrain")
    if stage == "posttrain":
        model.enable_gradient_checkpointing()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.zeros(batch, 3, 256, 256)
    draws = FlowDraws(z=torch.zeros_like(x), t=torch.zeros(batch), code_mask=torch.ones(batch))
    chain = ChainDraws(z=torch.zeros_like(x), times=torch.zeros(batch, chain_steps + 1))

    class Checkpointed(TorchDispatchMode):
        """Of attention, checkpointing keeps the result."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in KEPT and stage == "posttrain":
                tree_map_only(torch.Tensor, pack, result)
            return result

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, Checkpointed(), torch.autocast("cpu", torch.bfloat16):
        if stage == "pretrain":
            pretraining_loss(model, x, draws)
        else:
            posttraining_loss(model, x, draws, chain, lambda a, b: (a - b).square().mean((1, 2, 3)), LossWeights())
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)


def activations(config: dict, stage: str) -> float:
    """
    Bytes an image, of the whole model: all blocks but the last of a trunk keep the same, and all steps of a chain but
    the first, so that shallow models and short chains tell.
    """

    def an_image(encoder_layers: int, decoder_layers: int, chain_steps: int) -> int:
        shallow = config | {"encoder_num_layers": encoder_layers, "decoder_num_layers": decoder_layers}
        return saved_bytes(shallow, 2, stage, chain_steps) - saved_bytes(shallow, 1, stage, chain_steps)

    encoder, decoder = config["encoder_num_layers"], config["decoder_num_layers"]
    base = an_image(2, 2, 1)
    if stage == "pretrain":
        an_encoder_block, a_decoder_block = an_image(3, 2, 1) - base, an_image(2, 3, 1) - base
        return base + (encoder - 2) * an_encoder_block + (decoder - 2) * a_decoder_block
    deeper, longer, both = an_image(2, 3, 1), an_image(2, 2, 2), an_image(2, 3, 2)
    a_step, a_block = longer - base, deeper - base
    a_block_of_a_step = both - deeper - a_step
    steps, blocks = 8 - 1, decoder - 2
    return base + steps * a_step + blocks * a_block + steps * blocks * a_block_of_a_step


@pytest.mark.parametrize("name", ["flowmo_lo", "flowmo_small"])
def test_memory_in_the_comments_is_counted(script, name, fake_tensors):
    """Catches a batch that cannot fit its card, or a figure that a change of the model has outdated."""
    names = {"flowmo_lo": ("flowmo_lo", "flowmo_hi", "flowmo_continuous")}.get(name, (name, "flowmo_small_1gpu"))
    kept = {stage: activations(read_preset(script, name, "pretrain").model_config, stage) / GIB for stage in LEARNT}
    for each in names:
        _, card = DEVICES[each]
        model = build_model(read_preset(script, each, "pretrain"))
        for stage, (pattern, learnt) in LEARNT.items():
            held, an_image = figures(each, pattern)
            trained = sum(parameter.numel() for parameter in learnt(model).parameters())
            # Weights, gradients, Adam's two moments, EMA.
            expected = trained * 20 + (model.num_parameters() - trained) * 8
            assert held == pytest.approx(expected / GIB, abs=0.06)
            assert an_image == pytest.approx(kept[stage], abs=0.051)
            batch = read_preset(script, each, stage).train_batch_size
            # Beside these: bfloat16 copies of the weights, the perceptual network, CUDA's own.
            beside = 2 * model.num_parameters() / GIB + 3
            assert expected / GIB + batch * kept[stage] + beside < 0.985 * card  # 80 GB are 79.2 GiB, 24 GB 23.6


# Launch configurations


def launch(name: str, *flags: str) -> tuple[argparse.Namespace, dict[str, str]]:
    """What `accelerate launch` would start, and the environment it would give the processes."""
    path = str(LAUNCHES / f"{name}.yaml")
    if "multinode" in name:
        flags = ("--machine_rank", "1", "--main_process_ip", "10.0.0.1", *flags)
    argv = ["--config_file", path, "--main_process_port", "29517", *flags, "train.py"]
    args, _, from_config = _validate_launch_command(launch_command_parser().parse_args(argv))
    if args.use_deepspeed:
        fields = [*load_config_from_file(path).deepspeed_config] + ["mixed_precision"] * from_config
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        return args, prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp:
        return args, prepare_multi_gpu_env(args)
    return args, prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("path", sorted(LAUNCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_have_no_unknown_key(path):
    """Catches a misspelt key: the loader refuses one at the top, but passes over one in a section without a word."""
    config = load_config_from_file(str(path))
    options = vars(launch_command_parser().parse_args(["train.py"]))
    for section, prefix in ((config.fsdp_config, "fsdp_"), (config.deepspeed_config, "")):
        for key in section:
            assert key.startswith(prefix) and key in options, key
    assert config.num_processes == {"single_gpu": 1, "cpu_2proc": 2}.get(path.stem, 8 * config.num_machines)
    assert config.num_machines == (2 if "multinode" in path.stem else 1)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_multinode"])
def test_fsdp_is_version_2_of_our_blocks(name):
    """Catches version 1, a class that is not the model's, full copies on the CPU, or checkpointing done twice."""
    _, environment = launch(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
    with patch_environment(**environment), torch.device("meta"):
        model = FlowMoAutoencoder(encoder_num_layers=1)
        plugin.set_auto_wrap_policy(model)  # raises if there is no such class in the model
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert wrapped == {type(block) for block in [*model.encoder.blocks, *model.decoder.blocks]} and len(wrapped) == 3


def test_deepspeed_is_stage_2_without_clipping():
    """Catches another stage, offloading, or clipping at 1.0, which is what DeepSpeed gets if nothing is said."""
    _, environment = launch("deepspeed_zero2")
    told = {key.removeprefix("ACCELERATE_"): value for key, value in environment.items()}
    assert told["DEEPSPEED_ZERO_STAGE"] == "2"
    assert float(told["GRADIENT_CLIPPING"]) == 0
    assert told["DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == told["DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "none"
    assert told["MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("name", [path.stem for path in LAUNCHES.glob("*.yaml")])
def test_launches_start_as_many_processes_as_they_say(name):
    """Catches one process where several were meant, which the launcher does for a CPU, or another kind of them."""
    args, environment = launch(name)
    kinds = {kind for kind in ("FSDP", "DEEPSPEED") if environment.get(f"ACCELERATE_USE_{kind}") == "true"}
    assert kinds == {kind for kind in ("FSDP", "DEEPSPEED") if name.startswith(kind.lower())}
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if name == "cpu_2proc" else "bf16")
    if name == "single_gpu":
        assert args.num_processes == 1 and not args.multi_gpu
    elif "multinode" in name:
        assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
        assert args.rdzv_endpoint == "10.0.0.1:29517"
    else:
        assert args.nproc_per_node == ("2" if name == "cpu_2proc" else "8")
