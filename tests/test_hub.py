"""Published checkpoints in and out."""

import json
from pathlib import Path

import pytest
import torch

from flowmo_diffusers import FlowMoAutoencoder, FlowMoPipeline
from flowmo_diffusers.hub import convert
from flowmo_diffusers.models.published import from_published, infer_config, published_name, published_shapes


PARITY = Path(__file__).parent / "parity"
CHECKPOINT = PARITY / "lfq_lo" / "checkpoint.pth"
TOLD = ["--rope_axes", "4", "8", "4", "--codebook_bits", "3", "--sample_size", "32", "--num_latent_tokens", "16"]


@pytest.fixture(scope="module")
def state_dict():
    return torch.load(CHECKPOINT, weights_only=True)["model_ema_state_dict"]


@pytest.mark.parametrize(("name", "bits", "group"), [("lo", 18, 9), ("hi", 56, 14)])
def test_published_names_and_shapes(name, bits, group):
    """Any of the 608 tensors of a published checkpoint not being understood, or not fitting where it goes."""
    shapes = {
        key: tuple(shape) for key, shape in json.loads((PARITY / f"flowmo_{name}_shapes.json").read_text()).items()
    }
    config = infer_config(shapes)
    assert len(shapes) == 608
    assert published_shapes(config) == shapes
    with torch.device("meta"):
        model = FlowMoAutoencoder(**config)
    for key, tensor in model.state_dict().items():
        assert tensor.is_meta
        assert shapes[published_name(key)] == tuple(tensor.shape), key
    assert len({published_name(key) for key in model.state_dict()}) == len(model.state_dict())
    assert (model.config.latent_channels, model.config.codebook_bits) == (bits, group)
    assert model.config.num_attention_heads == 12
    if name == "lo":
        with torch.device("meta"):
            defaults = FlowMoAutoencoder().config
        assert {key: model.config[key] for key in config} == {key: defaults[key] for key in config}


def test_round_trip(tmp_path):
    """A weight lost, renamed or changed on the way to a folder and back."""
    convert.main([str(CHECKPOINT), str(tmp_path / "folder"), *TOLD])
    convert.main([str(tmp_path / "folder"), str(tmp_path / "back.pth")])
    original = torch.load(CHECKPOINT, weights_only=True)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == original.keys()
    model = FlowMoPipeline.from_pretrained(tmp_path / "folder").autoencoder
    alive = {published_name(name) for name in model.state_dict()}
    for key in ("model_ema_state_dict", "model_state_dict"):
        assert back[key].keys() == original[key].keys()
        for name, tensor in original[key].items():
            assert back[key][name].shape == tensor.shape
            if name in alive:
                assert torch.equal(back[key][name], tensor), name
            else:
                assert back[key][name].norm() > 0, f"{name}: the published training divides by this norm"


def test_raw_and_ema(tmp_path, state_dict):
    """The averaged weights not being the default, or `--weights raw` not being obeyed."""
    raw = {name: tensor + 1 for name, tensor in state_dict.items()}
    path = tmp_path / "both.pth"
    torch.save({"total_steps": 1, "model_state_dict": raw, "model_ema_state_dict": state_dict}, path)
    given = {"rope_axes": (4, 8, 4), "codebook_bits": 3, "sample_size": 32, "num_latent_tokens": 16}
    ema_model = convert.load_published(path, **given)
    raw_model = convert.load_published(path, "raw", **given)
    assert torch.equal(ema_model.encoder.patch_in.weight, state_dict["encoder.img_in.weight"])
    assert torch.equal(raw_model.encoder.patch_in.weight, raw["encoder.img_in.weight"])


def test_told_fields_are_stored(tmp_path):
    """Fields given on the command line that do not reach the configuration of the folder."""
    convert.main([str(CHECKPOINT), str(tmp_path), *TOLD])
    config = json.loads((tmp_path / "autoencoder" / "config.json").read_text())
    assert config["rope_axes"] == [4, 8, 4]
    assert (config["codebook_bits"], config["sample_size"], config["num_latent_tokens"]) == (3, 32, 16)
    assert (config["num_attention_heads"], config["encoder_hidden_size"], config["decoder_hidden_size"]) == (2, 32, 48)


def test_unknown_and_missing_names_are_refused(state_dict):
    """A foreign or damaged checkpoint that is loaded in part instead of being refused by name."""
    given = {"rope_axes": (4, 8, 4), "codebook_bits": 3}
    damaged = {name: tensor for name, tensor in state_dict.items() if name != "decoder.double_blocks.1.img_mlp.2.bias"}
    with pytest.raises(ValueError, match=r"missing tensors \['decoder.double_blocks.1.img_mlp.2.bias'\]"):
        from_published(damaged, **given)
    with pytest.raises(ValueError, match=r"unknown tensors \['decoder.extra'\]"):
        from_published(state_dict | {"decoder.extra": torch.zeros(1)}, **given)
    with pytest.raises(ValueError, match="encoder.txt_in.weight"):
        from_published({"model.layer.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="decoder.final_layer_img.linear.weight"):
        from_published(state_dict | {"decoder.final_layer_img.linear.weight": torch.zeros(3, 3)}, **given)


def test_unsafe_and_foreign_files_are_refused(tmp_path, capsys):
    """A pickle that runs code when opened, or a traceback instead of a message for a file that is no checkpoint."""
    import pickle

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    files = {
        "attack.pth": lambda path: torch.save({"model_ema_state_dict": Attack()}, path),
        "pickle.pth": lambda path: path.write_bytes(pickle.dumps(Attack())),
        "text.pth": lambda path: path.write_text("no checkpoint"),
        "empty.pth": lambda path: path.touch(),
        "other.pth": lambda path: torch.save({"state_dict": {}}, path),
    }
    for name, write in files.items():
        write(tmp_path / name)
        with pytest.raises(OSError, match=name):
            convert.load_published(tmp_path / name)
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(SystemExit):
        convert.main([str(tmp_path / "absent.pth"), str(tmp_path / "out")])
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
