"""Model cards."""

import argparse
import re
import shlex
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import yaml
from huggingface_hub import ModelCard

from flowmo_diffusers import (
    FlowMoAutoencoder,
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoScheduler,
    FlowMoTokenGenerator,
    FlowMoTokenScheduler,
)
from flowmo_diffusers.hub.cards import TrainingRun, write_model_card


@pytest.fixture
def run() -> TrainingRun:
    options = {
        "stage": "posttrain",
        "pretrained_model_name_or_path": "anna/flowmo-1a",
        "train_data_dir": Path("/home/anna/private/birds"),
        "learning_rate": 5e-5,
        "model_config": {"sample_size": 16, "rope_axes": [4, 6, 6]},
        "max_grad_norm": None,
        "hub_token": "hf_secret",
    }
    command = [
        "/home/anna/flowmo/training/train_flowmo.py",
        *("--stage", "posttrain", "--train_data_dir=/home/anna/private/birds", "--hub_token", "hf_secret"),
        *("--pretrained_model_name_or_path", "anna/flowmo-1a", "--output_dir", "~/runs/my birds"),
    ]
    return TrainingRun(
        stage="posttrain",
        dataset=Path("/home/anna/private/birds"),
        base_model="anna/flowmo-1a",
        resolution=16,
        steps=1000,
        images_seen=64_000,
        train_images=919,
        held_out_images=128,
        num_inference_steps=25,
        figures={"psnr": 25.6172, "val/lpips-alex": 0.00912, "resnet50": 0.5, "entropy_bits": 2.9},
        options=options,
        command=command,
        device="NVIDIA H100 80GB HBM3",
        num_processes=8,
        seconds=200_000,
    )


@pytest.fixture
def folder(tmp_path, tiny_pipeline) -> Path:
    """A saved pipeline with a picture."""
    folder = tmp_path / "my birds"
    tiny_pipeline.save_pretrained(folder)
    (folder / "validation").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(folder / "validation" / "posttrain 1000.png")
    return folder


def snippet(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)[1]


def test_metadata(folder, tiny_pipeline, run):
    """Front matter that the Hub does not read, or figures that do not reach its model index."""
    path = write_model_card(folder, tiny_pipeline, run, repo_id="anna/birds", license="cc-by-4.0")
    data = ModelCard.load(path).data.to_dict()
    assert {key: data[key] for key in ("license", "library_name", "pipeline_tag", "base_model")} == {
        "license": "cc-by-4.0",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "base_model": "anna/flowmo-1a",
    }
    assert "flowmo" in data["tags"] and "datasets" not in data
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == "birds" and result["dataset"]["type"] == "birds"
    metrics = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    assert metrics == {"PSNR": ("psnr", 25.62), "LPIPS (AlexNet)": ("lpips", 0.00912)}
    assert not list(folder.glob(".partial-*"))


def test_body(folder, tiny_pipeline, run):
    """A fact that is missing or wrong, a picture that is not shown, or a command that is not the one that ran."""
    path = write_model_card(folder, tiny_pipeline, run, [folder / "validation" / "posttrain 1000.png"])
    text = path.read_text()
    parameters = sum(parameter.numel() for parameter in tiny_pipeline.autoencoder.parameters())
    for fact in (
        "# my birds\n",
        "stage 1B",
        "8 tokens of 6 bits (6 bytes an image, 0.188 bits a pixel)",
        f"| parameters | {parameters:,} |",
        "| data | `birds`, 919 images, at 16 × 16 pixels |",
        "| steps | 1,000, 64,000 images seen |",
        "| hardware | `NVIDIA H100 80GB HBM3`, 8 processes |",
        "| time | 2 days, 7:33:20 (hours",
        "| PSNR | 25.62 (dB, of each image over its 8-bit values",
        "| `resnet50` | 0.5 |",
        "Means over 128 images that were not trained on, at 16 × 16 pixels,\nreconstructed in 25 steps",
        "![Held-out images and their reconstructions](validation/posttrain%201000.png)",
        "None has been stated",
        "@inproceedings{sargent2025flowmo,",
    ):
        assert fact in text, fact
    assert re.search(r"torch \d.*diffusers \d.*Python 3", text)
    command = re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL)[1]
    assert shlex.split(command.replace("\\\n", "")) == [
        *("accelerate", "launch", "--num_processes", "8", "train_flowmo.py"),
        *("--stage", "posttrain", "--train_data_dir=birds", "--hub_token", "***"),
        *("--pretrained_model_name_or_path", "anna/flowmo-1a", "--output_dir", "my birds"),
    ]
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    assert options == {
        "stage": "posttrain",
        "pretrained_model_name_or_path": "anna/flowmo-1a",
        "train_data_dir": "birds",
        "learning_rate": 5e-5,
        "model_config": {"sample_size": 16, "rope_axes": [4, 6, 6]},
        "max_grad_norm": None,
    }
    assert list(options)[0] == "stage"  # in the script's order


def test_nothing_private_is_published(folder, tiny_pipeline, run):
    """The Hub token, or a path of the user's machine, in a public card."""
    namespace = argparse.Namespace(**run.options, cache_dir="~/cache/x", shards=["/home/anna/a.tar"])
    run = replace(run, options=vars(namespace), base_model="/home/anna/1a", command=["x", "--hub_token=hf_secret"])
    text = write_model_card(folder, tiny_pipeline, run).read_text()
    assert "hf_secret" not in text
    assert "/home" not in text and "~" not in text and str(folder.parent) not in text
    assert "| started from | `1a` |" in text and "a.tar" in text
    assert "base_model" not in ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    "name",
    [
        'it\'s: "a" {b} [c] #d, & *e !f | g % @h `i`',
        "---\nlicense: mit\n---\n",
        "a\n```\n# b",
        "no\ttab\x07bell",
        "caf\udce9",
        "鳥 🐦 é",
        "yes",
        "1e3",
        "- x",
        "<details>",
    ],
)
def test_any_string_leaves_the_card_readable(tmp_path, tiny_pipeline, run, name):
    """A name with quotes, colons, line ends or broken Unicode that ends the front matter or makes it other YAML."""
    folder = tmp_path / "model"
    folder.mkdir()
    run = replace(run, dataset=Path(name), base_model=name, options={name: name}, command=[name], device=name)
    path = write_model_card(folder, tiny_pipeline, run, repo_id=None, license=name)
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["license"] == " ".join(name.encode("utf-8", "replace").decode().split())
    assert set(data) <= {"license", "library_name", "pipeline_tag", "tags", "base_model", "datasets", "model-index"}
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)\n```\n", card.text, flags=re.DOTALL)[1])
    assert len(options) == 1
    assert [line for line in card.text.splitlines() if re.match("#+ ", line)] == [
        "# model",
        *("## Use", "## Model", "## Training", "## Figures", "## Licence", "## Citation"),
    ]
    assert card.text.count("\n```") == 8
    assert re.search(r"\n\| hardware \| `([^`|\n]|\\\|)*`, 8 processes \|\n", card.text)


def test_hub_names_and_paths_are_told_apart(folder, tiny_pipeline, run, tmp_path, monkeypatch):
    """A local folder or the embedded emoji linked as if they were on the Hub, or a Hub dataset not linked."""

    def metadata(**changes):
        return ModelCard.load(write_model_card(folder, tiny_pipeline, replace(run, **changes))).data.to_dict()

    assert metadata(dataset="zh-plus/tiny-imagenet")["datasets"] == "zh-plus/tiny-imagenet"
    assert "datasets" not in metadata(dataset="emoji")
    assert "datasets" not in metadata(dataset=Path("birds"))
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in metadata(base_model="my birds")
    (tmp_path / "stage1a").mkdir()
    assert "base_model" not in metadata(base_model="stage1a")
    assert "base_model" not in metadata(base_model=None)


def test_infinite_figures(folder, tiny_pipeline, run):
    """A figure that is no number, which the Hub's model index refuses."""
    figures = {"psnr": float("inf"), "ssim": float("nan")}
    path = write_model_card(folder, tiny_pipeline, replace(run, figures=figures))
    assert "model-index" not in ModelCard.load(path).data.to_dict()
    assert "| PSNR | inf" in path.read_text()


def test_pictures_must_be_in_the_folder(folder, tiny_pipeline, run, tmp_path):
    """A card with a picture that is not uploaded with it."""
    (tmp_path / "elsewhere.png").touch()
    for picture in (tmp_path / "elsewhere.png", folder / "absent.png"):
        with pytest.raises(ValueError, match=f"pictures: .*{picture.name} must be a file in"):
            write_model_card(folder, tiny_pipeline, run, [picture])
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("quantizer", ["lfq", "kl"])
def test_snippet_runs(tmp_path, monkeypatch, tiny_config, run, quantizer):
    """Code on the card that does not run as it stands, beside the folder and a photo."""
    pipeline = FlowMoPipeline(FlowMoAutoencoder(**tiny_config, quantizer=quantizer), FlowMoScheduler())
    pipeline.save_pretrained(tmp_path / 'my "flowmo"')
    path = write_model_card(tmp_path / 'my "flowmo"', pipeline, run)
    PIL.Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(snippet(path), str(path), "exec"), names)
    assert PIL.Image.open("reconstruction.png").size == PIL.Image.open("decoded.png").size == (16, 16)
    if quantizer == "lfq":
        assert len(names["tokens"]) == 6 and "# 6 bytes" in snippet(path)


@pytest.fixture
def generation_pipeline(tiny_pipeline) -> FlowMoGenerationPipeline:
    generator = FlowMoTokenGenerator(
        num_tokens=8,
        token_groups=2,
        group_bits=3,
        num_classes=3,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        id2label={0: "cat, tabby", 1: "dog | wolf", 2: "bird"},
    )
    pipeline = FlowMoGenerationPipeline(generator, FlowMoTokenScheduler(), **tiny_pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def generator_run(run) -> TrainingRun:
    figures = {"val/token_loss": 4.5, "val/bits_per_bit": 0.8, "val/token_loss_at_0.5": 4.0, "val/fid": 12.5}
    return replace(
        run, stage="generator", base_model=None, tokenizer="anna/birds", figures=figures, num_inference_steps=None
    )


def test_generator_card(tmp_path, generation_pipeline, generator_run):
    """A generator's card that tells of a tokenizer, or not of its classes, its tokens, its tokenizer or its losses."""
    (tmp_path / "samples.png").touch()
    path = write_model_card(tmp_path, generation_pipeline, generator_run, [tmp_path / "samples.png"])
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["base_model"] == "anna/birds"
    assert data["pipeline_tag"] == "unconditional-image-generation" and "class-conditional" in data["tags"]
    (metric,) = data["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("fid", 12.5)
    parameters = sum(parameter.numel() for parameter in generation_pipeline.generator.parameters())
    for fact in (
        f"| parameters | {parameters:,}, beside ",
        "| order | masked prediction",
        "| transformer | 1 blocks of width 16, 2 heads |",
        "| tokens | 8 tokens of 6 bits (6 bytes an image",
        "| groups | 2 of 3 bits a token, each one of 8 values |",
        "| classes | 3: `cat, tabby`, `dog \\| wolf`, `bird` |",
        "| started from | random weights |",
        "| tokenizer | `anna/birds` |",
        "| token loss | 4.5 (nats a group",
        "| bits per stored bit | 0.8 (",
        "| token loss at masking ratio 0.5 | 4 (nats",
        "![Generated images, a row for each class](samples.png)",
        "Means over 128 images that were not trained on.\n",
    ):
        assert fact in card.text, fact
    assert "reconstruct" not in card.text


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_metadata_is_whole(tmp_path, tiny_pipeline, run, generation_pipeline, generator_run, kind):
    """A field of the front matter that one kind of card has and the other has not."""
    pipeline, run = (tiny_pipeline, run) if kind == "tokenizer" else (generation_pipeline, generator_run)
    run = replace(run, dataset="anna/photos")
    data = ModelCard.load(write_model_card(tmp_path, pipeline, run, license="mit")).data
    for name in ("library_name", "pipeline_tag", "datasets", "license", "base_model", "tags"):
        assert getattr(data, name), name
    assert data.datasets == "anna/photos" and data.library_name == "diffusers"
    assert {result.dataset_type for result in data.eval_results} == {"anna/photos"}
    assert all(result.metric_type and result.metric_value > 0 for result in data.eval_results)


def test_generator_that_was_started_from_another(tmp_path, generation_pipeline, generator_run):
    """A card that links the tokenizer or the first generator alone, where both are on the Hub."""
    run = replace(generator_run, base_model="anna/birds-generator")
    data = ModelCard.load(write_model_card(tmp_path, generation_pipeline, run)).data.to_dict()
    assert data["base_model"] == ["anna/birds", "anna/birds-generator"]


def test_generator_snippet_runs(tmp_path, monkeypatch, generation_pipeline, generator_run):
    """Code on a generator's card that does not run as it stands, beside the folder."""
    generation_pipeline.save_pretrained(tmp_path / "birds")
    path = write_model_card(tmp_path / "birds", generation_pipeline, generator_run)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet(path), str(path), "exec"), {})
    assert PIL.Image.open("generated.png").size == (16, 16)
