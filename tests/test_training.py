"""The training loop: what a step computes, what it changes, and what it reports (Algorithm 1, Appendix B)."""

import math
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training_helpers import (
    DOMAINS,
    TOKENIZER,
    changed,
    make_fused,
    make_phase,
    make_specialist,
    parameters,
    untimed_metrics,
)
from ultrafuser.config.training import StageConfig
from ultrafuser.errors import TrainingError, VocabularyError
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.train.loop import COMPOSED, Loop
from ultrafuser.train.optimizer import learning_rate_factor
from ultrafuser.train.phase import hash_records
from ultrafuser.train.signals import StopRequest
from ultrafuser.train.tracking.metrics import read_metrics

EVERYTHING = {"train_specialists": True}
# It adds the same to every score, so the softmax never sees it: its gradient is rounding, which AdamW makes into steps.
UNSEEN = "fusion_gate.layers.2.bias"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads that wait for each other over tensors this small take a hundred times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(folder: Path, model: FusedForCausalLM | None = None, **options: Any) -> FusedForCausalLM:
    phase = make_phase(folder, model=model, **options)
    Loop(phase).run()
    return phase.model


def assert_close(first: torch.nn.Module, second: torch.nn.Module, tolerance: float = 1e-4) -> None:
    for name, value in parameters(first).items():
        if name == UNSEEN:
            continue
        torch.testing.assert_close(value, parameters(second)[name], atol=tolerance, rtol=tolerance)


def gradients(folder: Path, **train_options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gradients of the first batch over everything, and its metrics."""
    phase = make_phase(folder, stage={**EVERYTHING, "max_grad_norm": None}, train=train_options)
    phase.model.train()
    loop = Loop(phase)
    loop.optimizer.step = lambda _: 0.0  # type: ignore[method-assign]  # leaves the gradients where they are
    if train_options.get("activation_checkpointing"):
        for specialist in phase.model.specialists.values():
            specialist.gradient_checkpointing_enable({"use_reentrant": False})
    phase.model.loss_chunk = phase.train.loss_chunk
    values = loop._step(0)
    return {name: p.grad for name, p in loop.trained.items() if p.grad is not None}, values


# --- the loss and its gradient ---------------------------------------------------------------------------------------


def test_the_loss_of_a_step_is_the_nll_per_response_token_of_the_whole_batch(tmp_path: Path):
    """Long responses weigh more than short ones: every token counts the same."""
    phase = make_phase(tmp_path)
    loop = Loop(phase)
    nll, tokens = torch.zeros(()), 0
    for draw in loop.sampler.batch(0):
        record = phase.records[draw.domain][draw.index]
        [turn] = record.turns
        weights_of = []
        logits = []
        for specialist, prompt in zip(phase.model.specialists.values(), turn.prompts, strict=True):
            output = specialist(torch.tensor([[*prompt, *turn.response]]), output_hidden_states=True)
            start = len(prompt) - 1
            logits.append(output.logits[0, start:-1])
            weights_of.append(phase.model.fusion_gate.layers(output.hidden_states[-1][0, start:-1])[:, 0])
        weights = torch.stack(weights_of, dim=-1).softmax(dim=-1)
        fused = sum(weights[:, j, None] * logits[j] for j in range(2))
        nll += torch.nn.functional.cross_entropy(fused, torch.tensor(turn.response), reduction="sum").detach()
        tokens += len(turn.response)

    values = loop._step(0)

    assert values["tokens"] == tokens
    assert values["loss"] == pytest.approx(float(nll) / tokens, rel=1e-5)


@pytest.mark.parametrize("options", [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 150}, {"loss_chunk": 3}])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(tmp_path: Path, options: Mapping[str, Any]):
    whole, values = gradients(tmp_path)
    cut, cut_values = gradients(tmp_path, **options)

    assert cut_values["loss"] == pytest.approx(values["loss"], rel=1e-5)
    assert cut_values["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-4)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", [{}, EVERYTHING], ids=["gate", "everything"])
def test_losses_and_parameters_of_a_run_do_not_depend_on_how_batches_are_cut(tmp_path: Path, stage: dict[str, Any]):
    """One piece a batch, and one piece a record, of which a batch has four: gradients accumulate to the same."""
    whole = train(tmp_path / "whole", stage=stage)
    cut = train(tmp_path / "cut", stage=stage, train={"micro_batch_tokens": 1})

    assert_close(whole, cut)
    lines = [untimed_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("cut", "whole")]
    assert len(lines[0]) == len(lines[1]) == 4
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for value in {"loss", "loss_per_domain", "grad_norm", "validation"} & other.keys():
            assert one[value] == pytest.approx(other[value], rel=1e-4)
    assert "validation" in lines[1][-1]


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path):
    plain, _ = gradients(tmp_path)
    checkpointed, _ = gradients(tmp_path, activation_checkpointing=True)

    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_activation_checkpointing_is_on_in_every_specialist_when_asked_for(tmp_path: Path):
    model = train(tmp_path, stage=EVERYTHING, train={"activation_checkpointing": True})

    assert all(specialist.is_gradient_checkpointing for specialist in model.specialists.values())


def test_frozen_specialists_have_nothing_to_checkpoint(tmp_path: Path):
    """They keep no graph; torch's checkpoints would hold the inputs of their layers until garbage is searched for."""
    model = train(tmp_path, train={"activation_checkpointing": True})

    assert not any(specialist.is_gradient_checkpointing for specialist in model.specialists.values())


def test_one_specialist_is_ordinary_fine_tuning(tmp_path: Path):
    """n = 1 equals a plain loop over the HF model: AdamW, cosine, clipping, the same batches."""
    model = make_fused(["text"])
    phase = make_phase(
        tmp_path, model=model, name="tune-text", stage={**EVERYTHING, "warmup_steps": 1}, sizes={"text": 6}
    )
    loop = Loop(phase)
    plain = make_specialist(0).train()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    expected = []
    for step in range(4):
        rows = [phase.records["text"][draw.index].turns[0] for draw in loop.sampler.batch(step)]
        total, tokens = torch.zeros(()), sum(len(turn.response) for turn in rows)
        for turn in rows:
            ids = torch.tensor([[*turn.prompts[0], *turn.response]])
            labels = ids.clone()
            labels[:, : len(turn.prompts[0])] = -100
            total = total + plain(input_ids=ids, labels=labels).loss * len(turn.response)
        (total / tokens).backward()
        total = total.detach()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * (1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 3)))
        adamw.step()
        adamw.zero_grad()
        expected.append((float(total / tokens), float(norm)))

    loop.run()

    lines = untimed_metrics(tmp_path / "metrics.jsonl")
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [pytest.approx(pair, rel=1e-3) for pair in expected]
    assert_close(model.specialists["text"], plain, tolerance=1e-3)
    assert lines[0]["gate_weights"] == {"text": {"text": 1.0}}


def test_no_tensor_of_logits_is_longer_than_a_chunk(tmp_path: Path):
    """n tensors [B, T, V] never exist: heads see response tokens alone, a chunk at a time."""
    phase = make_phase(tmp_path, stage={**EVERYTHING, "steps": 1, "records_per_domain": 6}, train={"loss_chunk": 4})
    rows: list[int] = []
    for specialist in phase.model.specialists.values():
        head = specialist.get_output_embeddings()
        head.register_forward_hook(lambda _module, _inputs, output: rows.append(output.shape[:-1].numel()))

    Loop(phase).run()

    assert max(rows) == 4
    assert sum(rows) > 100


# --- what is trained -------------------------------------------------------------------------------------------------


def test_stage_1_changes_the_gate_alone(tmp_path: Path):
    """Specialists stay the same to the bit, with no gradient; all of the gate moves."""
    model = make_fused()
    before = parameters(model)

    train(tmp_path, model)

    gate = {name for name in before if name.startswith("fusion_gate.")}
    assert changed(before, model) | {UNSEEN} == gate
    assert all(p.grad is None and not p.requires_grad for p in model.specialists.parameters())


def test_stage_1_keeps_no_graph_of_the_specialists(tmp_path: Path):
    phase = make_phase(tmp_path, stage={"steps": 1})
    graphs = []
    for specialist in phase.model.specialists.values():
        specialist.base_model.register_forward_hook(
            lambda _module, _inputs, output: graphs.append(output.last_hidden_state.requires_grad)
        )

    Loop(phase).run()

    assert graphs
    assert not any(graphs)


def test_stage_2_changes_everything(tmp_path: Path):
    model = make_fused()
    before = parameters(model)

    train(tmp_path, model, name="stage2", stage=EVERYTHING)

    assert changed(before, model) | {UNSEEN} == before.keys()


def test_a_phase_after_another_freezes_anew(tmp_path: Path):
    model = train(tmp_path / "stage2", make_fused(), name="stage2", stage=EVERYTHING)
    before = parameters(model)

    train(tmp_path / "stage1", model)

    assert all(name.startswith("fusion_gate.") for name in changed(before, model))


def test_training_lowers_the_loss_of_every_domain(tmp_path: Path):
    train(tmp_path, stage={**EVERYTHING, "steps": 20})

    lines = untimed_metrics(tmp_path / "metrics.jsonl")
    assert all(lines[-1]["validation"][domain] < 0.8 * lines[1]["validation"][domain] for domain in DOMAINS)


def test_the_gate_can_have_a_learning_rate_of_its_own(tmp_path: Path):
    model = make_fused()
    before = parameters(model)
    stage = {**EVERYTHING, "steps": 1, "learning_rate": 1e-4, "gate_learning_rate": 1e-2, "schedule": "constant"}

    train(tmp_path, model, stage=stage)

    # AdamW's first step is the learning rate wherever there is a gradient.
    def largest(name: str) -> float:
        return float((model.get_parameter(name) - before[name]).abs().max())

    assert largest("fusion_gate.layers.0.weight") == pytest.approx(1e-2, rel=0.02)
    assert largest("specialists.text.model.norm.weight") == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize("options", [{"weighting": "uniform"}, {"weighting": "perplexity"}, {"solo": "text"}])
def test_a_stage_with_nothing_to_train_is_refused(tmp_path: Path, options: Mapping[str, Any]):
    with pytest.raises(TrainingError, match="nothing to train"):
        Loop(make_phase(tmp_path, model=make_fused(**options)))


@pytest.mark.parametrize("where", ["prompts", "response"])
def test_a_record_with_a_token_that_not_all_specialists_have_is_named(tmp_path: Path, where: str):
    phase = make_phase(tmp_path)
    size = phase.model.config.vocab_size
    *others, record = phase.records["code"]
    turn = record.turns[0]
    change: dict[str, Any] = {where: (turn.prompts[0], (1, size)) if where == "prompts" else (*turn.response, size)}
    records = {**phase.records, "code": [*others, replace(record, turns=(replace(turn, **change),))]}

    with pytest.raises(VocabularyError, match=rf"record code:{record.id[:12]} has token {size}, .* set tokenizer"):
        Loop(replace(phase, records=records))


def test_the_hash_of_records_sees_every_token_and_makes_no_text_of_all(tmp_path: Path):
    """Processes compare it before each phase: a text of all records would be several times as large as they are."""
    record = make_phase(tmp_path).records["code"][3]
    turn = record.turns[0]
    others = [replace(turn, response=(*turn.response, 7)), replace(turn, prompts=turn.prompts[::-1])]
    many = [record] * 2000

    tracemalloc.start()
    expected = hash_records({"code": many})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < len(repr(many)) / 20
    for other in others:
        assert hash_records({"code": [*many[1:], replace(record, turns=(other,))]}) != expected


def test_weights_kept_in_half_precision_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Loop(make_phase(tmp_path, model=make_fused().to(torch.bfloat16), stage=EVERYTHING))

    assert "training weights kept in torch.bfloat16 loses small updates" in caplog.text


# --- schedule, clipping, precision -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_then_follows_a_cosine():
    stage = StageConfig(steps=12, warmup_steps=2, min_learning_rate_ratio=0.1)

    factors = [learning_rate_factor(stage, step) for step in range(12)]

    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5)  # half way
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert learning_rate_factor(stage, 12) == pytest.approx(0.1)


def test_a_constant_schedule_stays_at_its_peak():
    stage = StageConfig(steps=9, warmup_steps=2, schedule="constant")

    assert [learning_rate_factor(stage, step) for step in (0, 1, 2, 8)] == [0.5, 1, 1, 1]


def test_gradients_are_clipped_to_a_norm_and_reported_unclipped(tmp_path: Path):
    loops = {}
    for limit in (None, 1e-3):
        phase = make_phase(tmp_path, stage={**EVERYTHING, "max_grad_norm": limit})
        loops[limit] = Loop(phase)
        seen: dict[str, float] = {}

        def note(_: int, loop: Loop = loops[limit], seen: dict[str, float] = seen) -> float:
            grads = [p.grad for p in loop.trained.values() if p.grad is not None]
            seen["norm"] = float(torch.nn.utils.get_total_norm(grads))
            return 0.0

        loops[limit].optimizer.step = note  # type: ignore[method-assign]
        reported = loops[limit]._step(0)["grad_norm"]
        assert reported > 1e-2
        assert seen["norm"] == pytest.approx(reported if limit is None else limit, rel=1e-3)


def test_bf16_autocast_keeps_weights_and_optimizer_state_in_fp32(tmp_path: Path):
    phase = make_phase(tmp_path, stage=EVERYTHING, train={"precision": "bf16"})
    dtypes = set()
    phase.model.specialists["text"].get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: dtypes.add(output.dtype)
    )
    loop = Loop(phase)

    loop.run()

    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in phase.model.parameters()} == {torch.float32}
    assert {value.dtype for value in loop.optimizer.state().values()} == {torch.float32}
    exact = train(tmp_path / "fp32", stage=EVERYTHING)
    losses = [untimed_metrics(folder / "metrics.jsonl")[-1]["loss"] for folder in (tmp_path, tmp_path / "fp32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert_close(phase.model, exact, tolerance=0.05)


def test_a_gate_entropy_bonus_spreads_the_weights(tmp_path: Path):
    def sharpest(bonus: float) -> float:
        folder = tmp_path / str(bonus)
        train(folder, stage={"steps": 12, "learning_rate": 3e-2, "gate_entropy": bonus})
        weights = untimed_metrics(folder / "metrics.jsonl")[-1]["gate_weights"]
        return max(abs(w - 0.5) for row in weights.values() for w in row.values())

    assert sharpest(10.0) < 0.5 * sharpest(0.0)


# --- what is reported ------------------------------------------------------------------------------------------------


def test_every_line_of_metrics_has_the_promised_keys(tmp_path: Path):
    train(tmp_path, stage={"steps": 5}, train={"validate_every": 3})

    lines = list(read_metrics(tmp_path / "metrics.jsonl"))

    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines:
        assert line.keys() - {"validation"} == {
            *("step", "loss", "loss_per_domain", "gate_weights", "grad_norm"),
            *("learning_rate", "tokens", "tokens_per_s", "memory_bytes", "seconds"),
        }
        assert set(line["loss_per_domain"]) == set(DOMAINS)
        for weights in line["gate_weights"].values():
            assert list(weights) == list(DOMAINS)
            assert sum(weights.values()) == pytest.approx(1)
        assert line["grad_norm"] > 0
        assert line["tokens_per_s"] > 0
        assert line["memory_bytes"] > 2**20
    assert [("validation" in line) for line in lines] == [False, False, True, False, True]
    assert set(lines[2]["validation"]) == set(DOMAINS)


def test_the_loss_is_the_mean_of_the_domains_over_their_tokens(tmp_path: Path):
    phase = make_phase(tmp_path, stage={"records_per_domain": 4, "composed_share": 0.5})
    loop = Loop(phase)
    records = [loop._record(draw) for draw in loop.sampler.batch(0)]

    values = loop._step(0)

    tokens = {
        domain: sum(r.num_response_tokens for r in records if r.domain == domain) for domain in (*DOMAINS, COMPOSED)
    }
    assert values["loss_per_domain"].keys() == tokens.keys()
    total = sum(values["loss_per_domain"][domain] * tokens[domain] for domain in tokens)
    assert values["loss"] == pytest.approx(total / values["tokens"])


def test_validation_changes_nothing_and_is_the_loss_without_dropout(tmp_path: Path):
    phase = make_phase(tmp_path, model=make_fused(dropout=0.5))
    loop = Loop(phase)
    phase.model.train()

    first, second = loop.validate(), loop.validate()

    assert first == second
    assert phase.model.training


def test_validation_may_be_left_out(tmp_path: Path):
    train(tmp_path, train={"validation_records": 0})

    assert untimed_metrics(tmp_path / "metrics.jsonl")[-1]["validation"] == {}


# --- data ------------------------------------------------------------------------------------------------------------


def test_composed_records_are_counted_under_a_domain_of_their_own(tmp_path: Path):
    phase = make_phase(tmp_path, stage={"records_per_domain": 4, "composed_share": 0.25})
    loop = Loop(phase)
    [draw, _] = [draw for draw in loop.sampler.batch(0) if draw.joined]

    record = loop._record(draw)

    assert record.domain == COMPOSED
    assert draw.joined is not None
    answers = [phase.sources[d][i].messages[1].content for d, i in ((draw.domain, draw.index), draw.joined)]
    assert TOKENIZER.decode(record.turns[0].response) == "\n".join(answers) + "</s>"


def test_composed_records_keep_to_the_length_limit(tmp_path: Path):
    """Two records that fit alone may not fit together: the end is cut, or the first stands alone."""
    phase = make_phase(tmp_path, stage={"composed_share": 1.0})
    draws = Loop(phase).sampler.batch(0)
    whole = [Loop(phase)._record(draw) for draw in draws]
    prompt = max(r.num_columns - r.num_response_tokens for r in whole)

    limit = prompt + 3
    cut = [Loop(make_phase(tmp_path, stage={"composed_share": 1.0}, max_length=limit))._record(d) for d in draws]
    alone = [Loop(make_phase(tmp_path, stage={"composed_share": 1.0}, max_length=5))._record(d) for d in draws]

    assert all(record.num_columns <= limit for record in cut)
    assert all(record.domain == COMPOSED for record in cut)
    assert alone == [phase.records[draw.domain][draw.index] for draw in draws]


def test_the_proportional_sampler_is_a_setting(tmp_path: Path):
    phase = make_phase(tmp_path, train={"sampler": "proportional"}, sizes={"text": 30, "code": 2})

    domains = [draw.domain for step in range(8) for draw in Loop(phase).sampler.batch(step)]

    assert (domains.count("text"), domains.count("code")) == (30, 2)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_training_and_names_the_batch(tmp_path: Path):
    phase = make_phase(tmp_path, stage={"steps": 6})
    loop = Loop(phase)
    step = loop._step

    def poisoned(number: int) -> dict[str, Any]:
        if number == 3:
            with torch.no_grad():
                phase.model.specialists["code"].model.norm.weight[0] = math.nan
        return step(number)

    loop._step = poisoned  # type: ignore[method-assign]
    drawn = {phase.records[d.domain][d.index].id[:12] for d in loop.sampler.batch(3)}

    with pytest.raises(
        TrainingError, match=r"stage1, step 3: loss nan .*step-00000002; lower the learning rate"
    ) as caught:
        loop.run()

    assert "\n" not in str(caught.value)
    assert any(f"text:{name}" in str(caught.value) for name in drawn)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert [line["step"] for line in untimed_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert all(torch.isfinite(p).all() for p in phase.model.fusion_gate.parameters())
    clean = make_phase(tmp_path, stage={"steps": 6})
    Loop(clean).run()
    assert untimed_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 5


def test_a_learning_rate_that_is_far_too_high_is_caught(tmp_path: Path):
    with pytest.raises(TrainingError, match="the start of the phase; lower the learning rate"):
        train(tmp_path, stage={**EVERYTHING, "learning_rate": 1e30}, train={"checkpoint_every": 100})


def test_a_second_interrupt_stops_at_once():
    request = StopRequest()
    request._handle(2, None)
    assert request.made

    with pytest.raises(KeyboardInterrupt):
        request._handle(2, None)
