"""Model cards: what a trained folder says of itself, to people and to the Hub."""

import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from flowmo_diffusers import __version__
from flowmo_diffusers.data.images import EMBEDDED_DATASET
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline


STAGES = {
    "pretrain": "stage 1A, mode-matching pre-training of encoder and decoder",
    "posttrain": "stage 1B, mode-seeking post-training of the decoder",
}

# Figures with a meaning elsewhere, which go to the Hub's model index as well: name, type there, unit and protocol.
METRICS = {
    "psnr": ("PSNR", "psnr", "dB, of each image over its 8-bit values; higher is better"),
    "ssim": ("SSIM", "ssim", "higher is better"),
    "lpips-alex": ("LPIPS (AlexNet)", "lpips", "lower is better"),
    "lpips-vgg": ("LPIPS (VGG16)", "lpips", "lower is better"),
}

SECRET = "hub_token"

CITATION = """\
@inproceedings{sargent2025flowmo,
  title     = {Flow to the Mode: Mode-Seeking Diffusion Autoencoders for State-of-the-Art Image Tokenization},
  author    = {Sargent, Kyle and Hsu, Kyle and Johnson, Justin and Fei-Fei, Li and Wu, Jiajun},
  booktitle = {ICCV},
  year      = {2025}
}"""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """
    The facts of a finished training run.

    Args:
        stage: "pretrain" or "posttrain".
        dataset: Hub id or path, as the user gave it.
        base_model: The pipeline that training started from, Hub id or path; `None` for a new model.
        resolution: Side of the training images in pixels.
        steps: Updates of the weights.
        images_seen: Images trained on, counted as often as they were seen, in all processes.
        train_images: Different ones; `None` where a stream does not tell.
        held_out_images: Images behind `figures`, none of them trained on.
        num_inference_steps: Of the sampler when `figures` were measured, with the pipeline's default guidance.
        figures: Means over the held-out images, such as {"val/psnr": 25.6}.
        options: Every option of the script, `vars(args)`.
        command: The command line, `sys.argv`.
        device: What it ran on, such as "NVIDIA H100 80GB HBM3".
        num_processes: Processes of the run.
        seconds: Time spent training.
    """

    stage: str
    dataset: str | os.PathLike
    base_model: str | os.PathLike | None = None
    resolution: int
    steps: int
    images_seen: int
    train_images: int | None
    held_out_images: int
    num_inference_steps: int
    figures: Mapping[str, float]
    options: Mapping[str, Any]
    command: Sequence[str]
    device: str
    num_processes: int
    seconds: float


def write_model_card(
    folder: str | os.PathLike,
    pipeline: FlowMoPipeline,
    run: TrainingRun,
    pictures: Sequence[str | os.PathLike] = (),
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """
    Writes `README.md` into the folder of a trained pipeline, in place of one that is there.

    Nothing private to the machine is written: of an absolute path (or one from `~`) only the last name, and the Hub
    token nowhere.

    Args:
        folder: Where the pipeline has been saved; its name is the model's unless there is a `repo_id`.
        pipeline: The pipeline, for the facts of its architecture.
        run: The facts of its training.
        pictures: Pictures in `folder` to be shown.
        repo_id: Where the folder will be published; the usage snippet loads it from there, else from the folder.
        license: An identifier that the Hub knows ("apache-2.0", "cc-by-4.0", "other", ...). `None` says that none
            has been stated.

    Returns:
        The path of the card.

    Raises:
        ValueError: If a picture is not a file in `folder`.
    """
    folder = Path(os.path.abspath(folder))
    shown = [Path(os.path.abspath(picture)) for picture in pictures]
    for picture in shown:
        if not picture.is_file() or not picture.is_relative_to(folder):
            raise ValueError(f"pictures: {picture} must be a file in {folder}")
    license = None if license is None else _public(license)
    source = repo_id or folder.name
    name = _public(source.split("/")[-1])
    data = ModelCardData(
        model_name=name,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["flowmo", "image-tokenizer", "autoencoder", "rectified-flow"],
        license=license,
        base_model=_hub_id(run.base_model),
        datasets=_hub_id(run.dataset),
        eval_results=_eval_results(run) or None,
    )
    links = [quote(picture.relative_to(folder).as_posix()) for picture in shown]
    body = _body(name, source, pipeline.autoencoder, run, links, license)
    with atomic_file(folder / "README.md") as path:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(path)
    return folder / "README.md"


def _body(
    name: str, source: str, model: FlowMoAutoencoder, run: TrainingRun, links: list[str], license: str | None
) -> str:
    config = model.config
    size = f"{config.sample_size} × {config.sample_size} pixels"
    pictures = "\n\n".join(f"![Held-out images and their reconstructions]({link})" for link in links)
    options = {key: _plain(value) for key, value in run.options.items() if key != SECRET}
    figures = {_label(key): _figure(key, value) for key, value in run.figures.items()}
    terms = f"`{license}`" if license else "None has been stated for these weights: ask whoever published them."
    return f"""\
# {name}

A [FlowMo](https://arxiv.org/abs/2503.11056) image tokenizer: it turns an image of {size} into {_tokens(model)}, and
those back into the image by a rectified flow from noise. It is the result of {STAGES.get(run.stage, run.stage)}, on
{_code(run.dataset)}.

{pictures}

## Use

With the package `flowmo_diffusers` installed:

```python
{_snippet(source, model)}
```

## Model

{_table(_architecture(model))}

## Training

{_table(_training(run))}

```bash
{_command(run)}
```

<details>
<summary>All options</summary>

```yaml
{yaml_dump(options, sort_keys=False).strip()}
```

</details>

## Figures

Means over {run.held_out_images:,} images that were not trained on, at {run.resolution} × {run.resolution} pixels,
reconstructed in {run.num_inference_steps} steps with the pipeline's default guidance.

{_table(figures)}

## Licence

{terms}

## Citation

```bibtex
{CITATION}
```
"""


def _architecture(model: FlowMoAutoencoder) -> dict[str, str]:
    config = model.config
    return {
        "parameters": f"{model.num_parameters():,}",
        "images": f"{config.sample_size} × {config.sample_size} pixels, {config.in_channels} channels",
        "patches": f"{config.patch_size} × {config.patch_size} pixels",
        "tokens": _tokens(model),
        "quantizer": _code(config.quantizer),
        "encoder": f"{config.encoder_num_layers} blocks of width {config.encoder_hidden_size}",
        "decoder": f"{config.decoder_num_layers} blocks of width {config.decoder_hidden_size}",
    }


def _tokens(model: FlowMoAutoencoder) -> str:
    """ "256 tokens of 18 bits (576 bytes an image, 0.0703 bits a pixel)" """
    config = model.config
    if config.quantizer in ("kl", "none"):
        return f"{config.num_latent_tokens} continuous tokens of {config.latent_channels} channels"
    bits = config.num_latent_tokens * model.bits_per_token
    return (
        f"{config.num_latent_tokens} tokens of {model.bits_per_token} bits ({model.bytes_per_image:,} bytes an image, "
        f"{bits / config.sample_size**2:.3g} bits a pixel)"
    )


def _snippet(source: str, model: FlowMoAutoencoder) -> str:
    size = model.config.sample_size
    lines = [
        "from diffusers.utils import load_image",
        "from flowmo_diffusers import FlowMoPipeline",
        "",
        f'pipe = FlowMoPipeline.from_pretrained({source!r})  # and .to("cuda") where there is one',
        'image = load_image("photo.jpg")',
        f'pipe(image, height={size}, width={size}).images[0].save("reconstruction.png")',
        "",
        f"tokens = pipe.encode(image, height={size}, width={size})  # to be stored, and decoded later",
    ]
    if model.config.quantizer not in ("kl", "none"):
        lines += [
            "codes = pipe.autoencoder.indices_to_codes(tokens)",
            f"tokens = pipe.autoencoder.pack_codes(codes)[0]  # {model.bytes_per_image} bytes",
        ]
    lines.append('pipe.decode(tokens)[0].save("decoded.png")')
    return "\n".join(lines)


def _training(run: TrainingRun) -> dict[str, str]:
    packages = ("torch", "diffusers", "accelerate", "datasets", "huggingface_hub")
    images = "" if run.train_images is None else f", {run.train_images:,} images"
    return {
        "stage": STAGES.get(run.stage, run.stage),
        "started from": "random weights" if run.base_model is None else _code(run.base_model),
        "data": f"{_code(run.dataset)}{images}, at {run.resolution} × {run.resolution} pixels",
        "steps": f"{run.steps:,}, {run.images_seen:,} images seen",
        "hardware": f"{_code(run.device)}, {run.num_processes} process{'es' if run.num_processes > 1 else ''}",
        "time": f"{timedelta(seconds=round(run.seconds))} (hours:minutes:seconds)",
        "software": ", ".join(
            [f"flowmo_diffusers {__version__}"]
            + [f"{package} {version(package)}" for package in packages]
            + [f"Python {platform.python_version()}"]
        ),
    }


def _command(run: TrainingRun) -> str:
    """The command as it is typed, an option a line."""
    secret = run.options.get(SECRET)
    words = [word.replace(secret, "***") if secret else word for word in run.command]
    lines = [["accelerate", "launch", "--num_processes", str(run.num_processes)]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(_public(word))
    return " \\\n    ".join(shlex.join(line) for line in lines)


def _eval_results(run: TrainingRun) -> list[EvalResult]:
    """The figures that others measure too, where they are numbers."""
    dataset = _public(run.dataset)
    return [
        EvalResult(
            task_type="image-to-image",
            task_name="Reconstruction",
            dataset_type=dataset,
            dataset_name=f"{dataset}, {run.held_out_images} held-out images at {run.resolution} × {run.resolution}",
            metric_name=METRICS[_key(key)][0],
            metric_type=METRICS[_key(key)][1],
            metric_value=float(f"{value:.4g}"),
        )
        for key, value in run.figures.items()
        if _key(key) in METRICS and math.isfinite(value)
    ]


def _key(figure: str) -> str:
    return figure.removeprefix("val/")


def _label(figure: str) -> str:
    key = _key(figure)
    return METRICS[key][0] if key in METRICS else _code(key)


def _figure(figure: str, value: float) -> str:
    key = _key(figure)
    return f"{value:.4g}" + (f" ({METRICS[key][2]})" if key in METRICS else "")


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _hub_id(name: str | os.PathLike | None) -> str | None:
    """The name if it is one on the Hub, not a path on this machine or the embedded dataset."""
    if not isinstance(name, str) or name == EMBEDDED_DATASET or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _public(value: Any) -> str:
    """One line of valid Unicode in which a path of this machine has become its last name."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    option, equals, rest = text.partition("=") if text.startswith("--") else ("", "", text)
    return option + equals + (Path(rest).name if rest.startswith(("/", "~")) else rest)


def _plain(value: Any) -> Any:
    """An option's value as YAML holds it."""
    if isinstance(value, Mapping):
        return {_public(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else _public(value)


def _code(value: Any) -> str:
    """Any string as a code span in a table's cell."""
    return "`" + _public(value).replace("`", "'").replace("|", "\\|") + "`"
