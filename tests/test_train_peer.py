"""The script that trains the peer, run for real on the embedded images with a tiny model; and the study's presets."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import VQModel
from peers import TINY_VQMODEL
from safetensors.torch import load_file
from scripts import load_script

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.objectives.cost import peer_training_flops, pretraining_flops


STUDY = Path(__file__).parents[1] / "training" / "configs" / "study"
PRESETS = {
    "vq_lo": (1, "none"),
    "vq_lo_lpips": (1, "lpips-alex"),
    "vq_hi": (3, "none"),
    "vq_hi_lpips": (3, "lpips-alex"),
}


@pytest.fixture(scope="module")
def script():
    return load_script("train_peer")


@pytest.fixture
def train(script, tmp_path):
    """Runs the script in this process: `train(output_dir, option=value, flag=True)`."""

    def run(output_dir, **options):
        options = {
            "dataset_name": "emoji",
            "model_config": json.dumps(TINY_VQMODEL),
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


def test_the_folder_is_a_vqmodel_s(train, tmp_path):
    """Catches weights that diffusers cannot load, figures that are missing, or a parameter that is not trained."""
    few = train(tmp_path / "few", max_train_steps=1)
    more = train(tmp_path / "more", perceptual="lpips-alex", mixed_precision="bf16")
    model, info = VQModel.from_pretrained(tmp_path / "more", use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(dict(model.state_dict()), more) and model.config.num_vq_embeddings == 8
    assert all(tensor.isfinite().all() and not torch.equal(tensor, few[name]) for name, tensor in more.items())
    metrics = json.loads((tmp_path / "more" / "metrics.json").read_text())
    assert (metrics["stage"], metrics["steps"], metrics["images"]) == ("vqmodel", 4, 4)
    assert 0 < metrics["val/psnr"] < 60 and metrics["val/lpips-alex"] > 0
    assert 1 <= metrics["val/used_codes"] <= metrics["val/usable_codes"] == 8
    assert metrics["val/max_entropy_bits"] == 3
    assert (tmp_path / "more" / "validation" / "vqmodel-0000004.png").is_file()


def test_resumed_run_is_the_same_run(train, tmp_path):
    """Catches a resume that loses the optimiser, the EMA, the schedule or the place; another run's seed."""
    options = {"lr_scheduler": "polynomial", "lr_end": 1e-4, "checkpointing_steps": 2, "random_scale": 1.2}
    whole = train(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert same(whole, train(tmp_path / "resumed", **options, resume_from_checkpoint="latest"))
    assert not same(whole, train(tmp_path / "other", **options, seed=1))
    bigger = json.dumps(TINY_VQMODEL | {"num_vq_embeddings": 16})
    with pytest.raises(ValueError, match="num_vq_embeddings"):
        train(tmp_path / "resumed", **options, resume_from_checkpoint="latest", model_config=bigger)


def test_it_learns(train, tmp_path):
    """Catches a sign, a loss of something else, or a guard that keeps the worst weights."""
    options = {"max_train_steps": 30, "validation_steps": 10, "guard": "psnr", "learning_rate": 3e-3}
    train(tmp_path / "out", **options)
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())
    train(tmp_path / "one", max_train_steps=1)
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
        (["--dataset_name", "emoji", "--gradient_checkpointing"], "a VQModel has none"),
        (["--dataset_name", "emoji", "--compile"], "no repeated blocks"),
        (["--dataset_name", "emoji", "--max_bad_fraction", "1.5"], "--max_bad_fraction 1.5"),
        (["--dataset_name", "emoji", "--resolution", "0"], "--resolution 0 must be at least 1"),
        (["--dataset_name", "emoji", "--learning_rate", "0"], "--learning_rate 0.0"),
    ],
)
def test_wrong_options(script, capsys, tmp_path, argv, message):
    """Catches a wrong combination of options that is found out only after hours, or without a word on which."""
    with pytest.raises(SystemExit):
        script.parse_args(["--output_dir", str(tmp_path), *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"codebook": 8}, {}, r"no fields \['codebook'\]"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, {}, "up_block_types has 1 entries, block_out_channels 2"),
        ({"in_channels": 1}, {}, "in_channels and out_channels must be 3"),
        ({"lookup_from_codebook": True}, {}, "lookup_from_codebook"),
        ({}, {"resolution": 33}, "--resolution 33 must be a multiple of 2"),
        ({}, {"resolution": 16}, "--resolution 16: lpips-alex needs at least 31 pixels"),
    ],
)
def test_wrong_models(train, tmp_path, changes, options, message):
    """Catches a model that cannot learn these images, or cannot be measured, and an unknown field passed over."""
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", model_config=json.dumps(TINY_VQMODEL | changes), **options)


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
    with torch.device("meta"):
        model = VQModel(**args.model_config)
    codes = (32 // 2 ** (len(model.config.block_out_channels) - 1)) ** 2 * math.log2(model.config.num_vq_embeddings)
    assert codes == bits_per_pixel * 32**2 and model.config.sample_size == 32
    assert args.perceptual == perceptual

    flowmo = load_script("train_flowmo").parse_args(
        [
            "--config",
            str(STUDY / "tokenizer" / f"{name[3:5]}_1a.yaml"),
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
    work = peer_training_flops(model.config, 32, 32)
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
