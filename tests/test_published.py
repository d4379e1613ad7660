"""`FlowMoPipeline.from_published`: the authors' checkpoints by name, and files of their format."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hub_stand_in import Client, File, HubStandIn, Repo
from safetensors import SafetensorError

from flowmo_diffusers import FlowMoPipeline, FlowMoScheduler
from flowmo_diffusers.pipelines import published
from flowmo_diffusers.pipelines.published import load_published


CHECKPOINT = Path(__file__).parent / "parity" / "lfq_lo" / "checkpoint.pth"
CONFIG = {"rope_axes": [4, 8, 4], "codebook_bits": 3, "sample_size": 32, "num_latent_tokens": 16}

LOAD = f"""
import json, sys
from flowmo_diffusers import FlowMoPipeline
pipe = FlowMoPipeline.from_published("lo", config={CONFIG!r}, **json.loads(sys.argv[1]))
pipe.save_pretrained(sys.argv[2])
"""


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Path:
    """huggingface_hub's cache of assets, empty."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    return tmp_path / "assets" / "flowmo_diffusers" / "published"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return Path(shutil.copy(CHECKPOINT, tmp_path / "own.pth"))


def assert_weights(pipeline: FlowMoPipeline, expected: dict[str, torch.Tensor]) -> None:
    weights = pipeline.autoencoder.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor.to(weights[name].dtype)) for name, tensor in expected.items())


def test_file(assets, checkpoint, monkeypatch):
    """Other weights than the file's, a conversion at each call, or a stale one after the file has changed."""
    expected = load_published(CHECKPOINT, **CONFIG).state_dict()
    pipeline = FlowMoPipeline.from_published(checkpoint, config=CONFIG)
    assert_weights(pipeline, expected)
    assert isinstance(pipeline.scheduler, FlowMoScheduler) and pipeline.autoencoder.config.rope_axes == [4, 8, 4]
    checkpoint.unlink()
    shutil.copy2(CHECKPOINT, checkpoint)  # another time of change: what is there may be of another file

    read = []

    def load(*arguments, **given):
        read.append(arguments)
        return load_published(*arguments, **given)

    monkeypatch.setattr(published, "load_published", load)
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = FlowMoPipeline.from_published(str(checkpoint), config=CONFIG, dtype=dtype)
        assert pipeline.autoencoder.dtype == dtype
        assert_weights(pipeline, expected)
    assert len(read) == 1
    FlowMoPipeline.from_published(checkpoint, "raw", CONFIG)
    FlowMoPipeline.from_published(checkpoint, config=CONFIG | {"sample_size": 64})
    assert len(read) == 3

    changed = torch.load(CHECKPOINT, weights_only=True)
    changed["model_ema_state_dict"] = {name: 2 * tensor for name, tensor in changed["model_ema_state_dict"].items()}
    torch.save(changed, checkpoint)
    pipeline = FlowMoPipeline.from_published(checkpoint, config=CONFIG)
    assert_weights(pipeline, {name: 2 * tensor for name, tensor in expected.items()})
    assert len(list(assets.glob("own-*/model_index.json"))) == 5


def test_processes_wait_for_each_other(assets, checkpoint, monkeypatch):
    """Every process of a machine converting one file at once."""
    read, loaded, arrived = [], [], threading.Barrier(2, timeout=30)

    def load(*arguments, **given):
        read.append(arguments)
        return load_published(*arguments, **given)

    def run():
        arrived.wait()
        loaded.append(FlowMoPipeline.from_published(checkpoint, config=CONFIG))

    monkeypatch.setattr(published, "load_published", load)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 1 and len(loaded) == 2


def test_unusable_files(assets, checkpoint, tmp_path):
    """A traceback from the depths for a name that is not known, no file, a folder, or a file that is damaged."""
    for name, message in (
        ("medium", "'medium' does not exist: it must be 'lo', 'hi' or the file of a checkpoint"),
        (tmp_path / "absent.pth", "absent.pth' does not exist"),
        (tmp_path, "is a folder: `from_pretrained` loads those"),
    ):
        with pytest.raises(OSError, match=message):
            FlowMoPipeline.from_published(name)
    with pytest.raises(ValueError, match="weights='best' must be one of"):
        FlowMoPipeline.from_published(checkpoint, "best", CONFIG)
    with pytest.raises(ValueError, match="rope_axes"):
        FlowMoPipeline.from_published(checkpoint)
    data = checkpoint.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"no checkpoint"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(OSError, match="own.pth cannot be read"):
            FlowMoPipeline.from_published(checkpoint, config=CONFIG)
    assert not list(assets.rglob("*.json"))


def test_full_disk(assets, checkpoint, monkeypatch):
    """A full disk that is not named, or that leaves half a folder which is taken for a whole one later."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000))
        with pytest.raises(OSError, match="MiB and its disk has 0: make room, or set HF_ASSETS_CACHE"):
            FlowMoPipeline.from_published(checkpoint, config=CONFIG)

    def save(pipeline, folder):
        (folder / "model_index.json").write_text("{}")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FlowMoPipeline, "save_pretrained", save)
        with pytest.raises(OSError, match="own.pth could not be converted into .*No space left"):
            FlowMoPipeline.from_published(checkpoint, config=CONFIG)
    assert not list(assets.rglob("*.json"))
    FlowMoPipeline.from_published(checkpoint, config=CONFIG)


@pytest.mark.slow
def test_name(tmp_path):
    """A name that does not lead to the authors' file, a file that is downloaded again, or none to be had offline."""
    data = CHECKPOINT.read_bytes()
    oid = hashlib.sha256(data).hexdigest()
    expected = load_published(CHECKPOINT, **CONFIG).state_dict()
    with HubStandIn() as hub:
        hub.repos["ksarge/FlowMo"] = Repo(sha="a" * 40, files={"flowmo_lo.pth": File(oid, len(data), large=True)})
        hub.blobs[oid] = data
        client = Client(hub, tmp_path)

        failed = client(LOAD, "{}", "out", HF_HUB_OFFLINE="1")
        assert "could not be had from ksarge/FlowMo on the Hub" in failed.stderr
        assert "download flowmo_lo.pth from there by hand" in failed.stderr and not hub.requests
        for name, arguments, offline in (
            ("first", {}, "0"),
            ("offline", {}, "1"),
            ("local", {"local_files_only": True}, "0"),
        ):
            done = client(LOAD, json.dumps(arguments), name, HF_TOKEN=None, HF_HUB_OFFLINE=offline)
            assert done.returncode == 0, done.stderr
            assert_weights(FlowMoPipeline.from_pretrained(tmp_path / name), expected)
        downloads = [request for request in hub.requests if request.startswith("GET /ksarge/FlowMo/resolve/")]
        assert len(downloads) == 1 and downloads[0].endswith("/flowmo_lo.pth")
    folders = os.listdir(tmp_path / "hf_home" / "assets" / "flowmo_diffusers" / "published")
    assert len([name for name in folders if not name.endswith(".lock")]) == 1
