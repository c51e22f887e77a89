"""The registry for operators: models, versions in force, uploads of blobs and of signed metadata."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from garrison_controller.access.rules import Permission
from garrison_controller.api.auth import Caller, require
from garrison_controller.api.devices import TheController
from garrison_controller.registry import queries
from garrison_controller.registry.rules import MAX_ROOTS_PER_UPLOAD, Upload
from garrison_controller.registry.tables import Package
from garrison_controller.signing.families import MAX_FAMILIES
from garrison_protocol.errors import InvalidError
from garrison_protocol.fleet import Fleet
from garrison_protocol.manifest import parse_manifest

router = APIRouter(prefix="/api/v1", tags=["registry"])
Reader = Annotated[Caller, Depends(require(Permission.MODEL_READ, anywhere=True))]
Publisher = Annotated[Caller, Depends(require(Permission.MODEL_PUBLISH))]

MAX_UPLOAD_BYTES = 32 * 1024 * 1024
WRITE_BYTES = 1024 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")


class MetadataUpload(BaseModel):
    """New roots in order, new targets metadata, families' by role, and new targets' bytes by path; all in base64."""

    model_config = ConfigDict(extra="forbid")

    roots: list[str] = Field(default_factory=list, max_length=MAX_ROOTS_PER_UPLOAD)
    targets: str | None = None
    families: dict[str, str] = Field(default_factory=dict, max_length=MAX_FAMILIES)
    files: dict[str, str] = Field(default_factory=dict)


@router.get("/registry")
def get_registry(controller: TheController, _caller: Reader) -> dict[str, Any]:
    """Versions and expiries of the four roles and the families, floors, and the digest that boards pin."""
    return controller.registry.status()


@router.post("/registry/metadata", openapi_extra={"requestBody": {"content": {"application/json": {"schema": {}}}}})
async def post_metadata(controller: TheController, caller: Publisher, request: Request) -> dict[str, Any]:
    """Publish what release signers have signed; sending the same again changes nothing."""
    # Read by hand: FastAPI would read the body, of any length, before it asks who calls.
    upload = parse_upload(await _body(request))
    publication = await run_in_threadpool(
        controller.registry.accept_metadata, upload, caller.principal_id, caller.name, caller.at
    )
    return publication.to_dict()


@router.head("/registry/blobs/{sha256}")
def head_blob(controller: TheController, _caller: Publisher, sha256: str) -> Response:
    """How much of a blob is here: ``X-Offset`` bytes, and ``X-Complete``; 404 for nothing."""
    blobs = controller.registry.blobs
    size = blobs.size(sha256)
    kept = blobs.received(sha256) if size is None else size
    if kept is None:
        return Response(status_code=404)
    return Response(headers={"X-Offset": str(kept), "X-Complete": "false" if size is None else "true"})


@router.put("/registry/blobs/{sha256}")
async def put_blob(controller: TheController, _caller: Publisher, sha256: str, request: Request) -> dict[str, Any]:
    """Receive a blob or the rest of one (``Content-Range: bytes 5-9/10``); complete once its digest was checked."""
    blobs = controller.registry.blobs
    offset, total = _place(request)
    size = await run_in_threadpool(blobs.size, sha256)
    if size is not None:
        return {"sha256": sha256, "offset": size, "complete": True}
    incoming = await run_in_threadpool(blobs.begin, sha256, offset, total)
    try:
        waiting = bytearray()
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= WRITE_BYTES:
                await run_in_threadpool(incoming.write, bytes(waiting))
                waiting.clear()
        await run_in_threadpool(incoming.write, bytes(waiting))
        complete = await run_in_threadpool(incoming.finish)
    except ClientDisconnect:  # nobody is there to answer; what came stays, and the next upload begins behind it
        complete = False
    finally:
        incoming.close()
    return {"sha256": sha256, "offset": incoming.offset, "complete": complete}


@router.get("/models")
def get_models(controller: TheController, _caller: Reader) -> dict[str, Any]:
    """Every published version of every model."""
    with controller.database.reading() as session:
        found = queries.packages(session)
        fleet = controller.registry.get_fleet() if found else None
        return {"models": [_summary(package, fleet) for package in found]}


@router.get("/models/{name}")
def get_model(controller: TheController, _caller: Reader, name: str) -> dict[str, Any]:
    """Every published version of one model."""
    with controller.database.reading() as session:
        found = queries.packages(session, name)
        fleet = controller.registry.get_fleet() if found else None
        return {"models": [_summary(package, fleet) for package in found]}


@router.get("/models/{name}/versions/{version}")
def get_version(controller: TheController, _caller: Reader, name: str, version: str) -> dict[str, Any]:
    """One version with its manifest."""
    with controller.database.reading() as session:
        package = queries.get_package(session, name, version)
        summary = _summary(package, controller.registry.get_fleet())
        return summary | {"manifest": json.loads(package.manifest)}


def _summary(package: Package, fleet: Fleet | None) -> dict[str, Any]:
    manifest = parse_manifest(package.manifest.encode())
    return {
        "id": manifest.id,
        "name": package.name,
        "version": package.version,
        "alias": package.alias,
        "display_name": manifest.display_name,
        "publisher": manifest.publisher,
        "license": manifest.license,
        "task": manifest.task,
        "size_bytes": package.size_bytes,
        "variants": [variant.name for variant in manifest.variants],
        "manifest_sha256": package.manifest_sha256,
        "published_at": package.published_at.isoformat(),
        "published_by": package.published_by_name,
        "published_by_id": package.published_by,
        "below_floor": fleet is not None and fleet.below_floor(package.name, package.version),
    }


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_UPLOAD_BYTES:
            raise InvalidError(
                "registry.metadata_too_large",
                f"an upload of more than {MAX_UPLOAD_BYTES} bytes",
                hint="publish fewer packages at once",
            )
    return bytes(body)


def parse_upload(body: bytes) -> Upload:
    """Return the upload in a request's ``body``.

    Raises:
        InvalidError: ``registry.upload_malformed``.
    """
    try:
        parsed = MetadataUpload.model_validate_json(body)
        return Upload(
            tuple(base64.b64decode(root, validate=True) for root in parsed.roots),
            None if parsed.targets is None else base64.b64decode(parsed.targets, validate=True),
            {path: base64.b64decode(data, validate=True) for path, data in parsed.files.items()},
            {role: base64.b64decode(data, validate=True) for role, data in parsed.families.items()},
        )
    except (ValidationError, binascii.Error, ValueError) as error:
        raise InvalidError(
            "registry.upload_malformed", "the upload is not of this API's form", hint="use `garrison registry push`"
        ) from error


def _place(request: Request) -> tuple[int, int]:
    """Return offset and total size: from ``Content-Range``, or else a whole blob of ``Content-Length`` bytes."""
    header = request.headers.get("content-range")
    if header is None:
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise InvalidError("blob.range_malformed", "the upload states no length", hint="send Content-Length")
        return 0, int(length)
    match = _CONTENT_RANGE.fullmatch(header)
    if match is None or int(match[1]) > int(match[2]) or int(match[2]) >= int(match[3]):
        raise InvalidError("blob.range_malformed", f"Content-Range {header[:80]!r}", hint="bytes FIRST-LAST/TOTAL")
    return int(match[1]), int(match[3])
