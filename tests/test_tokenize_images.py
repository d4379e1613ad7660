"""The script that turns images into tokens."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from processes import START_METHOD, forget_accelerators, on_processes
from scripts import load_script

from flowmo_diffusers import FlowMoPipeline
from flowmo_diffusers.data.sources import FolderImages
from flowmo_diffusers.data.tokenizing import ImageVariants
from flowmo_diffusers.data.tokens import load_tokens, tokenizer_identity
from flowmo_diffusers.models.quantizers import LFQQuantizer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images of three classes."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(11):
        path = folder / f"class{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (20, 26, 3), np.uint8)).save(path)
    return folder


@pytest.fixture
def tiny(tiny_pipeline, tmp_path):
    """The folder of a pipeline whose tokens are 6 bytes."""
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(folder: Path, images: Path, *words) -> Path:
    """Runs the script; returns where it wrote."""
    common = ("--pretrained_model_name_or_path", folder / "tiny", "--dataset", images, "--output_dir", folder / "out")
    common += ("--cache_dir", folder / "cache", "--batch_size", 3, "--chunk_size", 4)
    forget_accelerators()
    script = load_script("tokenize_images")
    script.main(script.parse_args([str(word) for word in (*common, *words)]))
    forget_accelerators()
    return folder / "out"


def contents(out: Path) -> tuple[bytes, dict]:
    """What must be equal of two runs."""
    (file,) = (out / "data").glob("train-*.parquet")
    description = json.loads((out / "tokens-train.json").read_text())
    return file.read_bytes(), {k: v for k, v in description.items() if k not in ("throughput", "environment")}


def test_tokens_are_those_of_the_images(tmp_path, images, tiny, capsys):
    """Every variant's indices are what the tokenizer gives of these very pixels; classes, speed and card are there."""
    out = run(tmp_path, images, "--flip", "--num_crops", 2, "--random_scale", 1.5, "--seed", 4)
    tokens = load_tokens(out, cache_dir=tmp_path / "cache")
    source = FolderImages([images])
    variants = ImageVariants(source, 16, 2, 1.5, True, seed=4)
    autoencoder = FlowMoPipeline.from_pretrained(tiny).autoencoder
    pixels = torch.stack([variants.pixels(number) for number in range(44)])
    assert torch.equal(tokens.indices(range(44)), autoencoder.encode(pixels).indices)
    assert torch.equal(tokens.labels, torch.from_numpy(source.labels().ids).repeat_interleave(4))
    assert tokens.class_names == ["class0", "class1", "class2"]
    assert tokens.identity == tokenizer_identity(autoencoder)
    description = tokens.description
    assert (description["count"], description["settings"]["num_images"], description["bytes_per_image"]) == (44, 11, 6)
    speed = description["throughput"]
    assert speed["images_per_second"] > 0
    assert speed["tokens_per_second"] == pytest.approx(8 * speed["images_per_second"])
    assert "44 rows of 6 bytes an image" in capsys.readouterr().out
    assert "| train | 44 | 11 | 4 | 3 |" in (out / "README.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "data", "tokens-train.json"]


def test_a_finished_split_is_left_alone(tmp_path, images, tiny, capsys, monkeypatch):
    """The same settings do nothing; others are refused by name, as is another tokenizer; a second split is added."""
    out = run(tmp_path, images)
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(LFQQuantizer, "pack", None)
        run(tmp_path, images)
        assert "holds split 'train' already: nothing to do" in capsys.readouterr().out
        with pytest.raises(ValueError, match="by other settings: transform is .*'flip': False.*'flip': True"):
            run(tmp_path, images, "--flip")
    run(tmp_path, images, "--split", "test", "--num_images", 5)
    assert json.loads((out / "tokens-test.json").read_text())["count"] == 5 and contents(out) == before
    pipeline = FlowMoPipeline.from_pretrained(tiny)
    with torch.no_grad():
        next(pipeline.autoencoder.encoder.parameters()).add_(0.1)
    pipeline.save_pretrained(tiny)
    with pytest.raises(ValueError, match="tokens of another tokenizer: digest"):
        run(tmp_path, images, "--split", "validation")


def test_bad_images_are_left_out(tmp_path, images, tiny):
    """With their reasons, up to a share of all; other images keep their numbers and classes."""
    folder = tmp_path / "some"
    for path in sorted(images.rglob("*.png")):
        target = folder / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "class1" / "04.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"2 of 22 images cannot be used: .*04.png"):
        run(tmp_path, folder, "--flip")
    out = run(tmp_path, folder, "--flip", "--max_bad_fraction", 0.1)
    tokens = load_tokens(out, cache_dir=tmp_path / "cache")
    missing = next(n for n in range(11) if FolderImages([folder]).name(n).endswith("04.png"))
    assert tokens.images.tolist() == [n for n in range(11) for _ in range(2) if n != missing]
    assert torch.equal(tokens.labels, torch.from_numpy(FolderImages([folder]).labels().ids)[tokens.images])
    assert [reason for _, reason in tokens.description["bad_images"]] == ["no image of a known format"] * 2


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path, images, tiny):
    """The same bytes."""
    expected = contents(run(tmp_path, images, "--flip"))
    (tmp_path / "two").mkdir()
    tiny.rename(tmp_path / "two" / "tiny")
    on_processes(2, run, tmp_path / "two", images, "--flip")
    assert contents(tmp_path / "two" / "out") == expected


def killed_after(packings: int, folder: Path, images: Path) -> None:
    """Runs the script, but kills it at the so-and-so-many-th batch."""
    left, pack = [packings], LFQQuantizer.pack

    def strike(self, codes):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return pack(self, codes)

    LFQQuantizer.pack = strike
    torch.set_num_threads(1)
    run(folder, images, "--flip")


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, images, tiny, monkeypatch):
    """By SIGKILL in its third chunk: the rest alone is done, and the result is the same."""
    expected = contents(run(tmp_path, images, "--flip"))
    (tmp_path / "cut").mkdir()
    tiny.rename(tmp_path / "cut" / "tiny")
    process = multiprocessing.get_context(START_METHOD).Process(
        target=killed_after, args=(6, tmp_path / "cut", images)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    out = tmp_path / "cut" / "out"
    assert not list(out.glob("tokens-*")) and len(list(out.rglob("rows-*"))) == 2
    with pytest.raises(OSError, match="no finished tokens"):
        load_tokens(out)
    with pytest.raises(ValueError, match="holds results of something else: .*flip"):
        run(tmp_path / "cut", images)
    packed, pack = [], LFQQuantizer.pack
    monkeypatch.setattr(LFQQuantizer, "pack", lambda self, codes: packed.append(len(codes)) or pack(self, codes))
    assert contents(run(tmp_path / "cut", images, "--flip")) == expected
    assert sum(packed) == 22 - 8
    assert not list((tmp_path / "cut").rglob(".tokens-*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch_size", 0), "--batch_size 0 must be at least 1"),
        (("--random_scale", 1.5), "--random_scale belongs to --num_crops 2 or more"),
        (("--num_crops", 2, "--random_scale", 0.5), "--random_scale 0.5 must be at least 1"),
        (("--split", "a-b"), "--split 'a-b' must be letters, digits and underscores"),
        (("--seed", -1), "--seed -1 must not be negative"),
        (("--max_bad_fraction", 1), "--max_bad_fraction must be at least 0 and less than 1"),
    ],
)
def test_wrong_options_are_refused(tmp_path, images, words, message, capsys):
    """Before anything is loaded."""
    with pytest.raises(SystemExit):
        run(tmp_path, images, *words)
    assert message in capsys.readouterr().err


def test_wrong_tokenizers_and_columns_are_refused(tmp_path, images, tiny, tiny_config, tiny_pipeline):
    """Before any image is read: a resolution between patches, codes that are not discrete, no pipeline, no column."""
    with pytest.raises(ValueError, match="--resolution .*18.* must be multiples of patch_size=4"):
        run(tmp_path, images, "--resolution", 18)
    with pytest.raises(ValueError, match="label_column='kind'"):
        run(tmp_path, images, "--label_column", "kind")
    continuous = type(tiny_pipeline.autoencoder)(**{**tiny_config, "quantizer": "kl"})
    FlowMoPipeline(continuous, tiny_pipeline.scheduler).save_pretrained(tmp_path / "kl" / "tiny")
    with pytest.raises(ValueError, match="quantizer='kl' has no discrete codes"):
        run(tmp_path / "kl", images)
    with pytest.raises(ValueError, match="nothing/tiny.* neither a valid local path"):
        run(tmp_path / "nothing", images)
    assert not (tmp_path / "out" / "data").exists()
