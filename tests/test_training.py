"""The training script, run for real on the embedded images with a tiny model."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from flowmo_diffusers import FlowMoPipeline


SCRIPT = Path(__file__).parents[1] / "training" / "train_flowmo.py"
CONFIGS = SCRIPT.parent / "configs"
TINY = {
    "sample_size": 32,
    "patch_size": 8,
    "num_latent_tokens": 8,
    "latent_channels": 6,
    "codebook_bits": 3,
    "encoder_num_layers": 1,
    "decoder_num_layers": 1,
    "encoder_hidden_size": 64,
    "decoder_hidden_size": 64,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_flowmo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(script, tmp_path):
    """Runs the script in this process: `train(output_dir, option=value, flag=True)`."""

    def run(output_dir, **options):
        options = {
            "dataset_name": "emoji",
            "model_config": None if "pretrained_model_name_or_path" in options else json.dumps(TINY),
            "cache_dir": tmp_path / "cache",
            "perceptual": "lpips-alex",
            "train_batch_size": 4,
            "max_train_steps": 4,
            "num_validation_images": 4,
            "num_inference_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "mixed_precision": "no",
            "ema_decay": 0.5,
            "ema_update_every": 1,
        } | options
        argv = ["--output_dir", str(output_dir)]
        for name, value in options.items():
            if value is not None:
                argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main(script.parse_args(argv))
        return load_file(Path(output_dir) / "autoencoder" / "diffusion_pytorch_model.safetensors")

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_both_stages(train, tmp_path):
    """A stage that does not run, leaves no loadable folder, no figures or no picture, or trains what it must not."""
    first = train(tmp_path / "pre", max_train_steps=3)
    pipeline = FlowMoPipeline.from_pretrained(tmp_path / "pre")
    assert pipeline.autoencoder.config.num_latent_tokens == TINY["num_latent_tokens"]
    metrics = json.loads((tmp_path / "pre" / "metrics.json").read_text())
    assert metrics["steps"] == 3 and metrics["images"] == 4
    assert 0 < metrics["val/psnr"] < 60 and metrics["val/lpips-alex"] > 0
    assert PIL.Image.open(tmp_path / "pre" / "validation" / "pretrain-0000003.png").width > 300
    assert list((tmp_path / "pre" / "logs").rglob("events.out.tfevents*"))
    assert not list((tmp_path / "pre").glob(".partial-*"))

    second = train(tmp_path / "post", stage="posttrain", pretrained_model_name_or_path=tmp_path / "pre", chain_steps=2)
    for name in first:
        changed = not torch.equal(first[name], second[name])
        if name.startswith("encoder."):
            assert not changed, f"{name} is frozen in post-training"
    assert sum(not torch.equal(first[n], second[n]) for n in first if n.startswith("decoder.")) > 10
    FlowMoPipeline.from_pretrained(tmp_path / "post")


def test_pretraining_trains_everything(train, tmp_path):
    """A parameter that the optimiser was never given."""
    few, more = train(tmp_path / "few", max_train_steps=1), train(tmp_path / "more", max_train_steps=4)
    assert all(not torch.equal(few[name], more[name]) for name in few)


def test_same_seed_same_weights(train, tmp_path):
    """Training that depends on anything but its options: workers, global random state, or time."""
    reference = train(tmp_path / "a", max_train_steps=2)
    torch.manual_seed(123)
    assert same(reference, train(tmp_path / "b", max_train_steps=2, dataloader_num_workers=2))
    assert not same(reference, train(tmp_path / "c", max_train_steps=2, seed=1))


def test_resumed_run_is_the_same_run(train, tmp_path):
    """A resume that loses the optimiser, the EMA, the schedule, the norms, the draws or the place in the data."""
    options = {"lr_scheduler": "polynomial", "lr_end": 1e-4, "checkpointing_steps": 2, "random_scale": 1.2}
    whole = train(tmp_path / "whole", **options)
    assert [path.name for path in sorted((tmp_path / "whole").glob("checkpoint-*"))] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train(tmp_path / "resumed", **options, resume_from_checkpoint="latest")
    assert same(whole, resumed)


def test_gradient_accumulation_and_precision(train, tmp_path):
    """Accumulation, bf16, checkpointing of activations or a frozen encoder that stop a run or give no finite model."""
    weights = train(
        tmp_path / "out",
        gradient_accumulation_steps=2,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        freeze_encoder_steps=1,
        max_grad_norm=1.0,
        max_train_steps=2,
    )
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    one = train(tmp_path / "one", freeze_encoder_steps=1, max_train_steps=1, ema_decay=0.0)
    two = train(tmp_path / "two", freeze_encoder_steps=1, max_train_steps=2, ema_decay=0.0)
    moved = {name: (one[name] - two[name]).abs().max().item() for name in one}
    assert max(distance for name, distance in moved.items() if name.startswith("encoder.")) < 1e-6
    assert max(distance for name, distance in moved.items() if name.startswith("decoder.")) > 1e-4


@pytest.mark.parametrize("kind", ["kl", "fsq", "none"])
def test_other_quantizers(train, tmp_path, kind):
    """A quantizer whose terms the objective does not know what to do with."""
    config = TINY | {"quantizer": kind, "fsq_levels": 8}
    train(tmp_path / "out", model_config=json.dumps(config), max_train_steps=1)
    assert FlowMoPipeline.from_pretrained(tmp_path / "out").autoencoder.config.quantizer == kind


def test_own_folder(train, tmp_path):
    """A user's folder of images of any size and mode that does not train, or held-out images that are trained on."""
    for i, mode in enumerate(["RGB", "L", "RGBA", "P"] * 3):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.effect_noise((40 + i, 60), 50).convert(mode).save(path)
    train(tmp_path / "out", dataset_name=None, train_data_dir=tmp_path / "images", max_train_steps=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "posttrain", "--dataset_name", "emoji"], "--pretrained_model_name_or_path"),
        (["--stage", "posttrain", "--dataset_name", "emoji", "--pretrained_model_name_or_path", "x"]
         + ["--perceptual", "none"], "--perceptual none"),
        ([], "--dataset_name and --train_data_dir"),
        (["--dataset_name", "emoji", "--train_data_dir", "x"], "--dataset_name and --train_data_dir"),
        (["--dataset_name", "emoji", "--model_config", "{}", "--pretrained_model_name_or_path", "x"], "not both"),
        (["--dataset_name", "emoji", "--max_train_steps", "0"], "--max_train_steps 0"),
        (["--dataset_name", "emoji", "--lr_end", "0.1"], "--lr_scheduler polynomial"),
        (["--dataset_name", "emoji", "--random_scale", "0.5"], "--random_scale"),
        (["--dataset_name", "emoji", "--config", "absent.yaml"], "absent.yaml"),
    ],
)  # fmt: skip
def test_wrong_options(script, capsys, tmp_path, argv, message):
    """A wrong combination of options found out only after hours, or without a word on which."""
    with pytest.raises(SystemExit):
        script.parse_args(["--output_dir", str(tmp_path), *argv])
    assert message in capsys.readouterr().err


def test_missing_perceptual_weights(train, tmp_path, monkeypatch):
    """A missing network that is silently left out of the loss instead of being asked for."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(OSError, match="vgg16-397923af.pth.*--perceptual_weights"):
        train(tmp_path / "out", perceptual="lpips-vgg")


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("stage", ["pretrain", "posttrain"])
def test_presets_parse(script, tmp_path, config, stage):
    """A preset with a misspelt option, or a stage's section that does not reach its run."""
    argv = ["--config", str(config), "--stage", stage, "--output_dir", str(tmp_path)]
    if stage == "posttrain":
        argv += ["--pretrained_model_name_or_path", "pre"]
    args = script.parse_args([*argv, "--seed", "7"])
    assert args.seed == 7
    assert args.learning_rate < 0.01 and isinstance(args.learning_rate, float)


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    """The command of the README: a script that runs only inside this test's process."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", str(SCRIPT)]
    command += ["--dataset_name", "emoji", "--output_dir", str(tmp_path / "out"), "--model_config", json.dumps(TINY)]
    command += ["--perceptual", "lpips-alex", "--max_train_steps", "2", "--train_batch_size", "4"]
    command += ["--num_validation_images", "2", "--num_inference_steps", "2", "--cache_dir", str(tmp_path / "cache")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    FlowMoPipeline.from_pretrained(tmp_path / "out")
