"""``python -m bench.raw_onnx MODEL THREADS``: the yardstick, onnxruntime called directly.

Each line of standard input is a number of runs; each line of output is ``{"seconds": s}`` that they took, one after
the other. ``ORT_DISABLE_TELEMETRY=1`` must be in the environment.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime  # type: ignore[import-untyped]


def main() -> None:
    """Serve measurements until the end of input."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(sys.argv[2])
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        began_s = time.perf_counter()
        for number in range(count):
            values = [(number * 31 + index * 7) % 256 for index in range(2048)]
            session.run(["target_label"], {"bytes": np.array([values], dtype=np.int32)})
        print(json.dumps({"seconds": time.perf_counter() - began_s}), flush=True)


if __name__ == "__main__":
    main()
