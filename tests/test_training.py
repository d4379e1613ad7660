"""The training script, run for real on the embedded images with a tiny model."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmo_diffusers import FlowMoPipeline
from flowmo_diffusers.assets import starter


SCRIPT = Path(__file__).parents[1] / "training" / "train_flowmo.py"
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


def test_distillation(train, tmp_path):
    """A student that is not its teacher's copy at first, trains the encoder, or leaves no recipe of its own; and steps
    of the student that are drawn anew when a run goes on."""
    first = train(tmp_path / "pre", max_train_steps=3)
    options = {
        "stage": "distill",
        "pretrained_model_name_or_path": tmp_path / "pre",
        "teacher_num_inference_steps": 3,
        "num_inference_steps": None,
        "guard": "none",
        "checkpointing_steps": 2,
    }
    second = train(tmp_path / "few", **options)
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and all(name.startswith("decoder.") for name in moved)
    pipeline = FlowMoPipeline.from_pretrained(tmp_path / "few")
    recipe = pipeline.scheduler.config
    assert (recipe.num_inference_steps, recipe.guidance_scale, recipe.rho) == (4, 1.0, 4.0)
    assert pipeline.num_forwards() == 4
    card = (tmp_path / "few" / "README.md").read_text()
    assert "stage 1C" in card and "reconstructed in 4 steps (4 forwards of the decoder)" in card

    shutil.copytree(tmp_path / "few" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert same(second, train(tmp_path / "again", **options, resume_from_checkpoint="latest"))


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


def make_images(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        PIL.Image.effect_noise((40 + i, 60), 50).convert("RGB").save(folder / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("streaming", [None, True])
def test_tar_shards(train, tmp_path, streaming):
    """Shards that the script cannot read in place, or as a stream."""
    images = sorted(make_images(tmp_path / "images").iterdir())
    for shard in range(3):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for image in images[shard::3]:
                tar.add(image, image.name)
    shards = tmp_path / "train-{0..2}.tar"
    options = {"shuffle_buffer": 4, "streaming": streaming, "num_validation_images": 2, "dataloader_num_workers": 2}
    train(tmp_path / "out", dataset_name=None, train_data_dir=shards, max_train_steps=3, **options)
    assert {path.name for path in tmp_path.glob("*.tar")} == {f"train-{shard}.tar" for shard in range(3)}


def test_bad_images(train, tmp_path, caplog):
    """A broken file that stops a run, is passed over without its name, or does not stop a run when there are many."""
    folder = make_images(tmp_path / "images")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:900])
    options = {"dataset_name": None, "train_data_dir": folder, "num_validation_images": 1}
    train(tmp_path / "few", **options, max_bad_fraction=0.1)
    assert scalars(tmp_path / "few")["train/bad_images"][-1] == 1
    assert "05.png" in caplog.text
    with pytest.raises(OSError, match=r"1 of 11 images cannot be used.*--max_bad_fraction.*05.png"):
        train(tmp_path / "many", **options, max_bad_fraction=0.05)


def scalars(output_dir: Path) -> dict[str, list[float]]:
    """What TensorBoard shows, by name."""
    events = EventAccumulator(str(output_dir / "logs" / "flowmo"))
    events.Reload()
    assert events.Tags()["images"] == ["validation"]
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_student_learns_its_teacher(train, tmp_path):
    """A loss that does not bring the student's single step nearer to what its teacher makes of the same noise."""
    train(tmp_path / "pre", max_train_steps=20)
    options = {"stage": "distill", "pretrained_model_name_or_path": tmp_path / "pre", "teacher_num_inference_steps": 8}
    options |= {"student_steps": 1, "flow_weight": 0, "perceptual": "none", "guard": "none"}
    train(tmp_path / "few", **options, max_train_steps=60, train_batch_size=8)
    distances = scalars(tmp_path / "few")["train/sample_loss"]
    assert sum(distances[-5:]) < 0.7 * sum(distances[:5])


def test_a_teacher_asked_once(train, script, tmp_path, monkeypatch):
    """Samples that are computed again, differ from those computed, or are taken from another teacher."""
    folder = make_images(tmp_path / "images")
    data = {"dataset_name": None, "train_data_dir": folder, "num_validation_images": 1}
    train(tmp_path / "pre", **data, max_train_steps=3)
    options = {"stage": "distill", "pretrained_model_name_or_path": tmp_path / "pre", "teacher_num_inference_steps": 3}
    options |= {"guard": "none", "center_crop": True, "no-random_flip": True, "teacher_cache": tmp_path / "cached"}
    first = train(tmp_path / "first", **data, **options, max_train_steps=5)  # of 4 images, of which there are 11

    class Absent(FlowMoPipeline):
        def decode(self, *args, **kwargs):
            raise AssertionError("the teacher was asked again")

    build = script.build_teacher

    def absent(*args):
        teacher = build(*args)
        return Absent(teacher.autoencoder, teacher.scheduler)

    with monkeypatch.context() as patched:
        patched.setattr(script, "build_teacher", absent)
        assert same(first, train(tmp_path / "second", **data, **options, max_train_steps=5))
    with pytest.raises(ValueError, match="cached holds the samples of another teacher.*sampler"):
        train(tmp_path / "third", **data, **options | {"teacher_num_inference_steps": 4})


def test_codes_that_change_have_no_cache(train, tmp_path):
    """Samples of one draw of a Gaussian's codes that are taken for another draw's."""
    gaussian = json.dumps(TINY | {"quantizer": "kl"})
    train(tmp_path / "pre", model_config=gaussian, max_train_steps=1)
    options = {
        "stage": "distill",
        "pretrained_model_name_or_path": tmp_path / "pre",
        "teacher_cache": tmp_path / "kept",
    }
    with pytest.raises(ValueError, match="--teacher_cache: quantizer='kl'"):
        train(tmp_path / "few", **options, **{"center_crop": True, "no-random_flip": True})


def test_what_is_logged(train, tmp_path):
    """A figure that users steer a run by and that is not logged, or is not a number."""
    train(tmp_path / "out", validation_steps=2)
    logged = scalars(tmp_path / "out")
    losses = {"loss", "flow_loss", "perceptual_loss", "entropy_loss", "commit_loss", "codebook_entropy"}
    speed = {"images_per_second", "data_wait_share", "peak_memory_gib", "tflops_per_second", "seconds_per_step"}
    for name in losses | speed | {"gradient_norm", "lr", "skipped_steps", "bad_images"}:
        assert len(logged[f"train/{name}"]) == 4 and all(map(math.isfinite, logged[f"train/{name}"])), name
    for name in ("psnr", "lpips-alex", "dead_bits", "used_codes", "entropy_bits", "bit_imbalance"):
        assert len(logged[f"val/{name}"]) == 2 and all(map(math.isfinite, logged[f"val/{name}"])), name
    assert 0 <= min(logged["train/data_wait_share"]) <= max(logged["train/data_wait_share"]) <= 1


def test_weights_and_biases(train, tmp_path, monkeypatch):
    """Pictures or figures in a form that Weights & Biases refuses."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "out", report_to="wandb", max_train_steps=2)
    (run,) = (tmp_path / "out" / "logs" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb")) and list((run / "files" / "media" / "images").glob("validation_*.png"))


def test_best_weights_are_kept_apart(train, tmp_path):
    """
    Reward hacking that goes on to the end, or whose result is published: stage 1B with a sample weight far too large
    gains on what it optimises and loses on what it does not.
    """
    options = {"pretrained_model_name_or_path": starter(), "stage": "posttrain", "chain_steps": 2}
    options |= {"perceptual_weight": 3000.0, "learning_rate": 1e-3, "num_inference_steps": 4, "ema_decay": 0.0}
    out = tmp_path / "out"
    train(out, **options, max_train_steps=20, validation_steps=1, early_stopping_patience=3, guard="psnr")
    logged = scalars(out)
    psnr = logged["val/psnr"]
    best = max(range(len(psnr)), key=psnr.__getitem__)
    assert len(psnr) == best + 4 < 20
    assert psnr[-1] < psnr[best] - 0.5
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == best and metrics["val/psnr"] == pytest.approx(psnr[best])
    name = "autoencoder/diffusion_pytorch_model.safetensors"
    assert same(load_file(out / name), load_file(out / "best" / name))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_steps_that_are_not_finite(train, script, tmp_path, monkeypatch, caplog, bad):
    """One overflow that ruins the weights for good, or a run of nothing else that goes on for days."""
    plain, calls = script.pretraining_loss, itertools.count()

    def sometimes_bad(*args):
        losses = plain(*args)
        if next(calls) in bad_calls:
            # The gradient of sqrt at 0 is infinite, its value is not.
            factor = math.nan if bad == "loss" else 1 + torch.sqrt(losses["loss"] * 0)
            losses["loss"] = losses["loss"] * factor
        return losses

    monkeypatch.setattr(script, "pretraining_loss", sometimes_bad)
    bad_calls = {1, 2}
    weights = train(tmp_path / "some", max_train_steps=4, max_skipped_steps=2)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    logged = scalars(tmp_path / "some")
    assert logged["train/skipped_steps"] == [0, 1, 2, 2] and len(logged["train/loss"]) == 2

    calls, bad_calls = itertools.count(), {4, 5, 6, 7, 8}
    with pytest.raises(FloatingPointError, match="3 steps in a row, the last of them step 7"):
        train(tmp_path / "many", max_train_steps=20, max_skipped_steps=2, checkpointing_steps=3)
    assert "stopped at step 7; the last good checkpoint is" in caplog.text and "checkpoint-6" in caplog.text


def test_output_folder_of_another_run(train, tmp_path):
    """A new run among the checkpoints of an old one, of which "latest" would later be."""
    train(tmp_path / "out", max_train_steps=2, checkpointing_steps=1)
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest goes on with it"):
        train(tmp_path / "out", max_train_steps=2)
    with pytest.raises(ValueError, match="learning_rate is 0.001 there and 0.002 here"):
        train(tmp_path / "out", max_train_steps=2, learning_rate=2e-3, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="--max_train_steps 1 is less"):
        train(tmp_path / "out", max_train_steps=1, resume_from_checkpoint="latest")
    train(tmp_path / "out", max_train_steps=3, train_batch_size=2, gradient_accumulation_steps=2,
          resume_from_checkpoint="latest")  # fmt: skip


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
        (["--dataset_name", "emoji", "--lr_scheduler", "cosin"], "cosine_with_restarts"),
        (["--dataset_name", "emoji", "--lr_warmup_steps", "5"], "constant_with_warmup"),
        (["--dataset_name", "emoji", "--report_to", "clearml"], "--report_to clearml"),
        (["--dataset_name", "emoji", "--guard", "lpips-alex", "--perceptual", "lpips-alex"], "--guard lpips-alex"),
        (["--dataset_name", "emoji", "--guard", "a/net", "--perceptual", "b/net"], "--guard a/net"),
        (["--dataset_name", "emoji", "--early_stopping_patience", "2"], "--early_stopping_patience needs a --guard"),
        (["--dataset_name", "emoji", "--max_bad_fraction", "1.5"], "--max_bad_fraction 1.5"),
        (["--dataset_name", "emoji", "--ema_decay", "1"], "--ema_decay 1.0"),
        (["--dataset_name", "emoji", "--streaming"], "--streaming"),
        (["--dataset_name", "emoji", "--learning_rate", "0"], "--learning_rate 0.0"),
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
