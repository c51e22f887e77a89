"""Run by test_download_killed.py as a process of its own: downloads a package and prints how far it is.

Arguments: URL, CA file, blob folder, manifest file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from garrison_agent.registry.download import download_variant
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.http_source import HttpsOpener, HttpSource
from garrison_protocol.manifest import parse_manifest


def main(url: str, ca: str, folder: str, manifest_path: str) -> None:
    manifest = parse_manifest(Path(manifest_path).read_bytes())
    download_variant(
        manifest,
        manifest.variants[0],
        HttpSource(HttpsOpener(url, Path(ca))),
        BlobStore(Path(folder)),
        progress=lambda done, _total: print(done, flush=True),
        cancelled=lambda: False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
