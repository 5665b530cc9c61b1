"""What `ultrafuser bench` measures: that lines say what ran, and that reduced weights are compared with exact ones."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers import make_fused, make_model, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.cli.main import app
from ultrafuser.engine.bench import (
    bench_model,
    quality_loss,
    read_bandwidth,
    score_texts,
    time_decoding,
    time_prefill,
)
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.load import LoadOptions


def make_similar():
    """Three specialists whose layers are as wide as the int8 kernel wants them."""
    return {name: make_model(seed=seed, hidden_size=32) for seed, name in enumerate(("text", "code", "math"))}


def make_engine(**options) -> Engine:
    return Engine(make_fused(make_similar()), make_tokenizer(), EngineOptions(**{"max_context": 256, **options}))


def test_memory_is_read_at_some_speed():
    assert read_bandwidth(num_bytes=2**22, repetitions=2) > 0.1


@pytest.mark.parametrize("batch", [1, 2])
def test_a_line_counts_tokens_passes_and_bytes(batch: int):
    engine = make_engine(drafts=())
    prompts = [engine.encoder.encode_prompt((Message("user", text),)) for text in ("hi", "what?")]

    line = time_decoding(engine, prompts, name="plain", batch=batch, max_tokens=6)

    assert (line.name, line.num_specialists, line.batch) == ("plain", 3, batch)
    assert line.tokens_per_pass == 1.0
    assert line.ms_per_token == pytest.approx(1e3 * batch / line.tokens_per_s)
    assert line.bandwidth is not None
    assert line.memory_bytes > engine.weight_bytes
    assert not engine.has_work


def test_the_bytes_of_a_pass_are_those_of_all_layers_and_heads():
    engine = make_engine(drafts=())
    whole = sum(p.numel() for m in engine.model.specialists.values() for p in m.parameters())
    embeddings = sum(m.get_input_embeddings().weight.numel() for m in engine.model.specialists.values())
    norms = sum(p.numel() for m in engine.model.specialists.values() for n, p in m.named_parameters() if "norm" in n)

    assert engine.weight_bytes == 4 * (whole - embeddings - norms)


def test_drafts_have_no_bandwidth_since_a_pass_reads_weights_for_several_tokens():
    engine = make_engine(drafts=("lookup",))
    prompts = [engine.encoder.encode_prompt((Message("user", "abcabcabcabc"),))]

    assert time_decoding(engine, prompts, name="drafts", batch=1, max_tokens=6).bandwidth is None


def test_reading_a_prompt_takes_time():
    engine = make_engine()

    assert time_prefill(engine, ((5, 6, 7, 8),) * 3) > 0


def test_an_engine_loses_nothing_against_itself_and_int8_a_little():
    texts = [(10, 20, 30, 40, 50), (60, 70, 80)]
    exact = score_texts(make_engine(), texts)

    same = quality_loss(exact, exact)
    reduced = quality_loss(score_texts(make_engine(weights="int8"), texts), exact)

    assert same.loss == same.exact_loss
    assert same.agreement == 1.0
    assert same.num_tokens == reduced.num_tokens == 6
    assert 0 < abs(reduced.loss - reduced.exact_loss) < 0.5


def test_the_command_prints_a_table_and_writes_it(tmp_path: Path):
    save_fused(make_fused(make_similar()), tmp_path / "model", tokenizer=make_tokenizer())
    arguments = ["bench", str(tmp_path / "model"), "--tokens", "4", "--batch", "1", "--batch", "2", "--json"]

    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "bench.json")])

    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "bench.json").read_text())
    names = {line["name"] for line in report["timings"]}
    assert {"stacked, exact, plain", "auto, half, plain", "auto, int8, drafts"} <= names
    assert all((line["extra_loss"] is None) == ("exact" in line["name"]) for line in report["timings"])
    assert "auto, int8, drafts" in result.output


def test_a_model_of_several_types_is_measured_whole(monkeypatch: pytest.MonkeyPatch):
    """Its 16-bit weights cannot be laid out anew for good: the next engine needs them as they are."""
    specialists = make_similar()
    model = make_fused({**specialists, "code": specialists["code"].bfloat16()})
    assert {next(m.parameters()).dtype for m in model.specialists.values()} == {torch.float32, torch.bfloat16}
    monkeypatch.setattr("ultrafuser.engine.bench.load_model", lambda *_: (model, make_tokenizer()))

    lines = list(bench_model("mixed", ["hi"], batches=[1], max_tokens=3, load=LoadOptions()))

    assert {"sequential, exact, plain", "sequential, exact, drafts"} <= {line.name for line in lines}
    assert all(line.tokens_per_s > 0 for line in lines)
