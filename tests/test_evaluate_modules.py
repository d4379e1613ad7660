"""The `evaluate` modules: any images, in any batches, on any number of processes, give what the formulas give."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from processes import on_processes
from transformers import MobileNetV2Config, MobileNetV2Model

import flowmo_diffusers.metrics
from flowmo_diffusers.metrics.features import FeatureNetwork, InceptionFeatures
from flowmo_diffusers.metrics.frechet import Moments, frechet_distance
from flowmo_diffusers.metrics.inception import FIDInception
from flowmo_diffusers.metrics.inception_score import inception_score
from flowmo_diffusers.metrics.manifold import precision_recall
from flowmo_diffusers.metrics.modules.base import ImageMetric
from flowmo_diffusers.metrics.modules.fid import FID
from flowmo_diffusers.metrics.modules.inception_score import InceptionScore
from flowmo_diffusers.metrics.modules.lpips import LPIPS
from flowmo_diffusers.metrics.modules.precision_recall import PrecisionRecall
from flowmo_diffusers.metrics.modules.psnr import PSNR
from flowmo_diffusers.metrics.modules.rfid import RFID
from flowmo_diffusers.metrics.modules.sfid import SFID
from flowmo_diffusers.metrics.modules.ssim import SSIM
from flowmo_diffusers.metrics.reconstruction import mean_squared_error, psnr, psnr_over_batches, round_images, ssim
from flowmo_diffusers.objectives.perceptual import load_perceptual_network
from flowmo_diffusers.pipelines.images import images_to_tensor


CLASSES = {
    "fid": FID,
    "inception_score": InceptionScore,
    "lpips": LPIPS,
    "precision_recall": PrecisionRecall,
    "psnr": PSNR,
    "rfid": RFID,
    "sfid": SFID,
    "ssim": SSIM,
}
SET_METRICS = [FID, RFID, SFID, InceptionScore, PrecisionRecall]
FOLDER = Path(flowmo_diffusers.metrics.__file__).parent / "modules"


class TinyNetwork(FeatureNetwork):
    """Mean colours of the quarters of an image, and of its rows and columns."""

    def __init__(self, suffix: str = ""):
        super().__init__(suffix, 12, {"network": "tiny"})
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.images = 0

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.images += len(images)
        spatial = torch.cat([F.adaptive_avg_pool2d(images, size).flatten(1) for size in ((2, 1), (1, 4))], dim=1)
        return {"pool": self.scale * F.adaptive_avg_pool2d(images, 2).flatten(1), "spatial": spatial}

    def probabilities(self, pool: torch.Tensor) -> torch.Tensor:
        return (20 * pool).softmax(1)


def pictures(count: int, seed: int = 0, height: int = 16, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def tensors(count: int, seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pool(images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return TinyNetwork()(round_images(images))["pool"]


def moments(features: torch.Tensor) -> Moments:
    result = Moments(features.shape[1])
    result.add(features)
    return result


@pytest.fixture
def options(tmp_path) -> dict:
    return {"cache_dir": str(tmp_path), "device": "cpu"}


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """Where `evaluate.load` copies files to and imports them from: once a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


# Loading


@pytest.mark.parametrize("name", CLASSES)
def test_every_module_loads_by_path_and_by_class(modules_cache, options, name):
    """Catches a file whose first class is another metric, or that needs the network or a package to be loaded."""
    path = FOLDER / f"{name}.py"
    given = {"network": TinyNetwork()} if CLASSES[name] in SET_METRICS else {}
    metric = evaluate.load(str(path), batch_size=3, **given, **options)
    assert type(metric).__name__ == CLASSES[name].__name__ and metric.batch_size == 3
    assert isinstance(metric, ImageMetric) and metric.num_process == 1
    assert len(metric.description) > 80 and "predictions: " in metric.inputs_description
    assert "Returns:" in metric.compute.__doc__ and "Measures images" in metric.add_batch.__doc__
    assert name == "psnr" or "year = {" in metric.citation
    assert getattr(flowmo_diffusers.metrics, type(metric).__name__) is CLASSES[name]


def test_loaded_modules_measure(modules_cache, options):
    """Catches a module that only loads."""
    x, y = tensors(4), tensors(4, 1)
    metric = evaluate.load(str(FOLDER / "psnr.py"), rounding="float", **options)
    assert metric.compute(predictions=y, references=x)["psnr"] == pytest.approx(psnr(x, y, "float").mean().item())


def test_classes_are_imported_when_used():
    """Catches `evaluate` and `datasets` imported by whoever wants a formula, or a class that is not listed."""
    command = "import sys, flowmo_diffusers.metrics as m; print(*dir(m)); assert 'evaluate' not in sys.modules"
    listed = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout
    assert {kind.__name__ for kind in CLASSES.values()} <= set(listed.split())
    with pytest.raises(AttributeError, match="has no attribute 'KID'"):
        getattr(flowmo_diffusers.metrics, "KID")  # noqa: B009


# Pairs


def test_pair_metrics_are_the_formulas(options):
    """Catches predictions and references swapped, figures rounded to float32 on the way, or a sum for a mean."""
    x, y = tensors(5, side=32), tensors(5, 1, side=32)
    with torch.no_grad():
        distance = load_perceptual_network("lpips-alex")(round_images(x), round_images(y)).mean().item()
    expected = {"psnr": psnr(x, y).mean().item(), "ssim": ssim(x, y).mean().item(), "lpips_alex": distance}
    for metric in (PSNR(**options), SSIM(**options), LPIPS(**options)):
        result = metric.compute(predictions=y, references=x)
        key = next(iter(result))
        assert result[key] == pytest.approx(expected.pop(key), rel=1e-6 if key == "lpips_alex" else 1e-12)
    assert not expected


def test_rounding_is_asked_for(options):
    """Catches a rounding that is not handed on to a formula."""
    x, y = tensors(3, side=32), tensors(3, 1, side=32)
    network = load_perceptual_network("lpips-alex")
    for rounding in ("nearest", "truncate", "float"):
        own = {"rounding": rounding, **options}
        with torch.no_grad():
            distance = network(round_images(x, rounding), round_images(y, rounding)).mean().item()
            features = TinyNetwork()(round_images(x, rounding))["pool"]
        assert PSNR(**own).compute(predictions=y, references=x)["psnr"] == psnr(x, y, rounding).mean().item()
        assert SSIM(**own).compute(predictions=y, references=x)["ssim"] == ssim(x, y, rounding).mean().item()
        assert LPIPS(**own).compute(predictions=y, references=x)["lpips_alex"] == pytest.approx(distance, rel=1e-6)
        fid = FID(network=TinyNetwork(), **own)
        assert fid.compute(predictions=x, reference_statistics=moments(features))["fid"] < 1e-9


def test_batches_do_not_matter(options):
    """Catches a mean of means, an image dropped between batches, or rows that outlive `compute`."""
    x, y = tensors(11), tensors(11, 1)
    metric = PSNR(batch_size=3, **options)
    whole = metric.compute(predictions=y, references=x)
    metric.add_batch(predictions=y[:7], references=x[:7])
    metric.add(prediction=y[7], reference=x[7])
    assert metric.compute(predictions=y[8:], references=x[8:]) == whole
    assert metric.compute(predictions=y[:1], references=x[:1])["psnr"] == psnr(x, y)[0]


def test_kinds_of_images_are_one_image(options):
    """Catches a kind of input with another range, layout or order."""
    arrays, references = pictures(4), pictures(4, 1)
    as_tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    forms = {
        "PIL": [PIL.Image.fromarray(array) for array in arrays],
        "uint8": arrays,
        "float": arrays / 255,
        "arrays": list(arrays),
        "tensor": as_tensors / 127.5 - 1,
        "tensors": tuple(as_tensors / 127.5 - 1),
        "uint8 tensor": as_tensors,
        "batches": [as_tensors[:1], as_tensors[1:]],
    }
    expected = images_to_tensor(arrays)
    for name, form in forms.items():
        torch.testing.assert_close(images_to_tensor(form), expected, rtol=0, atol=1e-6, msg=name)
        result = SSIM(**options).compute(predictions=form, references=references)
        assert result["ssim"] == pytest.approx(ssim(images_to_tensor(references), expected).mean().item()), name
        fid = FID(network=TinyNetwork(), **options).compute(predictions=form, references=references)
        assert fid["fid"] == pytest.approx(
            frechet_distance(moments(pool(expected)), moments(pool(images_to_tensor(references))))
        )


def test_one_image_without_a_batch(options):
    """Catches rows of an image that are taken for images."""
    image, reference = PIL.Image.fromarray(pictures(1)[0]), pictures(1, 1)[0]
    metric = PSNR(**options)
    metric.add_batch(predictions=image, references=reference)
    assert len(metric) == 1
    metric.add(prediction=image, reference=PIL.Image.fromarray(reference))
    assert metric.compute()["psnr"] == pytest.approx(psnr(images_to_tensor(image), images_to_tensor(reference)).item())


def test_pil_modes(options):
    """Catches a grey picture that is refused, or one of 16 bits that is cut off at 255 without a word."""
    grey = PIL.Image.fromarray(pictures(1)[0]).convert("L")
    assert PSNR(**options).compute(predictions=grey, references=grey.convert("RGB"))["identical_images"] == 1
    deep = PIL.Image.fromarray(np.full((16, 16), 40000, np.uint16))
    with pytest.raises(ValueError, match="references: image has mode 'I;16', of more than 8 bits"):
        PSNR(**options).compute(predictions=deep, references=deep)


def test_sizes_may_mix(options):
    """Catches images that are measured with those of another size, or in another order than they came."""
    sizes = [(16, 12), (8, 8), (8, 8), (16, 12), (20, 9)]
    x = [pictures(1, seed, *size)[0] for seed, size in enumerate(sizes)]
    y = [pictures(1, seed + 10, *size)[0] for seed, size in enumerate(sizes)]
    singly = [psnr(images_to_tensor(a), images_to_tensor(b)).item() for a, b in zip(x, y, strict=True)]
    result = PSNR(official_batch_size=2, **options).compute(predictions=y, references=x)
    assert result["psnr"] == pytest.approx(np.mean(singly))
    errors = [mean_squared_error(*map(images_to_tensor, pair), "truncate") for pair in zip(x, y, strict=True)]
    assert result["psnr_official"] == pytest.approx(psnr_over_batches(torch.cat(errors), 2))
    features = torch.cat([pool(images_to_tensor(image)) for image in x])
    fid = FID(network=TinyNetwork(), **options).compute(predictions=y, reference_statistics=moments(features))
    others = torch.cat([pool(images_to_tensor(image)) for image in y])
    assert fid["fid"] == pytest.approx(frechet_distance(moments(others), moments(features)))


def test_official_psnr(options):
    """Catches an official figure per image, of rounded pixels, or one that nobody asked for."""
    x, y = tensors(7), tensors(7) * 0.9
    y[2:4] = x[2:4] * 0.99
    metric = PSNR(official_batch_size=5, **options)
    for part in (slice(0, 3), slice(3, 7)):
        metric.add_batch(predictions=y[part], references=x[part])
    result = metric.compute()
    expected = psnr_over_batches(mean_squared_error(x, y, "truncate"), 5)
    assert result == {"psnr": psnr(x, y).mean().item(), "identical_images": 0, "psnr_official": expected}
    assert expected < result["psnr"] - 1
    assert "psnr_official" not in PSNR(**options).compute(predictions=y, references=x)


def test_equal_images(options, caplog):
    """Catches an infinite mean that comes without a word, or an image that is lost without one."""
    x, y = tensors(3), tensors(3, 1)
    y[1] = x[1]
    result = PSNR(**options).compute(predictions=y, references=x)
    assert result == {"psnr": psnr(x, y)[[0, 2]].mean().item(), "identical_images": 1}
    assert "1 of 3 images equal" in caplog.text


# Sets


def test_set_metrics_are_the_formulas(options):
    """Catches sets that are swapped or mixed, another layer, or logits for probabilities."""
    x, y = tensors(40), 0.8 * tensors(30, 1)
    network = TinyNetwork()
    own = {"network": network, "batch_size": 7, **options}
    real, fake = pool(x), pool(y)
    with torch.no_grad():
        spatial = [moments(network(round_images(images))["spatial"]) for images in (y, x)]
    precision, recall = precision_recall(fake, real)
    assert precision != recall
    close = {"rel": 1e-6}
    assert FID(**own).compute(predictions=y, references=x) == pytest.approx(
        {"fid": frechet_distance(moments(fake), moments(real))}, **close
    )
    assert RFID(**own).compute(predictions=y, references=x[:30]) == pytest.approx(
        {"rfid": frechet_distance(moments(fake), moments(real[:30]))}, **close
    )
    assert SFID(**own).compute(predictions=y, references=x) == pytest.approx(
        {"sfid": frechet_distance(*spatial)}, **close
    )
    assert PrecisionRecall(**own).compute(predictions=y, references=x) == {"precision": precision, "recall": recall}
    mean, deviation = inception_score(network.probabilities(fake), 8)
    assert InceptionScore(split_size=8, **own).compute(predictions=y) == pytest.approx(
        {"inception_score": mean, "inception_score_std": deviation}, **close
    )
    assert mean > 1.01


def test_neighbours_are_asked_for(options):
    """Catches a k that is not handed on."""
    x, y = tensors(40), 0.8 * tensors(30, 1)
    result = PrecisionRecall(neighbours=1, network=TinyNetwork(), **options).compute(predictions=y, references=x)
    assert tuple(result.values()) == precision_recall(pool(y), pool(x), 1) != precision_recall(pool(y), pool(x))


def test_sets_may_come_apart(options):
    """Catches sets that must have one size, or that must come together."""
    x, y = tensors(40), tensors(30, 1)
    metric = FID(network=TinyNetwork(), **options)
    whole = metric.compute(predictions=y, references=x)
    metric.add_batch(references=x[:25])
    metric.add_batch(predictions=y[:10], references=x[25:26])
    metric.add(prediction=y[10])
    metric.add(reference=x[26])
    metric.add_batch(predictions=y[11:])
    metric.add_batch(references=x[27:])
    assert len(metric) == 70
    assert metric.compute() == pytest.approx(whole, rel=1e-9)


def test_more_rows_than_are_joined_at_a_time(options):
    """Catches rows beyond the first thousand that are lost."""
    x, y = tensors(2300, side=2), tensors(1001, 1, side=2)
    result = FID(network=TinyNetwork(), batch_size=500, **options).compute(predictions=y, references=x)
    assert result["fid"] == pytest.approx(frechet_distance(moments(pool(y)), moments(pool(x))), rel=1e-9)


def test_reference_statistics(options):
    """Catches statistics that are ignored, mixed with references, or of another network."""
    x, y = tensors(40), tensors(30, 1)
    metric = FID(network=TinyNetwork(), **options)
    expected = metric.compute(predictions=y, references=x)
    statistics = moments(pool(x))
    assert metric.compute(predictions=y, reference_statistics=statistics) == pytest.approx(expected)
    with pytest.raises(ValueError, match="40 references were added and reference_statistics are given"):
        metric.compute(predictions=y, references=x, reference_statistics=statistics)
    with pytest.raises(ValueError, match="0 references were added and reference_statistics are not given"):
        metric.compute(predictions=y)
    with pytest.raises(ValueError, match="no predictions were added"):
        metric.compute(references=x)
    with pytest.raises(ValueError, match="length 12 and 18"):
        metric.compute(predictions=y, reference_statistics=Moments.from_statistics(torch.zeros(18), torch.eye(18)))


@pytest.mark.parametrize("kind", SET_METRICS)
def test_results_are_named_by_their_network(options, kind):
    """Catches another network's figure that could be taken for FID."""
    x, y = tensors(20), tensors(20, 1)
    metric = kind(network=TinyNetwork("_tiny"), **options)
    result = metric.compute(predictions=y, references=None if kind is InceptionScore else x)
    assert result and all(name.endswith("_tiny") for name in result)


def test_networks_are_loaded_when_first_needed(options, tmp_path):
    """Catches a network that is loaded too early or with every batch, its name ignored, or weights not handed on."""
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.1, depth_divisible_by=4, min_depth=4)
    MobileNetV2Model(config).save_pretrained(tmp_path / "mobilenet")
    metric = FID(network=str(tmp_path / "mobilenet"), **options)
    result = metric.compute(predictions=tensors(8), references=tensors(8, 1))
    assert list(result) == ["fid_mobilenet_v2"] and metric.network is metric.network
    missing = FID(weights=str(tmp_path / "inception.pth"), **options)
    with pytest.raises(OSError, match=r"inception\.pth"):
        missing.add_batch(predictions=tensors(1))


def test_inception_of_random_weights(options):
    """Catches a metric that the real network does not fit: its layers, its lengths, its classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = InceptionFeatures(FIDInception())
    x = tensors(2, side=32)
    lengths = {}
    for metric in (FID(network=network, **options), SFID(network=network, **options)):
        metric.add_batch(predictions=x)
        lengths[metric.key] = len(metric._rows(x, None)["vector"][0]) // 4
    assert lengths == {"fid": 2048, "sfid": 2023}
    score = InceptionScore(network=network, **options).compute(predictions=x)
    assert 1 <= score["inception_score"] < 2


def test_layers_and_classifiers_that_a_network_lacks(options):
    """Catches a figure of whatever a network has instead."""

    class PoolOnly(TinyNetwork):
        def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"pool": super().extract(images)["pool"]}

        probabilities = FeatureNetwork.probabilities

    with pytest.raises(ValueError, match=r"sfid needs 'spatial' features; this network has only \['pool'\]"):
        SFID(network=PoolOnly(), **options).add_batch(predictions=tensors(2))
    with pytest.raises(ValueError, match="needs class probabilities"):
        InceptionScore(network=PoolOnly(), **options).add_batch(predictions=tensors(2))


# Several processes


def _measure_on_process(kind: type[ImageMetric], shares: list, cache_dir: str, network: bool) -> dict | None:
    rank = int(os.environ["RANK"])
    own = {"network": TinyNetwork()} if network else {}
    metric = kind(
        num_process=len(shares), process_id=rank, experiment_id="test", cache_dir=cache_dir, device="cpu", **own
    )
    for predictions, references in shares[rank]:
        metric.add_batch(predictions=predictions, references=references)
    result = metric.compute()
    assert not network or (metric.network.images > 0) == bool(shares[rank])
    return result


@pytest.mark.parametrize("empty", [0, 1])
def test_several_processes(tmp_path, empty):
    """Catches a process that measures for itself, one without images that the others wait for, or images counted
    twice."""
    x, y = tensors(9), tensors(9, 1)
    shares = [[(y[:4], x[:4]), (y[4:7], x[4:7])], [(y[7:], x[7:])]]
    shares.insert(empty, [])
    results = on_processes(3, _measure_on_process, PSNR, shares, str(tmp_path), False)
    assert results == [{"psnr": pytest.approx(psnr(x, y).mean().item()), "identical_images": 0}, None, None]
    assert not list(tmp_path.rglob("*.arrow"))


def test_several_processes_share_sets(tmp_path):
    """Catches sets that each process must have both of."""
    x, y = tensors(40), tensors(30, 1)
    shares = [[(y[:5], None)], [(None, x[:30]), (y[5:], x[30:])]]
    results = on_processes(2, _measure_on_process, FID, shares, str(tmp_path), True)
    assert results[0]["fid"] == pytest.approx(frechet_distance(moments(pool(y)), moments(pool(x))))
    assert results[1] is None


# What is kept


def test_rows_are_kept_on_disk_not_images(options, tmp_path):
    """Catches images in evaluate's file or memory, which would grow with them."""
    metric = FID(network=TinyNetwork(), **options)
    for seed in range(3):
        metric.add_batch(predictions=tensors(100, seed, side=64), references=tensors(100, seed + 3, side=64))
    metric.writer.finalize()
    (file,) = tmp_path.rglob("*.arrow")
    assert 600 * 12 * 4 < file.stat().st_size < 600 * 12 * 4 * 2
    held = [value for value in vars(metric).values() if isinstance(value, torch.Tensor | np.ndarray | list)]
    assert not held


def test_rows_in_memory(options):
    """Catches evaluate's own way without files, which must work too."""
    x, y = tensors(5), tensors(5, 1)
    metric = PSNR(keep_in_memory=True, **options)
    metric.add_batch(predictions=y[:2], references=x[:2])
    assert metric.compute(predictions=y[2:], references=x[2:])["psnr"] == psnr(x, y).mean().item()


# What does not fit


def nan_images() -> torch.Tensor:
    images = tensors(4)
    images[2, 0, 1, 1] = torch.nan
    return images


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (nan_images(), tensors(4), "predictions: image is empty or has values that are not finite"),
        (tensors(4), nan_images(), "references: image is empty or has values that are not finite"),
        (tensors(4), tensors(3), "predictions are 4 images and references 3"),
        (tensors(4), tensors(4, side=20), r"prediction 0 has size \(h, w\) = \(16, 16\) and its reference \(20, 20\)"),
        (
            [tensors(1)[0], tensors(1, side=20)[0]],
            tensors(2),
            r"prediction 1 has size \(h, w\) = \(20, 20\) and its reference \(16, 16\)",
        ),
        (tensors(4), None, "predictions and references must be given together"),
        (None, tensors(4), "predictions and references must be given together"),
        (tensors(4)[:, :1], tensors(4), "predictions: image has 1 channels; expected 3"),
        (pictures(2), pictures(2)[..., :1], "references: image has 1 channels; expected 3"),
        (pictures(2)[0, ..., 0], pictures(2), "predictions: image has shape .*expected three dimensions"),
        ("picture.png", tensors(1), r"predictions: image must be PIL images.*got \['str'\]"),
        ([], tensors(1), "predictions: image must be PIL images"),
        (tensors(4) * 255, tensors(4), r"predictions: image values range .* a tensor image lies in \[-1, 1\]"),
    ],
)
def test_wrong_pairs_are_refused(options, predictions, references, message):
    """Catches figures of images that do not belong together; what was added before stays, without half a batch."""
    x, y = tensors(5), tensors(5, 1)
    for metric in (PSNR(batch_size=1, **options), RFID(network=TinyNetwork(), batch_size=1, **options)):
        metric.add_batch(predictions=y, references=x)
        before = len(metric)
        with pytest.raises(ValueError, match=message):
            metric.add_batch(predictions=predictions, references=references)
        assert len(metric) == before
    assert metric.compute()["rfid"] > 0


def test_too_small_images_are_refused(options):
    """Catches a window or a network that sees less than it needs."""
    with pytest.raises(ValueError, match="smaller than SSIM's window"):
        SSIM(**options).add_batch(predictions=tensors(1, side=6), references=tensors(1, side=6))
    with pytest.raises(ValueError, match="at least 31x31"):
        LPIPS(**options).add_batch(predictions=tensors(1, side=30), references=tensors(1, side=30))


def test_images_of_several_sizes_are_no_batch():
    """Catches the first of several sizes taken for all."""
    with pytest.raises(ValueError, match=r"different sizes.*\(8, 8\), \(16, 16\)"):
        images_to_tensor([tensors(1)[0], tensors(1, side=8)[0]])


@pytest.mark.parametrize("kind", CLASSES.values())
def test_no_images_are_no_figure(options, kind):
    """Catches a mean over nothing."""
    own = {"network": TinyNetwork()} if kind in SET_METRICS else {}
    with pytest.raises(ValueError, match="empty|no images were added|no predictions were added|0 references"):
        kind(**own, **options).compute()


def test_inception_score_has_no_references(options):
    """Catches references that seem to be compared with."""
    with pytest.raises(ValueError, match="references are not looked at"):
        InceptionScore(network=TinyNetwork(), **options).add_batch(predictions=tensors(2), references=tensors(2))
    with pytest.raises(ValueError, match="predictions or references must be given"):
        FID(network=TinyNetwork(), **options).add_batch()


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (PSNR, {"rounding": "floor"}, "rounding='floor' must be one of nearest, truncate, float"),
        (PSNR, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (PSNR, {"official_batch_size": 0}, "official_batch_size=0 must be at least 1"),
        (LPIPS, {"network": "vgg"}, "network='vgg' must be 'lpips-alex' or 'lpips-vgg'"),
        (InceptionScore, {"split_size": 0}, "split_size=0 must be at least 1"),
        (PrecisionRecall, {"neighbours": 0}, "neighbours=0 must be at least 1"),
    ],
)
def test_wrong_options_are_refused(kind, wrong, message):
    """Catches an option that fails only when all images have been measured."""
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


@pytest.mark.parametrize("kind", CLASSES.values())
def test_unknown_options_are_refused(options, kind):
    """Catches a misspelt option, which evaluate itself would ignore, and one that `compute` finds too late."""
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no options \['wieghts'\]"):
        kind(wieghts="inception.pth")
    own = {"network": TinyNetwork()} if kind in SET_METRICS else {}
    metric = kind(**own, **options)
    references = None if kind is InceptionScore else tensors(5, 1, side=32)
    metric.add_batch(predictions=tensors(5, side=32), references=references)
    with pytest.raises(TypeError, match="split"):
        metric.compute(split=3)
    assert metric.compute()
