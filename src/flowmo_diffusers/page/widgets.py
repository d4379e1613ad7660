"""The parts that the demo page is made of. Needs Gradio."""

from collections.abc import Callable, Sequence
from functools import wraps

import gradio as gr
import PIL.Image
from gradio.events import Dependency

from flowmo_diffusers.data.decoding import decode_image
from flowmo_diffusers.page.uploads import uploaded
from flowmo_diffusers.page.workbench import Figures, Progress


MAX_SEED = 2**31 - 1


def image_input(label: str, samples: Sequence[PIL.Image.Image]) -> gr.Image:
    """Where an image is uploaded, with the first of the samples in it; a function gets the path of its file."""
    return gr.Image(
        samples[0] if samples else None,
        label=label,
        type="filepath",  # which the library's own reader decodes, with its limits
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        buttons=[],
        height=220,
        elem_id=label.lower().replace(" ", "-"),
    )


def check_upload(image: gr.Image) -> Dependency:
    """Says what is wrong with an upload; Gradio would say "Error"."""

    @refusing
    def check(payload):
        decode_image(uploaded(payload and payload["path"]))

    return image.upload(check, image, preprocess=False, concurrency_limit=None, api_visibility="private")


def picture(label: str) -> gr.Image:
    """A square place for a picture that was computed, which reaches the browser without loss."""
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes="picture",
        min_width=140,
    )


def slider(label: str, minimum: float, maximum: float, value: float, step: float = 1, **kwargs) -> gr.Slider:
    """Gradio refuses what lies outside the bounds, whoever asks."""
    return gr.Slider(minimum, maximum, value, step=step, label=label, buttons=[], **kwargs)


def seed_input(label: str = "Seed") -> gr.Number:
    """A whole number, 0 at first."""
    return gr.Number(0, label=label, precision=0, minimum=0, maximum=MAX_SEED)


def when_set(controls: Sequence[gr.components.Component]) -> list:
    """When a control has its new value: sliders not while they are drawn, numbers not while they are typed."""
    return [control.release if isinstance(control, gr.Slider) else control.submit for control in controls]


def refusing(function: Callable) -> Callable:
    """What the pipelines refuse is shown to the user as it is."""

    @wraps(function)
    def answered(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (OSError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return answered


def progress_bar(progress: gr.Progress) -> Progress:
    """Steps that are done, over the pictures that are waited for."""
    return lambda done, total: progress((done, total))


def figures_table(figures: Figures, compared: str = "PSNR") -> str:
    """Figures as a table in Markdown, with `compared` over the PSNR."""
    columns = {
        "windows": None if figures.windows is None else f"{figures.windows}",
        "bits": f"{figures.bits}",
        "bytes": f"{figures.num_bytes}",
        "bits a pixel": f"{figures.bits_per_pixel:.3g}",
        "bits changed": None if figures.changed is None else f"{figures.changed}",
        compared: None if figures.psnr is None else f"{figures.psnr:.2f} dB",
        "forwards of the decoder": f"{figures.forwards}",
        "time": f"{figures.seconds:.2f} s",
    }
    shown = {name: value for name, value in columns.items() if value is not None}
    return "\n".join("| " + " | ".join(row) + " |" for row in (shown, ["---"] * len(shown), shown.values()))
