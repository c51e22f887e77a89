"""What the API asks of the owner thread, and the JSON-able answers.

Each command is posted as an event; its ``concurrent.futures.Future`` is set by the owner, once, to the result named
in the command's docstring or to a ``GarrisonError``. The API never cancels a command's future: a client that went
away leaves the answer unread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NotRequired, TypeAlias, TypedDict

from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol.errors import NotFoundError
from garrison_protocol.manifest import Manifest, Variant


class RegistryStatus(TypedDict):
    """Which registry metadata the board trusts: ``Freshness`` and the TUF versions."""

    freshness: str
    root: int
    timestamp: int
    snapshot: int
    targets: int


class DesiredStatus(TypedDict):
    """The desired state that the board applied last; counter 0 and None before the first."""

    counter: int
    sha256: str | None


class AliasStatus(TypedDict):
    """One alias: its newest deployment, and what serves. ``package`` and ``serving`` are ``<name>:<version>``."""

    alias: str
    package: str
    version: str
    state: str
    loaded: bool
    serving: str | None
    serving_since: int | None
    """Unix seconds since when the serving package has been in service."""
    rollout: str
    variant: str | None
    error_code: str | None
    error_message: str | None
    progress_bytes: int
    total_bytes: int
    endpoint: str | None
    """Path under which it answers: ``/v1`` for text, ``/v2/models/<alias>`` for tensors; None: nothing serves."""
    worker: str
    """Where the serving worker stands: ``off``, ``starting``, ``ready``, ``backoff``, ``repairing``, or ``failed``."""
    worker_failure: str | None
    """Why it last ended by itself, code first; None: it has not since this package serves."""
    memory_mb: int | None
    """What the serving worker has taken at most, or is expected to; None: it is not in memory."""
    load_ms: int | None
    """How long it took to load."""


class StreamStatus(TypedDict):
    """One upward stream: newest row, last row covered by a signed receipt, and rows not covered."""

    epoch: str
    last: int
    acked: int
    pending: int


class CacheStatus(TypedDict):
    """Disk space of the model store, in MiB."""

    used_mb: int
    free_mb: int


class CertificateStatus(TypedDict):
    """The TLS certificate, in Unix seconds; None: there is none that can be used. ``failed`` counts renewals."""

    not_before: int | None
    not_after: int | None
    renew_at: int | None
    ended: bool
    """By the later of the board's clock and its floor."""
    failed: int
    error_code: str | None
    """Of the last renewal, if it failed."""
    error_message: str | None


class KeyView(TypedDict):
    """A key of ``fleet.json`` that this board listens to. Times are Unix seconds."""

    purpose: str
    fingerprint: str
    not_before: int
    not_after: int
    ended: bool


class LeaseView(TypedDict):
    """How long a serving model may do without news of the registry (``manifest.lease``). Unix seconds."""

    alias: str
    model: str
    ends_at: int
    on_expiry: str
    ended: bool


class TrustView(TypedDict):
    """What this board trusts, and what it would refuse now. Times are Unix seconds."""

    clock: int
    floor: int
    floor_source: str
    judged_at: int
    """The later of both, by which everything that ends is judged."""
    anchored: bool
    """The controller has told the time since the agent started."""
    fresh_at: int
    """When metadata was last verified as fresh; 0: never."""
    ends: dict[str, int]
    """When each role of the metadata ends."""
    keys: list[KeyView]
    leases: list[LeaseView]
    trusts: list[str]
    refuses: list[str]
    """Sentences, each with its reason; empty: nothing that is signed, newer, and meant for this board."""


class UpstreamView(TypedDict):
    """A server that runs already, offered under an alias of the configuration; nothing of it is signed or verified.

    ``state``: ok, unreachable, key_refused, key_unreadable, bad_answer, broke_off, model_unknown, or shadowed.
    """

    alias: str
    url: str
    model: str
    state: str
    detail: str


class StatusView(TypedDict):
    """Everything ``garrison-agent status`` shows. ``started_at`` is Unix seconds; ``health`` holds integers only."""

    device: str
    version: str
    started_at: int
    pid: int
    connected: bool
    broker: str
    """``host:port``; empty on a board that is not enrolled."""
    broker_error: str
    """Why the last try or connection ended; empty while connected, and before the first end."""
    certificate: CertificateStatus
    registry: RegistryStatus
    trust: TrustView
    desired: DesiredStatus
    aliases: list[AliasStatus]
    outbox: dict[str, StreamStatus]
    health: dict[str, int]
    """The newest telemetry facts by name (``rss_mb``, ``mem_used_mb``, ``cpu_permille``, ...)."""
    refused: dict[str, int]
    """Messages refused, by error code."""
    cache: CacheStatus
    upstreams: NotRequired[list[UpstreamView]]
    """Where the configuration names any."""


class ModelView(TypedDict):
    """A package that this board holds or is fetching; names follow Foundry Local's catalog."""

    id: str
    name: str
    version: str
    alias: str
    display_name: str
    publisher: str
    license: str
    license_description: str
    task: str
    engine: str
    device_type: str
    execution_provider: str
    variant: str
    quantization: str
    file_size_mb: float
    memory_mb: int
    parameter_count: int
    context_length: int
    max_output_tokens: int
    supports_tool_calling: bool
    input_modalities: list[str]
    output_modalities: list[str]
    capabilities: list[str]
    evaluation_cases: int
    min_accuracy: float
    manifest_sha256: str
    state: str
    serving: bool
    loaded: bool


class VariantView(TypedDict):
    """One build of a package, seen from this board. ``reasons`` is everything that is in its way; empty: it fits."""

    name: str
    engine: str
    device_type: str
    execution_provider: str
    quantization: str
    memory_mb: int
    size_bytes: int
    missing_bytes: int
    """Of its files, not on the disk yet."""
    fits: bool
    chosen: bool
    """It is the one that this board takes."""
    reasons: list[str]


class VariantsView(TypedDict):
    """All builds of a package in this board's order of preference, and what the board has to offer."""

    id: str
    alias: str
    architecture: str
    cpu_features: list[str]
    engines: list[str]
    memory_mb: int
    memory_budget_mb: int
    disk_free_mb: int
    """Beside what is kept in reserve."""
    variants: list[VariantView]


class LoadResult(TypedDict):
    """The model is loaded now; ``outcome`` tells whether this call did it."""

    id: str
    alias: str
    outcome: Literal["loaded", "already_loaded"]


class UnloadResult(TypedDict):
    """The model's worker has ended; ``outcome`` tells whether this call did it."""

    id: str
    alias: str
    outcome: Literal["unloaded", "not_loaded"]


class LoadedView(TypedDict):
    """A model in memory. ``size_bytes`` is what its worker takes, or is expected to take until that was measured."""

    alias: str
    id: str
    size_bytes: int
    loaded_since: int
    """Unix seconds."""
    expires_at: int | None
    """Unix seconds at which it leaves memory unless it is used before; None: it stays."""
    pinned: bool
    active: int
    """Requests in flight."""


class RunningView(LoadedView):
    """A model in memory, and how fast its answers were lately (tokens a second; None: not measured)."""

    tokens_per_s: float | None


class CacheEntry(TypedDict):
    """One installed package. ``state`` is ``serving``, ``loaded``, ``previous``, ``installing``, or ``unused``."""

    id: str
    variant: str
    size_bytes: int
    state: str
    in_use: bool
    """In use: ``cache remove`` refuses it."""
    path: str
    """The folder that holds the package's manifest."""


class CacheView(TypedDict):
    """The model store. ``location`` is its root folder."""

    location: str
    used_mb: int
    free_mb: int
    entries: list[CacheEntry]


class RemoveResult(TypedDict):
    """The package is gone; files that other packages share stay and are not counted."""

    id: str
    freed_bytes: int


class AppView(TypedDict):
    """An application that shares the local API. A limit of 0 is none; no ``models``: all of them."""

    name: str
    models: list[str]
    requests_per_min: int
    tokens_per_min: int
    concurrent: int
    admin: bool
    created_at: int
    """Unix seconds."""
    requests: int
    """Answered or refused by a model since the agent started."""
    tokens: int
    """Of those requests' prompts and answers."""


class AddedApp(AppView):
    """A new application with its key, which cannot be read again."""

    key: str


class ExportFile(TypedDict):
    """One file for ``home/`` on a stick; ``data`` in base64."""

    path: str
    data: str


class ExportPage(TypedDict):
    """Some of the files that this board sends home, and the cursor of the next page; None: that was all."""

    device: str
    files: list[ExportFile]
    next: str | None


class Check(TypedDict):
    """One finding of ``doctor``. ``fix`` says what to do; empty when the outcome is ``ok``."""

    name: str
    outcome: Literal["ok", "warn", "fail"]
    detail: str
    fix: str


@dataclass(frozen=True)
class GetStatus:
    """Answered with a ``StatusView``."""


@dataclass(frozen=True)
class ListModels:
    """Answered with ``list[ModelView]``, every package that is desired, serving, or installed."""


@dataclass(frozen=True)
class GetVariants:
    """Answered with a ``VariantsView``. Errors: ``model.unknown`` (NotFoundError)."""

    name: str


@dataclass(frozen=True)
class CheckCache:
    """Answered with an ``api.cache_check.CacheCheck`` under way; ``name`` None: every package.

    Errors: ``model.unknown`` (NotFoundError), ``cache.check_busy`` (ConflictError).
    """

    name: str | None
    repair: bool


@dataclass(frozen=True)
class LoadModel:
    """Answered with a ``LoadResult`` once the worker is ready to serve and the route table shows its socket.

    ``name`` is an alias, ``<name>:<version>``, or a package name. Any number may wait for one load. Errors:
    ``model.unknown`` (NotFoundError), ``model.not_installed`` (ConflictError), ``memory.*`` (InsufficientError), and
    what loading failed with. ``keep_alive_s`` as in ``SetKeepAlive``; None leaves it as it is. ``waits``: whoever asks
    will ask again while others use the memory, so those get no new requests for a moment.
    """

    name: str
    keep_alive_s: float | None = None
    waits: bool = False


@dataclass(frozen=True)
class SetKeepAlive:
    """Answered with None: how long the model stays in memory after its last use, until it is unloaded or set anew.

    Seconds; 0 unloads it as soon as no request is in flight, a negative number never by itself. ``name`` as in
    ``LoadModel``; a model that is not loaded keeps it for its next load. Errors: ``model.unknown``.
    """

    name: str
    keep_alive_s: float


@dataclass(frozen=True)
class ListLoaded:
    """Answered with ``list[RunningView]``: the models in memory that are ready to serve."""


@dataclass(frozen=True)
class UnloadModel:
    """Answered with an ``UnloadResult`` once the worker has finished its answers and ended.

    Errors: ``model.unknown``, ``model.busy``.
    """

    name: str


@dataclass(frozen=True)
class RecordRequest:
    """Answered with None: a request was answered, or not, by an upstream, which tells the owner nothing by itself."""

    alias: str
    model: str
    record: RequestRecord


@dataclass(frozen=True)
class ListCache:
    """Answered with a ``CacheView``."""


@dataclass(frozen=True)
class RemoveFromCache:
    """Answered with a ``RemoveResult``. Errors: ``model.unknown`` (NotFoundError), ``cache.in_use`` (ConflictError)."""

    name: str


@dataclass(frozen=True)
class AddApp:
    """Answered with an ``AddedApp``. Errors: ``app.name_malformed``, ``app.limit_out_of_range``, ``app.exists``,
    ``app.too_many``."""

    name: str
    models: tuple[str, ...] = ()
    requests_per_min: int = 0
    tokens_per_min: int = 0
    concurrent: int = 0
    admin: bool = False


@dataclass(frozen=True)
class RemoveApp:
    """Answered with the ``AppView`` of what was removed. Errors: ``app.unknown`` (NotFoundError)."""

    name: str


@dataclass(frozen=True)
class ListApps:
    """Answered with ``list[AppView]``."""


@dataclass(frozen=True)
class ShowApp:
    """Answered with an ``AppView``. Errors: ``app.unknown`` (NotFoundError)."""

    name: str


@dataclass(frozen=True)
class GetMetrics:
    """Answered with ``list[core.exposition.Family]``: what the agent measured since it started."""


@dataclass(frozen=True)
class BeginImport:
    """Answered with an ``api.carrier.Carrier``. Errors: ``bundle.busy`` (ConflictError)."""


@dataclass(frozen=True)
class GetExport:
    """Answered with an ``ExportPage``; an empty cursor begins. Errors: ``bundle.cursor_malformed``."""

    cursor: str


@dataclass(frozen=True)
class Doctor:
    """Answered with ``list[Check]``: what only the running agent knows."""


Command: TypeAlias = (
    GetStatus
    | ListModels
    | GetVariants
    | ListLoaded
    | LoadModel
    | SetKeepAlive
    | UnloadModel
    | RecordRequest
    | ListCache
    | CheckCache
    | RemoveFromCache
    | AddApp
    | RemoveApp
    | ListApps
    | ShowApp
    | GetMetrics
    | BeginImport
    | GetExport
    | Doctor
)

Post: TypeAlias = Callable[[Command], "Future[object]"]
"""Hands a command to the owner thread; callable from any thread, never blocks."""


def model_view(
    manifest: Manifest, variant: Variant, *, alias: str, manifest_sha256: str, state: str, serving: bool, loaded: bool
) -> ModelView:
    """Return the view of ``manifest`` as built in ``variant``. ``state`` is a deployment state or ``INSTALLED``."""
    return ModelView(
        id=manifest.id,
        name=manifest.name,
        version=manifest.version,
        alias=alias,
        display_name=manifest.display_name,
        publisher=manifest.publisher,
        license=manifest.license,
        license_description=manifest.license_description,
        task=manifest.task,
        engine=variant.runtime.engine.value,
        device_type=variant.runtime.device_type.value,
        execution_provider=variant.runtime.execution_provider,
        variant=variant.name,
        quantization=variant.quantization,
        file_size_mb=round(variant.size_bytes / (1024 * 1024), 1),
        memory_mb=variant.memory_mb,
        parameter_count=manifest.parameter_count,
        context_length=manifest.context_length,
        max_output_tokens=manifest.max_output_tokens,
        supports_tool_calling=manifest.supports_tool_calling,
        input_modalities=list(manifest.input_modalities),
        output_modalities=list(manifest.output_modalities),
        capabilities=list(manifest.capabilities),
        evaluation_cases=len(manifest.evaluation.cases),
        min_accuracy=manifest.evaluation.min_accuracy,
        manifest_sha256=manifest_sha256,
        state=state,
        serving=serving,
        loaded=loaded,
    )


def unknown_model(name: str, known: list[str]) -> NotFoundError:
    """Return the error for a name that no model answers to; it lists the names that would."""
    listed = ", ".join(sorted(set(known)))
    return NotFoundError(
        "model.unknown",
        f"no model is called {name!r}",
        hint=f"known here: {listed}" if listed else "no model is installed here yet; see: garrison-agent status",
        name=name,
    )
