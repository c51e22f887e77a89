"""A client of the Magika model over the Open Inference Protocol: features in, label out.

Follows the feature extraction and decision rules of the magika package (version 1.0.3, model standard_v3_3), so
that both give the same label; the scores come from the board.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.packages import find_file


@dataclass(frozen=True)
class Answer:
    """A file's type and how sure the model is."""

    label: str
    score: float


class FileTypes:
    """Asks a board what files are."""

    def __init__(self, url: str, model: str) -> None:
        self._infer = f"{url}/v2/models/{model}/infer"
        config = find_file("magika", "models/standard_v3_3/config.min.json")
        self._config: dict[str, Any] = json.loads(config.read_text())
        self._kinds: dict[str, Any] = json.loads(find_file("magika", "config/content_types_kb.min.json").read_text())

    def identify(self, path: Path) -> Answer:
        """Return the type of the file ``path``."""
        data = path.read_bytes()
        if not data:
            return Answer("empty", 1.0)
        features = self.features(data)
        least = int(self._config["min_file_size_for_dl"])
        if len(data) < least or features[least - 1] == self._config["padding_token"]:
            return Answer("txt" if _is_utf8(data) else "unknown", 1.0)
        return self._decide(self._scores(features))

    def features(self, data: bytes) -> list[int]:
        """Return the model's input: the stripped first and last bytes, padded, as integers."""
        block, padding = int(self._config["block_size"]), int(self._config["padding_token"])
        size, tail = int(self._config["beg_size"]), int(self._config["end_size"])
        near = min(block, len(data))
        begin = data[:near].lstrip()[:size]
        end = data[len(data) - near :].rstrip()[-tail:]
        return [*begin, *[padding] * (size - len(begin)), *[padding] * (tail - len(end)), *end]

    def _scores(self, features: list[int]) -> list[float]:
        tensor = {"name": "bytes", "shape": [1, len(features)], "datatype": "INT32", "data": features}
        request = urllib.request.Request(
            self._infer, json.dumps({"inputs": [tensor]}).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        return [float(score) for score in answer["outputs"][0]["data"]]

    def _decide(self, scores: list[float]) -> Answer:
        best = max(range(len(scores)), key=scores.__getitem__)
        model_label = str(self._config["target_labels_space"][best])
        label = str(self._config["overwrite_map"].get(model_label, model_label))
        floor = self._config["thresholds"].get(model_label, self._config["medium_confidence_threshold"])
        if scores[best] < floor:
            label = "txt" if self._kinds[label]["is_text"] else "unknown"
        return Answer(label, scores[best])


def _is_utf8(data: bytes) -> bool:
    try:
        data[:4096].decode()
    except UnicodeDecodeError:
        return False
    return True
