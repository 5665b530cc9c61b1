"""The server with a process for each specialist: the first one answers, all end together."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from helpers import make_fused, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.generation import SamplingParams
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.generator import FusedGenerator


@pytest.mark.slow
def test_three_processes_serve_what_one_model_says(tmp_path: Path):
    save_fused(make_fused(), tmp_path / "model", tokenizer=make_tokenizer())
    expected = FusedGenerator.from_pretrained(str(tmp_path / "model")).generate(
        [(Message("user", "hi"),)], SamplingParams(max_tokens=12)
    )[0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    serve = ["-m", "ultrafuser", "serve", str(tmp_path / "model"), "--port", "0", "--parallel", "--name", "tiny"]
    process = subprocess.Popen(
        [*launch, *serve],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)  # a full pipe would block it
    reader.start()
    watchdog = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))  # else a hang would have no end
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "is served at http://" in line, "".join(said)
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 12,
            "temperature": 0,
            "fusion": {"weights": True},
        }
        request = urllib.request.Request(
            f"{line.split()[-1]}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        reply = json.load(urllib.request.urlopen(request, timeout=30))
        assert reply["choices"][0]["message"]["content"] == expected.text
        assert set(reply["usage"]["fusion_mean"]) == {"text", "code", "math"}
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    finally:
        watchdog.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
