"""A stand-in for the agent's owner thread, as the local API sees it: a route table and a command queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from garrison_agent.api.commands import Command
from garrison_agent.api.routes import Route, RouteTable
from garrison_protocol.manifest import (
    ChatMessage,
    Evaluation,
    GenerateCase,
    Manifest,
    ModelFile,
    PackageRef,
    RuntimeSpec,
    Variant,
)
from garrison_protocol.states import Engine

DIGEST = "ab" * 32


def make_manifest(name: str = "smollm2", version: str = "1.0.0", *, engine: Engine = Engine.LLAMA_CPP) -> Manifest:
    """Return a small valid manifest."""
    variant = Variant(
        name="cpu-q4",
        runtime=RuntimeSpec(engine=engine),
        quantization="Q4_1",
        files=(ModelFile(path="model.bin", size=3 * 1024 * 1024, sha256=DIGEST, chunks_sha256=DIGEST),),
        memory_mb=200,
    )
    case = GenerateCase(id="hello", messages=(ChatMessage(role="user", content="Say hello"),), pattern="hello")
    return Manifest(
        name=name,
        version=version,
        alias="chat",
        display_name="SmolLM2 135M",
        publisher="HuggingFaceTB",
        license="Apache-2.0",
        license_description="Use it, keep the notice.",
        task="chat-completion",
        created_at="2025-01-01T00:00:00Z",
        parameter_count=134_515_008,
        context_length=2048,
        variants=(variant,),
        evaluation=Evaluation(cases=(case,), min_accuracy=0.8),
    )


def make_route(
    alias: str = "chat",
    *,
    socket: Path | None = None,
    name: str = "smollm2",
    version: str = "1.0.0",
    engine: Engine = Engine.LLAMA_CPP,
) -> Route:
    """Return a route; loaded if it has a socket."""
    manifest = make_manifest(name, version, engine=engine)
    return Route(
        alias=alias,
        model_id=f"{name}:{version}",
        engine=engine,
        socket=socket,
        package=PackageRef(name=name, version=version, manifest_sha256=DIGEST),
        manifest=manifest,
        variant=manifest.variants[0],
        state="ACTIVE",
        loaded=socket is not None,
    )


class LocalOwner:
    """Answers commands with ``answer`` (a result, or an exception), on the thread that posts; None: never."""

    def __init__(self, *routes: Route, answer: Callable[[Command], object] = lambda command: None) -> None:
        self.table = RouteTable(routes)
        self.answer = answer
        self.commands: list[Command] = []
        self.asked = threading.Event()

    def read(self) -> RouteTable:
        """The ``table`` callable of ``LocalApi``."""
        return self.table

    def post(self, command: Command) -> Future[object]:
        """The ``command`` callable of ``LocalApi``."""
        future: Future[object] = Future()
        self.commands.append(command)
        result = self.answer(command)
        if isinstance(result, Exception):
            future.set_exception(result)
        elif result is not None:
            future.set_result(result)
        self.asked.set()
        return future
