"""The demo: which runs it makes, one from the other, and what it writes. The runs themselves are tested elsewhere."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
from scripts import load_script

from flowmo_diffusers.assets import starter


@pytest.fixture
def run_demo(tmp_path: Path, monkeypatch) -> Callable[..., tuple[list[tuple[str, Namespace]], Path]]:
    """Runs it with options; the runs it wanted, with their options as the scripts read them, and its folder."""
    demo = load_script("demo")
    runs = []

    def run_script(name: str, *options: str | Path) -> float:
        args = load_script(name.removesuffix(".py")).parse_args([str(option) for option in options])
        runs.append((name, args))
        if name == "train_flowmo.py":
            shutil.copytree(starter(), args.output_dir, dirs_exist_ok=True)
        elif name == "train_generator.py":
            args.output_dir.mkdir(parents=True)
            record = {"steps": args.max_train_steps, "val/token_loss": 3.0, "val/bits_per_bit": 0.5}
            (args.output_dir / "metrics.json").write_text(json.dumps(record))
        return 60.0

    monkeypatch.setattr(demo, "run_script", run_script)
    monkeypatch.setattr(demo, "NUM_IMAGES", 12)
    monkeypatch.setattr(demo, "SAMPLING", {"num_inference_steps": 1, "guidance_scale": 1.0})

    def run(*options: str):
        monkeypatch.setattr("sys.argv", ["demo.py", "--output_dir", str(tmp_path / "demo"), *options])
        demo.main()
        return runs, tmp_path / "demo"

    return run


def test_a_few_minutes(run_demo, tmp_path):
    """Catches a demo that goes on with an old result, that trains for hours, or whose figures are of other weights."""
    old = tmp_path / "demo" / "pre-training_on_emoji" / "old"
    old.mkdir(parents=True)
    runs, folder = run_demo()
    assert [name for name, _ in runs] == ["train_flowmo.py"] * 2 + ["tokenize_images.py", "train_generator.py"]
    assert not old.exists()
    pretrain, posttrain, tokens, generator = (args for _, args in runs)
    assert (pretrain.stage, pretrain.max_train_steps, pretrain.pretrained_model_name_or_path) == (
        "pretrain",
        300,
        None,
    )
    assert (posttrain.stage, posttrain.max_train_steps) == ("posttrain", 40)
    assert posttrain.pretrained_model_name_or_path == str(pretrain.output_dir)
    assert generator.train_tokens_dir == tokens.output_dir and generator.max_train_steps == 80

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["starter"]["psnr"] > 25 > 20 > metrics["mean colour"]["psnr"]
    assert metrics["a few minutes of post-training on emoji"]["train_seconds"] == 60
    assert metrics["generator"]["steps"] == 80
    for name in ("demo.png", "generated.png"):
        with PIL.Image.open(folder / name) as picture:
            assert picture.width > 12 * 32


def test_from_scratch(run_demo, tmp_path):
    """Catches a recipe of the starter that lacks a stage, starts one from another's weights, is cut short, or begins
    anew after a kill."""
    half_done = tmp_path / "demo" / "distillation" / "checkpoint-100"
    half_done.mkdir(parents=True)
    runs, folder = run_demo("--from_scratch")
    assert half_done.exists()
    trained = [args for name, args in runs if name == "train_flowmo.py"]
    facts = [(args.dataset_name, args.stage, args.max_train_steps) for args in trained]
    assert facts == [
        ("emoji", "pretrain", 7000),
        ("emoji", "posttrain", 150),
        ("emoji+birds", "pretrain", 8000),
        ("emoji+birds", "posttrain", 200),
        ("emoji+birds", "distill", 600),
    ]
    starts = [args.pretrained_model_name_or_path for args in trained]
    assert starts == [None, *(str(args.output_dir) for args in trained[:-1])]
    assert trained[0].model_config["sample_size"] == 32 and trained[2].model_config is None
    assert all(args.resume_from_checkpoint == "latest" for _, args in runs if hasattr(args, "resume_from_checkpoint"))
    assert len(json.loads((folder / "metrics.json").read_text())) == 3 + 6 + 1
