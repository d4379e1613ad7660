"""Shows the demo page: reconstruct images, edit their tokens, generate images."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from flowmo_diffusers import FlowMoGenerationPipeline, FlowMoPipeline


STARTER = "starter"
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of [`run`]."""
    parser.add_argument(
        "--model", default=STARTER, help="folder or Hub id of a tokenizer (default: the embedded starter)"
    )
    parser.add_argument(
        "--generator",
        help="folder or Hub id of a generator of its tokens (default: the embedded one for the starter, else none)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--max_upload_mb", type=float, default=10, help="larger images are refused (default: 10)")
    parser.add_argument("--concurrency", type=int, default=1, help="calls computed at once; others wait (default: 1)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def run(args: argparse.Namespace) -> int:
    """
    Shows the page until Ctrl-C.

    Raises:
        ValueError: If Gradio is missing, or a model or an option does not fit.
        OSError: If there is no such model, or the port is taken.
    """
    try:
        from flowmo_diffusers.page.layout import build_page
        from flowmo_diffusers.page.serving import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the demo page needs Gradio: pip install 'flowmo_diffusers[demo]'") from error
    serve(
        build_page(*load_pipelines(args.model, args.generator, args.device, args.dtype), args.concurrency),
        args.host,
        args.port,
        args.max_upload_mb,
    )
    return 0


def load_pipelines(
    model: str, generator: str | None = None, device: str | None = None, dtype: str = "float32"
) -> "tuple[FlowMoPipeline, FlowMoGenerationPipeline | None]":
    """
    A [`FlowMoPipeline`] and, on the same tokenizer, a [`FlowMoGenerationPipeline`] or `None`.

    Args:
        model: A folder, a Hub id, or "starter" for the embedded one.
        generator: Likewise; by default the embedded one for the starter, else none.
        device: Default: cuda where there is one, else cpu.
        dtype: Of the weights; one of DTYPES.

    Raises:
        ValueError: As `from_pretrained`, or if the generator is of other tokens, or there is no such device.
        OSError: If there is no such pipeline.
    """
    import torch

    from flowmo_diffusers import FlowMoGenerationPipeline, FlowMoPipeline
    from flowmo_diffusers.assets import starter, starter_generator

    if generator is None and model == STARTER:
        generator = starter_generator()
    dtype, device = getattr(torch, dtype), device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device={device!r} is not to be had: {error}") from error
    tokenizer = starter() if model == STARTER else model
    pipeline = FlowMoPipeline.from_pretrained(tokenizer, dtype=dtype).to(device)
    if generator is None:
        return pipeline, None
    generation = FlowMoGenerationPipeline.from_pretrained(generator, dtype=dtype, **pipeline.components)
    return pipeline, generation.to(device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flowmo_diffusers.page", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
