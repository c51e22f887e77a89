"""The model package manifest: one logical model, its builds (variants), and the test it must pass on a board.

Field names follow Foundry Local's catalog where it has them. The manifest is a TUF target
(``models/<name>/<version>/manifest.json``); files are content-addressed blobs named by it.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import Name, Sha256, Version
from garrison_protocol.states import DeviceType, Engine

CHUNK_SIZE = 256 * 1024
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_FILE_BYTES = 1 << 40
EMBEDDING_TASKS = frozenset({"feature-extraction", "text-embedding", "embeddings"})
"""A text model of such a task answers with vectors."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PackageRef(_Part):
    """One exact package: its name, version, and the SHA-256 of its manifest."""

    name: Name
    version: Version
    manifest_sha256: Sha256

    @property
    def id(self) -> str:
        """Foundry Local's form of a model id."""
        return f"{self.name}:{self.version}"


class ModelFile(_Part):
    """A file of a variant. ``chunks_sha256`` names the blob that lists its chunks (``pack_chunks``)."""

    path: str
    size: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: Sha256
    chunk_size: int = Field(default=CHUNK_SIZE, ge=4096, le=64 * 1024 * 1024)
    chunks_sha256: Sha256

    @field_validator("path")
    @classmethod
    def _plain_relative_path(cls, path: str) -> str:
        pure = PurePosixPath(path)
        plain = path == str(pure) and not pure.is_absolute() and ".." not in pure.parts and path != "."
        if not plain or len(path) > 255 or "\\" in path or any(ord(letter) < 32 for letter in path):
            raise ValueError("a plain relative path is needed")
        return path


class Requirements(_Part):
    """What a board must have before a variant is downloaded. Empty lists allow anything."""

    architectures: tuple[str, ...] = ()
    memory_mb: int = Field(default=0, ge=0)
    disk_mb: int = Field(default=0, ge=0)
    cpu_features: tuple[str, ...] = ()


class RuntimeSpec(_Part):
    """Which engine runs a variant, and on what."""

    engine: Engine
    device_type: DeviceType = DeviceType.CPU
    execution_provider: str = "CPUExecutionProvider"


class Variant(_Part):
    """One build of the model. ``files[0]`` is what the engine opens."""

    name: Name
    runtime: RuntimeSpec
    quantization: str = ""
    files: tuple[ModelFile, ...] = Field(min_length=1, max_length=256)
    requirements: Requirements = Requirements()
    memory_mb: int = Field(ge=0)
    """Estimated resident memory of the worker, in MiB."""
    model_settings: dict[str, str | int | bool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_path_twice(self) -> Variant:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("two files share one path")
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


class ChatMessage(_Part):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChoiceCase(_Part):
    """Passes when ``choices[expected]`` has the highest mean log-probability per token after ``prompt``."""

    kind: Literal["choice"] = "choice"
    id: Name
    prompt: str
    choices: tuple[str, ...] = Field(min_length=2, max_length=16)
    expected: int = Field(ge=0, le=15)

    @model_validator(mode="after")
    def _expected_is_a_choice(self) -> ChoiceCase:
        if self.expected >= len(self.choices):
            raise ValueError("expected names no choice")
        return self


class GenerateCase(_Part):
    """Passes when the greedy answer to ``messages`` matches ``pattern`` (``re.search``) within ``max_tokens``."""

    kind: Literal["generate"] = "generate"
    id: Name
    messages: tuple[ChatMessage, ...] = Field(min_length=1, max_length=32)
    pattern: str = Field(max_length=500)
    max_tokens: int = Field(default=64, ge=1, le=1024)


class Tensor(_Part):
    """An input of the Open Inference Protocol: ``data`` is flat, in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: tuple[float | int | bool | str, ...]


class LabelCase(_Part):
    """Passes when ``output`` has its maximum at ``expected_index``, at ``min_score`` or more."""

    kind: Literal["label"] = "label"
    id: Name
    inputs: tuple[Tensor, ...] = Field(min_length=1, max_length=16)
    output: str
    expected_index: int = Field(ge=0)
    min_score: float = 0.0


class SimilarityCase(_Part):
    """Passes when the embedding of ``anchor`` is more similar to that of ``closer`` than to that of ``farther``.

    Similar is the cosine; it must be higher by more than ``margin``.
    """

    kind: Literal["similarity"] = "similarity"
    id: Name
    anchor: str = Field(min_length=1)
    closer: str = Field(min_length=1)
    farther: str = Field(min_length=1)
    margin: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)


EvaluationCase = Annotated[ChoiceCase | GenerateCase | LabelCase | SimilarityCase, Field(discriminator="kind")]


class Evaluation(_Part):
    """The gate: a board puts the model into service only if it reaches ``min_accuracy`` there."""

    cases: tuple[EvaluationCase, ...] = Field(min_length=1, max_length=500)
    min_accuracy: float = Field(ge=0, le=1)

    @property
    def cases_sha256(self) -> str:
        """Name the case set, so that a result can be compared with an earlier one over the same cases."""
        return sha256_hex(b"\n".join(case.model_dump_json().encode() for case in self.cases))


class ModelSignature(_Part):
    """An OpenSSF model-signing bundle (v1.0, key mode) that was verified when the package was packed.

    The bundle itself is the blob ``bundle_sha256``; ``public_key_pem`` is the P-256, P-384, or P-521 key it verifies
    with, ``key_sha256`` that of the key's SubjectPublicKeyInfo (DER).
    """

    format: Literal["openssf-model-signing/v1.0"] = "openssf-model-signing/v1.0"
    bundle_sha256: Sha256
    bundle_size: int = Field(ge=1, le=16 * 1024 * 1024)
    public_key_pem: str = Field(max_length=4096)
    key_sha256: Sha256


class Provenance(_Part):
    """Where the model comes from; evidence, not authorisation."""

    source: str = ""
    source_version: str = ""
    base_model: str = ""
    signature: ModelSignature | None = None


class Lease(_Part):
    """How long a board may serve the model without news of the registry, and what happens then."""

    days: float = Field(gt=0, le=3650, allow_inf_nan=False)
    """Since the board last verified fresh metadata, by the later of its clock and its time floor."""
    on_expiry: Literal["warn", "stop"] = "warn"
    """``warn`` serves on and says so; ``stop`` unloads the model until fresh metadata is verified again."""


class Manifest(_Part):
    """A model package. ``id`` is ``<name>:<version>``."""

    schema_version: str = "1.0"
    name: Name
    version: Version
    alias: Name
    display_name: str
    publisher: str
    license: str
    """SPDX identifier."""
    license_description: str = ""
    task: str
    created_at: str
    parameter_count: int = Field(default=0, ge=0)
    context_length: int = Field(default=0, ge=0)
    max_output_tokens: int = Field(default=0, ge=0)
    supports_tool_calling: bool = False
    input_modalities: tuple[str, ...] = ("text",)
    output_modalities: tuple[str, ...] = ("text",)
    capabilities: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = Field(min_length=1, max_length=64)
    evaluation: Evaluation
    provenance: Provenance = Provenance()
    lease: Lease | None = None
    """None: no limit; metadata expiry never stops a running model."""

    @model_validator(mode="after")
    def _no_variant_twice(self) -> Manifest:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError("two variants share one name")
        if not self.schema_version.startswith("1."):
            raise ValueError(f"schema {self.schema_version} needs a newer Garrison")
        return self

    @property
    def id(self) -> str:
        """Foundry Local's form of a model id."""
        return f"{self.name}:{self.version}"

    @property
    def parameter_class(self) -> str:
        """micro 100M-1.4B, small 1.5B-13.9B, medium 14B-30B; "" outside or unknown."""
        for name, low, high in (("micro", 0.1e9, 1.5e9), ("small", 1.5e9, 14e9), ("medium", 14e9, 30.5e9)):
            if low <= self.parameter_count < high:
                return name
        return ""

    def makes_embeddings(self, variant: Variant) -> bool:
        """Tell whether ``variant`` answers with vectors instead of text."""
        return self.task in EMBEDDING_TASKS or variant.model_settings.get("embedding") is True

    def variant(self, name: str) -> Variant | None:
        """Return the variant called ``name``, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)


def target_path(name: str, version: str) -> str:
    """Return the TUF target path of a package's manifest."""
    return f"models/{name}/{version}/manifest.json"


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest in ``data``.

    Raises:
        InvalidError: ``manifest.too_large`` or ``manifest.malformed``.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidError("manifest.too_large", f"a manifest of {len(data)} bytes", size=len(data))
    try:
        return Manifest.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise InvalidError("manifest.malformed", f"the manifest is not valid: {_first(error)}") from error


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        one = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}"
    return str(error)


def pack_chunks(digests: list[bytes]) -> bytes:
    """Return the chunk-list blob of a file: the SHA-256 of each of its chunks, 32 bytes each, in order."""
    return b"".join(digests)


def unpack_chunks(data: bytes, file: ModelFile) -> list[bytes]:
    """Return the chunk digests in ``data``, whose digest the caller has checked.

    Raises:
        InvalidError: ``manifest.chunks_malformed`` if they do not cover the file.
    """
    count = -(-file.size // file.chunk_size)
    if len(data) != 32 * count:
        raise InvalidError(
            "manifest.chunks_malformed", f"{file.path}: a chunk list of {len(data)} bytes for {count} chunks"
        )
    return [data[at : at + 32] for at in range(0, len(data), 32)]
