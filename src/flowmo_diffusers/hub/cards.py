"""Model cards: what a trained folder says of itself, to people and to the Hub."""

import math
import os
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from flowmo_diffusers import __version__
from flowmo_diffusers.data.images import EMBEDDED
from flowmo_diffusers.engine.files import atomic_file
from flowmo_diffusers.hub.card_parts import Subject, TrainingRun, code, plain, public, table
from flowmo_diffusers.hub.generator_card import describe_generator
from flowmo_diffusers.hub.tokenizer_card import describe_tokenizer
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.pipeline_generation import FlowMoGenerationPipeline


__all__ = ["TrainingRun", "with_remote_code", "write_model_card"]

WITH_PACKAGE = "With the package `flowmo_diffusers` installed:"
WITH_DIFFUSERS = "With diffusers; this model carries its code, which `trust_remote_code=True` allows to run:"

STAGES = {
    "pretrain": "stage 1A, mode-matching pre-training of encoder and decoder",
    "posttrain": "stage 1B, mode-seeking post-training of the decoder",
    "distill": "stage 1C, few-step distillation of the decoder",
    "generator": "a generator of a tokenizer's tokens",
}

SECRET = "hub_token"

CITATION = """\
@inproceedings{sargent2025flowmo,
  title     = {Flow to the Mode: Mode-Seeking Diffusion Autoencoders for State-of-the-Art Image Tokenization},
  author    = {Sargent, Kyle and Hsu, Kyle and Johnson, Justin and Fei-Fei, Li and Wu, Jiajun},
  booktitle = {ICCV},
  year      = {2025}
}"""


def write_model_card(
    folder: str | os.PathLike,
    pipeline: FlowMoPipeline | FlowMoGenerationPipeline,
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
    license = None if license is None else public(license)
    source = repo_id or folder.name
    name = public(source.split("/")[-1])
    describe = describe_generator if isinstance(pipeline, FlowMoGenerationPipeline) else describe_tokenizer
    subject = describe(pipeline, run, source)
    bases = [base for base in map(_hub_id, (run.tokenizer, run.base_model)) if base]
    data = ModelCardData(
        model_name=name,
        library_name="diffusers",
        pipeline_tag=subject.pipeline_tag,
        tags=list(subject.tags),
        license=license,
        base_model=bases[0] if len(bases) == 1 else bases or None,
        datasets=_hub_id(run.dataset),
        eval_results=_eval_results(run, subject) or None,
    )
    links = [quote(picture.relative_to(folder).as_posix()) for picture in shown]
    body = _body(name, subject, run, links, license)
    with atomic_file(folder / "README.md") as path:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(path)
    return folder / "README.md"


def with_remote_code(card: str, source: str) -> str:
    """
    The text of a card whose snippet loads the pipeline from `source`, a Hub id or folder that carries its code, by
    diffusers alone. A card that was not written by [`write_model_card`] may have no such snippet, and stays as it is.
    """
    card = card.replace(WITH_PACKAGE, WITH_DIFFUSERS)
    card = re.sub(
        r"(?m)^from flowmo_diffusers import FlowMo\w*Pipeline$", "from diffusers import DiffusionPipeline", card
    )
    call = f"DiffusionPipeline.from_pretrained({source!r}, trust_remote_code=True)"
    string = r"""(['"])(?:\\.|(?!\1).)*\1"""
    return re.sub(rf"FlowMo\w*Pipeline\.from_pretrained\({string}\)", lambda match: call, card)


def _body(name: str, subject: Subject, run: TrainingRun, links: list[str], license: str | None) -> str:
    pictures = "\n\n".join(f"![{subject.picture}]({link})" for link in links)
    options = {key: plain(value) for key, value in run.options.items() if key != SECRET}
    figures = {_label(key, subject): _figure(key, value, subject) for key, value in run.figures.items()}
    terms = f"`{license}`" if license else "None has been stated for these weights: ask whoever published them."
    return f"""\
# {name}

{subject.introduction} It is the
result of {STAGES.get(run.stage, run.stage)}, on {code(run.dataset)}.

{pictures}

## Use

{WITH_PACKAGE}

```python
{subject.snippet}
```

## Model

{table(subject.architecture)}

## Training

{table(_training(run))}

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

{subject.figures}

{table(figures)}

## Licence

{terms}

## Citation

```bibtex
{CITATION}
```
"""


def _training(run: TrainingRun) -> dict[str, str]:
    packages = ("torch", "diffusers", "accelerate", "datasets", "huggingface_hub")
    images = "" if run.train_images is None else f", {run.train_images:,} images"
    return {
        "stage": STAGES.get(run.stage, run.stage),
        "started from": "random weights" if run.base_model is None else code(run.base_model),
        **({} if run.tokenizer is None else {"tokenizer": code(run.tokenizer)}),
        "data": f"{code(run.dataset)}{images}, at {run.resolution} × {run.resolution} pixels",
        "steps": f"{run.steps:,}, {run.images_seen:,} images seen",
        "hardware": f"{code(run.device)}, {run.num_processes} process{'es' if run.num_processes > 1 else ''}",
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
        lines[-1].append(public(word))
    return " \\\n    ".join(shlex.join(line) for line in lines)


def _eval_results(run: TrainingRun, subject: Subject) -> list[EvalResult]:
    """The figures that others measure too, where they are numbers."""
    dataset = public(run.dataset)
    measured = [(subject.metrics.get(_key(name)), value) for name, value in run.figures.items()]
    return [
        EvalResult(
            task_type=subject.pipeline_tag,
            task_name=subject.task,
            dataset_type=dataset,
            dataset_name=f"{dataset}, {run.held_out_images} held-out images at {run.resolution} × {run.resolution}",
            metric_name=metric.name,
            metric_type=metric.hub_type,
            metric_value=float(f"{value:.4g}"),
        )
        for metric, value in measured
        if metric is not None and metric.hub_type is not None and math.isfinite(value)
    ]


def _key(figure: str) -> str:
    return figure.removeprefix("val/")


def _label(figure: str, subject: Subject) -> str:
    key = _key(figure)
    return subject.metrics[key].name if key in subject.metrics else code(key)


def _figure(figure: str, value: float, subject: Subject) -> str:
    metric = subject.metrics.get(_key(figure))
    return f"{value:.4g}" + (f" ({metric.meaning})" if metric else "")


def _hub_id(name: str | os.PathLike | None) -> str | None:
    """The name if it is one on the Hub, not a path on this machine or an embedded dataset."""
    if not isinstance(name, str) or name in EMBEDDED or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
