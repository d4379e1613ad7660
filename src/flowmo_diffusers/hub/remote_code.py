"""
Writes a pipeline into a folder that carries its own code, for people who have diffusers and not this package.

    python -m flowmo_diffusers.hub.remote_code my_flowmo my_flowmo_with_code

They load it by `DiffusionPipeline.from_pretrained(folder_or_hub_id, trust_remote_code=True)`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub.utils import filter_repo_objects

from flowmo_diffusers.engine.files import atomic_folder
from flowmo_diffusers.hub.cards import with_remote_code
from flowmo_diffusers.hub.single_file import PACKAGE, Import, single_file
from flowmo_diffusers.hub.upload import published_patterns
from flowmo_diffusers.pipelines.loading import load_pipeline
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.pipeline_generation import FlowMoGenerationPipeline


def export_remote_code(
    pipeline: FlowMoPipeline | FlowMoGenerationPipeline,
    folder: str | Path,
    card_from: str | Path | None = None,
    repo_id: str | None = None,
) -> None:
    """
    Saves a pipeline with its code: the pipeline's in one file beside `model_index.json`, that of each component in one
    file in the component's folder. Diffusers fetches no other files of code from the Hub, so everything a class needs
    is joined into its file. The files import torch, diffusers, NumPy and PIL only, and equal pipelines give equal
    files.

    Args:
        folder: Where to; not a folder of the layout without code.
        card_from: A saved pipeline's folder whose card, pictures, metrics and licence come along; the card's snippet
            becomes one for diffusers alone.
        repo_id: Where the folder will be published, for that snippet; default: the name of the folder.

    Raises:
        ValueError: If `pipeline` is not one of this package's, lacks a component, or has one of another package; or if
            `folder` holds a pipeline of the layout without code.
        OSError: If `card_from` is no saved pipeline.
    """
    folder = Path(folder)
    _check_pipeline(pipeline)
    _check_folder(folder)
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        index = _read_json(temporary / "model_index.json")
        for name, component in pipeline.components.items():
            index[name] = _write_code(type(component), temporary / name)
        # A component's class stands in annotations of the pipeline's code only, for which its base is as good.
        stand_ins = [_stand_in(type(component)) for component in pipeline.components.values()]
        index["_class_name"] = _write_code(type(pipeline), temporary, {one.alias: one for one in stand_ins})
        _write_json(temporary / "model_index.json", index)
        if card_from is not None:
            _copy_card(Path(card_from), temporary, repo_id or folder.absolute().name)


def _check_pipeline(pipeline: DiffusionPipeline) -> None:
    kinds = (FlowMoPipeline, FlowMoGenerationPipeline)
    if type(pipeline) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"pipeline is a {type(pipeline).__name__}; expected a {names} of this package")
    for name, component in pipeline.components.items():
        home = type(component).__module__.partition(".")[0]
        if home != PACKAGE:
            found = "is missing" if component is None else f"is a {type(component).__name__} of {home}"
            raise ValueError(f"pipeline: its {name} {found}; expected one of this package, whose code can be written")


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if index.is_file() and isinstance(_read_json(index).get("_class_name"), str):
        raise ValueError(
            f"folder {folder} holds a pipeline without code, as a folder holds one kind: name another one"
        )


def _copy_card(source: Path, target: Path, name: str) -> None:
    """All that is published of a saved pipeline, but the pipeline itself."""
    paths = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    for path in filter_repo_objects(paths, allow_patterns=published_patterns(source)):
        if not (target / path.partition("/")[0]).exists():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
    card = target / "README.md"
    if card.is_file():
        card.write_text(with_remote_code(card.read_text(encoding="utf-8"), name), encoding="utf-8")


def _write_code(cls: type, folder: Path, stand_ins: dict[str, Import] | None = None) -> list[str]:
    """Writes the file of a class; returns the entry of `model_index.json`."""
    module = cls.__module__.rpartition(".")[2]
    (folder / f"{module}.py").write_text(single_file(cls, stand_ins), encoding="utf-8")
    return [module, cls.__name__]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stand_in(cls: type) -> Import:
    return Import("diffusers", "SchedulerMixin" if issubclass(cls, SchedulerMixin) else "ModelMixin", cls.__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowmo_diffusers.hub.remote_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a saved pipeline: a folder, or an id on the Hub")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--repo_id", help="where it will be published, for the card; default: the folder's name")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        card_from = args.source if Path(args.source).is_dir() else None
        export_remote_code(load_pipeline(args.source), args.output, card_from, args.repo_id)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
