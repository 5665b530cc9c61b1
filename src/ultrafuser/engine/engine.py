"""Engine: requests join and leave a running batch over the caches of n specialists.

The synchronous core: `add` takes a request, `step` does one round of work, events go to listeners. One
thread at a time. A round reads a chunk of the first waiting prompt and decodes one block of every running choice.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ultrafuser.alignment.encode import Encoder
from ultrafuser.engine.check import check_request
from ultrafuser.engine.choice import Choice, State, fixed_weights
from ultrafuser.engine.decoding import Advance, Block, decode, token_log_probs
from ultrafuser.engine.detokenize import Detokenizer
from ultrafuser.engine.drafts import DraftKind, Planner
from ultrafuser.engine.memory import fit_slots, may_pack
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.prefill import first_logits, first_weights, has_read_prompt, read_chunk
from ultrafuser.engine.requests import EngineStats, GenerationRequest, Listener
from ultrafuser.engine.runner import MARGIN, Runner
from ultrafuser.engine.sampling import Sampler
from ultrafuser.engine.skipping import Absences
from ultrafuser.engine.speculation import Speculation
from ultrafuser.errors import ModelError, RequestError
from ultrafuser.model.build import read_templates
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import NOT_A_NUMBER


@dataclass(slots=True)
class _Counters:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    skipped_passes: int = 0
    audited_tokens: int = 0
    agreed_tokens: int = 0


@dataclass(slots=True)
class _Memory:
    """What the engine remembers of a running choice besides the choice itself."""

    absences: Absences
    siblings: list[Choice] = field(default_factory=list)  # choices that wait for this one to read their prompt


class Engine:
    """Answers requests with a fused model.

    Args:
        model: Built with templates. With exact weights it goes on working beside the engine.
        tokenizer: The shared tokenizer.
        options: How.
        draft: A small model of the same vocabulary, for drafts of kind "model"; it reads the first specialist's view.
        runner: Runs the views, where that is not done in this process; it must have room for `options`.

    Raises:
        ConfigError: Options that these specialists do not allow.
        ModelError: An architecture that the engine cannot run, no templates, or too little memory.
    """

    def __init__(
        self,
        model: FusedForCausalLM,
        tokenizer: Any,
        options: EngineOptions = EngineOptions(),
        *,
        draft: PreTrainedModel | None = None,
        runner: Runner | None = None,
    ) -> None:
        templates = read_templates(model.config)
        if not templates:
            raise ModelError("the model has no templates: build it with templates=..., so that it can be asked")
        self.model, self.tokenizer, self.options = model.train(False), tokenizer, options
        self.encoder = Encoder(tokenizer, templates)
        self.names: list[str] = list(model.names)
        self.has_draft_model = draft is not None
        size = draft.get_output_embeddings().weight.shape[0] if draft is not None else 0
        if draft is not None and size != model.config.vocab_size:
            raise ModelError(
                f"the draft model has {size} tokens and the specialists {model.config.vocab_size}: it must have their "
                "vocabulary"
            )
        self.max_context, num_slots = fit_slots(model, options, draft=draft)
        drafts = () if options.skip_below else options.drafts
        kinds = tuple(kind for kind in drafts if kind != "model" or draft is not None)
        self.runner = runner or Runner(
            model,
            num_slots=num_slots,
            max_context=self.max_context,
            margin=MARGIN,
            kind=options.runner,
            form=options.weights,
            draft_form=options.draft_weights if "self" in kinds else "exact",
            draft=draft,
            static_shapes=options.static_shapes,
            pack=may_pack(model, options),
            release=options.release_model,
        )
        self.num_slots = num_slots
        if len(self.names) == 1 and self.runner.draft_form == "exact":  # it would run ahead of itself
            kinds = tuple(kind for kind in kinds if kind != "self")
        self._speculation = Speculation(self.make_planner(kinds, options.max_draft_choices), self.runner)
        ends = model.generation_config.eos_token_id  # 0 is an id, too
        self.end_ids = frozenset(
            [self.encoder.end_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]
        )
        self.vocab_size = int(model.config.vocab_size)
        self._texts: dict[int, str] = {}  # of single tokens, for all choices
        # Choices by slot: those that decode first, then those whose prompt is being read or waits to be.
        self._running: list[Choice] = []
        self._waiting: deque[list[Choice]] = deque()
        self._memory: dict[int, _Memory] = {}
        self._counters = _Counters()

    @property
    def planner(self) -> Planner:
        """Decides about drafts; another one may take its place between requests."""
        return self._speculation.planner

    @planner.setter
    def planner(self, planner: Planner) -> None:
        self._speculation.planner = planner

    @property
    def num_waiting(self) -> int:
        """Choices that have no slot yet."""
        return sum(len(group) for group in self._waiting)

    @property
    def num_decoding(self) -> int:
        """Choices that have read their prompt."""
        return len(self._decoding())

    @property
    def weight_bytes(self) -> int:
        """Weights that a decoding pass reads: of all specialists, embeddings left out."""
        return self.runner.weight_bytes

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._waiting)

    def make_planner(self, kinds: Sequence[DraftKind], max_choices: int) -> Planner:
        """A planner of these kinds of drafts that knows nothing yet of what passes cost."""
        return Planner(
            kinds,
            num_specialists=len(self.names),
            max_choices=max_choices,
            is_read_again=self.runner.draft_form != "exact",
        )

    def check(self, request: GenerationRequest) -> None:
        """Refuse what can never be served; any thread may ask.

        Raises:
            RequestError: Says what is wrong.
        """
        check_request(request, names=self.names, max_context=self.max_context, vocab_size=self.vocab_size)
        if request.params.n > self.num_slots:
            raise RequestError(f"n is {request.params.n}; this engine can run {self.num_slots} choices at once")

    def add(self, request: GenerationRequest, listener: Listener) -> list[Choice]:
        """Queue a request.

        Returns:
            Its choices; set `cancelled` on them to stop them.

        Raises:
            RequestError: It can never be served.
        """
        self.check(request)
        longest = max(request.prompts, key=len)
        weights, active = fixed_weights(self.names, request)
        if self.model.config.solo:
            weights, active = None, [name == self.model.config.solo for name in self.names]
        rows = [*request.prompts, *([request.prompts[0]] if self.has_draft_model else [])]
        limit = min(request.params.max_tokens, self.max_context - len(longest))
        choices = [
            Choice(
                request,
                number,
                rows=rows,
                weights=weights,
                active=active,
                sampler=Sampler(request.params, choice=number, prompt=longest, ends=self.end_ids),
                detokenizer=Detokenizer(self.tokenizer, self._texts),
                listener=listener,
                ends=self.end_ids,
                max_tokens=limit,
            )
            for number in range(request.params.n)
        ]
        self._waiting.append(choices)
        self._counters.prompt_tokens += len(longest)
        return choices

    @torch.inference_mode()
    def step(self) -> bool:
        """One round of work.

        Returns:
            Whether anything is left to do.
        """
        self._drop_cancelled()
        self._admit()
        reading = next((choice for choice in self._running if choice.state is State.PREFILL), None)
        if reading is not None:
            self._read(reading)
        if decoding := self._decoding():
            self._decode(decoding)
        return self.has_work

    def fail_all(self, error: str) -> None:
        """End everything with an error and forget it."""
        for choice in [*self._running, *itertools.chain.from_iterable(self._waiting)]:
            choice.state = State.FINISHED
            choice.emit((), "error", error)
        self._running.clear()
        self._waiting.clear()
        self._memory.clear()
        self._speculation.clear()

    def stats(self) -> EngineStats:
        """Figures of now."""
        c = self._counters
        return EngineStats(
            num_running=len(self._running),
            num_waiting=self.num_waiting,
            num_slots=self.num_slots,
            cached_tokens=sum(choice.longest_view for choice in self._running),
            prompt_tokens=c.prompt_tokens,
            generated_tokens=c.generated_tokens,
            drafted_tokens=c.drafted_tokens,
            accepted_tokens=c.accepted_tokens,
            steps=c.steps,
            skipped_passes=c.skipped_passes,
            audited_tokens=c.audited_tokens,
            agreed_tokens=c.agreed_tokens,
        )

    def _decoding(self) -> list[Choice]:
        return [choice for choice in self._running if choice.state is State.DECODE]

    def _admit(self) -> None:
        while self._waiting and len(self._running) + len(self._waiting[0]) <= self.num_slots:
            first, *siblings = self._waiting.popleft()
            for choice in (first, *siblings):
                choice.slot = len(self._running)
                self._running.append(choice)
                self._memory[id(choice)] = _Memory(Absences(self.options.skip_below))
                self._speculation.add(choice)
            first.state = State.PREFILL
            self._memory[id(first)].siblings = siblings

    def _drop_cancelled(self) -> None:
        for group in list(self._waiting):
            if any(choice.cancelled for choice in group):
                self._waiting.remove(group)
                for choice in group:
                    self._finish(choice, Advance([], "cancelled", 0))
        for choice in list(self._running):
            if choice.cancelled and choice in self._running:
                for memory in self._memory.values():
                    memory.siblings = [other for other in memory.siblings if other is not choice]
                # Who would have read the prompt takes along those that wait for it.
                for sibling in [choice, *self._memory[id(choice)].siblings]:
                    self._leave(sibling)
                    self._finish(sibling, Advance([], "cancelled", 0))

    def _read(self, choice: Choice) -> None:
        """One chunk of a prompt; after the last one, its first token."""
        read_chunk(self.runner, choice, self.options.chunk)
        self._counters.steps += 1
        if not has_read_prompt(self.runner, choice):
            return
        weights = first_weights(self.runner, choice)
        logits = first_logits(self.runner, choice, weights)
        memory = self._memory[id(choice)]
        siblings, memory.siblings = memory.siblings, []
        for sibling in siblings:
            self.runner.copy_slot(choice.slot, sibling.slot, choice.seen)
            sibling.fork(choice)
        for one in [choice, *siblings]:
            one.state = State.DECODE
            one.tails.clear()
            if bool(logits.isnan().any()):
                advance = Advance([], "error", 0, NOT_A_NUMBER)
            else:
                token = one.sampler.pick(logits, ())
                log_prob, top = token_log_probs(logits, token, one.request.params.log_probs)
                pieces, reason = one.append(token, tuple(weights[0].tolist()), log_prob, top)
                advance = Advance(pieces, reason, 1)
            self._settle(one, advance)

    def _decode(self, choices: Sequence[Choice]) -> None:
        """One block of every running choice."""
        arrived = time.perf_counter()
        plan = self._speculation.decide(choices)
        decided = time.perf_counter()
        drafts = self._speculation.write(choices, plan)
        began = time.perf_counter()
        blocks = [Block(*parts) for parts in zip(choices, drafts.read, drafts.rows, drafts.known, strict=True)]
        pending = [len(c.pending(len(self.names))) if self.has_draft_model else 0 for c in choices]
        absences = {choice.slot: self._memory[id(choice)].absences.of(choice) for choice in choices}
        absent = {slot: views for slot, (views, _) in absences.items() if views}
        returning = {slot: views for slot, (_, views) in absences.items() if views}
        slots = [choice.slot for choice in choices]
        advances = decode(self.runner, blocks, skipped=absent, audited=returning)
        costs = self.planner.costs
        observe = costs.observe_join if drafts.is_joined else costs.observe_pass
        passed = time.perf_counter() - began
        observe(len(choices), max(drafts.rows), passed)
        self._counters.steps += 1
        for row, (choice, advance, waits, slot) in enumerate(zip(choices, advances, pending, slots, strict=True)):
            drafted, accepted = self._speculation.learn(choice, row, drafts, advance.num_tokens)
            self._counters.drafted_tokens += drafted
            self._counters.accepted_tokens += accepted
            self._account(choice, advance, absent.get(slot, set()))
            if plan.kind == "model":
                choice.seen[-1] += waits + min(max(advance.num_tokens - 1, 0), len(drafts.guesses[row]) - 1)
            self._settle(choice, advance)
        # Deciding is counted where something is drafted: where not, it is done as seldom as it pays.
        since = arrived if plan.kind is not None else decided
        costs.observe_rest(plan.kind, time.perf_counter() - since - drafts.seconds - passed)

    def _account(self, choice: Choice, advance: Advance, absent: set[int]) -> None:
        self._memory[id(choice)].absences.observe(choice.last_weights, absent)
        self._counters.skipped_passes += len(absent)
        if advance.agreed is not None:
            self._counters.audited_tokens += 1
            self._counters.agreed_tokens += advance.agreed

    def _settle(self, choice: Choice, advance: Advance) -> None:
        """Tell the listener; a choice that is over leaves."""
        self._counters.generated_tokens += advance.num_tokens
        if advance.reason is None:
            choice.emit(advance.pieces)
            return
        if advance.reason == "error":
            self.runner.clear_slot(choice.slot)
        self._leave(choice)
        self._finish(choice, advance)

    def _finish(self, choice: Choice, advance: Advance) -> None:
        choice.state = State.FINISHED
        choice.emit(advance.pieces, advance.reason, advance.error)

    def _leave(self, choice: Choice) -> None:
        """Free a slot. The last choice that decodes takes it, then all that follow move up by one."""
        del self._memory[id(choice)]
        self._speculation.forget(choice)
        hole = choice.slot
        decoding = [other for other in self._running if other.state is State.DECODE and other is not choice]
        last = max(decoding, key=lambda other: other.slot, default=None)
        if last is not None and last.slot > hole:
            self._move(last, hole)
        self._running.remove(choice)
        choice.slot = -1
        self._running.sort(key=lambda other: other.slot)
        for slot, other in enumerate(self._running):
            if other.slot != slot:
                self._move(other, slot)

    def _move(self, choice: Choice, slot: int) -> None:
        if any(choice.seen):
            self.runner.copy_slot(choice.slot, slot, choice.seen)
        choice.slot = slot
