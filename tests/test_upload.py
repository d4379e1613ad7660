"""Uploads to a stand-in of the Hub, and loading from it."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import hf_xet
import PIL.Image
import pytest
from hub_stand_in import READ_TOKEN, UPLOAD, WRITE_TOKEN, Client, HubStandIn
from runs import short_run

from flowmo_diffusers.hub.cards import write_model_card
from flowmo_diffusers.hub.upload import push_folder


CHECK = """
import json, sys, time
time.sleep = lambda seconds: None
from flowmo_diffusers.hub.upload import check_push
for arguments in json.loads(sys.argv[1]):
    try:
        print(json.dumps(check_push(**arguments)))
    except (OSError, ValueError) as error:
        print(json.dumps([isinstance(error, ValueError), str(error)]))
"""

LOAD = """
import sys, torch
from huggingface_hub import ModelCard
from flowmo_diffusers import FlowMoPipeline
ours, theirs = (FlowMoPipeline.from_pretrained(path).autoencoder.state_dict() for path in sys.argv[1:])
assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
exec(ModelCard.load(sys.argv[2]).text.split("```python\\n")[1].split("```")[0])
"""


@pytest.fixture
def folder(tmp_path, tiny_pipeline) -> Path:
    """What a training run leaves."""
    folder = tmp_path / "birds"
    tiny_pipeline.save_pretrained(folder)
    (folder / "metrics.json").write_text("{}")
    for name in (
        "validation/last 1.png",
        "validation/first.png",
        "checkpoint-9/autoencoder/model.safetensors",
        "checkpoint-9/random_states_0.pkl",
        "logs/events.out.tfevents.my-machine",
        ".partial-1-metrics.json",
        "autoencoder/.partial-1-config.json",
        "wandb/run.log",
        "best/model_index.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    PIL.Image.effect_noise((9, 9), 60).convert("RGB").save(tmp_path / "photo.jpg")
    run = short_run("emoji")
    write_model_card(folder, tiny_pipeline, run, [folder / "validation/last 1.png"], "anna/birds", "mit")
    return folder


PUBLISHED = {
    "README.md",
    "autoencoder/config.json",
    "autoencoder/diffusion_pytorch_model.safetensors",
    "metrics.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "validation/last 1.png",
}


@pytest.fixture(params=["lfs", "xet"])
def hub(request, tmp_path):
    with HubStandIn(xet=tmp_path / "cas" if request.param == "xet" else None) as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path) -> Client:
    return Client(hub, tmp_path)


@pytest.fixture
def lfs(tmp_path):
    with HubStandIn() as hub:
        yield hub, Client(hub, tmp_path)


def expected(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PUBLISHED}


@pytest.mark.slow
def test_failed_upload_is_finished_by_the_next(lfs, folder):
    """A failure that loses what was sent, is not reported with a way on, or a retry that sends all of it again."""
    hub, client = lfs
    weights = (folder / "autoencoder/diffusion_pytorch_model.safetensors").read_bytes()
    picture = (folder / "validation/last 1.png").read_bytes()
    puts = [f"PUT /blobs/{hashlib.sha256(data).hexdigest()}" for data in (weights, picture)]
    hub.fail(puts[0], status=None)  # the connection is lost in the middle of the weights, each time

    failed = client(UPLOAD, folder, "anna/birds", "--private")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "Nothing is lost" in failed.stderr
    assert hub.repos["anna/birds"].private and not hub.repos["anna/birds"].files
    assert hub.requests.count(puts[1]) == 1 and puts[0] not in hub.requests

    hub.heal()
    (command,) = re.findall(r"\n    python -m flowmo_diffusers\.hub\.upload (.*)", failed.stderr)
    assert shlex.split(command) == [str(folder), "anna/birds", "--private"]
    done = client(UPLOAD, *shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"uploaded to {hub.endpoint}/anna/birds\n"
    assert hub.content("anna/birds") == expected(folder)
    assert [hub.requests.count(put) for put in puts] == [1, 1]
    assert hub.repos["anna/birds"].messages == ["Upload FlowMo pipeline"]

    # Nothing has changed, then one file has.
    assert client(UPLOAD, folder, "anna/birds").returncode == 0
    assert len(hub.repos["anna/birds"].messages) == 1
    (folder / "metrics.json").write_text('{"psnr": 21}')
    assert client(UPLOAD, folder, "anna/birds").returncode == 0
    assert len(hub.repos["anna/birds"].messages) == 2
    assert [hub.requests.count(put) for put in puts] == [1, 1]
    assert hub.content("anna/birds") == expected(folder)


@pytest.mark.slow
def test_published_model_loads_from_the_hub(hub, client, folder, tmp_path):
    """A published folder that a stranger cannot load, once offline too, or other weights; by LFS, and by Xet as
    installed by default.
    With Xet: blobs sent again after a commit that failed."""
    weights = (folder / "autoencoder/diffusion_pytorch_model.safetensors", folder / "validation/last 1.png")
    if hub.xet:
        hub.fail("/commit/")
        assert "Nothing is lost" in client(UPLOAD, folder, "anna/birds").stderr
        hub.heal()
        sent = {path: path.stat().st_mtime_ns for path in hub.xet.glob("xet/xorbs/xorbs/*")}
        assert sent
    done = client(UPLOAD, folder, "anna/birds")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["anna/birds"]
    assert repo.files.keys() == PUBLISHED
    if hub.xet:
        assert sent == {path: path.stat().st_mtime_ns for path in hub.xet.glob("xet/xorbs/xorbs/*")}
        assert not hub.blobs
        hashes = hf_xet.hash_files([str(path) for path in weights])
        for path, info in zip(weights, hashes, strict=True):
            hub.xet_hashes[hashlib.sha256(path.read_bytes()).hexdigest()] = info.hash
    loaded = client(LOAD, folder, "anna/birds", HF_TOKEN=None)
    assert loaded.returncode == 0, loaded.stderr
    download = "xet-read-token" if hub.xet else f"GET /anna/birds/resolve/{repo.sha}/autoencoder/diffusion"
    assert any(download in request for request in hub.requests)
    assert PIL.Image.open(tmp_path / "decoded.png").size == (16, 16)
    requests = len(hub.requests)
    loaded = client(LOAD, folder, "anna/birds", HF_TOKEN=None, HF_HUB_OFFLINE="1")
    assert loaded.returncode == 0, loaded.stderr
    assert len(hub.requests) == requests


@pytest.mark.slow
def test_trouble_that_passes(lfs, folder):
    """An upload that gives up at the first error, or at one that the Hub's client does not try again itself."""
    hub, client = lfs
    hub.fail("POST /api/repos/create", status=503, times=2)
    hub.fail("POST /api/models/anna/birds/commit", status=None, times=1)
    done = client(UPLOAD, folder, "anna/birds")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Trying again in 5 seconds") == 1 and done.stderr.count("in 120 seconds") == 1
    assert hub.content("anna/birds") == expected(folder)


@pytest.mark.slow
def test_private_means_private(lfs, folder):
    """A model that should be private, sent to a repository that has long been public."""
    hub, client = lfs
    assert client(UPLOAD, folder, "anna/birds").returncode == 0
    (folder / "metrics.json").write_text("secret")
    failed = client(UPLOAD, folder, "anna/birds", "--private")
    assert failed.returncode == 2 and "exists and is public" in failed.stderr and "Trying again" not in failed.stderr
    assert hub.content("anna/birds")["metrics.json"] == b"{}"


@pytest.mark.slow
def test_refused_upload(lfs, folder):
    """A licence that the Hub does not know, or a full account, of which nobody is told, or that is tried again."""
    hub, client = lfs
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: mine"))
    failed = client(UPLOAD, folder, "anna/birds")
    assert failed.returncode == 2 and '"license" must be one of' in failed.stderr
    assert hub.requests.count("POST /api/validate-yaml") == 1 and not hub.blobs

    card.write_text(card.read_text().replace("license: mine", "license: mit"))
    hub.fail("PUT /blobs", status=403)
    failed = client(UPLOAD, folder, "anna/birds")
    assert failed.returncode == 2 and "403" in failed.stderr and "Trying again" not in failed.stderr


@pytest.mark.slow
def test_refusals_are_found_before_training(lfs, tmp_path):
    """A token, an id or a setting that only the upload at the end would stumble over."""
    hub, client = lfs

    def check(*arguments: dict, **environment: str | None) -> list:
        done = client(CHECK, json.dumps(arguments), **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    good, wrong, reader, malformed = check(
        {"repo_id": "birds", "private": True},
        {"repo_id": "birds", "token": "hf_wrong"},
        {"repo_id": "anna/birds", "token": READ_TOKEN},
        {"repo_id": "anna/birds/1"},
    )
    assert good == "anna/birds" and hub.repos["anna/birds"].private
    assert wrong[0] is False and "--hub_token" in wrong[1] and "Invalid username or password" in wrong[1]
    assert reader[0] is False and "the right to write" in reader[1]
    assert malformed[0] is True and "--hub_model_id" in malformed[1]
    assert sum("repos/create" in request for request in hub.requests) == 3  # a refusal is not asked for again

    ((_, offline),) = check({"repo_id": "birds"}, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE=1 turns it off" in offline
    ((_, anonymous),) = check({"repo_id": "birds"}, HF_TOKEN=None)
    assert "needs a token" in anonymous
    hub.fail("POST /api/repos/create", status=503)
    ((_, down),) = check({"repo_id": "birds"})
    assert "503" in down


def test_only_pipelines_are_pushed(tmp_path):
    """Some folder's files, taken for a model's and made public."""
    (tmp_path / "diary.txt").touch()
    with pytest.raises(OSError, match="is no saved pipeline: it has no model_index.json"):
        push_folder(tmp_path, "anna/birds")


RUN = """
import runpy, sys, time
time.sleep = lambda seconds: None
sys.argv = ["training/train_flowmo.py", *sys.argv[2:]]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_training_pushes_its_result(lfs, tiny_config, tmp_path):
    """A run whose result does not reach the Hub, or that finds out only at its end that it may not be published."""
    hub, client = lfs
    script = str(Path(__file__).parents[1] / "training" / "train_flowmo.py")
    options = ["--dataset_name", "emoji", "--model_config", json.dumps(tiny_config), "--perceptual", "none"]
    options += ["--max_train_steps", "1", "--train_batch_size", "2", "--num_validation_images", "2"]
    options += ["--num_inference_steps", "1", "--output_dir", "out", "--license", "mit", "--report_to", "none"]
    options += ["--push_to_hub", "--hub_model_id", "anna/tiny", "--cache_dir", str(tmp_path / "cache")]
    code = RUN.format(script=script)

    refused = client(code, "-", *options, HF_TOKEN=READ_TOKEN)
    assert refused.returncode != 0 and "would not take the model" in refused.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))

    done = client(code, "-", *options)
    assert done.returncode == 0, done.stderr
    names = set(hub.content("anna/tiny"))
    assert {"README.md", "model_index.json", "metrics.json", "validation/pretrain-0000001.png"} <= names
    assert not any(name.startswith(("checkpoint", "logs")) for name in names)
    card = hub.content("anna/tiny")["README.md"].decode()
    assert "license: mit" in card and WRITE_TOKEN not in card
    PIL.Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / "photo.jpg")
    loaded = client(LOAD, "out", "anna/tiny")
    assert loaded.returncode == 0, loaded.stderr
