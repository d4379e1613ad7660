"""Samples of pipelines, statistics that others read, and the figures of generated images."""

import json
import time
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler
from generators import TinyNetwork, features_of, one_process, random_images, tiny_ddpm, tiny_dit
from scipy.linalg import sqrtm

from flowmo_diffusers.data.arrays import ArrayImages
from flowmo_diffusers.data.decoding import BadImage
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.frechet import Moments
from flowmo_diffusers.metrics.generation import Reference, generation_metrics
from flowmo_diffusers.metrics.image_sets import SameSize, StoredSamples, common_size, first_size, pixel_arrays
from flowmo_diffusers.metrics.protocol import Protocol
from flowmo_diffusers.metrics.sampling import PipelineSampler, sample_chunks, sample_npz
from flowmo_diffusers.metrics.statistics import add_arrays, array_names, read_statistics, read_text, write_statistics


PROTOCOL = {"height": 8, "rounding": "nearest", "network": {"name": "tiny", "sizes": [1, 2]}}


@pytest.fixture
def network():
    return TinyNetwork()


def measured(count: int, dims: int, seed: int) -> tuple[torch.Tensor, Moments]:
    """Features and their moments."""
    features = torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))
    moments = Moments(dims)
    moments.add(features)
    return features, moments


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The plain formula, with SciPy's root."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)


# Statistics


@pytest.fixture
def statistics():
    return {"pool": measured(40, 6, 0)[1], "spatial": measured(40, 4, 1)[1]}


def test_what_is_written_is_what_the_field_reads(tmp_path):
    """Keys, types and shapes that guided-diffusion's evaluator asks for: images by an uncompressed version 1 header,
    mean and covariance as NumPy computes them, and nothing pickled."""
    pool, pool_moments = measured(40, 6, 0)
    spatial, spatial_moments = measured(40, 4, 1)
    images = random_images(7, 0)
    path = tmp_path / "reference.npz"
    write_statistics(path, {"pool": pool_moments, "spatial": spatial_moments}, PROTOCOL, images, 7)
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "count", "protocol"}
        for features, mean, covariance in ((pool, "mu", "sigma"), (spatial, "mu_s", "sigma_s")):
            assert arrays[mean].dtype == arrays[covariance].dtype == np.float64
            np.testing.assert_allclose(arrays[mean], features.double().mean(0), atol=1e-12)
            np.testing.assert_allclose(arrays[covariance], np.cov(features.double(), rowvar=False), atol=1e-12)
        assert np.array_equal(arrays["arr_0"], images)
        assert arrays["count"] == 40
        assert json.loads(str(arrays["protocol"])) == PROTOCOL
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((7, 8, 8, 3), False, np.uint8)
        assert file.read() == images.tobytes()


def test_statistics_come_back(tmp_path, statistics):
    path = tmp_path / "statistics.npz"
    write_statistics(path, statistics, PROTOCOL)
    found = read_statistics(path, PROTOCOL)
    for name, moments in statistics.items():
        assert found[name].count == 40
        assert torch.equal(found[name].mean, moments.mean)
        torch.testing.assert_close(found[name].covariance, moments.covariance)
    assert "arr_0" not in array_names(path)


def test_equal_statistics_make_equal_files(tmp_path, statistics, monkeypatch):
    """Catches dates and names of temporary files in what is stored."""
    for name, now in (("a.npz", 1e9), ("b.npz", 1.1e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        write_statistics(tmp_path / name, statistics, PROTOCOL, random_images(2, 0), 2)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_others(tmp_path, caplog, save):
    """guided-diffusion's do not say count and protocol, which a warning tells; pytorch-fid's are FID's alone."""
    features = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    own = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    save(tmp_path / "adm.npz", random_images(3, 0), mu_s=own["mu"][:3], sigma_s=own["sigma"][:3, :3], **own)
    save(tmp_path / "fid.npz", **own)
    found = read_statistics(tmp_path / "adm.npz", PROTOCOL)
    assert found["pool"].count is None
    torch.testing.assert_close(found["pool"].covariance, torch.from_numpy(own["sigma"]))
    assert found["spatial"].dims == 3
    assert "does not say by which protocol" in caplog.text
    assert read_statistics(tmp_path / "fid.npz")["spatial"] is None


def test_another_protocol_is_refused(tmp_path, statistics):
    """With what differs, and not what does not; tuples are the lists that JSON makes of them."""
    path = tmp_path / "statistics.npz"
    write_statistics(path, statistics, PROTOCOL)
    same = {**PROTOCOL, "network": {"name": "tiny", "sizes": (1, 2)}}
    assert read_statistics(path, same)["pool"].count == 40
    with pytest.raises(ValueError, match="another protocol: rounding is 'nearest' there and 'float' here$"):
        read_statistics(path, {**same, "rounding": "float"})
    with pytest.raises(ValueError, match="crop is None there and 'none' here"):
        read_statistics(path, {**same, "crop": "none"})
    with pytest.raises(ValueError, match="rounding is 'nearest' there and None here"):
        read_statistics(path, {"height": 8, "network": PROTOCOL["network"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": None}, r"no statistics \(mu and sigma\): it has \['mu_s', 'sigma', 'sigma_s'\]"),
        ({"sigma": None}, "mu and sigma are no statistics: sigma is missing"),
        ({"sigma_s": None}, "mu_s and sigma_s are no statistics: sigma_s is missing"),
        ({"mu": np.zeros(3)}, r"mu and sigma are no statistics: .*shapes \(3,\) and \(5, 5\)"),
        ({"sigma": np.full((5, 5), np.nan)}, "not finite"),
        ({"sigma": np.triu(np.ones((5, 5)))}, "not symmetric"),
        ({"mu": np.array(["a"] * 5)}, "mu and sigma are no statistics"),
        ({"mu": np.array([{}] * 5)}, "mu and sigma are no statistics: .*allow_pickle"),
        ({"count": np.array(1)}, "count=1 must be at least 2"),
    ],
)
def test_what_cannot_be_statistics(tmp_path, change, message):
    arrays = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(4), "sigma_s": np.eye(4)} | change
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message) as error:
        read_statistics(path)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path, statistics):
    path = tmp_path / "statistics.npz"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_statistics(path)
    path.write_bytes(b"no zip")
    with pytest.raises(OSError, match=r"no \.npz file"):
        read_statistics(path)
    write_statistics(path, statistics, PROTOCOL)
    content = bytearray(path.read_bytes())
    content[content.index(statistics["pool"].mean.numpy().tobytes())] ^= 255
    path.write_bytes(content)
    with pytest.raises(OSError, match="is damaged"):
        read_statistics(path)


def test_nothing_half_written(tmp_path, statistics):
    """Images that fail leave the file as it was, and nothing beside it."""
    path = tmp_path / "statistics.npz"
    write_statistics(path, statistics, PROTOCOL)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="there are 2 images, not count=3"):
        write_statistics(path, statistics, PROTOCOL, random_images(2, 0), 3)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Samples


def test_an_image_is_the_same_in_any_company():
    """Catches noise that depends on the batch, also of a pipeline that draws more at every step."""
    sampler = PipelineSampler(tiny_ddpm(), seed=3, arguments={"num_inference_steps": 3})
    images = sampler([0, 1, 2])
    assert images.dtype == torch.uint8
    assert images.shape == (3, 8, 8, 3)
    assert (images[0] != images[1]).any()
    difference = images[1:].int() - sampler([1, 2]).int()
    assert difference.abs().max() <= 1
    other = PipelineSampler(tiny_ddpm(), seed=4, arguments={"num_inference_steps": 3})
    assert (other([0])[0] != images[0]).any()


def test_pixels_are_those_of_a_saved_picture():
    """Rounded to the nearest value, as diffusers' own pictures are; image i has the generator that is named i."""
    pipeline = tiny_ddpm()
    image = PipelineSampler(pipeline, 7, arguments={"num_inference_steps": 2})([5])[0]
    picture = pipeline(1, keyed_generator(7, "sample", 5), num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(picture), image)


def test_classes_in_turn():
    """Image i is of class labels[i mod n], wherever its batch begins; the class makes a difference."""
    pipeline = tiny_dit()
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0}
    sampler = PipelineSampler(pipeline, class_labels=[0, 2], arguments=arguments)
    assert sampler.labels(range(3, 6)) == [2, 0, 2]
    images = sampler([3, 4])
    alone = PipelineSampler(pipeline, class_labels=[2], arguments=arguments)([3])
    other = PipelineSampler(pipeline, class_labels=[1], arguments=arguments)([3])
    assert (images[0].int() - alone[0].int()).abs().max() <= 1
    assert (images[0].int() - other[0].int()).abs().max() > 1


def test_noise_besides_the_generators():
    """DiT's pipeline gives its scheduler none: samples must still be the same each time, and nobody else's noise
    another."""
    pipeline = tiny_dit()
    pipeline.scheduler = DDPMScheduler()
    sampler = PipelineSampler(pipeline, 0, [0], {"num_inference_steps": 3, "guidance_scale": 1.0})
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = sampler([0, 1])
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(sampler([0, 1]), first)


def test_a_description_is_of_the_content(tmp_path):
    """The same from another folder; another for other weights, settings of a component, labels, seed or arguments."""
    pipeline = tiny_dit()
    sampler = PipelineSampler(pipeline, 0, [0, 1], {"num_inference_steps": 2})
    before = json.dumps(sampler.description)
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    assert json.dumps(PipelineSampler(again, 0, [0, 1], {"num_inference_steps": 2}).description) == before
    assert json.dumps(PipelineSampler(again, 1, [0, 1], {"num_inference_steps": 2}).description) != before
    assert json.dumps(PipelineSampler(again, 0, [0], {"num_inference_steps": 2}).description) != before
    assert json.dumps(PipelineSampler(again, 0, [0, 1], {"num_inference_steps": 3}).description) != before
    again.scheduler = type(again.scheduler).from_config(again.scheduler.config, clip_sample=False)
    assert json.dumps(PipelineSampler(again, 0, [0, 1], {"num_inference_steps": 2}).description) != before
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 1
    assert json.dumps(sampler.description) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [1]}, "DDPMPipeline has no classes, but class_labels are given"),
        ({"arguments": {"steps": 3}}, r"\['steps'\] cannot be set for DDPMPipeline: \['num_inference_steps'\] can"),
        ({"arguments": {"output_type": "pil"}}, r"\['output_type'\] cannot be set"),
        ({"arguments": {"batch_size": 3}}, r"\['batch_size'\] cannot be set"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        PipelineSampler(tiny_ddpm(), **options)


def test_pipelines_that_do_not_fit(tiny_pipeline):
    """A tokenizer is no generator; noise must be given, and classes where there are some."""
    with pytest.raises(ValueError, match="FlowMoPipeline cannot be sampled: .*neither class_labels nor batch_size"):
        PipelineSampler(tiny_pipeline)

    class Unseeded(type(tiny_ddpm())):
        def __call__(self, batch_size, output_type): ...

    with pytest.raises(ValueError, match="Unseeded cannot be sampled: .*no generator or no output_type"):
        PipelineSampler(Unseeded(tiny_ddpm().unet, DDPMScheduler()))
    with pytest.raises(ValueError, match="DiTPipeline needs class_labels, none are given"):
        PipelineSampler(tiny_dit())
    with pytest.raises(ValueError, match=r"class_labels=\[1, -1\] must not be negative"):
        PipelineSampler(tiny_dit(), class_labels=[1, -1])


def test_images_that_are_none():
    """NaN, and what has no three colours, stop a run at the first image."""
    broken = tiny_ddpm()
    broken.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="DDPMPipeline gives images that are not finite among 4 to 5"):
        PipelineSampler(broken, arguments={"num_inference_steps": 1})([4, 5])
    with pytest.raises(ValueError, match=r"gives \(1, 8, 8, 1\), not \(1, height, width, 3\)"):
        PipelineSampler(tiny_ddpm(channels=1), arguments={"num_inference_steps": 1})([0])


def test_chunks_of_samples(tmp_path):
    """In order, with labels, whatever the batch; another seed has another folder."""
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0}
    sampler = PipelineSampler(tiny_dit(), 0, [2, 0, 1], arguments)
    chunks = sample_chunks(sampler, 7, tmp_path, one_process(), batch_size=2, chunk_size=3)
    rows = chunks.read("images", "label")
    assert rows["label"].tolist() == [2, 0, 1, 2, 0, 1, 2]
    assert (rows["images"].int() - sampler(range(7)).int()).abs().max() <= 1
    other = sample_chunks(PipelineSampler(tiny_dit(), 1, [2, 0, 1], arguments), 7, tmp_path, one_process())
    assert other.folder != chunks.folder


def test_samples_as_the_field_reads_them(tmp_path):
    """`arr_0` and `arr_1` of numpy.savez, then nothing else is left; with the same description nothing is done."""
    sampler = PipelineSampler(tiny_dit(), 0, [0, 1], {"num_inference_steps": 1, "guidance_scale": 1.0})
    path = tmp_path / "samples.npz"
    sample_npz(sampler, 5, path, one_process(), batch_size=5, chunk_size=5)
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], sampler(range(5)))
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0]
    before = path.stat()
    sample_npz(sampler, 5, path, one_process(), batch_size=5)
    assert path.stat() == before
    sample_npz(sampler, 3, path, one_process(), batch_size=5)
    assert len(ArrayImages(path)) == 3
    assert read_text(path, "description")["count"] == 3
    path.unlink()
    np.savez(path, random_images(3, 0))  # somebody else's
    sample_npz(sampler, 3, path, one_process(), batch_size=5)
    assert np.array_equal(np.load(path)["arr_0"], sampler(range(3)))


def test_sampling_goes_on(tmp_path, monkeypatch):
    """What was drawn before a run ended is not drawn again."""
    sampler = PipelineSampler(tiny_ddpm(), arguments={"num_inference_steps": 1})
    draw, seen = PipelineSampler.__call__, []

    def draw_few(self, numbers):
        seen.append(list(numbers))
        if numbers[0] == 4 and len(seen) < 5:
            raise KeyboardInterrupt
        return draw(self, numbers)

    monkeypatch.setattr(PipelineSampler, "__call__", draw_few)
    with pytest.raises(KeyboardInterrupt):
        sample_npz(sampler, 6, tmp_path / "samples.npz", one_process(), 2, 2)
    assert seen == [[0, 1], [2, 3], [4, 5]]
    seen[:] = [None] * 5
    sample_npz(sampler, 6, tmp_path / "samples.npz", one_process(), 2, 2)
    assert seen[5:] == [[4, 5]]


# Figures


def test_figures_are_the_plain_formulas(tmp_path, network):
    """FID, sFID, Inception Score over splits in order, precision and recall."""
    samples, real = random_images(23, 0), random_images(31, 1) // 4 * 3 + 90
    ours, theirs = features_of(tmp_path / "a", samples, network), features_of(tmp_path / "b", real, network)
    figures, left_out = generation_metrics(ours, Reference.from_features(theirs), network, split_size=10)
    assert left_out == {}
    x, y = ours.read("pool", "spatial"), theirs.read("pool", "spatial")
    assert figures["fid"] == pytest.approx(frechet(x["pool"].numpy(), y["pool"].numpy()), rel=1e-6)
    assert figures["sfid"] == pytest.approx(frechet(x["spatial"].numpy(), y["spatial"].numpy()), rel=1e-6)
    p = network.probabilities(x["pool"]).double()
    scores = [(q * (q / q.mean(0)).log()).sum(1).mean().exp().item() for q in (p[:10], p[10:20], p[20:])]
    assert figures["inception_score"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert figures["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-5)
    a, b = x["pool"].double(), y["pool"].double()
    for name, points, centres in (("precision", a, b), ("recall", b, a)):
        radii = torch.cdist(centres, centres).sort(1).values[:, 3]
        expected = (torch.cdist(points, centres) <= radii).any(1).double().mean().item()
        assert figures[name] == pytest.approx(expected)
        assert 0 < expected < 1
    only, _ = generation_metrics(ours, Reference.from_features(theirs), network, ["precision_recall"], neighbours=1)
    assert set(only) == {"precision", "recall"}
    assert only["recall"] < figures["recall"]


def test_precision_and_recall_of_some_images(tmp_path, network):
    """Spread over both sets, not their first ones."""
    samples, real = random_images(20, 0), random_images(30, 1)
    ours, theirs = features_of(tmp_path / "a", samples, network), features_of(tmp_path / "b", real, network)
    few = [features_of(tmp_path / "c", samples[::2], network), features_of(tmp_path / "d", real[::3], network)]
    metrics = ["precision_recall"]
    found, _ = generation_metrics(ours, Reference.from_features(theirs), network, metrics, 3, 5000, 10)
    expected, _ = generation_metrics(few[0], Reference.from_features(few[1]), network, metrics)
    assert found == expected
    assert found != generation_metrics(ours, Reference.from_features(theirs), network, metrics)[0]


def test_what_statistics_cannot_give(tmp_path, network, statistics):
    """Left out with the reason, and only where it was asked for."""
    ours = features_of(tmp_path, random_images(9, 0), network)
    reference = Reference({**statistics, "spatial": None})
    figures, left_out = generation_metrics(ours, reference, network)
    assert set(figures) == {"fid", "inception_score", "inception_score_std"}
    assert left_out == {
        "sfid": "the statistics of the reference have no mu_s and sigma_s",
        "precision_recall": "the reference has statistics, but no images",
    }
    assert generation_metrics(ours, reference, network, ["fid"])[1] == {}
    assert set(generation_metrics(ours, Reference(statistics), network)[0]) > {"fid", "sfid"}


def test_other_networks_have_their_names(tmp_path):
    """Never plain "fid", and nothing that only Inception has."""
    network = TinyNetwork("_vit")
    ours, theirs = (features_of(tmp_path / str(n), random_images(9, n), network) for n in range(2))
    figures, left_out = generation_metrics(ours, Reference.from_features(theirs), network)
    assert set(figures) == {"fid_vit", "precision_vit", "recall_vit"}
    assert left_out["sfid"] == "tiny_vit has no spatial features"
    assert "class probabilities" in left_out["inception_score"]


def test_metrics_that_are_unknown_or_impossible(tmp_path, network, statistics):
    ours = features_of(tmp_path, random_images(3, 0), network)
    with pytest.raises(ValueError, match=r"metrics=\['kid'\] are unknown: .*'precision_recall'"):
        generation_metrics(ours, Reference(statistics), network, ["fid", "kid"])
    with pytest.raises(ValueError, match="greater than neighbours=3"):
        generation_metrics(ours, Reference.from_features(ours), network, ["precision_recall"])
    other = {"pool": measured(40, 5, 0)[1], "spatial": None}
    with pytest.raises(ValueError, match="length 6 and 5"):
        generation_metrics(ours, Reference(other), network, ["fid"])


def test_few_images_are_warned_of(tmp_path, network, caplog):
    ours = features_of(tmp_path, random_images(5, 0), network)
    generation_metrics(ours, Reference.from_features(ours), network, ["fid"])
    assert "only 5 images for 6 features" in caplog.text


def test_a_chunk_without_images(tmp_path, network):
    """All of its images were bad."""
    images = random_images(12, 0)
    chunks = features_of(tmp_path / "a", images, network)
    chunks.write(1, {}, [["bad", "reason"]] * 5)
    rest = features_of(tmp_path / "b", np.delete(images, range(5, 10), 0), network)
    found, _ = generation_metrics(chunks, Reference.from_features(chunks), network)
    expected, _ = generation_metrics(rest, Reference.from_features(rest), network)
    assert found == pytest.approx(expected)


# Sets of images


def test_sizes_must_agree():
    assert common_size({"samples": (8, 6), "reference": (8, 6)}) == (8, 6)
    with pytest.raises(ValueError, match=r"samples of 8 x 6 and reference of 6 x 8; .*--resolution"):
        common_size({"samples": (8, 6), "reference": (6, 8)})


def test_the_first_size_that_can_be_read():
    class Images(list):
        def __getitem__(self, number):
            if super().__getitem__(number) is None:
                raise BadImage("broken")
            return super().__getitem__(number)

    assert first_size(Images([None, PIL.Image.new("RGB", (6, 8))]), "samples") == (8, 6)
    with pytest.raises(OSError, match="samples: none of 2 images can be read"):
        first_size(Images([None, None]), "samples")
    with pytest.raises(OSError, match="reference: none of 0 images"):
        first_size(Images(), "reference")


def test_images_of_one_size_stay_as_they_are():
    """Catches a crop or resize that nobody asked for, and sides that are mixed up."""
    pixels = random_images(1, 0)[0][:, :6]
    image = SameSize((8, 6))(PIL.Image.fromarray(pixels))
    np.testing.assert_allclose((image.permute(1, 2, 0).numpy() + 1) * 127.5, pixels, atol=1e-4)
    with pytest.raises(ValueError, match=r"8 x 6 pixels where others have 6 x 8: .*--resolution"):
        SameSize((8, 6))(PIL.Image.new("RGB", (8, 6)))
    assert SameSize((8, 6)).to_dict() == ImageTransform((8, 6)).to_dict()


def test_samples_stored_as_jpeg(tmp_path):
    """As PIL's own round trip has them, told apart in caches, and so written."""
    pixels = random_images(1, 0, side=16)
    np.savez(tmp_path / "a.npz", pixels)
    transform = StoredSamples(SameSize((16, 16)), Protocol(jpeg_quality=40))
    assert transform.to_dict() == {**SameSize((16, 16)).to_dict(), "jpeg_quality": 40}
    PIL.Image.fromarray(pixels[0]).save(tmp_path / "a.jpg", quality=40)
    (written,) = pixel_arrays(ArrayImages(tmp_path / "a.npz"), transform, [0])
    assert np.array_equal(written, np.asarray(PIL.Image.open(tmp_path / "a.jpg")))
    (same,) = pixel_arrays(ArrayImages(tmp_path / "a.npz"), SameSize((16, 16)), [0])
    assert np.array_equal(same, pixels[0])


def test_arrays_beside_others(tmp_path):
    np.savez(tmp_path / "a.npz", np.arange(3))
    add_arrays(tmp_path / "a.npz", {"b": np.ones(2)})
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].tolist() == [0, 1, 2]
        assert arrays["b"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="allow_pickle"):
        add_arrays(tmp_path / "c.npz", {"b": np.array([{}])})
