"""
The demo page in a real Chromium, without a window. Needs the packages `gradio` and `playwright`, and a Chromium:
`FLOWMO_CHROMIUM=path`, or one that is on the PATH. `FLOWMO_SCREENSHOTS=folder` keeps the pictures of the docs.
"""

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from flowmo_diffusers.page.demo import load_pipelines


pytest.importorskip("gradio", reason="the demo page needs Gradio (docs/demo-page.md)")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

from flowmo_diffusers.page.layout import build_page  # noqa: E402
from flowmo_diffusers.page.serving import serve  # noqa: E402


NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("FLOWMO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
SCREENSHOTS = os.environ.get("FLOWMO_SCREENSHOTS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: set FLOWMO_CHROMIUM=path"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = build_page(*load_pipelines("starter", device="cpu"))
        yield serve(page, max_upload_mb=1, block=False)
        page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which Chromium refuses to make for root
        browser = run.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address: str):
    """The page, opened; in the end nothing else than the page was asked for anything, and no script has failed."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(30_000)
    elsewhere, errors = [], []
    known = (address, "data:", "blob:" + address)
    tab.on("request", lambda request: None if request.url.startswith(known) else elsewhere.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(address)
    tab.get_by_role("button", name="Reconstruct").wait_for()
    yield tab
    tab.close()
    assert (elsewhere, errors) == ([], [])


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something like a traffic light on white, larger than the model's images and not square."""
    image = PIL.Image.new("RGB", (240, 160), "white")
    image.paste("black", (85, 5, 155, 155))
    for top, colour in ((15, "red"), (60, "orange"), (105, "green")):
        image.paste(colour, (100, top, 140, top + 40))
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    image.save(path)
    return path


def figures(tab, which: int = 0) -> dict[str, str]:
    """The table under the pictures, once it is there."""
    table = tab.locator("table:visible").nth(which)
    table.wait_for()
    rows = [row.split("\t") for row in table.inner_text().strip().split("\n")]
    return dict(zip(*rows, strict=True))


def shown(tab, label: str) -> np.ndarray:
    """The pixels of the picture under a label, as the server sent them."""
    block = tab.locator(".picture:visible", has=tab.get_by_test_id("block-label").get_by_text(label, exact=True))
    source = block.locator("img").get_attribute("src")
    return np.asarray(PIL.Image.open(io.BytesIO(tab.request.get(source).body())), int)


def keep(tab, name: str) -> None:
    if SCREENSHOTS:
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(700)  # until what fades in or out has done so
        tab.screenshot(path=Path(SCREENSHOTS) / f"page-{name}.png", full_page=True)


def drag(tab, label: str, share: float) -> None:
    """A slider by its handle, as a person does."""
    box = tab.get_by_label(f"range slider for {label}").bounding_box()
    middle = box["y"] + box["height"] / 2
    start = tab.get_by_label(f"range slider for {label}").evaluate("s => (s.value - s.min) / (s.max - s.min)")
    tab.mouse.move(box["x"] + 8 + start * (box["width"] - 16), middle)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 8 + share * (box["width"] - 16), middle, steps=5)
    tab.mouse.up()


def enter(tab, label: str, value: int) -> None:
    """A number into the field beside a slider, which takes it when the field is left."""
    number = tab.get_by_label(f"number input for {label}", exact=True)
    number.fill(str(value))
    number.press("Tab")
    tab.wait_for_timeout(300)
    assert number.input_value() == str(value)


def set_steps(tab, steps: int) -> None:
    """Waits for their result, as a person does."""
    enter(tab, "Steps", steps)
    tab.get_by_role("cell", name=str(steps), exact=True).wait_for()


def test_upload_reconstruct_and_change_a_slider(tab, photo: Path):
    """A page on which a person can do nothing, though its functions work."""
    tab.locator("#image input[type=file]").set_input_files(photo)
    first = figures(tab)
    assert (first["bits"], first["bytes"], first["bits a pixel"]) == ("1536", "192", "1.5")
    assert first["forwards of the decoder"] == "4"
    original, reconstruction = shown(tab, "Original"), shown(tab, "Reconstruction")
    assert original.shape == reconstruction.shape == (32, 32, 3)
    assert original[6, 16, 0] > 200 > 100 > original[6, 16, 1]  # red
    assert np.abs(original - reconstruction).mean() < 25
    keep(tab, "reconstruct")

    drag(tab, "Steps", 0.4)
    tab.get_by_role("cell", name="4", exact=True).wait_for(state="detached")
    steps = int(tab.get_by_label("number input for Steps").input_value())
    assert steps > 8
    assert int(figures(tab)["forwards of the decoder"]) == steps  # without guidance
    assert not np.array_equal(shown(tab, "Reconstruction"), reconstruction)

    set_steps(tab, 4)
    assert np.array_equal(shown(tab, "Reconstruction"), reconstruction)  # from the same seed


def test_the_whole_image(tab, photo: Path):
    """A box that is ticked to no effect, or that cannot be unticked."""
    tab.locator("#image input[type=file]").set_input_files(photo)
    assert "windows" not in figures(tab)
    tab.get_by_label("The whole image, in windows").check()
    tab.get_by_role("columnheader", name="windows").wait_for()
    assert "more than 65 536 pixels is made smaller" in tab.locator("#whole").inner_text()
    found = figures(tab)
    assert (found["windows"], found["bits"], found["bytes"]) == ("70", "107520", "13440")
    original, reconstruction = shown(tab, "Original"), shown(tab, "Reconstruction")
    assert original.shape == reconstruction.shape == (160, 240, 3)
    assert np.array_equal(original, np.asarray(PIL.Image.open(photo), int))
    assert np.abs(original - reconstruction).mean() < 25
    assert tab.locator(".picture:visible").count() == 2  # no tokens
    keep(tab, "whole")
    tab.get_by_label("The whole image, in windows").uncheck()
    tab.get_by_role("columnheader", name="windows").wait_for(state="detached")
    assert shown(tab, "Original").shape == (32, 32, 3)
    assert tab.locator(".picture:visible").count() == 3


def test_sample_and_its_steps(tab):
    """A sample that is another one, or an animation that stands still."""
    tab.locator("#samples button").nth(1).click()
    figures(tab)
    assert float(figures(tab)["PSNR"].split()[0]) > 20
    set_steps(tab, 25)
    tab.get_by_role("button", name="Show the steps").click()
    picture = tab.locator("#steps img")
    picture.wait_for()
    animation = PIL.Image.open(io.BytesIO(tab.request.get(picture.get_attribute("src")).body()))
    assert animation.format == "WEBP" and 20 < animation.n_frames <= 26  # WebP joins frames that are equal
    animation.seek(animation.n_frames - 1)
    last = np.asarray(animation.convert("RGB"), int)[4:256:8, 4::8]
    assert np.array_equal(last, shown(tab, "Reconstruction"))
    keep(tab, "steps")


def test_edit(tab):
    """Controls of one tab that drive the other."""
    tab.get_by_role("tab", name="Edit tokens").click()
    enter(tab, "Bits to flip", 100)
    enter(tab, "Last token", 31)
    tab.get_by_role("button", name="Flip", exact=True).click()
    tab.get_by_role("cell", name="100", exact=True).wait_for()
    assert not np.array_equal(shown(tab, "Flipped"), shown(tab, "Reconstruction"))
    keep(tab, "flip")
    tab.get_by_role("tab", name="Mix two images").click()
    tab.get_by_text("random ones", exact=True).click()
    assert 0 < int(figures(tab)["bits changed"]) < 1536 / 2
    keep(tab, "mix")


def test_generate(tab):
    """A tab of generation that makes nothing, or nothing of the class."""
    tab.get_by_role("tab", name="Generate").click()
    tab.locator("#class input").click()
    tab.get_by_role("option", name="Smileys & Emotion").click()
    enter(tab, "Steps of the generator", 16)
    tab.locator("#generate").click()
    figures(tab)
    images = tab.locator("#generated .gallery-item img")
    assert images.count() == 6
    sources = [images.nth(number).get_attribute("src") for number in range(6)]
    pixels = np.stack([PIL.Image.open(io.BytesIO(tab.request.get(source).body())) for source in sources])
    red, green, blue = pixels[:, 12:20, 12:20].mean(axis=(0, 1, 2))
    assert min(red, green) > blue + 20  # most smileys are yellow
    keep(tab, "generate")


def test_bad_uploads_are_explained(tab, tmp_path: Path):
    """'Error', and nothing else."""
    toast = tab.get_by_test_id("toast-body")
    for name, content, reason in (
        ("broken.png", b"no image", "no image of a known format"),
        ("large.png", os.urandom(2**20 + 1), "exceed the maximum allowed size of 1.0 Mb"),
    ):
        (tmp_path / name).write_bytes(content)
        tab.locator("#image input[type=file]").set_input_files(tmp_path / name)
        toast.get_by_text(reason).wait_for()
        assert tab.get_by_test_id("toast-text").count() == 1
        tab.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")
