"""The script that measures tokenizers."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderTiny, VQModel
from peers import TINY_TITOK, TINY_VQMODEL
from processes import forget_accelerators, on_processes
from scripts import load_script

from flowmo_diffusers import FlowMoPipeline
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.features import FeatureNetwork
from flowmo_diffusers.metrics.frechet import Moments, frechet_distance
from flowmo_diffusers.metrics.manifold import precision_recall
from flowmo_diffusers.metrics.reconstruction import psnr, ssim
from flowmo_diffusers.models.titok import TiTokModel


SCRIPT = Path(__file__).parents[1] / "training" / "evaluate_reconstruction.py"


class MeanColours(FeatureNetwork):
    """A network of three features."""

    def __init__(self):
        super().__init__("_mean", 3, {"network": "mean"})
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": images.mean((2, 3)) * self.scale}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve smooth images of 32 x 32 pixels, and one that is damaged."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(12):
        coarse = PIL.Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize((32, 32), PIL.Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return folder


def originals(folder):
    pixels = [np.asarray(PIL.Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture
def tiny(tiny_pipeline, tmp_path):
    """The folder of a pipeline whose tokens are 6 bytes."""
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def options(tmp_path, images, *words):
    common = ("--dataset", images, "--split", "train", "--resolution", "32", "--output_dir", tmp_path / "out")
    common += ("--cache_dir", tmp_path / "cache", "--batch_size", "5", "--chunk_size", "4")
    return [str(word) for word in (*common, *words)]


def run(tmp_path, images, *words, network=MeanColours):
    """What the script writes, with a network of three features."""
    forget_accelerators()
    script = load_script("evaluate_reconstruction")
    script.build_network = lambda args, protocol: network()
    script.main(script.parse_args(options(tmp_path, images, *words)))
    forget_accelerators()
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_figures_are_those_of_the_reconstructions(tmp_path, images, tiny, capsys):
    """Everything that is written, against images reconstructed and measured by hand."""
    written = run(
        tmp_path, images, "--pretrained_model_name_or_path", tiny, "--sweep", "num_inference_steps=1,3",
        "--metrics", "lpips_alex", "rfid", "precision_recall",
    )  # fmt: skip
    assert [result["name"] for result in written["results"]] == [
        "tiny, num_inference_steps 1",
        "tiny, num_inference_steps 3",
    ]
    pipeline = FlowMoPipeline.from_pretrained(tiny)
    x = originals(images)
    generators = [keyed_generator(0, "decoding", number) for number in range(12)]
    y = pipeline(x, num_inference_steps=3, generator=generators, output_type="latent").images
    figures = written["results"][1]["figures"]
    assert figures["images"] == 12 and figures["bytes_per_image"] == 6
    assert figures["bits_per_pixel"] == 8 * 6 / 32**2
    assert figures["psnr"] == pytest.approx(psnr(x, y).mean().item(), abs=1e-3)
    assert figures["ssim"] == pytest.approx(ssim(x, y).mean().item(), abs=1e-4)
    truncated = [(((x, y)[k] + 1) * 127.5 + 1e-4).floor() for k in (0, 1)]
    errors = (truncated[0] - truncated[1]).square().mean((1, 2, 3))
    official = torch.stack([10 * torch.log10(255**2 / errors[i : i + 5].mean()) for i in (0, 5, 10)]).mean().item()
    assert figures["psnr_official"] == pytest.approx(official, abs=2e-3)
    assert figures["psnr_official"] < figures["psnr"]
    a, b = Moments(3), Moments(3)
    a.add(MeanColours()(x)["pool"])
    b.add(MeanColours()((((y + 1) * 127.5).round() / 127.5) - 1)["pool"])
    assert figures["rfid_mean"] == pytest.approx(frechet_distance(a, b), rel=1e-3, abs=1e-6)
    assert "rfid" not in figures and {"precision_mean", "recall_mean", "lpips_alex", "entropy_bits"} <= figures.keys()
    assert written["protocol"]["rounding"] == "nearest" and written["protocol"]["resolution"] == [32, 32]
    assert "protocol: dataset" in capsys.readouterr().out


def test_precision_and_recall_against_another_split(tmp_path, images, tiny):
    """Catches figures against the originals called those of the reference, or the reference's images not counted."""
    for split, files in {"train": range(12), "test": range(6, 12)}.items():
        (tmp_path / "set" / split).mkdir(parents=True)
        for number in files:
            shutil.copy(images / f"{number:02}.png", tmp_path / "set" / split)
    figures = run(
        tmp_path, tmp_path / "set", "--pretrained_model_name_or_path", tiny, "--sweep", "num_inference_steps=1",
        "--metrics", "rfid", "precision_recall", "--reference_split", "test",
    )["results"][0]["figures"]  # fmt: skip
    pipeline = FlowMoPipeline.from_pretrained(tiny)
    x = originals(images)
    generators = [keyed_generator(0, "decoding", number) for number in range(12)]
    y = pipeline(x, num_inference_steps=1, generator=generators, output_type="latent").images
    samples = MeanColours()((((y + 1) * 127.5).round() / 127.5) - 1)["pool"]
    for name, references in {"": x, "_test": x[6:]}.items():
        expected = precision_recall(samples, MeanColours()(references)["pool"])
        assert (figures[f"precision_mean{name}"], figures[f"recall_mean{name}"]) == expected


def test_everything_is_written(tmp_path, images, tiny):
    """Table, pictures of best, median and worst, and the curve when there is more than one subject."""
    AutoencoderTiny(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4).save_pretrained(
        tmp_path / "taesd"
    )
    run(
        tmp_path, images, "--pretrained_model_name_or_path", tiny, "--metrics", "rfid", "--num_picture_images", 3,
        "--baseline", "jpeg", "webp:40", tmp_path / "taesd", "--baseline_bytes", 150,
    )  # fmt: skip
    table = (tmp_path / "out" / "metrics.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| tiny",
        "| jpeg, 150 bytes",
        "| webp, quality 40",
        "| taesd",
    ]
    assert table[0].startswith(
        "| | images | bits_per_pixel | bytes_per_image | rfid_mean ↓ | psnr ↑ | psnr_official ↑"
    )
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert len(pictures) == 4 and "tiny.png" in pictures
    with PIL.Image.open(tmp_path / "out" / "pictures" / "tiny.png") as picture:
        assert picture.size == (6 + 3 * (96 + 6), 6 + 6 * (24 + 96 + 6))
    assert (tmp_path / "out" / "rate_distortion.png").is_file()


def test_all_settings_on_the_same_images(tmp_path, images):
    """Catches settings that are shown with other images than each other, and one that cannot be read among them."""
    folder = tmp_path / "some"
    shutil.copytree(images, folder)
    (folder / "00.png").write_bytes(b"no image")
    words = ("--baseline", "jpeg:30", "jpeg:95", "--metrics", "--num_picture_images", 2, "--max_bad_fraction", 0.1)
    run(tmp_path, folder, *words)
    with PIL.Image.open(tmp_path / "out" / "together.png") as picture:
        assert picture.size == (6 + 2 * (96 + 6), 6 + 3 * (24 + 96 + 6))
        pixels = np.asarray(picture).astype(int)
    for column, name in enumerate(("01.png", "02.png")):
        original = np.asarray(PIL.Image.open(images / name)).astype(int)
        tiles = [pixels[30 + row * 126 :][:96, 6 + column * 102 :][:, :96][1::3, 1::3] for row in range(3)]
        errors = [np.abs(tile - original).mean() for tile in tiles]
        assert errors[0] == 0 < errors[2] < errors[1] < 20


def test_a_peer_of_ones_own(tmp_path, images, tiny):
    """Catches a VQModel's folder under another name than a pipeline's would have, bits that are not those of its
    indices, or a collapsed codebook that nothing tells of."""
    for folder in ("a", "b"):
        model = VQModel(**TINY_VQMODEL)
        torch.nn.init.constant_(model.quantize.embedding.weight, 1.0)
        model.quantize.embedding.weight.data[0] = 0.0
        model.save_pretrained(tmp_path / folder / "vq")
    words = ("--pretrained_model_name_or_path", tiny, "--metrics", "--baseline")
    (ours, peer) = run(tmp_path, images, *words, tmp_path / "a" / "vq")["results"]
    assert (ours["name"], peer["name"], peer["group"]) == ("tiny", "vq", "vq")
    figures = peer["figures"]
    assert figures["bits_per_pixel"] == 16 * 16 * 3 / 32**2 and figures["bytes_per_image"] == 96
    assert figures["used_codes"] <= 2 and figures["usable_codes"] == 8 and figures["max_entropy_bits"] == 3
    assert "dead_bits" in ours["figures"] and "dead_bits" not in figures
    TiTokModel(**TINY_TITOK).save_pretrained(tmp_path / "titok")
    (titok,) = run(tmp_path, images, "--metrics", "--baseline", tmp_path / "titok")["results"]
    assert titok["figures"]["bytes_per_image"] == pytest.approx(6 * math.log2(12) / 8)
    assert 1 <= titok["figures"]["used_codes"] <= titok["figures"]["usable_codes"] == 12
    named_alike = [str(tmp_path / folder / "vq") for folder in ("a", "b")]
    results = run(tmp_path, images, "--metrics", "--baseline", *named_alike)["results"]
    assert [result["name"] for result in results] == named_alike


def test_worse_quality_is_worse(tmp_path, images):
    """A sanity check of the whole chain: JPEG's qualities are ordered by every figure."""
    written = run(tmp_path, images, "--baseline", "jpeg:90", "jpeg:30", "jpeg:5", "--metrics", "lpips_alex", "rfid")
    for name, sign in (("psnr", -1), ("ssim", -1), ("bits_per_pixel", -1), ("lpips_alex", 1), ("rfid_mean", 1)):
        values = [sign * result["figures"][name] for result in written["results"]]
        assert values == sorted(values) and len(set(values)) == 3, name


def test_a_second_run_measures_nothing_again(tmp_path, images, tiny, monkeypatch):
    """Rows and the originals' features are kept; only other settings are new."""
    words = ("--pretrained_model_name_or_path", tiny, "--metrics", "rfid")
    first = run(tmp_path, images, *words, "--sweep", "num_inference_steps=1")
    forwards = []
    extract = MeanColours.extract
    monkeypatch.setattr(
        MeanColours, "extract", lambda self, images: forwards.append(len(images)) or extract(self, images)
    )
    again = run(tmp_path, images, *words, "--sweep", "num_inference_steps=1")
    assert again["results"] == first["results"] and not forwards
    run(tmp_path, images, *words, "--sweep", "num_inference_steps=1,2")
    assert sum(forwards) == 12
    run(tmp_path, images, *words, "--sweep", "num_inference_steps=1", "--rounding", "truncate")
    assert sum(forwards) == 24


def test_the_published_protocol_is_darker(tmp_path, images, tiny):
    """Truncated pixels change PSNR and SSIM; the protocol is stored beside them."""
    words = ("--pretrained_model_name_or_path", tiny, "--sweep", "num_inference_steps=2", "--metrics")
    ours = run(tmp_path, images, *words)
    theirs = run(tmp_path, images, *words[:-1], "--protocol", "flowmo", "--metrics")
    assert theirs["protocol"]["inception_input"] == "pytorch-fid" and theirs["protocol"]["rounding"] == "truncate"
    difference = theirs["results"][0]["figures"]["psnr"] - ours["results"][0]["figures"]["psnr"]
    assert 1e-5 < abs(difference) < 0.1
    assert theirs["results"][0]["figures"]["psnr_official"] == ours["results"][0]["figures"]["psnr_official"]


def test_windows_are_measured_with_all_their_bytes(tmp_path, images, tiny):
    """Would catch windows of which one is counted, that encoding does not know of, or whose codes are not counted."""
    words = ("--pretrained_model_name_or_path", tiny, "--sweep", "window_size=16,32", "num_inference_steps=1")
    run(tmp_path, images, *words, "--metrics")
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert [result["figures"]["bytes_per_image"] for result in results] == [3 * 3 * 6, 6]
    pipeline = FlowMoPipeline.from_pretrained(tiny)
    x = originals(images)
    y = pipeline(
        x,
        num_inference_steps=1,
        generator=[keyed_generator(0, "decoding", number) for number in range(len(x))],
        output_type="latent",
        window_size=16,
    ).images
    assert results[0]["figures"]["psnr"] == pytest.approx(psnr(x, y.clamp(-1, 1)).mean().item(), abs=0.01)


def test_damaged_images_are_left_out(tmp_path, images, tiny):
    """They are named in the results, and too many of them are an error."""
    folder = tmp_path / "some"
    folder.mkdir()
    for file in images.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "07.png").write_bytes(b"no image")
    words = ("--pretrained_model_name_or_path", tiny, "--sweep", "num_inference_steps=1", "--metrics", "rfid")
    written = run(tmp_path, folder, *words, "--max_bad_fraction", "0.1")
    assert written["results"][0]["figures"]["images"] == 11
    ((name, reason),) = written["results"][0]["bad_images"]
    assert name.endswith("07.png") and "known format" in reason
    with pytest.raises(OSError, match="1 of 12 images cannot be used"):
        run(tmp_path, folder, *words)


@pytest.mark.parametrize("preset", ["imagenet_256", "openimages_256", "food101_256", "nuscenes"])
def test_presets(tmp_path, preset):
    """Each is a set of options that the script has, with the crop of the published evaluation."""
    config = SCRIPT.parent / "configs" / "evaluation" / f"{preset}.yaml"
    words = ["--config", config, "--dataset", "somewhere", "--baseline", "jpeg:75", "--output_dir", tmp_path]
    args = load_script("evaluate_reconstruction").parse_args([str(word) for word in words])
    assert args.resolution == (256, 256) and (args.interpolation, args.crop) == ("bilinear", "torchvision")
    assert args.split in ("validation", "test") and args.num_images is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to evaluate"),
        (("--baseline", "jpeg"), "need --baseline_bytes"),
        (("--baseline", "jpeg:50", "--sweep", "steps=1"), "'steps' cannot be swept: num_inference_steps"),
        (("--baseline", "jpeg:50", "--sweep", "rho=a"), "'a' are no values of rho"),
        (("--baseline", "jpeg:50", "--sweep", "rho=1", "rho=2"), "names a setting twice"),
        (
            ("--pretrained_model_name_or_path", "a", "--baseline", "jpeg", "--sweep", "window_size=16"),
            "need --baseline_bytes where the bytes depend on windows",
        ),
        (("--baseline", "jpeg:50", "--batch_size", "0"), "--batch_size 0 must be at least 1"),
        (("--baseline", "jpeg:50", "--metrics", "precision_recall"), "needs rfid"),
        (
            ("--baseline", "jpeg:50", "--reference_split", "train"),
            "--reference_split is for --metrics precision_recall",
        ),
        (("--baseline", "jpeg:50", "--metrics", "fid"), "invalid choice: 'fid'"),
    ],
)
def test_wrong_options(tmp_path, images, capsys, words, message):
    with pytest.raises(SystemExit):
        load_script("evaluate_reconstruction").parse_args(options(tmp_path, images, *words))
    assert message in capsys.readouterr().err


def test_every_combination_of_settings_is_measured(tmp_path, images, tiny):
    """Of the sampler and of the scheduler; intervals are two numbers."""
    script = load_script("evaluate_reconstruction")
    args = script.parse_args(
        options(tmp_path, images, "--pretrained_model_name_or_path", tiny, "--sweep", "solver=euler,heun",
                "guidance_interval=0.17:1.02,0:inf", "rho=2")
    )  # fmt: skip
    ((name, pipeline),) = script.pipelines(args, torch.device("cpu"))
    found = script.flowmo_reconstructors(name, pipeline, args)
    assert [each.name for each in found] == [
        f"tiny, solver {solver}, guidance_interval {interval}, rho 2.0"
        for solver in ("euler", "heun")
        for interval in ((0.17, 1.02), (0.0, float("inf")))
    ]
    assert [each.pipeline.scheduler.config.solver for each in found] == ["euler", "euler", "heun", "heun"]
    assert all(each.pipeline.scheduler.config.rho == 2 for each in found)
    assert found[1].sampling == {"guidance_interval": (0.0, float("inf"))}


def test_distortion_by_forwards(tmp_path, images, tiny):
    """Forwards that are not counted, or a plot whose curves are of one setting each."""
    words = ("--pretrained_model_name_or_path", tiny, "--sweep", "num_inference_steps=1,25", "solver=euler,heun")
    figures = [each["figures"]["forwards"] for each in run(tmp_path, images, *words, "--metrics")["results"]]
    assert figures == [1, 1, 31, 61]
    assert (tmp_path / "out" / "forwards.png").is_file()
    curve = load_script("evaluate_reconstruction").curve
    assert curve("tiny, num_inference_steps 25, solver heun") == "tiny, solver heun"


def test_models_of_different_sizes_need_a_resolution(tmp_path, images, tiny):
    script = load_script("evaluate_reconstruction")
    with pytest.raises(ValueError, match="--resolution must be given: the pipelines' own are"):
        script.sample_size([])
    args = script.parse_args(options(tmp_path, images, "--pretrained_model_name_or_path", tiny, tiny))
    assert [name for name, _ in script.pipelines(args, torch.device("cpu"))] == [str(tiny)] * 2
    assert script.sample_size(script.pipelines(args, torch.device("cpu"))) == 16


def _on_each(tmp_path, images, words):
    return run(tmp_path, images, *words)


@pytest.mark.slow
def test_processes_measure_what_one_does(tmp_path, images, tiny):
    """Two processes share the images and write the same figures."""
    words = ("--pretrained_model_name_or_path", tiny, "--sweep", "num_inference_steps=2", "--metrics", "rfid")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (alone,) = on_processes(1, _on_each, tmp_path / "one", images, words)
    both = on_processes(2, _on_each, tmp_path / "two", images, words)
    assert both[0] == both[1]
    for name, value in alone["results"][0]["figures"].items():
        if name != "images_per_second":
            assert both[0]["results"][0]["figures"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_a_killed_evaluation_continues(tmp_path, images, tiny):
    """SIGKILL after the first chunk: what is there stays, and the end is that of a run that was not killed."""
    words = ("--pretrained_model_name_or_path", tiny, "--sweep", "num_inference_steps=25", "--metrics")
    command = [sys.executable, str(SCRIPT)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "yes"}
    (tmp_path / "whole").mkdir()
    subprocess.run(command + options(tmp_path / "whole", images, *words), check=True, env=environment)
    process = subprocess.Popen(command + options(tmp_path, images, *words, "--batch_size", "1"), env=environment)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("rows-*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("rows-*.safetensors")}
    assert 0 < len(kept) < 3 and not (tmp_path / "out" / "metrics.json").exists()
    subprocess.run(command + options(tmp_path, images, *words, "--batch_size", "1"), check=True, env=environment)
    assert all(path.stat().st_mtime_ns == time_written for path, time_written in kept.items())
    ended, whole = (
        json.loads((folder / "out" / "metrics.json").read_text())["results"][0]["figures"]
        for folder in (tmp_path, tmp_path / "whole")
    )
    for name, value in whole.items():
        if name != "images_per_second":
            assert ended[name] == pytest.approx(value, rel=1e-4), name
