"""The script that trains a peer, run for real on the embedded images with tiny models; and the study's presets."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import VQModel
from peers import TINY_TITOK, TINY_VQMODEL
from safetensors.torch import load_file
from scripts import load_script

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.models.titok import TiTokModel
from flowmo_diffusers.objectives.cost import peer_training_flops, pretraining_flops


STUDY = Path(__file__).parents[1] / "training" / "configs" / "study"
PRESETS = {
    f"{peer}_{rate}{suffix}": (bits_per_pixel, perceptual)
    for peer in ("vq", "titok")
    for rate, bits_per_pixel in (("lo", 1), ("hi", 3))
    for suffix, perceptual in (("", "none"), ("_lpips", "lpips-alex"))
}
MODELS = {"vqmodel": VQModel, "titok": TiTokModel}
TINY = {"vqmodel": TINY_VQMODEL, "titok": TINY_TITOK}
CODES = {"vqmodel": 8, "titok": 12}
both = pytest.mark.parametrize("architecture", MODELS)


@pytest.fixture(scope="module")
def script():
    return load_script("train_peer")


@pytest.fixture
def train(script, tmp_path):
    """Runs the script in this process: `train(output_dir, architecture, option=value, flag=True)`."""

    def run(output_dir, architecture="vqmodel", **options):
        options = {
            "dataset_name": "emoji",
            "architecture": architecture,
            "model_config": json.dumps(TINY[architecture]),
            "cache_dir": tmp_path / "cache",
            "train_batch_size": 4,
            "max_train_steps": 4,
            "num_validation_images": 4,
            "logging_steps": 1,
            "mixed_precision": "no",
            "report_to": "none",
            "ema_decay": 0.5,
            "ema_update_every": 1,
        } | options
        argv = ["--output_dir", str(output_dir)]
        for name, value in options.items():
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main(script.parse_args(argv))
        return load_file(Path(output_dir) / "diffusion_pytorch_model.safetensors")

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@both
def test_the_folder_is_the_model_s(train, tmp_path, architecture):
    """Catches weights that cannot be loaded, figures that are missing, or a parameter that is not trained."""
    few = train(tmp_path / "few", architecture, max_train_steps=1)
    more = train(tmp_path / "more", architecture, perceptual="lpips-alex", mixed_precision="bf16")
    model_class, codes = MODELS[architecture], CODES[architecture]
    model, info = model_class.from_pretrained(tmp_path / "more", use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(dict(model.state_dict()), more)
    trained = dict(model.named_parameters())
    assert all(tensor.isfinite().all() and not torch.equal(tensor, few[name]) for name, tensor in trained.items())
    metrics = json.loads((tmp_path / "more" / "metrics.json").read_text())
    assert (metrics["stage"], metrics["steps"], metrics["images"]) == (architecture, 4, 4)
    assert 0 < metrics["val/psnr"] < 60 and metrics["val/lpips-alex"] > 0
    assert 1 <= metrics["val/used_codes"] <= metrics["val/usable_codes"] == codes
    assert metrics["val/max_entropy_bits"] == pytest.approx(math.log2(codes))
    assert (tmp_path / "more" / "validation" / f"{architecture}-0000004.png").is_file()
    shown = json.loads((tmp_path / "more" / "config.json").read_text())["_class_name"]
    assert shown == model_class.__name__


@both
def test_resumed_run_is_the_same_run(train, tmp_path, architecture):
    """
    Catches a resume that loses the optimiser, the EMA, the schedule, the place, or what a quantizer counts and draws;
    another run's seed.
    """
    options = {"lr_scheduler": "polynomial", "lr_end": 1e-4, "checkpointing_steps": 4, "random_scale": 1.2}
    options |= {"max_train_steps": 8, "train_batch_size": 2}  # codes are replaced after the resume
    whole = train(tmp_path / "whole", architecture, **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    assert same(whole, train(tmp_path / "resumed", architecture, **options, resume_from_checkpoint="latest"))
    assert not same(whole, train(tmp_path / "other", architecture, **options, seed=1))
    size = {"vqmodel": "num_vq_embeddings", "titok": "codebook_size"}[architecture]
    bigger = json.dumps(TINY[architecture] | {size: 16})
    with pytest.raises(ValueError, match=size):
        train(tmp_path / "resumed", architecture, **options, resume_from_checkpoint="latest", model_config=bigger)


@both
def test_it_learns(train, tmp_path, architecture):
    """Catches a sign, a loss of something else, or a guard that keeps the worst weights."""
    options = {"max_train_steps": 30, "validation_steps": 10, "guard": "psnr", "learning_rate": 3e-3}
    train(tmp_path / "out", architecture, **options)
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())
    train(tmp_path / "one", architecture, max_train_steps=1)
    before = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert after["val/psnr"] > before["val/psnr"] + 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "exactly one of --dataset_name and --train_data_dir"),
        (["--dataset_name", "emoji", "--streaming"], "--streaming"),
        (["--dataset_name", "emoji", "--perceptual", "resnet50"], "--perceptual: invalid choice"),
        (["--dataset_name", "emoji", "--perceptual_weight", "-1"], "--perceptual_weight -1.0 must be at least 0"),
        (["--dataset_name", "emoji", "--perceptual_weights", "a"], "--perceptual none has none"),
        (["--dataset_name", "emoji", "--gradient_checkpointing"], "a peer has none"),
        (["--dataset_name", "emoji", "--compile"], "no repeated blocks"),
        (["--dataset_name", "emoji", "--max_bad_fraction", "1.5"], "--max_bad_fraction 1.5"),
        (["--dataset_name", "emoji", "--resolution", "0"], "--resolution 0 must be at least 1"),
        (["--dataset_name", "emoji", "--learning_rate", "0"], "--learning_rate 0.0"),
        (["--dataset_name", "emoji", "--architecture", "vqgan"], "--architecture: invalid choice: 'vqgan'"),
    ],
)
def test_wrong_options(script, capsys, tmp_path, argv, message):
    """Catches a wrong combination of options that is found out only after hours, or without a word on which."""
    with pytest.raises(SystemExit):
        script.parse_args(["--output_dir", str(tmp_path), *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "changes", "options", "message"),
    [
        ("vqmodel", {"codebook": 8}, {}, r"no fields \['codebook'\]"),
        (
            "vqmodel",
            {"up_block_types": ["UpDecoderBlock2D"]},
            {},
            "up_block_types has 1 entries, block_out_channels 2",
        ),
        ("vqmodel", {"in_channels": 1}, {}, "in_channels and out_channels must be 3"),
        ("vqmodel", {"lookup_from_codebook": True}, {}, "lookup_from_codebook"),
        ("vqmodel", {}, {"resolution": 33}, "--resolution 33 must be a multiple of 2"),
        ("vqmodel", {}, {"resolution": 16}, "--resolution 16: lpips-alex needs at least 31 pixels"),
        ("titok", {"codebook": 8}, {}, r"TiTokModel has no fields \['codebook'\]"),
        ("titok", {"patch_size": 5}, {}, "patch_size=5 must divide sample_size=32"),
        ("titok", {}, {"resolution": 40}, "--resolution 40: the model takes its sample_size of 32 only"),
        ("titok", {"sample_size": 16}, {}, "--resolution 16: lpips-alex needs at least 31 pixels"),
    ],
)
def test_wrong_models(train, tmp_path, architecture, changes, options, message):
    """Catches a model that cannot learn these images, or cannot be measured, and an unknown field passed over."""
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", architecture, model_config=json.dumps(TINY[architecture] | changes), **options)


def test_a_missing_package_is_told_before_anything_is_written(train, tmp_path, monkeypatch):
    """Catches data that are prepared, or an output folder, for a model that cannot be made."""
    monkeypatch.setitem(sys.modules, "titok_pytorch", None)
    with pytest.raises(ImportError, match="pip install"):
        train(tmp_path / "out", "titok")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


# The study's presets


def read_preset(script, name: str):
    config = str(STUDY / "peers" / f"{name}.yaml")
    return script.parse_args(["--config", config, "--output_dir", "out", "--train_data_dir", "images"])


def comments(name: str) -> str:
    lines = (STUDY / "peers" / f"{name}.yaml").read_text().split("\n")
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_study_s(script, name):
    """Catches a peer of other bits, work, images or schedule than FlowMo's, or a figure its comment has outlived."""
    bits_per_pixel, perceptual = PRESETS[name]
    args = read_preset(script, name)
    peer, rate = name.split("_")[:2]
    assert args.architecture == {"vq": "vqmodel", "titok": "titok"}[peer]
    with torch.device("meta"):
        model = MODELS[args.architecture](**args.model_config)
    if peer == "vq":
        positions = (32 // 2 ** (len(model.config.block_out_channels) - 1)) ** 2
        codes = positions * math.log2(model.config.num_vq_embeddings)
    else:
        codes = model.config.num_latent_tokens * math.log2(model.config.codebook_size)
    assert codes == bits_per_pixel * 32**2 and model.config.sample_size == 32
    assert args.perceptual == perceptual

    flowmo = load_script("train_flowmo").parse_args(
        [
            "--config",
            str(STUDY / "tokenizer" / f"{rate}_1a.yaml"),
            "--output_dir",
            "out",
            "--train_data_dir",
            "images",
        ]
    )
    shared = (
        *("train_batch_size", "max_train_steps", "lr_scheduler", "lr_power", "lr_warmup_steps", "mixed_precision"),
        *("ema_decay", "ema_update_every", "num_validation_images", "seed", "guard", "adam_beta1", "adam_beta2"),
        *("random_flip", "random_scale", "center_crop", "perceptual_weight", "max_grad_norm"),
    )
    assert {option: getattr(args, option) for option in shared} == {o: getattr(flowmo, o) for o in shared}
    assert args.lr_end / args.learning_rate == pytest.approx(flowmo.lr_end / flowmo.learning_rate)
    with torch.device("meta"):
        config = FlowMoAutoencoder(**flowmo.model_config).config
    work = peer_training_flops(type(model), model.config, 32, 32)
    assert work == pytest.approx(pretraining_flops(config, 32, 32), rel=0.05)

    if perceptual == "none":
        millions, giga, bits = re.findall(
            r"([\d.]+) M parameters, ([\d.]+) GFLOP an image .* = (\d+) bits", comments(name)
        )[0]
        assert float(millions) == pytest.approx(model.num_parameters() / 1e6, abs=0.005)
        assert float(giga) == pytest.approx(work / 1e9, abs=0.005)
        assert int(bits) == codes


def test_there_are_no_other_presets():
    """Catches a preset that nothing holds to the study."""
    assert {path.stem for path in (STUDY / "peers").iterdir()} == PRESETS.keys()
