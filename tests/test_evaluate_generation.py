"""The script that measures generators."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from generators import TinyNetwork, features_of, random_images, tiny_ddpm, tiny_dit
from processes import START_METHOD, on_processes, own_accelerators
from scripts import load_script

from flowmo_diffusers.data.arrays import ArrayImages
from flowmo_diffusers.metrics.generation import Reference, generation_metrics
from flowmo_diffusers.metrics.inception import FIDInception
from flowmo_diffusers.metrics.sampling import PipelineSampler


SAMPLES, REAL = random_images(14, 0), random_images(17, 1) // 4 * 3 + 60
STEPS = {"pipeline_kwargs": '{"num_inference_steps": 1}'}


def evaluate(folder: Path, reference: object, name: str = "run", **options: object) -> dict:
    """Runs the script with the tiny network in this process; what it writes into metrics.json."""
    script = load_script("evaluate_generation")
    script.build_network = lambda args, protocol: TinyNetwork()
    argv = ["--output_dir", str(folder / name), "--reference", str(reference), "--cache_dir", str(folder / "cache")]
    for option, value in options.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{option}", *map(str, values)]
    with own_accelerators():
        script.main(script.parse_args(argv))
    file = folder / name / "metrics.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_pictures(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def real(tmp_path) -> Path:
    return write_pictures(tmp_path / "real", REAL)


@pytest.fixture
def samples(tmp_path) -> Path:
    np.savez(tmp_path / "generated.npz", SAMPLES)
    return tmp_path / "generated.npz"


@pytest.fixture
def expected(tmp_path) -> dict[str, float]:
    network = TinyNetwork()
    theirs, ours = (features_of(tmp_path / f"rows{n}", x, network) for n, x in enumerate((REAL, SAMPLES)))
    return generation_metrics(ours, Reference.from_features(theirs), network)[0]


def test_figures_and_all_that_they_depend_on(tmp_path, samples, real, expected, capsys):
    """Those of the library, with counts, protocol, sources and versions; the table says the same."""
    results = evaluate(tmp_path, real, samples=samples)
    assert results["figures"] == pytest.approx(expected, rel=1e-5)
    assert results["left_out"] == {}
    assert results["samples"] == {"source": str(samples), "split": None, "images": 14, "bad_images": []}
    assert results["reference"] == {"source": str(real), "split": None, "images": 17, "bad_images": []}
    protocol = results["protocol"]
    assert (protocol["height"], protocol["width"], protocol["crop"]) == (8, 8, "center")
    assert (protocol["neighbours"], protocol["inception_score_split"]) == (3, 5000)
    assert protocol["network"] == {"network": "tiny"}
    assert protocol["num_images_precision_recall"] == 10_000
    assert results["environment"]["packages"]["torch"] == torch.__version__
    table = (tmp_path / "run" / "metrics.md").read_text()
    assert f"{expected['fid']:.3f}" in table
    assert f"{expected['recall']:.3f}" in table
    printed = capsys.readouterr().out
    assert "height 8, width 8" in printed.splitlines()[0]
    assert table in printed


def test_samples_in_any_form_are_the_same(tmp_path, samples, real):
    """A folder, `.npz`, and what `--write_samples` makes of them."""
    folder = write_pictures(tmp_path / "pictures", SAMPLES)
    first = evaluate(tmp_path, real, "a", samples=folder, write_samples=tmp_path / "written.npz")
    assert np.array_equal(np.load(tmp_path / "written.npz")["arr_0"], SAMPLES)
    for name in (samples, tmp_path / "written.npz"):
        assert evaluate(tmp_path, real, name.stem, samples=name)["figures"] == first["figures"]


def test_options_of_the_figures(tmp_path, samples, real):
    """Each reaches the figure that it is of."""
    base = evaluate(tmp_path, real, "base", samples=samples)["figures"]
    few = evaluate(tmp_path, real, "few", samples=samples, metrics=["fid"])["figures"]
    assert few == {"fid": base["fid"]}
    for option, value, changed in (
        ("neighbours", 1, {"precision", "recall"}),
        ("num_images_precision_recall", 8, {"precision", "recall"}),
        ("inception_score_split", 5, {"inception_score", "inception_score_std"}),
        ("jpeg_quality", 10, set(base) - {"inception_score_std"}),
        ("num_samples", 9, set(base) - {"inception_score_std"}),
        ("num_reference_images", 9, {"fid", "sfid", "precision", "recall"}),
    ):
        figures = evaluate(tmp_path, real, option, samples=samples, **{option: value})["figures"]
        different = {name for name in base if figures[name] != base[name]}
        assert different <= changed, option
        assert different & {"fid", "recall", "inception_score", "precision"}, option


def test_only_samples_are_stored_as_jpeg(tmp_path, samples, real):
    """The reference stays as it is; what is written is what was measured."""
    written = tmp_path / "written.npz"
    figures = evaluate(tmp_path, real, "a", samples=samples, jpeg_quality=10, write_samples=written)["figures"]
    assert (np.load(written)["arr_0"] != SAMPLES).any()
    assert evaluate(tmp_path, real, "b", samples=written)["figures"] == figures


def test_what_a_killed_write_left_is_removed(tmp_path, samples, real):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".partial-1-samples.npz").write_bytes(b"half")
    evaluate(tmp_path, real, samples=samples)
    assert not list((tmp_path / "run").glob(".partial-*"))


def test_a_pipeline_is_sampled_once(tmp_path, real, monkeypatch):
    """Samples are stored in the field's form; the same command again draws and measures nothing anew."""
    tiny_ddpm().save_pretrained(tmp_path / "generator")
    options = {"pretrained_model_name_or_path": tmp_path / "generator", "num_samples": 9, "seed": 5, **STEPS}
    first = evaluate(tmp_path, real, chunk_size=4, sample_batch_size=3, **options)
    drawn = np.load(tmp_path / "run" / "samples.npz")["arr_0"]
    sampler = PipelineSampler(tiny_ddpm(), 5, arguments={"num_inference_steps": 1})
    assert np.abs(drawn.astype(int) - sampler(range(9)).numpy()).max() <= 1
    assert first["samples"] == {
        "source": str(tmp_path / "generator"),
        "split": None,
        "images": 9,
        "bad_images": [],
        "num_classes": None,
        "class_labels": [],
        "pipeline_kwargs": {"num_inference_steps": 1},
        "dtype": "float32",
        "seed": 5,
    }
    assert evaluate(tmp_path, real, "again", samples=tmp_path / "run" / "samples.npz")["figures"] == first["figures"]

    seen = []
    draw = PipelineSampler.__call__
    monkeypatch.setattr(PipelineSampler, "__call__", lambda self, numbers: seen.append(numbers) or draw(self, numbers))
    monkeypatch.setattr(TinyNetwork, "extract", lambda self, images: pytest.fail("measured again"))
    assert evaluate(tmp_path, real, chunk_size=4, sample_batch_size=3, **options) == first
    assert seen == [[0]]


def test_classes(tmp_path, real):
    """In turn, all of `--num_classes` or some."""
    tiny_dit().save_pretrained(tmp_path / "generator")
    options = {
        "pretrained_model_name_or_path": tmp_path / "generator",
        "num_samples": 5,
        "pipeline_kwargs": '{"num_inference_steps": 1, "guidance_scale": 1.0}',
    }
    evaluate(tmp_path, real, "all", num_classes=3, **options)
    evaluate(tmp_path, real, "some", class_labels=[2, 0], **options)
    assert np.load(tmp_path / "all" / "samples.npz")["arr_1"].tolist() == [0, 1, 2, 0, 1]
    assert np.load(tmp_path / "some" / "samples.npz")["arr_1"].tolist() == [2, 0, 2, 0, 2]
    with pytest.raises(ValueError, match="DiTPipeline needs class_labels"):
        evaluate(tmp_path, real, "none", **options)


def test_a_reference_by_its_statistics(tmp_path, samples, real):
    """The same figures; precision and recall by the images that are stored beside, spread over all."""
    stored = tmp_path / "reference.npz"
    first = evaluate(tmp_path, real, "a", samples=samples, write_statistics=stored)
    second = evaluate(tmp_path, stored, "b", samples=samples)
    assert second["figures"] == pytest.approx(first["figures"], rel=1e-9)
    assert second["reference"] == {"source": str(stored), "split": None, "images": 17, "bad_images": []}
    evaluate(tmp_path, real, "c", samples=samples, write_statistics=stored, num_images_precision_recall=5)
    with np.load(stored) as arrays:
        assert np.array_equal(arrays["arr_0"], REAL[[0, 3, 6, 10, 13]])
        assert arrays["count"] == 17
        np.savez(tmp_path / "adm.npz", **{name: arrays[name] for name in ("mu", "sigma")})
    third = evaluate(tmp_path, tmp_path / "adm.npz", "d", samples=samples)
    assert set(third["left_out"]) == {"sfid", "precision_recall"}
    assert third["figures"]["fid"] == pytest.approx(first["figures"]["fid"], rel=1e-9)
    assert third["reference"]["images"] is None
    assert "No sfid: the statistics of the reference have no mu_s" in (tmp_path / "d" / "metrics.md").read_text()
    with pytest.raises(ValueError, match="--write_statistics: the reference .* has statistics already"):
        evaluate(tmp_path, stored, "e", samples=samples, write_statistics=tmp_path / "other.npz")


def test_statistics_of_another_protocol_are_refused(tmp_path, samples, real):
    """Before anything is sampled but the image that is tried."""
    stored = tmp_path / "reference.npz"
    evaluate(tmp_path, real, "a", samples=samples, write_statistics=stored)
    tiny_ddpm().save_pretrained(tmp_path / "generator")
    for change, message in (
        ({"resolution": 16}, "another protocol: height is 8 there and 16 here; .*width is 8 there and 16 here"),
        ({"resolution": 8, "interpolation": "adm"}, "interpolation is 'bilinear' there and 'adm' here"),
    ):
        options = {"pretrained_model_name_or_path": tmp_path / "generator", **STEPS, **change}
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path, stored, "b", **options)
    assert not (tmp_path / "b" / "samples").exists()


def test_sizes_must_agree(tmp_path, samples):
    """Of samples and reference, and within a set, unless a resolution is given; of a pipeline by one sample."""
    larger = write_pictures(tmp_path / "larger", random_images(9, 2, side=10))
    message = "samples of 8 x 8 and reference of 10 x 10; .*--resolution"
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, larger, samples=samples)
    tiny_ddpm().save_pretrained(tmp_path / "generator")
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, larger, pretrained_model_name_or_path=tmp_path / "generator", **STEPS)
    results = evaluate(tmp_path, larger, samples=samples, resolution="6x8", crop="none")
    assert (results["protocol"]["height"], results["protocol"]["width"], results["protocol"]["crop"]) == (6, 8, "none")
    PIL.Image.new("RGB", (8, 10)).save(larger / "other.png")
    with pytest.raises(ValueError, match="8 x 10 pixels where others have 10 x 10"):
        evaluate(tmp_path, larger, samples=larger)


def test_bad_images(tmp_path, samples, real, expected):
    """Left out of all figures and of what is stored, and named; too many are an error."""
    (real / "004x.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"1 of 18 images cannot be used: .*004x\.png"):
        evaluate(tmp_path, real, samples=samples)
    stored = tmp_path / "reference.npz"
    results = evaluate(tmp_path, real, samples=samples, max_bad_fraction=0.1, write_statistics=stored)
    assert results["figures"] == pytest.approx(expected, rel=1e-5)
    assert results["reference"]["images"] == 17
    assert results["reference"]["bad_images"][0][0] == str(real / "004x.png")
    assert np.array_equal(np.load(stored)["arr_0"], REAL)


def test_nothing_to_measure(tmp_path, samples, real):
    """Empty sets and files that are not there."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no images in"):
        evaluate(tmp_path, tmp_path / "empty", samples=samples)
    with pytest.raises(OSError, match="no images in"):
        evaluate(tmp_path, real, samples=tmp_path / "empty")
    with pytest.raises(OSError, match="missing.npz does not exist"):
        evaluate(tmp_path, tmp_path / "missing.npz", samples=samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --samples and --pretrained"),
        ({"samples": "a", "pretrained_model_name_or_path": "b"}, "exactly one of --samples and --pretrained"),
        ({"samples": "a", "num_classes": 3}, "belong to --pretrained_model_name_or_path"),
        ({"samples": "a", "pipeline_kwargs": "{"}, "is no JSON"),
        ({"pretrained_model_name_or_path": "b", "pipeline_kwargs": "[1]"}, "must be a mapping"),
        ({"pretrained_model_name_or_path": "b", "num_classes": 3, "class_labels": 1}, "not both"),
        ({"samples": "a", "num_samples": 0}, "--num_samples 0 must be at least 1"),
        ({"samples": "a", "seed": -1}, "must not be negative"),
        ({"samples": "a", "max_bad_fraction": 1}, "must be from 0 to 1"),
        ({"samples": "a", "write_statistics": "a.txt"}, "a.txt must end in .npz"),
        ({"samples": "a", "metrics": "kid"}, "invalid choice: 'kid'"),
        ({"samples": "a", "resolution": "8y"}, "must be a side in pixels"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        evaluate(tmp_path, "r", **options)
    assert message in capsys.readouterr().err


def test_a_file_of_options(tmp_path, samples, real):
    (tmp_path / "options.yaml").write_text("neighbours: 1\njpeg_quality: 50\n")
    protocol = evaluate(tmp_path, real, samples=samples, config=tmp_path / "options.yaml")["protocol"]
    assert (protocol["neighbours"], protocol["jpeg_quality"]) == (1, 50)


def killed_after(calls: int, folder: Path, options: dict) -> None:
    """Runs the script, but kills it when it draws or measures for the so-and-so-many-th time."""
    left = [calls]

    def strike(function):
        def call(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    PipelineSampler.__call__ = strike(PipelineSampler.__call__)
    TinyNetwork.extract = strike(TinyNetwork.extract)
    torch.set_num_threads(1)
    evaluate(folder, folder / "real", **options)


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, real):
    """By SIGKILL while it draws, and while it measures samples and reference: the same figures and the same file."""
    tiny_ddpm().save_pretrained(tmp_path / "generator")
    options = {"pretrained_model_name_or_path": str(tmp_path / "generator"), "num_samples": 9, **STEPS}
    options |= {"chunk_size": 2, "sample_batch_size": 2, "batch_size": 5}
    expected = evaluate(tmp_path, real, "whole", **options)
    context = multiprocessing.get_context(START_METHOD)
    (tmp_path / "cut").mkdir()
    os.rename(tmp_path / "real", tmp_path / "cut" / "real")
    # One sample is tried, then five batches are drawn, two of them measured, and four of the reference.
    for calls, kept in ((4, {"rows": 2}), (6, {"samples.npz": 1}), (6, {"samples.npz": 1, "rows": 1})):
        process = context.Process(target=killed_after, args=(calls, tmp_path / "cut", options))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        files = [path.name.split("-")[0] for path in (tmp_path / "cut" / "run").rglob("*.*")]
        assert {name: files.count(name) for name in ("samples.npz", "rows") if name in files} == kept
    results = evaluate(tmp_path / "cut", tmp_path / "cut" / "real", **options)
    assert results["figures"] == expected["figures"]
    content = [(folder / "samples.npz").read_bytes() for folder in (tmp_path / "whole", tmp_path / "cut" / "run")]
    assert content[0] == content[1]
    assert not list((tmp_path / "cut").rglob(".partial-*"))


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, real):
    """Work is shared; figures and files are the same, written once."""
    tiny_dit().save_pretrained(tmp_path / "generator")
    options = {"pretrained_model_name_or_path": str(tmp_path / "generator"), "num_samples": 11, "num_classes": 3}
    options |= {"pipeline_kwargs": '{"num_inference_steps": 2, "guidance_scale": 1.0}', "chunk_size": 2}
    first = evaluate(tmp_path, real, "one", write_statistics=tmp_path / "one.npz", **options)
    (tmp_path / "other").mkdir()
    options["write_statistics"] = tmp_path / "other" / "two.npz"
    found = on_processes(2, evaluate_shared, tmp_path / "other", real, options)
    results = json.loads((tmp_path / "other" / "run" / "metrics.json").read_text())
    assert results["figures"] == pytest.approx(first["figures"], rel=1e-6)
    assert np.array_equal(
        np.load(tmp_path / "one" / "samples.npz")["arr_0"],
        np.load(tmp_path / "other" / "run" / "samples.npz")["arr_0"],
    )
    assert found == [[0, 0, 4, 8], [0, 2, 6, 10]]  # each has tried the first image
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other" / "two.npz").read_bytes()


def evaluate_shared(folder: Path, real: Path, options: dict) -> list[int]:
    """The first number of each batch that this process has drawn."""
    seen, draw = [], PipelineSampler.__call__
    Accelerator.end_training = lambda self: None  # it would end what `on_processes` ends
    PipelineSampler.__call__ = lambda self, numbers: seen.append(numbers[0]) or draw(self, numbers)
    evaluate(folder, real, **options)
    return seen


@pytest.mark.slow
def test_with_fid_s_own_network(tmp_path):
    """From the command line, with random weights: figures by its features, and statistics in the field's shapes.
    The Fréchet distance of 2048 features would take most of a minute."""
    torch.manual_seed(0)
    torch.save(FIDInception().state_dict(), tmp_path / "inception.pth")
    np.savez(tmp_path / "samples.npz", random_images(6, 0, side=16))
    real = write_pictures(tmp_path / "real", random_images(7, 1, side=16))
    script = Path(__file__).parents[1] / "training" / "evaluate_generation.py"
    command = [sys.executable, str(script), "--samples", str(tmp_path / "samples.npz"), "--reference", str(real)]
    command += ["--inception_weights", str(tmp_path / "inception.pth"), "--output_dir", str(tmp_path / "run")]
    command += ["--cache_dir", str(tmp_path / "cache"), "--write_statistics", str(tmp_path / "reference.npz")]
    command += ["--metrics", "inception_score", "precision_recall"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())["figures"]
    assert set(figures) == {"inception_score", "inception_score_std", "precision", "recall"}
    with np.load(tmp_path / "reference.npz") as arrays:
        shapes = {name: arrays[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")}
    assert shapes == {
        "mu": (2048,),
        "sigma": (2048, 2048),
        "mu_s": (2023,),
        "sigma_s": (2023, 2023),
        "arr_0": (7, 16, 16, 3),
    }
    assert len(ArrayImages(tmp_path / "reference.npz")) == 7
