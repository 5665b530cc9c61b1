"""An engine over tiny models, what it answered, and the plain uncached loop that says what it should have answered.

The reference calls each specialist's own forward on its whole view for every token, and fuses by hand.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers import make_fused, make_model, make_tokenizer, reference_scores
from ultrafuser.engine.drafts import PLAIN, DraftKind, Plan
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.requests import GenerationRequest, StreamEvent, TokenPiece
from ultrafuser.generation import SamplingParams
from ultrafuser.model.fused import FusedForCausalLM

DEVICE = torch.device(os.environ.get("ULTRAFUSER_TEST_DEVICE", "cpu"))  # where engines of `make_engine` run
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="this is about what the CPU alone has")
CONTEXT = 96
ENDS = frozenset({2})  # of the paper's templates: </s>
FIRST_BYTE = 5  # ids before are special


@dataclass
class Heard:
    """A listener that keeps what it hears of one request, and fails where events come out of order."""

    num_choices: int = 1
    events: list[StreamEvent] = field(default_factory=list)
    pieces: list[list[TokenPiece]] = field(init=False)
    reasons: list[str | None] = field(init=False)
    errors: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = [[] for _ in range(self.num_choices)]
        self.reasons = [None] * self.num_choices
        self.errors = [""] * self.num_choices

    def __call__(self, event: StreamEvent) -> None:
        assert self.reasons[event.choice] is None, "a choice that is over says nothing more"
        assert event.pieces or event.prompt or event.finish_reason, "an event has news"
        assert not event.prompt or (event.choice == 0 and not self.pieces[0]), "the prompt comes first"
        self.events.append(event)
        self.pieces[event.choice] += event.pieces
        self.reasons[event.choice] = event.finish_reason
        self.errors[event.choice] = event.error

    @property
    def is_over(self) -> bool:
        return all(reason is not None for reason in self.reasons)

    def ids(self, choice: int = 0) -> list[int]:
        return [piece.token_id for piece in self.pieces[choice]]

    def text(self, choice: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces[choice])

    def weights(self, choice: int = 0) -> Tensor:
        return torch.tensor([piece.gate_weights for piece in self.pieces[choice]])

    @property
    def prompt(self) -> tuple[TokenPiece, ...]:
        return next((event.prompt for event in self.events if event.prompt), ())


@dataclass
class Expected:
    """What the plain loop answers; `ids` without the end token."""

    ids: list[int]
    reason: str
    weights: list[Tensor]
    logits: list[Tensor]


def make_engine(
    model: FusedForCausalLM | None = None,
    *,
    draft: PreTrainedModel | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Engine:
    """A small engine that drafts nothing unless told to, then with the specialists' own weights, and decides always."""
    defaults: dict[str, Any] = {
        "max_context": CONTEXT,
        "max_choices": 4,
        "drafts": (),
        "draft_weights": "exact",
        "chunk": 16,
    }
    engine = Engine(
        (make_fused() if model is None else model).to(DEVICE),
        make_tokenizer() if tokenizer is None else tokenizer,
        EngineOptions(**{**defaults, **options}),
        draft=None if draft is None else draft.to(DEVICE),
    )
    engine.planner.rest_after = lambda _: 0  # type: ignore[method-assign]  # which depends on the clock
    return engine


def make_similar(num: int = 3, *, noise: float = 0.02, **options: Any) -> dict[str, PreTrainedModel]:
    """Specialists that nearly agree, so that what one of them drafts is mostly right."""
    specialists = {}
    for seed, name in enumerate(("text", "code", "math")[:num]):
        model = make_model(seed=0, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        specialists[name] = model
    return specialists


def always_draft(engine: Engine, *kinds: DraftKind, lengths: Sequence[int] = (2, 3, 8, 1, 4)) -> None:
    """Draft in every block, whatever it costs: kinds and lengths take turns."""
    turn = 0

    def plan(num_choices: int, histories: Any, possible: dict[DraftKind, int]) -> Plan:
        nonlocal turn
        del num_choices, histories
        turn += 1
        kind = kinds[turn % len(kinds)]
        length = min(lengths[turn % len(lengths)], possible.get(kind, 0))
        return Plan(kind, length) if length else PLAIN

    engine.planner.plan = plan  # type: ignore[method-assign]


def random_prompts(
    *lengths: int, seed: int = 0, first: int = FIRST_BYTE, last: int = 13
) -> tuple[tuple[int, ...], ...]:
    """One row per specialist, of few different ids, so that a lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(first, last, (n,), generator=generator).tolist()) for n in lengths)


def greedy(
    *lengths: int, seed: int = 0, draw_seed: int | None = None, max_tokens: int = 10, **more: Any
) -> GenerationRequest:
    """A request for an answer, greedy unless `more` says otherwise, to prompts of these lengths drawn with `seed`."""
    fields = {key: more.pop(key) for key in ("without", "weights", "score_prompt") if key in more}
    return GenerationRequest(
        random_prompts(*lengths, seed=seed), SamplingParams(max_tokens=max_tokens, seed=draw_seed, **more), **fields
    )


def run(engine: Engine, *requests: GenerationRequest, before_step: Callable[[int], None] | None = None) -> list[Heard]:
    """Ask everything at once and step until nothing is left."""
    heard = [Heard(request.params.n) for request in requests]
    for request, listener in zip(requests, heard, strict=True):
        engine.add(request, listener)
    finish(engine, before_step)
    assert all(one.is_over for one in heard)
    return heard


def finish(engine: Engine, before_step: Callable[[int], None] | None = None) -> None:
    """Step until nothing is left; fails when that never comes."""
    for number in range(2000):
        if before_step is not None:
            before_step(number)
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


@torch.no_grad()
def reference_outputs(model: FusedForCausalLM, rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each specialist after its own row: logits [T, V] and last hidden states [T, H]."""
    outputs = [
        specialist(
            input_ids=torch.tensor([list(row)], device=specialist.device), use_cache=False, output_hidden_states=True
        )
        for specialist, row in zip(model.specialists.values(), rows, strict=True)
    ]
    return [o.logits[0].cpu() for o in outputs], [o.hidden_states[-1][0].cpu() for o in outputs]


def perplexity_weights(model: FusedForCausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    """PackLLM by hand: softmax of minus the mean NLL of each specialist's own prompt."""
    logits, _ = reference_outputs(model, prompts)
    means = [
        -rows[:-1].log_softmax(dim=-1)[range(len(prompt) - 1), prompt[1:]].sum() / max(len(prompt) - 1, 1)
        for rows, prompt in zip(logits, prompts, strict=True)
    ]
    return torch.softmax(-torch.stack(means) / model.config.perplexity_temperature, dim=0)


@torch.no_grad()
def reference_weights(model: FusedForCausalLM, hiddens: Sequence[Tensor], request: GenerationRequest) -> Tensor:
    """Weights [N] at one position, where the gate or the request decides."""
    names = model.names
    if request.weights is not None:
        values = torch.tensor([0.0 if n in request.without else request.weights.get(n, 0.0) for n in names])
        return values / values.sum()
    scores = torch.zeros(len(names))
    if model.config.weighting == "gate" and len(names) > 1:
        scores = reference_scores(model, hiddens)
    left_out = {*request.without} if model.config.solo is None else {*names} - {model.config.solo}
    scores = torch.stack([s - torch.inf if n in left_out else s for n, s in zip(names, scores, strict=True)])
    return torch.softmax(scores, dim=0)


def reference_fused(model: FusedForCausalLM, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Fused logits [V] in the model's space."""
    stacked = torch.stack(list(logits))
    if model.config.fusion_space == "logprobs":
        stacked = stacked.log_softmax(dim=-1)
    if model.config.fusion_space == "probs":
        return (weights[:, None] * stacked.softmax(dim=-1)).sum(dim=0).log()
    return (weights[:, None] * stacked).sum(dim=0)


@torch.no_grad()
def reference_answer(
    model: FusedForCausalLM, request: GenerationRequest, *, max_context: int = CONTEXT, ends: frozenset[int] = ENDS
) -> Expected:
    """The greedy answer of the plain loop."""
    held: Tensor | None = None
    if model.config.weighting == "perplexity":
        held = perplexity_weights(model, request.prompts)
    limit = min(request.params.max_tokens, max_context - max(map(len, request.prompts)))
    answer = Expected([], "length", [], [])
    while len(answer.ids) < limit:
        outputs, hiddens = reference_outputs(model, [[*row, *answer.ids] for row in request.prompts])
        weights = held if held is not None else reference_weights(model, [h[-1] for h in hiddens], request)
        if model.config.granularity == "prompt":
            held = weights
        logits = reference_fused(model, [o[-1] for o in outputs], weights)
        token = int(logits.argmax())
        if (token in ends and not request.params.ignore_end) or token in request.params.stop_token_ids:
            answer.reason = "stop"
            break
        answer.ids.append(token)
        answer.weights.append(weights)
        answer.logits.append(logits)
    return answer


def assert_answers(model: FusedForCausalLM, request: GenerationRequest, heard: Heard, **reference: Any) -> None:
    """The answer is the reference's: tokens, text, weights and reason."""
    expected = reference_answer(model, request, **reference)
    for choice in range(heard.num_choices):
        assert heard.ids(choice) == expected.ids
        assert heard.reasons[choice] == expected.reason
        assert heard.text(choice) == make_tokenizer().decode(expected.ids, skip_special_tokens=True)
        if expected.ids:
            torch.testing.assert_close(heard.weights(choice), torch.stack(expected.weights), rtol=1e-3, atol=1e-4)


def twin(model: FusedForCausalLM) -> FusedForCausalLM:
    """A copy, for a second engine or a reference that no engine has touched."""
    return copy.deepcopy(model)
