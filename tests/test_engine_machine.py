"""Whatever comes, leaves and is cancelled in whatever order: every answer is the plain loop's, no slot is lost."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine_helpers import (
    Expected,
    Heard,
    always_draft,
    make_engine,
    make_similar,
    random_prompts,
    reference_answer,
    twin,
)
from helpers import make_fused, make_mixed, make_model, make_tokenizer
from ultrafuser.engine.choice import Choice, State
from ultrafuser.engine.drafts import DraftKind
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.generation import SamplingParams
from ultrafuser.model.fused import FusedForCausalLM

Weights = tuple[tuple[str, float], ...]
SLOTS = 4
MOST = 12  # tokens of an answer; a shorter one is its beginning
PROMPTS = [
    random_prompts(*lengths, seed=i) for i, lengths in enumerate([(3, 9, 5), (14, 2, 7), (1, 1, 1), (20, 26, 22)])
]
WEIGHTS = (None, None, (("math", 1.0),), (("text", 1.0), ("code", 2.0)))


@cache
def make(kind: str) -> tuple[FusedForCausalLM, FusedForCausalLM]:
    """A model for the engines and its twin for the reference."""
    model = make_fused(make_similar() if kind == "similar" else make_mixed())
    return model, twin(model)


@cache
def expected(
    kind: str, prompt: int, without: tuple[str, ...], weights: tuple[tuple[str, float], ...] | None
) -> Expected:
    request = GenerationRequest(
        PROMPTS[prompt], SamplingParams(max_tokens=MOST), without, None if weights is None else dict(weights)
    )
    return reference_answer(make(kind)[1], request)


class EngineMachine(RuleBasedStateMachine):
    """Requests of all sorts against one engine."""

    @initialize(
        kind=st.sampled_from(["similar", "mixed"]),
        drafts=st.sampled_from([(), ("lookup",), ("self",), ("model",), ("self", "lookup", "model")]),
        chunk=st.sampled_from([1, 5, 64]),
        sequential=st.booleans(),
        reduced=st.booleans(),
    )
    def start(self, kind: str, drafts: tuple[DraftKind, ...], chunk: int, sequential: bool, reduced: bool) -> None:
        self.kind = kind
        self.engine: Engine = make_engine(
            make(kind)[0],
            draft=make_model(seed=0) if "model" in drafts else None,
            runner="sequential" if sequential else "auto",
            drafts=drafts,
            draft_weights="auto" if reduced else "exact",  # "mixed" has specialists that know no other
            chunk=chunk,
            max_choices=SLOTS,
            max_draft_choices=3,
        )
        if drafts:
            always_draft(self.engine, *drafts)
        self.asked: list[tuple[GenerationRequest, Heard, list[Choice], Expected | None]] = []

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1),
        max_tokens=st.integers(1, MOST),
        without=st.sampled_from([(), (), ("text",), ("code", "math")]),
        weights=st.sampled_from(WEIGHTS),
        n=st.sampled_from([1, 1, 2, 3]),
        seed=st.sampled_from([None, None, 7]),
    )
    def submit(
        self,
        prompt: int,
        max_tokens: int,
        without: tuple[str, ...],
        weights: Weights | None,
        n: int,
        seed: int | None,
    ) -> None:
        if weights is not None and {name for name, _ in weights} <= set(without):
            without = ()
        sampled = {"temperature": 1.5, "seed": seed} if seed is not None else {}
        request = GenerationRequest(
            PROMPTS[prompt],
            SamplingParams(max_tokens=max_tokens, n=n, **sampled),
            without,
            None if weights is None else dict(weights),
        )
        heard = Heard(n)
        answer = None if sampled else expected(self.kind, prompt, without, weights)
        self.asked.append((request, heard, self.engine.add(request, heard), answer))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        _, _, choices, _ = data.draw(st.sampled_from(self.asked))
        for choice in choices:
            choice.cancelled = True

    @rule()
    def finish(self) -> None:
        for _ in range(500):
            if not self.engine.step():
                break
        assert not self.engine.has_work
        assert (self.engine._running, list(self.engine._waiting), self.engine._memory) == ([], [], {})
        assert all(heard.is_over for _, heard, _, _ in self.asked)
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.cached_tokens) == (0, 0, 0)

    @invariant()
    def running_choices_lie_in_the_first_slots_and_those_that_decode_before_the_others(self) -> None:
        if not hasattr(self, "engine"):
            return
        running = self.engine._running
        assert sorted(choice.slot for choice in running) == list(range(len(running)))
        assert len(running) <= SLOTS
        decoding = [choice.slot for choice in running if choice.state is State.DECODE]
        assert sorted(decoding) == list(range(len(decoding)))
        assert {id(choice) for choice in running} == set(self.engine._memory)

    @invariant()
    def answers_are_the_references(self) -> None:
        for request, heard, choices, answer in getattr(self, "asked", []):
            for choice in range(request.params.n):
                ids, reason = heard.ids(choice), heard.reasons[choice]
                assert reason is None or choices[choice].state is State.FINISHED
                assert reason in (None, "stop", "length", "cancelled")
                assert reason != "cancelled" or choices[choice].cancelled
                if answer is None:
                    continue
                whole = answer.ids[: request.params.max_tokens]
                assert ids == whole[: len(ids)]
                if reason in ("stop", "length"):
                    assert ids == whole
                    assert reason == ("length" if len(whole) == request.params.max_tokens else answer.reason)
                    assert heard.text(choice) == make_tokenizer().decode(whole, skip_special_tokens=True)
                    weights = torch.stack(answer.weights[: len(whole)]) if whole else torch.zeros(0)
                    torch.testing.assert_close(heard.weights(choice), weights, rtol=1e-3, atol=1e-4)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.finish()
            self.answers_are_the_references()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=40, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
