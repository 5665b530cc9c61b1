"""What only a GPU can show: steps replayed as CUDA graphs, losses in its kernels, training on it and over NCCL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from helpers import make_fused, make_tokenizer, make_trio
from training_helpers import write_ingredients
from ultrafuser.chat.messages import Message
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.generator import EngineGenerator
from ultrafuser.engine.options import EngineOptions
from ultrafuser.errors import ConfigError
from ultrafuser.generation import SamplingParams
from ultrafuser.kernels.bf16 import has_bf16_kernel, multiply_bf16
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.loss import LinearHead, fused_nll
from ultrafuser.model.loss_backends import concatenated_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONVERSATIONS = [(Message("user", text),) for text in ("hi", "abcabcabcabc", "x" * 40)]


@pytest.mark.parametrize("runner", ["stacked", "sequential"])
@pytest.mark.parametrize("drafts", [(), ("lookup", "self")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_graphs_change_no_token(runner: Any, drafts: Any, temperature: float):
    model, params = make_fused().to("cuda"), SamplingParams(max_tokens=40, temperature=temperature, seed=3)

    def answers(**options: Any) -> list[Any]:
        settings = EngineOptions(max_context=256, chunk=16, runner=runner, max_draft_choices=8, **options)
        engine = Engine(model, make_tokenizer(), settings)
        assert (engine.runner.groups[0].graphs is None) == (options.get("static_shapes") is False)
        return [answer.token_ids for answer in EngineGenerator(engine).generate(CONVERSATIONS, params)]

    assert answers(drafts=drafts) == answers(drafts=(), static_shapes=False)
    if temperature == 0:
        expected = FusedGenerator(model, make_tokenizer()).generate(CONVERSATIONS, params)
        assert answers(drafts=drafts) == [answer.token_ids for answer in expected]


def test_a_graph_is_captured_once_for_each_shape():
    model = make_fused().to("cuda")
    engine = Engine(model, make_tokenizer(), EngineOptions(max_context=256, drafts=()))
    generator = EngineGenerator(engine)
    generator.generate(CONVERSATIONS[:1], SamplingParams(max_tokens=8))
    graphs = engine.runner.groups[0].graphs
    assert graphs is not None
    first = dict(graphs.steps)
    assert first

    generator.generate(CONVERSATIONS[:1], SamplingParams(max_tokens=8))

    assert graphs.steps == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_engine_in_16_bits_says_what_the_model_says(dtype: torch.dtype):
    model = make_fused(make_trio(tied=True)).to("cuda", dtype)
    engine = Engine(model, make_tokenizer(), EngineOptions(max_context=256))

    (answer,) = EngineGenerator(engine).generate(CONVERSATIONS[:1], SamplingParams(max_tokens=8))

    (expected,) = FusedGenerator(model, make_tokenizer()).generate(CONVERSATIONS[:1], SamplingParams(max_tokens=8))
    assert answer.token_ids[0] == expected.token_ids[0]


def test_products_of_bf16_numbers_are_not_rounded_to_bf16():
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not multiply bf16 numbers")
    numbers = torch.randn(300, 64, device="cuda").bfloat16()
    x, weight = numbers[:70], numbers[70:]
    assert has_bf16_kernel(x.device)
    torch.testing.assert_close(multiply_bf16(x, weight).double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["half", "int8"])
@pytest.mark.parametrize("runner", ["stacked", "sequential"])
def test_weights_in_fewer_bits_are_refused(form: Any, runner: Any):
    with pytest.raises(ConfigError, match=f"weights in {form} are for the CPU"):
        Engine(make_fused().to("cuda"), make_tokenizer(), EngineOptions(max_context=256, weights=form, runner=runner))


@pytest.mark.parametrize("backend", ["chunked", "liger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["all", "gate"])
def test_losses_are_those_of_float64(backend: str, dtype: torch.dtype, trained: str):
    if backend == "liger":
        pytest.importorskip("liger_kernel", reason="pip install liger-kernel")
    draw = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(70, 64), (70, 64), (70, 32), (999, 64), (999, 64), (999, 32)]
    everything = trained == "all"
    leaves = [
        torch.randn(shape, generator=draw, device="cuda").mul_(0.3).to(dtype).requires_grad_(everything)
        for shape in shapes
    ]
    scores = torch.randn((70, 3), generator=draw, device="cuda").requires_grad_()
    labels = torch.randint(0, 999, (70,), generator=draw, device="cuda")
    wanted = [*(leaves if everything else ()), scores]

    weights = torch.softmax(scores, dim=-1)
    if backend == "chunked":
        heads = [LinearHead(head) for head in leaves[3:]]
        loss = fused_nll(leaves[:3], weights, labels, heads, chunk=32).mean()
    else:
        loss = concatenated_loss(weights, labels, leaves[:3], leaves[3:], [None] * 3, backend).mean()
    gradients = torch.autograd.grad(loss, wanted)

    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (*leaves, scores)]
    parts = [w[:, None] * (h @ o.T) for w, h, o in zip(exact[6].softmax(-1).T, exact[:3], exact[3:6], strict=True)]
    expected = F.cross_entropy(torch.stack(parts).sum(dim=0), labels)
    of = [*(exact[:6] if everything else ()), exact[6]]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for gradient, truth in zip(gradients, torch.autograd.grad(expected, of), strict=True):
        assert float((gradient.double() - truth).abs().max()) < tolerance * float(truth.abs().max())


def train(recipe: Path, run: Path, *settings: str, launcher: tuple[str, ...] = (sys.executable, "-m")) -> list[Any]:
    """Train all phases; returns their lines of metrics."""
    command = [*launcher, "ultrafuser", "train", str(recipe), "--set", f"output={run}"]
    for setting in settings:
        command += ["--set", setting]
    paths = os.pathsep.join([str(Path(__file__).parent.parent / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for stage in ("stage1", "stage2") for line in (run / stage / "metrics.jsonl").open(encoding="utf-8")]
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_training_is_that_of_the_cpu_and_over_nccl_that_of_one_process(tmp_path: Path):
    recipe = write_ingredients(tmp_path)
    on_cpu = train(recipe, tmp_path / "cpu")
    on_gpu = train(recipe, tmp_path / "gpu", "train.device=cuda")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m")
    over_nccl = train(recipe, tmp_path / "nccl", "train.device=cuda", launcher=torchrun)
    in_bf16 = train(recipe, tmp_path / "bf16", "train.device=cuda", "train.precision=bf16")

    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (on_cpu, on_gpu, over_nccl, in_bf16)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[3] == pytest.approx(losses[1], rel=2e-2)
