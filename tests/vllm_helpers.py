"""vLLM for tests: its environment, our package installed as a wheel beside it, jobs and servers in processes of it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from helpers import make_fused, make_model, make_tokenizer
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM

ROOT = Path(__file__).parent.parent
DRIVER = ROOT / "studies" / "vllm_answers.py"
HIDDEN = 64  # two heads of 32, the narrowest that vLLM's attention on a CPU has


@cache
def vllm_folder() -> Path:
    """The environment; built where it is not yet, which scripts/check.sh does before the tests."""
    built = subprocess.run(
        [ROOT / "scripts" / "vllm_env.sh"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    if built.returncode:
        reason = built.stderr.strip().splitlines()[-1:] or ["no reason given"]
        pytest.skip(f"the environment of vLLM cannot be built here: {reason[0]}")
    return Path(built.stdout.strip())


@dataclass(frozen=True)
class VllmHome:
    """Where vLLM and our package are."""

    python: Path
    site: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of processes: our installed package, no hub, one thread, little memory."""
        # TQDM_DISABLE: without its bar vLLM divides by the zero seconds that a silent one counts.
        ours = ("VLLM_", "PYTHON", "ULTRAFUSER_", "TQDM_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        return kept | {
            "PYTHONPATH": str(self.site),
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def answer(self, jobs: Sequence[Mapping[str, Any]], folder: Path, timeout_s: float = 400.0) -> dict[str, Any]:
        """Answers to jobs of `studies/vllm_answers.py`, all in one process."""
        (folder / "jobs.json").write_text(json.dumps(jobs))
        ended = subprocess.run(
            [self.python, DRIVER, folder / "jobs.json", folder / "answers.json"],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=timeout_s,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
        return found

    @contextmanager
    def serve(self, model: Path, *options: str, folder: Path, within_s: float = 600.0) -> Iterator[str]:
        """`vllm serve MODEL`; the address up to and including /v1."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [self.python.parent / "vllm", "serve", model, "--port", str(port), "--host", "127.0.0.1", *options]
        with (folder / "serve.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
            try:
                _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", within_s, folder / "serve.log")
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)  # its engine and workers, too
                    process.wait(10)


SMALL = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--gpu-memory-utilization", "0.02")
SMALL += ("--distributed-executor-backend", "uni")  # one process less to start


@cache
def install() -> VllmHome:
    """Our package as a user installs it: a wheel, so that its entry point is what vLLM finds; once a process."""
    python = vllm_folder() / "bin" / "python"
    site = Path(tempfile.mkdtemp(prefix="ultrafuser-site-"))
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([python, "-m", "pip", "install", *options, str(ROOT)], check=True, capture_output=True)
    return VllmHome(python, site)


def make_servable(**options: Any) -> FusedForCausalLM:
    """Three tiny specialists that vLLM's attention can run, with one template and a gate that prefers somebody."""
    trio = {
        name: make_model(seed=seed, hidden_size=HIDDEN, num_key_value_heads=2)
        for seed, name in enumerate(("text", "code", "math"))
    }
    for model in trio.values():
        scale_down(model)
    return make_fused(trio, **{"templates": "chatml", **options})


def scale_down(model: Any) -> None:
    """Wider models need smaller weights, or every answer is one token for ever."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_((16 / HIDDEN) ** 0.5)


def save(model: FusedForCausalLM, folder: Path, **options: Any) -> Path:
    """A model folder with its tokenizer, whose template is the model's where it has one for all."""
    tokenizer = make_tokenizer()
    if model.config.templates:
        tokenizer.chat_template = model.config.templates[0]["source"]
    return save_fused(model, folder, tokenizer=tokenizer, **options)


def asking(text: str) -> Conversation:
    """A conversation of one question."""
    return (Message("user", text),)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, within_s: float, log: Path) -> None:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"vllm serve was not up within {within_s} s: {log.read_text()[-4000:]}")
