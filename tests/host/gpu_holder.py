"""What a stage does before it loads anything: `gpu_holder encode|denoise|decode RENEW_EVERY_S`; ends with its input."""

from __future__ import annotations

import json
import os
import sys

from streamflow.config import StageSettings
from streamflow.host.gpus import own_gpu
from streamflow.telemetry import configure_logging
from streamflow.types import Stage

if __name__ == "__main__":
    configure_logging(level="info", log_format="text", service=sys.argv[1])
    with own_gpu(StageSettings(), Stage(sys.argv[1]), renew_every_s=float(sys.argv[2])) as gpu:
        told = {"number": gpu and gpu.number, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
        print(json.dumps({**told, "torch": "torch" in sys.modules}), flush=True)
        sys.stdin.read()
