"""The script that trains a generator, run for real on the tokens of a tiny tokenizer."""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import debug_launcher
from processes import forget_accelerators, launched, shard_blocks
from safetensors.torch import load_file
from scripts import load_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmo_diffusers import FlowMoGenerationPipeline, FlowMoPipeline
from flowmo_diffusers.data.tokens import load_tokens
from flowmo_diffusers.metrics.class_samples import class_samples
from flowmo_diffusers.pipelines.loading import load_pipeline


TINY = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
IMAGES = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return folder


@pytest.fixture
def tokens(tiny_pipeline, tmp_path, images) -> Path:
    """The tiny tokenizer in `tokenizer`, and the images' tokens, mirrored ones too."""
    tiny_pipeline.save_pretrained(tmp_path / "tokenizer")
    script = load_script("tokenize_images")
    words = ("--pretrained_model_name_or_path", tmp_path / "tokenizer", "--dataset", images, "--flip")
    forget_accelerators()
    script.main(script.parse_args([str(word) for word in (*words, "--output_dir", tmp_path / "tokens")]))
    return tmp_path / "tokens"


@pytest.fixture
def train(tokens, tmp_path):
    """Runs the script in this process: `train(output_dir, option=value, flag=True)`; returns the weights."""
    script = load_script("train_generator")

    def run(output_dir: Path, launch=None, **options) -> dict[str, torch.Tensor]:
        options = {
            "train_tokens_dir": tokens,
            "tokenizer": tmp_path / "tokenizer",
            "model_config": json.dumps(TINY),
            "train_batch_size": 4,
            "max_train_steps": 4,
            "num_validation_images": 4,
            "num_inference_steps": 2,
            "decoder_num_inference_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 0,
            "mixed_precision": "no",
            "ema_decay": 0.5,
        } | options
        argv = ["--output_dir", str(output_dir)]
        for name, value in options.items():
            if value is not None:
                argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        forget_accelerators()
        args = script.parse_args(argv)
        script.main(args) if launch is None else launch(script, args)
        return load_file(Path(output_dir) / "generator" / "diffusion_pytorch_model.safetensors")

    yield run
    forget_accelerators()


def test_a_run_leaves_a_pipeline_with_its_figures(train, tmp_path):
    """A script that does not run, or leaves no loadable pipeline, figures, picture, losses or card."""
    out = tmp_path / "out"
    train(out, validation_steps=2)
    record = json.loads((out / "metrics.json").read_text())
    assert (record["stage"], record["steps"], record["images"]) == ("generator", 4, 8)  # with mirrored ones
    ratios = [record[f"val/token_loss_at_{ratio}"] for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert record["val/token_loss"] == pytest.approx(sum(ratios) / 5)
    assert record["val/bits_per_bit"] == pytest.approx(record["val/token_loss"] / math.log(8))
    assert sorted(path.name for path in (out / "validation").iterdir()) == [
        "generator-0000002.png",
        "generator-0000004.png",
    ]
    logged = EventAccumulator(str(out / "logs" / "flowmo")).Reload().Tags()["scalars"]
    assert {"train/loss", "train/token_loss", "train/accuracy", "train/lr", "val/token_loss_at_0.5"} <= set(logged)
    card = (out / "README.md").read_text()
    assert "FlowMoGenerationPipeline.from_pretrained" in card and "token loss at masking ratio 0.5" in card

    pipeline = load_pipeline(out)
    assert isinstance(pipeline, FlowMoGenerationPipeline)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(["dog", 0], num_inference_steps=2, decoder_num_inference_steps=1)
    assert output.images[0].size == (16, 16) and output.indices.shape == (2, 8, 2)
    tokenizer = FlowMoPipeline.from_pretrained(tmp_path / "tokenizer").autoencoder
    for name, weight in pipeline.autoencoder.state_dict().items():
        assert torch.equal(weight, tokenizer.state_dict()[name]), name


@pytest.mark.parametrize("order", ["masked", "autoregressive"])
def test_resumed_is_uninterrupted(train, tmp_path, order):
    """A resume that forgets the optimiser, the EMA or the place in the tokens."""
    options = {"model_config": json.dumps(TINY | {"order": order}), "num_inference_steps": None}
    whole = train(tmp_path / "whole", checkpointing_steps=2, **options)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", half / "checkpoint-2")
    resumed = train(half, resume_from_checkpoint="latest", **options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_it_learns_the_tokens(train, tmp_path):
    """Losses of the wrong groups, or an optimiser that does nothing: what is seen again and again is learned."""
    model = json.dumps(TINY | {"order": "autoregressive", "hidden_size": 64})
    options = {"model_config": model, "max_train_steps": 150, "learning_rate": 5e-3, "num_inference_steps": None}
    train(tmp_path / "out", train_batch_size=16, label_smoothing=0, logging_steps=10, **options)
    logged = EventAccumulator(str(tmp_path / "out" / "logs" / "flowmo")).Reload()
    losses = [event.value for event in logged.Scalars("train/token_loss")]
    assert losses[0] > 1.2 and losses[-1] < 0.6 * losses[0]


def test_accumulation_is_the_joint_batch(train, tmp_path):
    """Losses that weigh images differently in parts of a batch than in the whole."""
    whole = train(tmp_path / "whole", train_batch_size=4, max_train_steps=2)
    parts = train(tmp_path / "parts", train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=2)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4)


def test_the_guard_keeps_the_best(train, tmp_path):
    """A guard that is not looked at: the figures are those of the step it chose."""
    train(tmp_path / "out", guard="token_loss", validation_steps=1)
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    best = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    assert record == best


def test_training_goes_on_from_a_generator(train, tmp_path):
    """A pipeline to start from that is not read, or whose weights are not those trained on."""
    first = train(tmp_path / "first")
    start = {"pretrained_model_name_or_path": tmp_path / "first", "model_config": None}
    second = train(tmp_path / "second", max_train_steps=1, learning_rate=1e-9, ema_decay=0, **start)
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=1e-5)


def test_validation_of_another_split(train, tokens, tmp_path, images):
    """A split of its own for validation that is trained on, or not looked at."""
    script = load_script("tokenize_images")
    words = ("--pretrained_model_name_or_path", tmp_path / "tokenizer", "--dataset", images, "--split", "train")
    other = tmp_path / "others"
    shutil.copytree(images, other / "test")
    forget_accelerators()
    words = ("--pretrained_model_name_or_path", tmp_path / "tokenizer", "--dataset", other, "--split", "test")
    script.main(script.parse_args([str(word) for word in (*words, "--output_dir", tokens)]))
    train(tmp_path / "out", num_validation_images=5)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 5


def test_other_tokens_are_refused(train, tokens, tmp_path, tiny_pipeline):
    """Tokens of another tokenizer: they have the same form, and mean something else."""
    with torch.no_grad():
        tiny_pipeline.autoencoder.encoder.head.linear.weight += 0.1
    tiny_pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        train(tmp_path / "out", tokenizer=tmp_path / "other")


def test_the_decoder_may_be_trained_on(train, tmp_path, tiny_pipeline):
    """A tokenizer after stage 1B, which has changed the decoder alone, takes the tokens of stage 1A."""
    with torch.no_grad():
        tiny_pipeline.autoencoder.decoder.head.linear.weight += 0.1
    tiny_pipeline.save_pretrained(tmp_path / "posttrained")
    train(tmp_path / "out", tokenizer=tmp_path / "posttrained", max_train_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_config": json.dumps(TINY | {"num_tokens": 9})}, "num_tokens=9; --train_tokens_dir has 8"),
        ({"model_config": json.dumps(TINY | {"num_classes": 3})}, "num_classes=3; --train_tokens_dir has 2"),
        ({"model_config": json.dumps(TINY | {"hidden_size": 33})}, "hidden_size=33"),
        (
            {"model_config": json.dumps(TINY | {"order": "autoregressive"}), "num_inference_steps": 3},
            "--num_inference_steps 3: .* tokens, 8",
        ),
        ({"split": "val"}, "val"),
        ({"num_validation_images": 99}, "99 images cannot be held out"),
    ],
)
def test_errors_before_any_work(train, tmp_path, options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        train(tmp_path / "out", **options)
    assert not (tmp_path / "out" / "generator").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1}, "label_smoothing 1.0 must be at least 0 and less than 1"),
        ({"class_dropout": -0.1}, "class_dropout"),
        ({"max_train_steps": 0}, "max_train_steps 0 must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 must be at least 1"),
        ({"pretrained_model_name_or_path": "x"}, "not both"),
        ({"mask_schedule": "square"}, "mask_schedule"),
        ({"early_stopping_patience": 2}, "--guard"),
    ],
)
def test_options_are_checked(train, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        train(tmp_path / "out", **options)
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_other_tokens_is_refused(train, tokens, tmp_path):
    """A resume on tokens that are others now."""
    train(tmp_path / "out", checkpointing_steps=2)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (file,) = (tokens / "data").glob("*.parquet")
    description = json.loads((tokens / "tokens-train.json").read_text())
    assert load_tokens(tokens).checksum
    description["files"][file.name] = "0" * 32
    with pytest.raises(OSError, match="damaged"):
        (tokens / "tokens-train.json").write_text(json.dumps(description))
        train(tmp_path / "out", resume_from_checkpoint="latest")


def test_a_tokens_folder_is_a_dataset(tokens):
    """A folder that `datasets` cannot read by itself."""
    dataset = datasets.load_dataset(str(tokens), split="train")
    assert len(dataset) == 2 * IMAGES and {len(code) for code in dataset["codes"]} == {6}


def test_class_samples_has_a_row_for_each_class(train, tmp_path):
    """A picture without the classes' names, or of other classes each time."""
    train(tmp_path / "out", max_train_steps=1)
    pipeline = load_pipeline(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    sampling = {"images_per_class": 3, "num_inference_steps": 2, "decoder_num_inference_steps": 1}
    two, again = (class_samples(pipeline, **sampling) for _ in range(2))
    one = class_samples(pipeline, num_classes=1, **sampling)
    assert two.height - one.height == one.height - 6 and two.width == one.width
    assert np.array_equal(np.asarray(two), np.asarray(again))


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, shard_blocks], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("order", ["masked", "autoregressive"])
def test_two_processes_are_one(train, tokens, tmp_path, order, start):
    """Draws, losses, averages, figures or an export that depend on how a run is spread."""
    options = {"model_config": json.dumps(TINY | {"order": order}), "num_inference_steps": None, "validation_steps": 2}
    options["adam_epsilon"] = 1e-4  # else Adam makes whole steps of the rounding of gradients that are nearly 0
    one = train(tmp_path / "one", **options, checkpointing_steps=2)
    forget_accelerators()
    two = train(
        tmp_path / "two",
        launch=lambda script, args: debug_launcher(launched, (script.main, args, start), 2),
        train_batch_size=2,
        checkpointing_steps=2,
        **options,
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    first, second = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two"))
    assert first.pop("stage") == second.pop("stage")
    assert second == pytest.approx(first, rel=1e-4)


def test_an_adapter(train, tmp_path):
    """A run whose adapter is not trained, or whose result is not the generator with the adapter."""
    pytest.importorskip("peft", reason='needs PEFT: pip install "flowmo_diffusers[lora]"')
    train(tmp_path / "base")
    path = {"pretrained_model_name_or_path": tmp_path / "base", "model_config": None}
    train(tmp_path / "out", **path, lora_rank=2, lora_alpha=4)
    parts = FlowMoPipeline.from_pretrained(tmp_path / "tokenizer").components
    base, trained = (
        FlowMoGenerationPipeline.from_pretrained(tmp_path / name, **parts).generator for name in ("base", "out")
    )
    inputs = torch.full((1, 8, 2), -1), torch.tensor([1])
    with torch.no_grad():
        before, after = (model(*inputs).logits for model in (base, trained))
        base.load_lora_adapter(tmp_path / "out")
        assert base.peft_config["default_0"].lora_alpha == 4 and not torch.equal(before, after)
        torch.testing.assert_close(after, base(*inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, shard_blocks], ids=["ddp", "fsdp2"])
def test_two_processes_train_one_adapter(train, tmp_path, start):
    """An adapter that is another on each process, or frozen weights that a wrapper waits for or cannot hold."""
    pytest.importorskip("peft", reason='needs PEFT: pip install "flowmo_diffusers[lora]"')
    train(tmp_path / "base")
    path = {"pretrained_model_name_or_path": tmp_path / "base", "model_config": None}
    options = {**path, "lora_rank": 2, "adam_epsilon": 1e-4, "checkpointing_steps": 2}
    one = train(tmp_path / "one", **options)
    forget_accelerators()
    two = train(
        tmp_path / "two",
        launch=lambda script, args: debug_launcher(launched, (script.main, args, start), 2),
        train_batch_size=2,
        **options,
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    file = "pytorch_lora_weights.safetensors"
    adapters = [load_file(tmp_path / name / file) for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(tensor.any() for name, tensor in adapters[1].items() if "lora_B" in name)
