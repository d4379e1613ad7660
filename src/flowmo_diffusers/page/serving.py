"""The demo page as a small web server. Needs Gradio."""

import gradio as gr
from starlette.middleware import Middleware

from flowmo_diffusers.page.uploads import LimitedBody


# The little that a request has beside the file that it uploads.
OVERHEAD = 64 * 2**10

CSS = """
.pixels img { image-rendering: pixelated; }
.picture .image-container, #samples .grid-wrap, #generated .grid-wrap, #steps .image-container { padding-top: 32px; }
.picture .image-container > button, .picture .image-frame { width: 100%; }
.picture .image-frame { aspect-ratio: 1; }
.picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
#samples .grid-wrap, #generated .grid-wrap { height: auto; min-height: 0; max-height: none; }
#samples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); grid-auto-rows: auto; padding-top: 0; }
#samples .thumbnail-item { height: auto; aspect-ratio: 1; }
#generated .grid-container { padding-top: 0; }
#steps img { max-height: 480px; }
.prose table { width: 100%; }
.prose table, .prose tr, .prose th, .prose td { border: 0 !important; padding: 4px 8px; }
.prose th { font-weight: normal; color: var(--body-text-color-subdued); }
"""


def theme() -> gr.themes.Base:
    """Calm, and with the fonts of the reader's machine, so that none is fetched."""
    return gr.themes.Base(
        primary_hue="slate",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def serve(
    page: gr.Blocks,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_upload_mb: float = 10,
    block: bool = True,
) -> str:
    """
    Shows a page of [`build_page`] until it is interrupted, or in the background.

    Args:
        host: Address to listen at. The default is reached from this machine only; "0.0.0.0" is every address it has.
        port: Default: the first free one from 7860 on.
        max_upload_mb: Larger files are refused, in MB of 2^20 bytes.
        block: Until Ctrl-C; else it returns, and `page.close()` ends it.

    Returns:
        The page's address.

    Raises:
        ValueError: If `max_upload_mb` is not positive.
        OSError: If the port is taken.
    """
    if not max_upload_mb > 0:
        raise ValueError(f"max_upload_mb={max_upload_mb} must be positive")
    max_bytes = round(max_upload_mb * 2**20)
    _, address, _ = page.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        max_file_size=max_bytes,
        app_kwargs={"middleware": [Middleware(LimitedBody, max_bytes=max_bytes + OVERHEAD)]},
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        theme=theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    print(f"the demo page is at {address}; Ctrl-C ends it", flush=True)
    if block:
        page.block_thread()
    return address
