"""What model cards are made of: the facts of a run, what is said of a kind of pipeline, and safe text."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """
    The facts of a finished training run.

    Args:
        stage: "pretrain", "posttrain", "distill" or "generator".
        dataset: Hub id or path, as the user gave it.
        base_model: The pipeline that training started from, Hub id or path; `None` for a new model.
        tokenizer: The pipeline whose tokens a generator was trained on, Hub id or path.
        resolution: Side of the training images in pixels.
        steps: Updates of the weights.
        images_seen: Images trained on, counted as often as they were seen, in all processes.
        train_images: Different ones; `None` where a stream does not tell.
        held_out_images: Images behind `figures`, none of them trained on.
        num_inference_steps: Of the sampler when `figures` were measured, with the pipeline's default guidance; `None`
            where they do not come from samples.
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
    tokenizer: str | os.PathLike | None = None
    resolution: int
    steps: int
    images_seen: int
    train_images: int | None
    held_out_images: int
    num_inference_steps: int | None = None
    figures: Mapping[str, float]
    options: Mapping[str, Any]
    command: Sequence[str]
    device: str
    num_processes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Metric:
    """
    A figure with a meaning elsewhere.

    Args:
        name: Shown to people.
        meaning: Unit, protocol, and which way is better.
        hub_type: What the Hub's model index calls it; `None` where it has no word for it.
    """

    name: str
    meaning: str
    hub_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    What a card says of one kind of pipeline.

    Args:
        introduction: A sentence on what it is, Markdown.
        picture: What its pictures show.
        snippet: Python code that uses it.
        architecture: Rows of a table.
        figures: A sentence on how the figures were measured.
        metrics: By the names of figures; others are shown under their own.
        pipeline_tag: The Hub's task.
        task: Its name in the Hub's model index.
        tags: For the Hub.
    """

    introduction: str
    picture: str
    snippet: str
    architecture: Mapping[str, str]
    figures: str
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    pipeline_tag: str
    task: str
    tags: Sequence[str]


def table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def public(value: Any) -> str:
    """One line of valid Unicode in which a path of this machine has become its last name."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    option, equals, rest = text.partition("=") if text.startswith("--") else ("", "", text)
    return option + equals + (Path(rest).name if rest.startswith(("/", "~")) else rest)


def plain(value: Any) -> Any:
    """An option's value as YAML holds it."""
    if isinstance(value, Mapping):
        return {public(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else public(value)


def code(value: Any) -> str:
    """Any string as a code span in a table's cell."""
    return "`" + public(value).replace("`", "'").replace("|", "\\|") + "`"
