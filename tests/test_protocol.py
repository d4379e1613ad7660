"""What published numbers differ by."""

import argparse

import pytest
import torch

from flowmo_diffusers.metrics.options import add_crop_options, add_protocol_options, build_protocol
from flowmo_diffusers.metrics.protocol import PROTOCOLS, Protocol


def parse(*words):
    parser = argparse.ArgumentParser()
    add_protocol_options(parser.add_argument_group())
    add_crop_options(parser.add_argument_group())
    return parser.parse_args(words)


def test_the_published_protocol():
    """Truncated pixels for PSNR and SSIM, floats for networks, Inception's input as in pytorch-fid, batches of 5."""
    assert build_protocol(parse("--protocol", "flowmo")).to_dict() == {
        "rounding": "truncate",
        "network_rounding": "float",
        "inception_input": "pytorch-fid",
        "jpeg_quality": None,
        "official_batch_size": 5,
    }


def test_options_change_a_named_protocol():
    changed = build_protocol(parse("--protocol", "flowmo", "--rounding", "nearest", "--jpeg_quality", "90"))
    assert (changed.rounding, changed.network_rounding, changed.jpeg_quality) == ("nearest", "float", 90)
    assert build_protocol(parse()) == PROTOCOLS["standard"] == Protocol()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounding": "up"}, "rounding='up' must be one of"),
        ({"network_rounding": None}, "network_rounding=None must be one of"),
        ({"inception_input": "pil"}, "inception_input='pil' must be one of"),
        ({"jpeg_quality": 0}, "jpeg_quality=0 must be from 1 to 100"),
        ({"official_batch_size": 0}, "official_batch_size=0 must be at least 1"),
    ],
)
def test_unknown_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**values)


def test_networks_see_rounded_images():
    """8 bits by default, floats where the protocol says so."""
    x = torch.tensor([0.1234, -0.5]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    steps = (Protocol().for_networks(x) + 1) * 127.5
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert not torch.equal(Protocol().for_networks(x), x)
    torch.testing.assert_close(Protocol(network_rounding="float").for_networks(x), x)


def test_jpeg_is_what_others_stored():
    """Images come back as from a JPEG file, worse at a lower quality; without one they are untouched."""
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert Protocol().stored(x) is x
    high, low = ((Protocol(jpeg_quality=quality).stored(x) - x).square().mean() for quality in (95, 10))
    assert 0 < high < low


@pytest.mark.parametrize(("word", "size"), [("256", (256, 256)), ("90x160", (90, 160))])
def test_resolution(word, size):
    assert parse("--resolution", word).resolution == size


@pytest.mark.parametrize("word", ["0", "256x", "a", "1x2x3", "-4", "1.5"])
def test_wrong_resolutions_are_refused(word, capsys):
    with pytest.raises(SystemExit):
        parse(f"--resolution={word}")
    assert "HEIGHTxWIDTH" in capsys.readouterr().err
