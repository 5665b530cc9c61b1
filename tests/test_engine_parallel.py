"""A process for each specialist: the answers of one process, one sum a token, and one clear error when a rank is lost.

Two launches of three processes play everything (engine_ranks.py); the same plays in this process say what is right.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine_helpers import assert_answers, greedy, run
from engine_ranks import MIX, NUM_RANKS, OPTIONS, PLAYS
from helpers import PAPER_TEMPLATES, make_fused, make_mixed, make_model, make_tokenizer, make_trio, save_specialist
from ultrafuser.engine.load import load_engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.parallel import close_ranks, run_rank
from ultrafuser.engine.shard import KeptRows
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.checkpoint import save_fused

MAIN = (
    "trio:mix,joins,count,drafts",
    "mixed:mix,joins",
    "loud:mix",
    "held:mix",
    "perplexity:mix",
    "probs:mix",
    "logprobs:mix",
    "gate_only:mix",
    "trio:memory,killed",
)
ANSWERS = [f"{job.partition(':')[0]}:{play}" for job in MAIN for play in job.partition(":")[2].split(",")]
ANSWERS = [name for name in ANSWERS if name.partition(":")[2] in ("mix", "joins", "drafts")]


@dataclass
class Launch:
    """Processes that have ended."""

    results: dict[str, Any]
    errors: dict[int, str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    loud = make_fused()
    with torch.no_grad():
        for parameter in loud.fusion_gate.parameters():
            parameter.mul_(4.0)  # scores of which some are beyond what a sum of exp can hold well
    gate_only = make_fused({name: str(save_specialist(m, folder / name)) for name, m in make_trio().items()})  # type: ignore[misc]
    made = {
        "trio": make_fused(),
        "mixed": make_fused(make_mixed()),
        "loud": loud,
        "held": make_fused(granularity="prompt"),
        "perplexity": make_fused(weighting="perplexity"),
        "probs": make_fused(fusion_space="probs"),
        "logprobs": make_fused(fusion_space="logprobs"),
        "gate_only": gate_only,
    }
    for name, model in made.items():
        save_fused(model, folder / "models" / name, tokenizer=make_tokenizer(), gate_only=name == "gate_only")
    return folder / "models"


@pytest.fixture(scope="module")
def launches(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Launch]:
    """The plays, whose last loses a killed rank, and two more that lose a rank which hangs."""
    jobs = {tmp_path_factory.mktemp("ranks"): played for played in (MAIN, ("trio:hung",), ("trio:second_hung",))}
    for folder in jobs:
        for model in models.iterdir():
            (folder / model.name).symlink_to(model)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, str(Path(__file__).with_name("engine_ranks.py"))]
    command.append(json.dumps([(str(folder), played) for folder, played in jobs.items()]))
    ranks = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        ranks.wait(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
    return [read_launch(folder) for folder in jobs]


def read_launch(folder: Path) -> Launch:
    logs = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(NUM_RANKS))
    assert (folder / "results.json").is_file(), logs
    errors = {rank: (folder / f"error-{rank}").read_text() for rank in range(3) if (folder / f"error-{rank}").is_file()}
    return Launch(json.loads((folder / "results.json").read_text()), errors)


@pytest.mark.parametrize("name", ANSWERS)
def test_ranks_answer_as_one_process_does(launches: list[Launch], models: Path, name: str):
    """Tokens, weights, reasons and log-probabilities, with joins, leaves and cancellations."""
    model, _, play = name.partition(":")
    actual = launches[0].results[name]

    expected = PLAYS[play](load_engine(str(models / model), OPTIONS))

    assert len(actual) == len(expected) == len(MIX)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["ids"] == theirs["ids"]
        assert ours["reasons"] == theirs["reasons"]
        for part in ("weights", "log_probs", "prompt"):
            torch.testing.assert_close(_numbers(ours[part]), _numbers(theirs[part]), rtol=1e-4, atol=1e-5)


def test_a_token_costs_one_sum_and_one_message(launches: list[Launch]):
    one, three = launches[0].results["trio:count"]

    assert one[:2] == [14, 14]  # a request of fourteen tokens
    sums, messages, steps = three
    assert sums == messages == steps == 18  # three of them: a first token each, and the steps of the batch


def test_a_rank_without_memory_ends_what_runs_and_the_engine_goes_on(launches: list[Launch]):
    error, answer = launches[0].results["trio:memory"]

    assert error.startswith("OutOfMemoryError: rank 1 with specialist 'code'")
    assert answer["ids"] == launches[0].results["trio:mix"][0]["ids"]


@pytest.mark.parametrize(
    ("number", "play", "lost", "left"),
    [
        (0, "killed", "2 with specialist 'math'", 1),
        (1, "hung", "2 with specialist 'math'", 1),
        (2, "second_hung", "1 with specialist 'code'", 2),
    ],
)
def test_a_lost_rank_ends_the_engine_with_one_error_that_names_it(
    launches: list[Launch], number: int, play: str, lost: str, left: int
):
    first, second, seconds, num_tokens = launches[number].results[f"trio:{play}"]

    assert first.startswith(f"ModelError: rank {lost} is gone or hangs")
    assert "start it again" in first
    assert second == first  # and every later step says the same
    assert seconds < 60
    assert 0 < num_tokens < 20
    assert "the first rank has ended" in launches[number].errors[left]  # and does not wait for ever


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_specialist_is_a_rank_of_its_own(tmp_path: Path):
    model = make_fused({"text": make_model(seed=0)}, templates=PAPER_TEMPLATES[:1])
    save_fused(model, tmp_path / "model", tokenizer=make_tokenizer())

    engine = run_rank(str(tmp_path / "model"), OPTIONS)

    assert engine is not None
    request = greedy(9, seed=1)
    assert_answers(model, request, run(engine, request)[0])
    close_ranks(engine)


@pytest.mark.usefixtures("alone")
def test_ranks_and_specialists_must_be_as_many(models: Path):
    with pytest.raises(ConfigError, match=r"1 processes for 3 specialists \(text, code, math\).*--nproc-per-node 3"):
        run_rank(str(models / "trio"))


def test_ranks_need_a_launcher_and_a_fused_model(monkeypatch: pytest.MonkeyPatch, models: Path):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"distributed\.run"):
        run_rank(str(models / "trio"))
    with pytest.raises(ConfigError, match="stacked"):
        run_rank(str(models / "trio"), EngineOptions(runner="stacked"))


@pytest.mark.usefixtures("alone")
def test_an_ordinary_model_has_no_specialists_to_run_in_parallel(tmp_path: Path):
    save_specialist(make_model(), tmp_path / "plain")
    with pytest.raises(ModelError, match="llama model and no fused one"):
        run_rank(str(tmp_path / "plain"))
    with pytest.raises(ModelError, match="no model can be loaded"):
        run_rank(str(tmp_path / "nowhere"))


def test_hidden_states_are_kept_while_they_may_be_asked_for():
    kept = KeptRows()
    states = torch.arange(400.0).view(100, 4)
    kept.add(1, states[None, :40], [0], [0])  # a chunk of a prompt
    kept.add(41, states[40:44].view(2, 2, 4), [0, 1], [40, 0])

    torch.testing.assert_close(kept.rows([40, 41, 44]), states[[39, 40, 43]])

    kept.copy(1, 2)  # the choice moves
    kept.add(45, states[None, 44:45], [1], [0])  # and another one takes its slot
    torch.testing.assert_close(kept.rows([44]), states[[43]])
    kept.add(46, states[None, 45:46], [2], [0])
    kept.add(47, states[None, 46:47], [0], [90])  # far beyond
    assert len(kept) == 3
    with pytest.raises(AssertionError, match="no longer kept"):
        kept.rows([1])


def _numbers(nested: Any) -> torch.Tensor:
    """All numbers of nested lists; None counts as 0."""
    if isinstance(nested, list):
        parts = [_numbers(one) for one in nested]
        return torch.cat(parts) if parts else torch.zeros(0)
    return torch.tensor([0.0 if nested is None else float(nested)])
