"""The training script on several processes, and in several ways on one: the same run each time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from processes import launched, shard_blocks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


TINY = {
    "sample_size": 32,
    "patch_size": 8,
    "num_latent_tokens": 8,
    "latent_channels": 6,
    "codebook_bits": 3,
    "encoder_num_layers": 2,
    "decoder_num_layers": 2,
    "encoder_hidden_size": 64,
    "decoder_hidden_size": 64,
    "num_attention_heads": 2,
}
OPTIONS = {
    "dataset_name": "emoji",
    "model_config": json.dumps(TINY),
    "perceptual": "lpips-alex",
    "train_batch_size": 8,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "num_validation_images": 3,
    "num_inference_steps": 2,
    "validation_steps": 2,
    "guard": "psnr",
    "logging_steps": 1,
    "random_scale": 1.2,
    "max_grad_norm": 1.0,
    "ema_decay": 0.5,
    "ema_update_every": 1,
    "mixed_precision": "no",
    "entropy_weight": 0.1,  # more than the paper's, so that a wrong entropy shows in the weights
}


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """`run(folder, processes, option=value, flag=True)`: the losses by step, the trained weights and the figures."""
    cache = tmp_path_factory.mktemp("cache")

    def run(folder, processes=1, start=None, **options):
        argv = ["--output_dir", str(folder), "--cache_dir", str(cache)]
        for name, value in (OPTIONS | options).items():
            if value is not None:
                argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        args = script.parse_args(argv)
        AcceleratorState._reset_state(reset_partial_state=True)
        if processes == 1:
            script.main(args)
            AcceleratorState._reset_state(reset_partial_state=True)
        else:
            debug_launcher(launched, (script.main, args, start), num_processes=processes)
        events = EventAccumulator(str(Path(folder, "logs", "flowmo")))
        events.Reload()
        losses = {
            name.removeprefix("train/"): torch.tensor([event.value for event in events.Scalars(name)])
            for name in events.Tags()["scalars"]
            if name.startswith("train/") and ("loss" in name or "entropy" in name or "norm" in name)
        }
        weights = load_file(Path(folder) / "autoencoder" / "diffusion_pytorch_model.safetensors")
        return losses, weights, json.loads((Path(folder) / "metrics.json").read_text())

    return run


def assert_same_run(ours, theirs, tolerance=1e-4):
    losses, weights, figures = ours
    expected_losses, expected_weights, expected_figures = theirs
    assert losses.keys() == expected_losses.keys() and len(losses) >= 5
    for name, values in expected_losses.items():
        torch.testing.assert_close(losses[name], values, rtol=tolerance, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, weight in expected_weights.items():
        assert (weights[name] - weight).abs().max() < tolerance, name
    assert figures["steps"] == expected_figures["steps"]
    assert figures["val/psnr"] == pytest.approx(expected_figures["val/psnr"], abs=1e-2)


@pytest.fixture(scope="module")
def joint(run, tmp_path_factory):
    """One process with the joint batch."""
    return run(tmp_path_factory.mktemp("joint"), train_batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_are_one(run, joint, tmp_path, workers):
    """Processes that see the same images or noise, average wrongly, or take an entropy or a figure of their part."""
    assert_same_run(run(tmp_path, 2, global_entropy=True, dataloader_num_workers=workers), joint)


def test_accumulated_batches_are_one(run, joint, tmp_path):
    """Accumulation that forgets to divide, draws anew, or takes each batch's own entropy."""
    options = {"train_batch_size": 4, "gradient_accumulation_steps": 4}
    assert_same_run(run(tmp_path, **options, global_entropy=True), joint)


@pytest.mark.slow
def test_two_processes_that_accumulate_are_one(run, joint, tmp_path):
    """Accumulation and processes that do not combine."""
    options = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_same_run(run(tmp_path, 2, **options, global_entropy=True), joint)


def test_entropy_of_a_part_is_another(run, joint, tmp_path):
    """A joint entropy that makes no difference, so that the tests above could not fail."""
    losses, _, _ = run(tmp_path, train_batch_size=4, gradient_accumulation_steps=4)
    assert (losses["codebook_entropy"] - joint[0]["codebook_entropy"]).abs().max() > 1e-3


@pytest.mark.slow
def test_posttraining_on_two_processes(run, joint, tmp_path, tmp_path_factory):
    """Stage 1B whose chain or noise depends on how the batch is spread, or hangs with several passes a step."""
    run(tmp_path / "pre", max_train_steps=1, validation_steps=0)
    options = {
        "stage": "posttrain",
        "model_config": None,
        "pretrained_model_name_or_path": tmp_path / "pre",
        "chain_steps": 2,
        "perceptual_weight": 1.0,
        "global_entropy": True,
    }
    one = run(tmp_path / "one", **options)
    assert_same_run(run(tmp_path / "two", 2, **options, train_batch_size=4), one)


@pytest.mark.slow
def test_distillation_on_two_processes(run, tmp_path):
    """Stage 1C whose processes take different numbers of steps, or spoil each other's kept samples."""
    run(tmp_path / "pre", max_train_steps=1, validation_steps=0)
    options = {"stage": "distill", "model_config": None, "pretrained_model_name_or_path": tmp_path / "pre"}
    options |= {"teacher_num_inference_steps": 3, "center_crop": True, "no-random_flip": True, "random_scale": None}
    one = run(tmp_path / "one", **options, teacher_cache=tmp_path / "a")
    assert_same_run(run(tmp_path / "two", 2, **options, teacher_cache=tmp_path / "b", train_batch_size=4), one)


@pytest.mark.slow
def test_encoder_frozen_on_the_way(run, tmp_path):
    """Processes that wait for the gradients of an encoder that was frozen, or differ from one process after it."""
    options = {"freeze_encoder_steps": 2, "global_entropy": True}
    one = run(tmp_path / "one", **options)
    assert_same_run(run(tmp_path / "two", 2, **options, train_batch_size=4), one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "posttrain"])
def test_sharded_by_fsdp2(run, tmp_path, stage):
    """Sharded weights whose norms, averages, clipping, validation, checkpoints or export are of a shard only."""
    options = {"checkpointing_steps": 2, "freeze_encoder_steps": 1, "global_entropy": True}
    if stage == "posttrain":
        run(tmp_path / "pre", max_train_steps=1, validation_steps=0)
        options |= {"stage": stage, "model_config": None, "pretrained_model_name_or_path": tmp_path / "pre"}
        options |= {"chain_steps": 2, "perceptual_weight": 1.0}
    one = run(tmp_path / "one", **options)
    assert_same_run(run(tmp_path / "two", 2, shard_blocks, **options, train_batch_size=4), one)

    # Killed at step 3, resumed from step 2, with the encoder frozen since.
    shutil.copytree(tmp_path / "two", tmp_path / "again", ignore=shutil.ignore_patterns("checkpoint-4", "logs"))
    options |= {"resume_from_checkpoint": "latest"}
    last_steps = {name: values[2:] for name, values in one[0].items()}
    assert_same_run(run(tmp_path / "again", 2, shard_blocks, **options, train_batch_size=4), (last_steps, *one[1:]))
