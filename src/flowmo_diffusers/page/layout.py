"""What the demo page looks like, and what its buttons do. Needs Gradio."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import PIL.Image
from gradio.events import Dependency
from gradio.processing_utils import save_bytes_to_cache

from flowmo_diffusers.data.images import load_images
from flowmo_diffusers.page.bits import bit_picture
from flowmo_diffusers.page.uploads import uploaded
from flowmo_diffusers.page.widgets import (
    check_upload,
    figures_table,
    image_input,
    picture,
    progress_bar,
    refusing,
    seed_input,
    slider,
    when_set,
)
from flowmo_diffusers.page.workbench import Sampling, Workbench
from flowmo_diffusers.pipelines.pipeline_flowmo import FlowMoPipeline
from flowmo_diffusers.pipelines.pipeline_generation import DEFAULT_STEPS, FlowMoGenerationPipeline


NUM_SAMPLES = 12
MAX_GENERATED = 9
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
        samples: Images to choose from. Default: some of the embedded emoji and photos, none of which the starter saw.

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


def _controls(
    workbench: Workbench, samples: Sequence[PIL.Image.Image]
) -> tuple[gr.Image, list[Dependency], gr.Slider, list[gr.components.Component]]:
    """Image, what happens when there is another one, its side, and what [`Sampling`] takes."""
    recipe, config = workbench.recipe, workbench.autoencoder.config
    image = image_input("Image", samples[:1])
    changes = [check_upload(image)]
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
    side = slider("Side in pixels", max(patch, size // 2 // patch * patch), 2 * size, size, patch, precision=0)
    sampling = [
        slider("Steps", 1, max(50, recipe.num_inference_steps), recipe.num_inference_steps, precision=0),
        slider("Guidance scale", 0, max(5, recipe.guidance_scale), recipe.guidance_scale, 0.1),
        slider("ρ of the schedule", min(0.5, recipe.rho), max(8, recipe.rho), recipe.rho, 0.1),
        seed_input(),
    ]
    return image, changes, side, sampling


def _reconstruct_tab(
    workbench: Workbench, image: gr.Image, changes: list[Dependency], side: gr.Slider, sampling: list, model: dict
) -> None:
    with gr.Row():
        original, tokens, result = picture("Original"), picture("Tokens"), picture("Reconstruction")
    figures = gr.Markdown(elem_id="figures")
    whole = gr.Checkbox(False, label="The whole image, in windows", info=_about_windows(workbench), elem_id="whole")
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

    @refusing
    def reconstruct(file, side, whole, *settings, progress=gr.Progress()):  # noqa: B008, which is how Gradio asks for it
        file, sampling, report = uploaded(file), Sampling(*settings), progress_bar(progress)
        if whole:
            done = workbench.reconstruct_whole(file, sampling, report)
            shown = gr.update(value=None, visible=False)
        else:
            done = workbench.reconstruct(file, side, sampling, report)
            shown = gr.update(value=bit_picture(done.bits), visible=True)
        return done.original, shown, done.image, figures_table(done.figures)

    @refusing
    def animate(file, side, *settings, progress=gr.Progress()):  # noqa: B008
        trajectory = workbench.trajectory(uploaded(file), side, Sampling(*settings), progress_bar(progress))
        with TemporaryDirectory() as folder:
            path = Path(folder) / "steps.webp"
            trajectory.save(path, scale=-(-ANIMATION_SIDE // side))
            kept = save_bytes_to_cache(path.read_bytes(), path.name, steps.GRADIO_CACHE)
        return gr.update(value=kept, visible=True)

    inputs, outputs = [image, side, whole, *sampling], [original, tokens, result, figures]
    triggers = [run.click, whole.input, *when_set([side, *sampling])]
    gr.on(triggers, reconstruct, inputs, outputs, api_name="reconstruct", trigger_mode="always_last", **model)
    for change in changes:
        change.success(reconstruct, inputs, outputs, api_visibility="private", trigger_mode="always_last", **model)
    show_steps.click(animate, [image, side, *sampling], steps, api_name="animate", **model)


def _flip_tab(workbench: Workbench, image: gr.Image, side: gr.Slider, sampling: list, model: dict) -> None:
    total, last_token = workbench.num_tokens * workbench.bits_per_token, workbench.num_tokens - 1
    with gr.Row():
        count = slider("Bits to flip", 0, total, total // 32, precision=0)
        first = slider("First token", 0, last_token, 0, precision=0)
        last = slider("Last token", 0, last_token, last_token, precision=0)
        seed = seed_input("Seed of the flips")
    run = gr.Button("Flip", variant="primary")
    with gr.Row():
        before, tokens, after = picture("Reconstruction"), picture("Flipped tokens"), picture("Flipped")
    gr.Markdown("Orange: the bits that were flipped.")
    figures = gr.Markdown()

    @refusing
    def flip(file, side, count, first, last, seed, *settings, progress=gr.Progress()):  # noqa: B008
        edit = workbench.flip(
            uploaded(file), side, Sampling(*settings), count, first, last, seed, progress_bar(progress)
        )
        tokens_shown = bit_picture(edit.bits, edit.marked)
        return edit.images[0], tokens_shown, edit.image, figures_table(edit.figures, "PSNR of both pictures")

    gr.on(
        [run.click, *when_set([count, first, last, seed])],
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
        other = image_input("Second image", samples[1:2])
        check_upload(other)
        with gr.Column(scale=2):
            count = slider(
                "Tokens of the second image", 0, workbench.num_tokens, workbench.num_tokens // 2, precision=0
            )
            which = gr.Radio([LAST, RANDOM], value=LAST, label="Which of its tokens")
            seed = seed_input("Seed of random ones")
            run = gr.Button("Mix", variant="primary")
    with gr.Row():
        first, second = picture("First image"), picture("Second image")
        tokens, mixed = picture("Mixed tokens"), picture("Mixed")
    gr.Markdown("Orange: the tokens of the second image.")
    figures = gr.Markdown()

    @refusing
    def mix(file, other, side, count, which, seed, *settings, progress=gr.Progress()):  # noqa: B008
        drawn = seed if which == RANDOM else None
        edit = workbench.mix(
            uploaded(file), uploaded(other), side, Sampling(*settings), count, drawn, progress_bar(progress)
        )
        tokens_shown = bit_picture(edit.bits, edit.marked)
        return *edit.images, tokens_shown, edit.image, figures_table(edit.figures, "PSNR of first and mixed")

    gr.on(
        [run.click, *when_set([count, seed]), which.input],
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
        count = slider("Images", 1, MAX_GENERATED, 6, precision=0)
        steps = slider("Steps of the generator", 1, 128, DEFAULT_STEPS if masked else 1, visible=masked, precision=0)
        guidance = slider("Its guidance scale", 1, 10, 2, 0.1)
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
        tokens = picture("Tokens of the first one")
    figures = gr.Markdown()

    @refusing
    def generate(label, count, steps, guidance, *settings, progress=gr.Progress()):  # noqa: B008
        label = None if label == -1 else label
        images, bits, figures = workbench.generate(
            label, count, steps, guidance, Sampling(*settings), progress_bar(progress)
        )
        return images, bit_picture(bits[0]), figures_table(figures)

    run.click(
        generate,
        [label, count, steps, guidance, *sampling],
        [images, tokens, figures],
        api_name="generate",
        **model,
    )


def _heading(workbench: Workbench) -> str:
    side, tokens, bits = workbench.autoencoder.config.sample_size, workbench.num_tokens, workbench.bits_per_token
    return (
        "# FlowMo\n"
        f"An image becomes {tokens} tokens of {bits} bits, and these an image again. This tokenizer was made for "
        f"{side} × {side} pixels; images are cropped to the square in their middle and resized, or taken whole, in "
        "windows of that size."
    )


def _about_windows(workbench: Workbench) -> str:
    side, pixels = workbench.autoencoder.config.sample_size, f"{workbench.max_pixels:,}".replace(",", " ")
    return (
        f"Instead of the square: overlapping windows of {side} × {side} pixels, each with tokens of its own. An image "
        f"of more than {pixels} pixels is made smaller before. The picture of tokens, the steps and “Edit tokens” are "
        "of the square only."
    )


def _held_out() -> list[PIL.Image.Image]:
    images = load_images("emoji+birds")["test"].pick(NUM_SAMPLES)
    return [images[number] for number in range(len(images))]
