"""The demo page as a server: what it answers, what it refuses, and whom it talks to."""

import argparse
import builtins
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from flowmo_diffusers.assets import asset_path
from flowmo_diffusers.models.windows import Windows
from flowmo_diffusers.page import demo


gradio = pytest.importorskip("gradio", reason="the demo page needs Gradio (docs/demo-page.md)")
import httpx  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from flowmo_diffusers.page.layout import build_page  # noqa: E402
from flowmo_diffusers.page.serving import serve  # noqa: E402
from flowmo_diffusers.page.widgets import figures_table  # noqa: E402
from flowmo_diffusers.page.workbench import Figures  # noqa: E402


SETTINGS = [4, 1.5, 4.0, 0]  # steps, guidance scale, rho, seed
FILE = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def picture() -> PIL.Image.Image:
    image = PIL.Image.new("RGB", (80, 60), "white")
    image.paste("orange", (20, 10, 60, 50))
    return image


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, picture: PIL.Image.Image):
    """The starter's page, of which a file of 100 kB is refused."""
    cache = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        page = build_page(*demo.load_pipelines("starter", device="cpu"), samples=[picture, picture.rotate(45)])
        serve(page, max_upload_mb=0.1, block=False)
        yield page
        page.close()


@pytest.fixture(scope="module")
def client(page: gradio.Blocks, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(page.local_url, verbose=False, download_files=str(tmp_path_factory.mktemp("answers")))


@pytest.fixture
def photo(tmp_path: Path, picture: PIL.Image.Image) -> str:
    picture.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def call(page: gradio.Blocks, image: dict) -> httpx.Response:
    """A reconstruction asked for as a browser does, of any image."""
    return httpx.post(page.local_url + "gradio_api/call/reconstruct", json={"data": [image, 32, False, *SETTINGS]})


def answer(page: gradio.Blocks, image: dict) -> str:
    event = call(page, image).json()["event_id"]
    return httpx.get(page.local_url + f"gradio_api/call/reconstruct/{event}", timeout=60).text


def upload(page: gradio.Blocks, content: bytes) -> httpx.Response:
    return httpx.post(page.local_url + "gradio_api/upload", files={"files": ("x.png", content)})


def test_reconstruct(client: Client, photo: str):
    """Pictures in another order, not lossless, or an upload that does not arrive."""
    original, tokens, image, figures = client.predict(
        handle_file(photo), 32, False, *SETTINGS, api_name="/reconstruct"
    )
    with PIL.Image.open(original) as shown:
        assert shown.format == "PNG" and shown.size == (32, 32)
        assert shown.getpixel((16, 16)) == (255, 165, 0) and shown.getpixel((1, 1)) == (255, 255, 255)
        with PIL.Image.open(image) as restored:
            assert restored.format == "PNG" and restored.size == (32, 32)
            assert np.abs(np.asarray(restored, int) - np.asarray(shown, int)).mean() < 20
    assert tokens["visible"]
    with PIL.Image.open(tokens["value"]) as bits:
        assert set(bits.convert("L").get_flattened_data()) >= {20, 245}
    assert "| 1536 | 192 | 1.5 |" in figures and " dB |" in figures


def test_whole_image(client: Client, photo: str):
    """The square after all, or figures and tokens of it."""
    original, tokens, image, figures = client.predict(handle_file(photo), 32, True, *SETTINGS, api_name="/reconstruct")
    with PIL.Image.open(original) as shown, PIL.Image.open(photo) as sent, PIL.Image.open(image) as restored:
        assert np.array_equal(shown, sent) and restored.size == (80, 60)
        assert np.abs(np.asarray(restored, int) - np.asarray(shown, int)).mean() < 20
    assert not tokens["visible"] and tokens["value"] is None
    windows = len(Windows(60, 80, 32))
    assert f"| {windows} | {1536 * windows} | {192 * windows} | {1536 * windows / 4800:.3g} |" in figures


def test_animate(client: Client, photo: str):
    """A still picture, or one that the browser cannot fetch."""
    shown = client.predict(handle_file(photo), 32, *SETTINGS, api_name="/animate")
    with PIL.Image.open(shown["value"]) as animation:
        assert animation.format == "WEBP" and animation.n_frames == 5 and animation.size == (256, 512)


def test_edits(client: Client, photo: str):
    """Arguments of the page that reach the wrong parameter."""
    *_, figures = client.predict(handle_file(photo), 32, 7, 3, 5, 0, *SETTINGS, api_name="/flip")
    assert "| 1536 | 192 | 1.5 | 7 |" in figures
    for which in ("the last ones", "random ones"):
        *_, figures = client.predict(
            handle_file(photo), handle_file(photo), 32, 20, which, 0, *SETTINGS, api_name="/mix"
        )
        assert "| 1536 | 192 | 1.5 | 0 | inf dB |" in figures  # both are the same image


def test_generate(client: Client):
    """A class by another number, or images that are not as many as asked for."""
    images, tokens, figures = client.predict(2, 3, 4, 2.0, *SETTINGS, api_name="/generate")
    assert len(images) == 3 and "| 1536 | 192 | 1.5 |" in figures
    client.predict(-1, 1, 4, 2.0, *SETTINGS, api_name="/generate")
    with pytest.raises(AppError, match="not in the list of choices"):
        client.predict(9, 1, 4, 2.0, *SETTINGS, api_name="/generate")


def test_no_tab_of_generation_without_a_generator(tiny_pipeline, picture: PIL.Image.Image):
    """A tab whose button can only fail."""
    page = build_page(tiny_pipeline, samples=[picture])
    assert {block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)} == {
        "Reconstruct",
        "Edit tokens",
        "Flip bits",
        "Mix two images",
    }


def test_errors_are_shown(client: Client, page: gradio.Blocks, photo: str):
    """What was wrong with the user's input, replaced by 'Error'."""
    with pytest.raises(AppError, match="there is no image: upload one"):
        client.predict(None, 32, False, *SETTINGS, api_name="/reconstruct")
    with pytest.raises(AppError, match=r"tokens 5 to 3: expected 0 <= first <= last <= 63"):
        client.predict(handle_file(photo), 32, 7, 5, 3, 0, *SETTINGS, api_name="/flip")
    with pytest.raises(AppError, match="greater than maximum value"):
        client.predict(handle_file(photo), 32, False, 10**9, *SETTINGS[1:], api_name="/reconstruct")
    (path,) = upload(page, Path(photo).read_bytes()[:-40]).json()
    assert "truncated" in answer(page, {"path": path, "meta": FILE})


def test_files_of_this_machine_are_not_read(page: gradio.Blocks, photo: str):
    """Anyone who reaches the page seeing any picture of the machine it runs on."""
    assert "must be a file that was uploaded to this page" in answer(page, {"path": photo})
    assert "event: error" in answer(page, {"path": photo, "meta": FILE})
    address = page.local_url + "gradio_api/file="
    assert httpx.get(address + photo).status_code == 403
    assert httpx.get(address + str(asset_path("emoji", "LICENSE"))).status_code == 403


def test_uploads_are_limited(page: gradio.Blocks):
    """A page that fills memory or disk with whatever it is sent."""
    limit = round(0.1 * 2**20)
    assert upload(page, os.urandom(limit - 1000)).status_code == 200
    refused = upload(page, os.urandom(limit + 1))
    assert refused.status_code == 413 and "exceeded maximum allowed size" in refused.text
    assert upload(page, os.urandom(2 * limit)).status_code == 413
    assert call(page, {"url": "data:image/png;base64," + "A" * 2 * limit}).status_code == 413
    unknown = httpx.post(page.local_url + "gradio_api/upload", content=iter([b"x"] * 10))
    assert unknown.status_code == 413


def test_binds_to_this_machine_alone(page: gradio.Blocks):
    """A page that the whole network can use unless told otherwise, or a tunnel through someone else's server."""
    assert (page.share, page.share_url) == (False, None)
    addresses = {sock.getsockname()[0] for server in page.server.servers for sock in server.sockets}
    assert addresses == {"127.0.0.1"}
    defaults = argparse.ArgumentParser()
    demo.add_arguments(defaults)
    args = defaults.parse_args([])
    assert args.host == "127.0.0.1" and not any("share" in name for name in vars(args))


def test_no_telemetry_and_no_foreign_fonts(page: gradio.Blocks):
    """A page that tells Gradio's makers of its use, or asks Google for fonts."""
    assert not page.analytics_enabled and not page.get_config_file()["analytics_enabled"]
    assert page.theme._stylesheets == []
    config = httpx.get(page.local_url + "config").json()
    assert not config["analytics_enabled"] and config["footer_links"] == []


def test_options(monkeypatch):
    """An option of the command that has no effect."""
    seen = {}

    def keep(page, *args):
        seen["serve"] = args
        seen["concurrency"] = {fn.concurrency_limit for fn in page.fns.values() if fn.concurrency_id == "model"}

    monkeypatch.setattr("flowmo_diffusers.page.serving.serve", keep)
    options = [
        "--host",
        "0.0.0.0",
        "--port",
        "7999",
        "--max_upload_mb",
        "2.5",
        "--concurrency",
        "3",
        "--device",
        "cpu",
    ]
    assert demo.main(options) == 0
    assert seen == {"serve": ("0.0.0.0", 7999, 2.5), "concurrency": {3}}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max_upload_mb", "0"], "max_upload_mb=0.0 must be positive"),
        (["--concurrency", "0"], "concurrency=0 must be at least 1"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--generator", "nowhere/at/all"], "nowhere/at/all"),
        (["--device", "abacus"], "device='abacus' is not to be had"),
        (["--port", "{taken}"], "{taken}"),
    ],
)
def test_bad_options(options: list[str], reason: str, capsys):
    """A traceback instead of a line that says what to change."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as end:
            demo.main([option.replace("{taken}", port) for option in options])
    assert end.value.code == 2
    assert reason.replace("{taken}", port) in capsys.readouterr().err


def test_without_gradio(monkeypatch, capsys):
    """A missing extra that is not named."""
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "flowmo_diffusers.page.layout")
    with pytest.raises(SystemExit):
        demo.main([])
    assert "pip install 'flowmo_diffusers[demo]'" in capsys.readouterr().err


def test_options_need_no_torch():
    """A `--help` that takes seconds."""
    code = "import sys, flowmo_diffusers.page.demo; print({'torch', 'gradio', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_figures():
    """A figure under another's name."""
    figures = Figures(1536, 192, 1.5, 31, 0.25, psnr=27.5, changed=7, windows=3)
    names, _, values = figures_table(figures, "PSNR of both").splitlines()
    assert dict(zip(names.split(" | "), values.split(" | "), strict=True)) == {
        "| windows": "| 3",
        "bits": "1536",
        "bytes": "192",
        "bits a pixel": "1.5",
        "bits changed": "7",
        "PSNR of both": "27.50 dB",
        "forwards of the decoder": "31",
        "time |": "0.25 s |",
    }
