"""What the demo page looks like, and what its buttons do. Needs Gradio."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import PIL.Image
from gradio.events import Dependency
from gradio.processing_utils import save_bytes_to_cache

from flowmo_diffusers.data.decoding import decode_image
from flowmo_diffusers.data.images import EMBEDDED_DATASET, load_images
from flowmo_diffusers.page.bits import bit_picture
from flowmo_diffusers.page.uploads import uploaded
from flowmo_diffusers.page.workbench import Figures, Sampling, Workbench
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.pipeline_generation import DEFAULT_STEPS, FlowMoGenerationPipeline


NUM_SAMPLES = 12
MAX_GENERATED = 9
MAX_SEED = 2**31 - 1
# Uploads and results are removed when they are an hour old; looked for every ten minutes.
DELETE_CACHE = (600, 3600)
ANIMATION_SIDE = 256  # in pixels, at least

LAST, RANDOM = "the last ones", "random ones"


def build_page(
    pipeline: FlowMoPipeline,
    generation_pipeline: FlowMoGenerationPipeline | None = None,
    concurrency: int = 1,
    samples: Sequence[PIL.Image.Image] | None = None,
) -> gr.Blocks:
    """
    The demo page, to be shown by [`serve`].

    Args:
        pipeline: A tokenizer of colour images whose tokens are discrete.
        generation_pipeline: A generator of its tokens; without one there is no tab of generation.
        concurrency: Calls that are computed at once; others wait in a queue.
        samples: Images to choose from. Default: some of the embedded emoji that the starter never saw.

    Raises:
        ValueError: As [`Workbench`], or if concurrency is not at least 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency} must be at least 1")
    workbench = Workbench(pipeline, generation_pipeline)
    samples = _held_out() if samples is None else list(samples)
    model = {"concurrency_limit": concurrency, "concurrency_id": "model"}
    # Small pictures are enlarged pixel by pixel, photographs smoothly.
    shown = "pixels" if pipeline.autoencoder.config.sample_size <= 64 else None
    with gr.Blocks(title="FlowMo", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.Markdown(_heading(workbench))
        with gr.Row(elem_classes=shown):
            with gr.Column(scale=1, min_width=280):
                image, changes, side, sampling = _controls(workbench, samples)
            with gr.Column(scale=3):
                with gr.Tab("Reconstruct"):
                    _reconstruct_tab(workbench, image, changes, side, sampling, model)
                with gr.Tab("Edit tokens"):
                    with gr.Tab("Flip bits"):
                        _flip_tab(workbench, image, side, sampling, model)
                    with gr.Tab("Mix two images"):
                        _mix_tab(workbench, samples, image, side, sampling, model)
                if generation_pipeline is not None:
                    with gr.Tab("Generate"):
                        _generate_tab(workbench, sampling, model)
    return page


def figures_table(figures: Figures, compared: str = "PSNR") -> str:
    """Figures as a table in Markdown, with `compared` over the PSNR."""
    columns = {
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


def _controls(
    workbench: Workbench, samples: Sequence[PIL.Image.Image]
) -> tuple[gr.Image, list[Dependency], gr.Slider, list[gr.components.Component]]:
    """Image, what happens when there is another one, its side, and what [`Sampling`] takes."""
    recipe, config = workbench.recipe, workbench.autoencoder.config
    image = _upload("Image", samples[:1])
    changes = [_check(image)]
    if samples:
        choice = gr.Gallery(
            list(samples),
            label="Samples",
            columns=4,
            height="auto",
            format="png",
            allow_preview=False,
            buttons=[],
            interactive=False,
            elem_id="samples",
        )

        def choose(event: gr.SelectData) -> PIL.Image.Image:
            return samples[event.index]

        changes.append(choice.select(choose, None, image, queue=False, api_visibility="private"))
    patch, size = config.patch_size, config.sample_size
    side = _slider("Side in pixels", max(patch, size // 2 // patch * patch), 2 * size, size, patch, precision=0)
    sampling = [
        _slider("Steps", 1, max(50, recipe.num_inference_steps), recipe.num_inference_steps, precision=0),
        _slider("Guidance scale", 0, max(5, recipe.guidance_scale), recipe.guidance_scale, 0.1),
        _slider("ρ of the schedule", 0.5, max(8, recipe.rho), recipe.rho, 0.1),
        _seed(),
    ]
    return image, changes, side, sampling


def _reconstruct_tab(
    workbench: Workbench, image: gr.Image, changes: list[Dependency], side: gr.Slider, sampling: list, model: dict
) -> None:
    with gr.Row():
        original, tokens, result = _result("Original"), _result("Tokens"), _result("Reconstruction")
    figures = gr.Markdown(elem_id="figures")
    with gr.Row():
        run = gr.Button("Reconstruct", variant="primary")
        show_steps = gr.Button("Show the steps")
    steps = gr.Image(
        label="x_t above, the image that the model saw in it below",
        type="filepath",
        buttons=["download"],
        interactive=False,
        visible=False,
        elem_id="steps",
    )

    @_refusing
    def reconstruct(file, side, *settings, progress=gr.Progress()):  # noqa: B008, which is how Gradio asks for it
        done = workbench.reconstruct(uploaded(file), side, Sampling(*settings), _bar(progress))
        return done.original, bit_picture(done.bits), done.image, figures_table(done.figures)

    @_refusing
    def animate(file, side, *settings, progress=gr.Progress()):  # noqa: B008
        trajectory = workbench.trajectory(uploaded(file), side, Sampling(*settings), _bar(progress))
        with TemporaryDirectory() as folder:
            path = Path(folder) / "steps.webp"
            trajectory.save(path, scale=-(-ANIMATION_SIDE // side))
            kept = save_bytes_to_cache(path.read_bytes(), path.name, steps.GRADIO_CACHE)
        return gr.update(value=kept, visible=True)

    inputs, outputs = [image, side, *sampling], [original, tokens, result, figures]
    triggers = [run.click, *_released([side, *sampling])]
    gr.on(triggers, reconstruct, inputs, outputs, api_name="reconstruct", trigger_mode="always_last", **model)
    for change in changes:
        change.success(reconstruct, inputs, outputs, api_visibility="private", trigger_mode="always_last", **model)
    show_steps.click(animate, [image, side, *sampling], steps, api_name="animate", **model)


def _flip_tab(workbench: Workbench, image: gr.Image, side: gr.Slider, sampling: list, model: dict) -> None:
    total, last_token = workbench.num_tokens * workbench.bits_per_token, workbench.num_tokens - 1
    with gr.Row():
        count = _slider("Bits to flip", 0, total, total // 32, precision=0)
        first = _slider("First token", 0, last_token, 0, precision=0)
        last = _slider("Last token", 0, last_token, last_token, precision=0)
        seed = _seed("Seed of the flips")
    run = gr.Button("Flip", variant="primary")
    with gr.Row():
        before, tokens, after = _result("Reconstruction"), _result("Flipped tokens"), _result("Flipped")
    gr.Markdown("Orange: the bits that were flipped.")
    figures = gr.Markdown()

    @_refusing
    def flip(file, side, count, first, last, seed, *settings, progress=gr.Progress()):  # noqa: B008
        edit = workbench.flip(uploaded(file), side, Sampling(*settings), count, first, last, seed, _bar(progress))
        picture = bit_picture(edit.bits, edit.marked)
        return edit.images[0], picture, edit.image, figures_table(edit.figures, "PSNR of both pictures")

    gr.on(
        [run.click, *_released([count, first, last, seed])],
        flip,
        [image, side, count, first, last, seed, *sampling],
        [before, tokens, after, figures],
        api_name="flip",
        trigger_mode="always_last",
        **model,
    )


def _mix_tab(
    workbench: Workbench,
    samples: Sequence[PIL.Image.Image],
    image: gr.Image,
    side: gr.Slider,
    sampling: list,
    model: dict,
) -> None:
    with gr.Row():
        other = _upload("Second image", samples[1:2])
        _check(other)
        with gr.Column(scale=2):
            count = _slider(
                "Tokens of the second image", 0, workbench.num_tokens, workbench.num_tokens // 2, precision=0
            )
            which = gr.Radio([LAST, RANDOM], value=LAST, label="Which of its tokens")
            seed = _seed("Seed of random ones")
            run = gr.Button("Mix", variant="primary")
    with gr.Row():
        first, second = _result("First image"), _result("Second image")
        tokens, mixed = _result("Mixed tokens"), _result("Mixed")
    gr.Markdown("Orange: the tokens of the second image.")
    figures = gr.Markdown()

    @_refusing
    def mix(file, other, side, count, which, seed, *settings, progress=gr.Progress()):  # noqa: B008
        drawn = seed if which == RANDOM else None
        edit = workbench.mix(uploaded(file), uploaded(other), side, Sampling(*settings), count, drawn, _bar(progress))
        picture = bit_picture(edit.bits, edit.marked)
        return *edit.images, picture, edit.image, figures_table(edit.figures, "PSNR of first and mixed")

    gr.on(
        [run.click, *_released([count, seed]), which.input],
        mix,
        [image, other, side, count, which, seed, *sampling],
        [first, second, tokens, mixed, figures],
        api_name="mix",
        trigger_mode="always_last",
        **model,
    )


def _generate_tab(workbench: Workbench, sampling: list, model: dict) -> None:
    masked = workbench.generator.config.order == "masked"
    classes = [("any", -1), *((name, number) for number, name in enumerate(workbench.class_names))]
    with gr.Row():
        label = gr.Dropdown(classes, value=classes[1 % len(classes)][1], label="Class", elem_id="class")
        count = _slider("Images", 1, MAX_GENERATED, 6, precision=0)
        steps = _slider("Steps of the generator", 1, 128, DEFAULT_STEPS if masked else 1, visible=masked, precision=0)
        guidance = _slider("Its guidance scale", 1, 10, 2, 0.1)
    run = gr.Button("Generate", variant="primary", elem_id="generate")
    with gr.Row():
        images = gr.Gallery(
            label="Images",
            columns=3,
            height="auto",
            format="png",
            buttons=["download_all"],
            interactive=False,
            elem_id="generated",
            scale=2,
        )
        tokens = _result("Tokens of the first one")
    figures = gr.Markdown()

    @_refusing
    def generate(label, count, steps, guidance, *settings, progress=gr.Progress()):  # noqa: B008
        label = None if label == -1 else label
        images, bits, figures = workbench.generate(label, count, steps, guidance, Sampling(*settings), _bar(progress))
        return images, bit_picture(bits[0]), figures_table(figures)

    run.click(
        generate,
        [label, count, steps, guidance, *sampling],
        [images, tokens, figures],
        api_name="generate",
        **model,
    )


def _refusing(function: Callable) -> Callable:
    """What the pipelines refuse is shown to the user as it is."""

    @wraps(function)
    def answered(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (OSError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return answered


def _bar(progress: gr.Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress((done, total))


def _heading(workbench: Workbench) -> str:
    side, tokens, bits = workbench.autoencoder.config.sample_size, workbench.num_tokens, workbench.bits_per_token
    return (
        "# FlowMo\n"
        f"An image becomes {tokens} tokens of {bits} bits, and these an image again. This tokenizer was made for "
        f"{side} × {side} pixels; images are cropped to the square in their middle and resized."
    )


def _upload(label: str, samples: Sequence[PIL.Image.Image]) -> gr.Image:
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


def _check(image: gr.Image) -> Dependency:
    """Says what is wrong with an upload; Gradio would say "Error"."""

    @_refusing
    def check(payload):
        decode_image(uploaded(payload and payload["path"]))

    return image.upload(check, image, preprocess=False, concurrency_limit=None, api_visibility="private")


def _result(label: str) -> gr.Image:
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes="picture",
        min_width=140,
    )


def _slider(label: str, minimum: float, maximum: float, value: float, step: float = 1, **kwargs) -> gr.Slider:
    return gr.Slider(minimum, maximum, value, step=step, label=label, buttons=[], **kwargs)


def _seed(label: str = "Seed") -> gr.Number:
    return gr.Number(0, label=label, precision=0, minimum=0, maximum=MAX_SEED)


def _released(controls: Sequence[gr.components.Component]) -> list:
    """When a control has its new value: sliders not while they are drawn, numbers not while they are typed."""
    return [control.release if isinstance(control, gr.Slider) else control.submit for control in controls]


def _held_out() -> list[PIL.Image.Image]:
    images = load_images(EMBEDDED_DATASET)["test"].pick(NUM_SAMPLES)
    return [images[number] for number in range(len(images))]
