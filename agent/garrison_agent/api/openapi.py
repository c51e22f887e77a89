"""``GET /openapi.json``: the local API's own description, from the file that ``scripts/openapi.py`` writes."""

from __future__ import annotations

from pathlib import Path

from garrison_agent.api.asgi import Request, RouteBook


class Description:
    """The handler of ``/openapi.json``. The document is read for each request, and not kept."""

    def add_to(self, book: RouteBook) -> None:
        """Register the path."""
        book.add("GET", "/openapi.json", self.document)

    async def document(self, request: Request) -> None:
        """Answer with the OpenAPI 3.1 document."""
        text = Path(__file__).with_name("openapi.json").read_bytes()
        length = str(len(text)).encode()
        await request.start(200, [(b"content-type", b"application/json"), (b"content-length", length)])
        await request.end(text)
