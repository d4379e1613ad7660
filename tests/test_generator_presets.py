"""The presets of generators: they parse, they build, and what the documentation says of their sizes is counted."""

import re
from pathlib import Path

import pytest
import torch
from scripts import load_script

from flowmo_diffusers import FlowMoTokenGenerator
from flowmo_diffusers.objectives.cost import generator_training_flops


ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "training" / "configs" / "generator").glob("*.yaml"))
LO = {"num_tokens": 256, "token_groups": 2, "group_bits": 9, "num_classes": 1000}


def read(path: Path):
    argv = ["--config", str(path), "--output_dir", "out", "--train_tokens_dir", "tokens", "--tokenizer", "tokenizer"]
    return load_script("train_generator").parse_args(argv)


def build(path: Path, **tokens) -> FlowMoTokenGenerator:
    with torch.device("meta"):
        return FlowMoTokenGenerator(**read(path).model_config, **tokens)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_documented_size_is_counted(path):
    """A preset that does not parse or build, or a table that says something else of it."""
    config = build(path, **LO).config
    row = re.search(rf"`[^`]*{path.name}`[^|]*\|([^|]*)\|([^|]*)\|", (ROOT / "docs" / "generation.md").read_text())
    assert row, f"docs/generation.md has no row for {path.name}"
    shape = f"{config.hidden_size} × {config.num_layers} × {config.num_attention_heads}"
    assert row[1].strip() == shape
    millions = build(path, **LO).num_parameters() / 1e6
    assert float(re.match(r" ([\d.]+) M", row[2])[1]) == pytest.approx(millions, abs=0.05 if millions < 10 else 0.5)


def test_maskbit_is_maskbits_recipe():
    """Values that are not those the comments claim."""
    path = ROOT / "training" / "configs" / "generator" / "maskbit.yaml"
    args = read(path)
    assert (args.adam_beta1, args.adam_beta2, args.adam_weight_decay, args.learning_rate) == (0.9, 0.96, 0.045, 1e-4)
    assert (args.label_smoothing, args.class_dropout, args.mask_schedule) == (0.1, 0.1, "arccos")
    images = args.train_batch_size * args.gradient_accumulation_steps * 8
    assert images == 1024
    assert round(args.max_train_steps * images / 1_281_167) == 1079
    model = build(path, **LO)
    adaptive = sum(p.numel() for name, p in model.named_parameters() if "modulation" in name)
    assert (model.num_parameters() - adaptive) / 1e6 == pytest.approx(305, abs=1)


def test_flops_follow_the_order():
    """An autoregressive generator costs its heads more, nothing else."""
    path = ROOT / "training" / "configs" / "generator" / "tiny.yaml"
    config = dict(build(path, **LO).config)
    masked = generator_training_flops(config)
    assert masked < generator_training_flops(config | {"order": "autoregressive"}) < 1.5 * masked
