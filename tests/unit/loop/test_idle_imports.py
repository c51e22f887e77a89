"""What an idle agent does not keep in memory, which on a small board belongs to the models."""

from __future__ import annotations

import subprocess
import sys

RARE = {
    "garrison_agent.api.applications",
    "garrison_agent.api.cache_check",
    "garrison_agent.api.foundry_older",
    "garrison_agent.api.metrics",
    "garrison_agent.api.ollama",
    "garrison_agent.api.openapi",
    "garrison_agent.api.tls_server",
    "garrison_agent.api.upstreams",
    "garrison_agent.core.exposition",
    "garrison_agent.owner.cache_reading",
    "garrison_agent.owner.metrics",
}
"""Surfaces that are imported when somebody asks for them."""
FOREIGN = {
    "click",
    "configparser",
    "llama_cpp",
    "logging.config",
    "logging.handlers",
    "multiprocessing",
    "numpy",
    "onnxruntime",
    "pickle",
    "psutil",
    "socketserver",
    "tuf",
}
"""What workers, other processes, or options that nobody sets would need."""


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_an_idle_agent_has_not_loaded_what_is_rare() -> None:
    loaded = modules_after("import garrison_agent.wiring")
    assert "garrison_agent.api.app" in loaded
    assert loaded & (RARE | FOREIGN) == set()


def test_what_was_left_out_of_the_http_server_is_there_for_who_needs_it() -> None:
    statement = (
        "import garrison_agent.http_server, logging.config, configparser;"
        "logging.config.dictConfig({'version': 1}); configparser.RawConfigParser().read_string('[a]')"
    )
    assert {"logging.handlers", "configparser"} <= modules_after(statement)
