"""The chat page: a handful of files, read once, so no request ever reaches the file system."""

from __future__ import annotations

from importlib.resources import files

from starlette.responses import Response

from ultrafuser.server.api_error import ApiError

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
}
INDEX = "index.html"


class Page:
    """The files of the page by name."""

    def __init__(self) -> None:
        folder = files("ultrafuser.server") / "page"
        self._files = {
            file.name: (file.read_bytes(), TYPES[suffix])
            for file in folder.iterdir()
            if file.is_file() and (suffix := "." + file.name.rpartition(".")[2]) in TYPES
        }

    def serve(self, name: str) -> Response:
        """One file, whole: ranges are not served. Raises ApiError: no such file."""
        if name not in self._files:
            raise ApiError(404, "there is no such page", code="not_found")
        content, media_type = self._files[name]
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})
