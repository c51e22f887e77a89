"""What boards fetch from the registry: metadata and small targets for anyone, model files for enrolled boards.

Metadata and targets prove themselves by signatures and digests and hold no secrets; a board needs some of them before
it is enrolled. Everything but ``timestamp.json`` never changes under its name, so caches may keep it.
"""

from __future__ import annotations

import re

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from garrison_controller.api.devices import DeviceSession, TheController
from garrison_controller.registry.store import TIMESTAMP
from garrison_protocol.errors import NotFoundError
from garrison_protocol.ids import SHA256_PATTERN

router = APIRouter(prefix="/device/v1", tags=["boards"])

_FOR_EVER = "public, max-age=31536000, immutable"
_FOR_EVER_PRIVATE = "private, max-age=31536000, immutable"
_NEVER = "no-cache"


class BlobResponse(FileResponse):
    """A file, whole or in part (``Range``), in pieces large enough that sending costs more than switching threads."""

    chunk_size = 1024 * 1024


@router.get("/metadata/{name}", response_class=Response)
def get_metadata(controller: TheController, name: str) -> Response:
    """TUF metadata by its file name; 404 ends a client's walk through the roots."""
    path = controller.registry.store.metadata_path(name)
    headers = {"Cache-Control": _NEVER if name == TIMESTAMP else _FOR_EVER}
    return Response(path.read_bytes(), media_type="application/json", headers=headers)


@router.get("/targets/{path:path}", response_class=Response)
def get_target(controller: TheController, path: str) -> Response:
    """A small target (a manifest, fleet.json): ``<digest>/<path>``, or ``<folder>/<digest>.<name>`` as TUF has it."""
    digest, _, rest = path.partition("/")
    if re.fullmatch(SHA256_PATTERN, digest) is None:
        folder, slash, name = path.rpartition("/")
        digest, _, name = name.partition(".")
        rest = f"{folder}{slash}{name}"
    found = controller.registry.store.target_path(digest, rest)
    return Response(found.read_bytes(), media_type="application/json", headers={"Cache-Control": _FOR_EVER})


@router.get("/blobs/{sha256}", response_class=BlobResponse)
def get_blob(controller: TheController, _device: DeviceSession, sha256: str) -> BlobResponse:
    """A model file or chunk list by digest; ``Range`` gives a part of it (206)."""
    return _blob(controller, sha256)


@router.head("/blobs/{sha256}", response_class=BlobResponse)
def head_blob(controller: TheController, _device: DeviceSession, sha256: str) -> BlobResponse:
    """Whether a model file is here, and its size."""
    return _blob(controller, sha256)


def _blob(controller: TheController, sha256: str) -> BlobResponse:
    blobs = controller.registry.blobs
    if blobs.size(sha256) is None:
        raise NotFoundError("blob.not_found", f"no blob {sha256} is here", hint="it may belong to no published model")
    headers = {"ETag": f'"{sha256}"', "Cache-Control": _FOR_EVER_PRIVATE}
    return BlobResponse(blobs.path(sha256), media_type="application/octet-stream", headers=headers)
