"""vLLM's second model runner on a CPU: `studies/vllm_answers.py` with Triton's kernels interpreted. Slow; for tests.

That runner prepares its batches by Triton kernels, which Triton compiles for GPUs alone; vLLM therefore takes its first
runner on a CPU. But Triton brings an interpreter, which runs the same kernels as Python. vLLM asks for a back end named
"cpu" before it believes in Triton there, so one is named; the interpreter never looks at it.
"""

from __future__ import annotations

import importlib
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    backends = importlib.import_module("triton.backends").backends
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    runpy.run_path(str(Path(__file__).parent.parent / "studies" / "vllm_answers.py"), run_name="__main__")
