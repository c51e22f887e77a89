"""How models are run on this board: the configuration's defaults, where their manifests do not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from garrison_agent.config import AgentConfig, RuntimeConfig
from garrison_agent.owner.estimates import Context, Estimates
from garrison_agent.owner.shelf import Shelf
from garrison_agent.runtimes.cores import read_cores, read_quota, worker_threads
from garrison_agent.runtimes.spec import Limits, WorkerFile, WorkerSpec
from garrison_protocol.errors import InvalidError
from garrison_protocol.manifest import Manifest, PackageRef, Variant
from garrison_protocol.states import Engine


def context_of(config: AgentConfig) -> Context:
    """Return how to tell the context that a worker will hold, as ``planner`` asks for it; 0: it holds none."""
    runtime = config.runtime

    def context(manifest: Manifest, variant: Variant) -> int:
        if variant.runtime.engine is Engine.ONNXRUNTIME:
            return 0
        parallel = _number(variant.model_settings.get("parallel"), runtime.parallel)
        return _context_length(runtime, manifest, variant) * parallel

    return context


def _context_length(runtime: RuntimeConfig, manifest: Manifest, variant: Variant) -> int:
    """Return the tokens of one sequence: no more than the model was made for."""
    length = _number(variant.model_settings.get("context_length"), runtime.context_length)
    return min(length, manifest.context_length) if manifest.context_length else length


def _number(value: object, default: int) -> int:
    return int(value) if isinstance(value, int) else default


def planner(
    config: AgentConfig, shelf: Shelf, estimates: Estimates, threads: int
) -> Callable[[PackageRef, str, Path], WorkerSpec]:
    """Return how to run a package: the board's defaults, where the manifest's ``model_settings`` do not say."""
    runtime = config.runtime

    def plan(package: PackageRef, variant_name: str, socket: Path) -> WorkerSpec:
        manifest, variant = shelf.variant(package, variant_name)
        settings = variant.model_settings
        for name in ("context_length", "threads", "parallel"):
            if not isinstance(settings.get(name, 1), int):
                raise InvalidError("manifest.malformed", f"model_settings of {package.id}: {name} is no number")
        limited = runtime.memory_limit == "auto"
        return WorkerSpec(
            model_id=package.id,
            engine=variant.runtime.engine,
            files=tuple(
                WorkerFile(file.path, file.sha256, file.size, shelf.blobs.path(file.sha256)) for file in variant.files
            ),
            socket=socket,
            threads=_number(settings.get("threads"), runtime.threads or threads),
            context_length=_context_length(runtime, manifest, variant),
            parallel=_number(settings.get("parallel"), runtime.parallel),
            settings={**settings, "embedding": True} if manifest.makes_embeddings(variant) else settings,
            execution_provider=variant.runtime.execution_provider,
            limits=Limits(
                memory_mb=estimates.limit_mb(package, variant_name) if limited else 0,
                cpu_percent=runtime.cpu_limit_percent,
            ),
        )

    return plan


def default_threads(config: AgentConfig) -> int:
    """Return the threads of a worker where nothing else is said."""
    limit = config.runtime.cpu_limit_percent
    quotas = [quota for quota in (read_quota(), limit / 100 if limit else None) if quota is not None]
    return worker_threads(read_cores(), min(quotas, default=None))
