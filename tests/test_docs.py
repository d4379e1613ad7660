"""
Every block of code in the documentation, run or parsed.

Python runs, the blocks of a page after one another in one namespace and in a folder that holds what pages presuppose.
Command lines are parsed by the scripts they start; those of some pages also run, on models of a few thousand weights.
"""

import json
import shutil
import tarfile
from collections import defaultdict
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from commands import Script, WrongCommand, check, commands
from pages import PAGES, ROOT, Block, blocks
from peft import LoraConfig
from processes import own_accelerators
from token_models import build_generator
from transformers import MobileNetV2Config, MobileNetV2Model

from flowmo_diffusers import (
    FlowMoAutoencoder,
    FlowMoGenerationPipeline,
    FlowMoPipeline,
    FlowMoScheduler,
    FlowMoTokenScheduler,
)
from flowmo_diffusers.assets import starter
from flowmo_diffusers.hub.convert import save_published
from flowmo_diffusers.hub.remote_code import export_remote_code


# What is too large, or not here, and what stands in its place.
SUBSTITUTIONS = {
    "README.md": {'"cuda"': '"cpu"', 'from_published("lo"': 'from_published("flowmo_lo.pth", config=SHAPES'},
    "docs/data.md": {"count=64": "count=2", "last=1000": "last=32", "num_workers=8": "num_workers=0"},
    "docs/evaluation.md": {
        'weights="pt_inception-2015-12-05-6726825d.pth"': 'network="./my_network"',
        "2048": "8",
    },
    "docs/generation.md": {"100:": "30:"},
    "docs/performance.md": {"--device cuda": "--device cpu"},
    "docs/publishing.md": {'from_pretrained("anna/my-flowmo-with-code"': 'from_pretrained("./my_flowmo_with_code"'},
    "docs/scaling.md": {
        '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)': "localhost",
        "$((8 * SLURM_NNODES))": "16",
        "$SLURM_NNODES": "2",
        "$SLURM_NODEID": "0",
        "$MAIN_IP": "localhost",
    },
}

# What the Python of a page takes as given.
GIVEN = {
    "README.md": lambda: {"SHAPES": {"codebook_bits": 8, "sample_size": 32, "num_latent_tokens": 64}},
    "docs/tokens.md": lambda: {
        "pipe": FlowMoPipeline.from_pretrained(starter()),
        "image": _noise(1, 32)[0],
    },
    "docs/evaluation.md": lambda: {
        "batches": [(_noise(4, 16), _noise(4, 16)), (_noise(4, 16), _noise(4, 16))],
        "x": torch.randn(20, 8),
        "y": torch.randn(20, 8),
    },
}

# Blocks that are neither run nor parsed.
TEXT = {
    "": "formulas, output, folders",
    "bibtex": "a citation",
    "{eval-rst}": "of the site, whose build is strict",
    "{toctree}": "of the site",
}

# Pages whose commands run, and with what, so that they take seconds.
RUN = {"README.md", "docs/quickstart.md"}
TINY = {
    "sample_size": 32,
    "num_latent_tokens": 64,
    "latent_channels": 24,
    "codebook_bits": 8,
    "encoder_num_layers": 1,
    "decoder_num_layers": 1,
    "encoder_hidden_size": 32,
    "decoder_hidden_size": 32,
    "num_attention_heads": 1,
}
DATA = "--dataloader_num_workers 0 --cache_dir cache"
TRAINING = f"--max_train_steps 1 --train_batch_size 2 --num_validation_images 2 --mixed_precision no {DATA}"
QUICK = {
    "train_flowmo": f"{TRAINING} --perceptual lpips-alex --num_inference_steps 1",
    "train_generator": f"{TRAINING} --num_inference_steps 1 --decoder_num_inference_steps 1 --lr_warmup_steps 0",
    "tokenize_images": DATA,
    "evaluate_reconstruction": f"--num_images 3 --sweep num_inference_steps=1 --metrics lpips_alex {DATA}",
    "convert": "--codebook_bits 8 --sample_size 32 --num_latent_tokens 64",
}
NEW_MODELS = {
    "train_flowmo": TINY,
    "train_generator": {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 1},
}
RESULTS = {"tokenize_images": "tokens-train.json", "evaluate_reconstruction": "metrics.json"}

BLOCKS = [block for page in PAGES for block in blocks(page)]


class Page:
    """The blocks of a page, run in their order in a folder of its own."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.blocks = [block for block in BLOCKS if block.page == name]
        self.namespace: dict[str, Any] = GIVEN.get(name, dict)()
        self.arguments: dict[str, list[str]] = defaultdict(list)  # of the last command of each script
        self.done = 0

    def run(self, block: Block) -> None:
        """And those before it that have not been run."""
        until = self.blocks.index(block) + 1
        first, self.done = self.done, max(until, self.done)
        for earlier in self.blocks[first:until]:
            KINDS[earlier.language](self, earlier, self._substituted(earlier))

    def _substituted(self, block: Block) -> str:
        text = block.text
        for old, new in SUBSTITUTIONS.get(self.name, {}).items():
            text = text.replace(old, new)
        return text


def run_python(page: Page, block: Block, text: str) -> None:
    # Empty lines before it, so that an error names the page's line.
    exec(compile("\n" * (block.line - 1) + text, ROOT / block.page, "exec"), page.namespace)


def run_bash(page: Page, block: Block, text: str) -> None:
    found = list(commands(text))
    assert found, "no command"
    for words in found:
        script = check(words)
        if script is not None:
            before = page.arguments[script.name]
            script.arguments = [word for given in script.arguments for word in (before if given == "..." else [given])]
            script.parse()
            page.arguments[script.name] = script.arguments
            if page.name in RUN and script.name in QUICK:
                run_quickly(script)


def run_quickly(script: Script) -> None:
    """And look for what it is to write."""
    more = QUICK[script.name].split()
    if script.name in NEW_MODELS and "--pretrained_model_name_or_path" not in script.arguments:
        more += ["--model_config", json.dumps(NEW_MODELS[script.name])]
    arguments = script.parse()
    output = Path(getattr(arguments, "output_dir", None) or arguments.output)
    shutil.rmtree(output, ignore_errors=True)  # what pages without this command presuppose
    with own_accelerators():
        script.run(*more)
    assert (output / RESULTS.get(script.name, "model_index.json")).is_file()


def run_yaml(page: Page, block: Block, text: str) -> None:
    assert yaml.safe_load(text) is not None


def run_json(page: Page, block: Block, text: str) -> None:
    json.loads(text)


def pass_over(page: Page, block: Block, text: str) -> None:
    pass


KINDS = {"python": run_python, "bash": run_bash, "yaml": run_yaml, "json": run_json, **dict.fromkeys(TEXT, pass_over)}


def _noise(count: int, side: int) -> list[PIL.Image.Image]:
    pixels = np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)
    return [PIL.Image.fromarray(array) for array in pixels]


@pytest.fixture(scope="session")
def presupposed(tmp_path_factory) -> Path:
    """A folder with this repository's scripts and everything that pages take as given."""
    folder = tmp_path_factory.mktemp("presupposed")
    for name in ("benchmarks", "docs", "src", "training"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photo.jpg").parent.mkdir(exist_ok=True)
    _noise(1, 90)[0].save(folder / "photo.jpg")
    for label in ("bird", "cat", "dog", "horse"):
        (folder / "my_images" / label).mkdir(parents=True)
        for number, image in enumerate(_noise(3, 36)):
            image.save(folder / "my_images" / label / f"{number}.png")
    (folder / "shards").mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / "shards" / f"{split}.tar", "w") as tar:
            for path in sorted((folder / "my_images").rglob("*.png")):
                tar.add(path, f"{path.parent.name}-{path.name}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FlowMoAutoencoder(**TINY).eval()
        MobileNetV2Model(MobileNetV2Config(image_size=16, depth_multiplier=0.1)).save_pretrained(folder / "my_network")
    (folder / "my_network" / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    tokenizer = FlowMoPipeline(model, FlowMoScheduler(num_inference_steps=2))
    for name in ("my_flowmo", "my_flowmo_post"):
        tokenizer.save_pretrained(folder / name)
    save_published(model, folder / "flowmo_lo.pth")
    export_remote_code(tokenizer, folder / "my_flowmo_with_code")
    model.add_adapter(LoraConfig(target_modules=r"decoder\..*to_qkv"))
    model.save_lora_adapter(folder / "my_flowmo_lora")
    model.unload_lora()
    labels = dict(enumerate(("bird", "cat", "dog", "horse")))
    generator = build_generator(num_tokens=64, token_groups=3, group_bits=8, num_classes=4, id2label=labels)
    parts = (generator, FlowMoTokenScheduler(), *tokenizer.components.values())
    FlowMoGenerationPipeline(*parts).save_pretrained(folder / "my_generator")
    return folder


@pytest.fixture(scope="session")
def page(presupposed, tmp_path_factory):
    """The page of a name; the same for all its blocks."""

    @cache
    def find(name: str) -> Page:
        folder = tmp_path_factory.mktemp("page") / "work"
        shutil.copytree(presupposed, folder, symlinks=True)
        return Page(name, folder)

    return find


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(page, block, monkeypatch):
    """Code that a reader copies and that does not run, options that do not exist, or a language that nobody checks."""
    assert block.language in KINDS, f"{block}: nothing here knows how to check {block.language!r}"
    monkeypatch.chdir(page(block.page).folder)
    page(block.page).run(block)


def test_what_the_readme_says_of_its_code(page, monkeypatch):
    """Snippets that run and do something else: other sizes of pictures or files."""
    readme = page("README.md")
    monkeypatch.chdir(readme.folder)
    for block in readme.blocks:
        readme.run(block)
    assert PIL.Image.open("reconstruction.png").size == PIL.Image.open("restored.png").size == (32, 32)
    assert Path("photo.bin").stat().st_size == 192
    assert len(readme.namespace["images"]) == 2 and readme.namespace["tokens"].shape == (1, 64, 3)


def test_what_the_quickstart_says_of_its_code(page, monkeypatch):
    """As of the README."""
    quickstart = page("docs/quickstart.md")
    monkeypatch.chdir(quickstart.folder)
    for block in quickstart.blocks:
        quickstart.run(block)
    assert quickstart.namespace["output"].indices.shape == (1, 64, 3)
    assert len(quickstart.namespace["packed"]) == 192
    assert PIL.Image.open("reconstruction.png").size == PIL.Image.open("flag.png").size == (32, 32)


@pytest.mark.parametrize("name", SUBSTITUTIONS)
def test_substitutions_are_of_something(name):
    """A text that stands in a page no longer, so that what it was to make small is run as it is, or not at all."""
    text = "".join(block.text for block in BLOCKS if block.page == name)
    assert not [old for old in SUBSTITUTIONS[name] if old not in text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "python training/train_flowmo.py --output_dir o --learning_rte 1",
            "unrecognized arguments: --learning_rte",
        ),
        ("accelerate launch training/train_flowmo.py --stage pretrian --output_dir out", "invalid choice: 'pretrian'"),
        ("accelerate launch --config_file none.yaml training/train_flowmo.py", "none.yaml does not exist"),
        ("accelerate launch --processes 2 training/train_flowmo.py", "unrecognized arguments: --processes"),
        ("X=1 python training/train.py", "is no script of this repository"),
        ("make dmeo", "the Makefile does not know it"),
        ("pip install -e '.[trainning]'", "has no extra"),
        ("make demo && flomo encode photo.jpg", "nothing here knows how to check it"),
        ("python -m flowmo_diffusers.hub.convert a.pth", "the following arguments are required: output"),
        ("python benchmarks/memory.py \\\n    --dtype float23  # a comment", "invalid choice: 'float23'"),
    ],
)
def test_wrong_commands_are_found(text, message):
    """Checks of command lines that nothing can fail."""
    with pytest.raises(WrongCommand, match=message):
        for words in commands(text):
            script = check(words)
            if script is not None:
                script.parse()


def test_commands_that_are_installed(monkeypatch):
    """A console script of this package that is taken for an unknown program, or whose options nobody checks."""
    installed = EntryPoint("upload", "flowmo_diffusers.hub.upload:main", "console_scripts")
    monkeypatch.setattr("commands.entry_points", lambda group, name: [installed] if name == "upload" else [])
    assert check(["upload", "my_flowmo", "anna/my-flowmo"]).parse().repo_id == "anna/my-flowmo"
    with pytest.raises(WrongCommand, match="the following arguments are required: repo_id"):
        check(["upload", "my_flowmo"]).parse()


def test_words_of_commands():
    """Quotes, comments, continued lines and several commands in one that are read otherwise than a shell does."""
    text = 'a --b \'{"c": 1,\n "d": 2}\' \\\n  e  # f\n\ng && h | i\n#!/bin/sh\n'
    assert list(commands(text)) == [["a", "--b", '{"c": 1,\n "d": 2}', "e"], ["g"], ["h"], ["i"]]
