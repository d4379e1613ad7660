"""What the demo page takes from outside, and what not. Needs Gradio."""

from gradio.utils import get_upload_folder, is_in_or_equal
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def uploaded(path: str | None) -> str:
    """
    The path of an image that its user uploaded or chose. Gradio itself opens any path of this machine that a request
    names.

    Raises:
        ValueError: If there is none, or it is no file that was uploaded to this page, or made by it.
    """
    if path is None:
        raise ValueError("there is no image: upload one, or choose a sample")
    if not is_in_or_equal(path, get_upload_folder()):
        raise ValueError("an image must be a file that was uploaded to this page")
    return path


class LimitedBody:
    """
    Refuses requests that are too long, before they are read. Gradio limits uploaded files only, but takes images
    inside of JSON as well.

    Args:
        app: That gets the others.
        max_bytes: Of a request's body, whose length must be told.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if "transfer-encoding" in headers or int(headers.get("content-length", 0)) > self.max_bytes:
            refusal = PlainTextResponse(f"this page takes at most {self.max_bytes} bytes at a time", status_code=413)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)
