"""GeneratorLM: any Generator as a model of lm-eval.

A conversation travels through lm-eval as JSON, so that each specialist writes it in its own template; a plain string,
as stock tasks send it, is read by all specialists as it stands. Answers go through the journal.

Source: lm-eval's request contract (`lm_eval.api.model.TemplateLM`, version 0.4.13).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ultrafuser.chat.messages import Message, parse_conversation
from ultrafuser.errors import ConfigError, DataError, ModelError
from ultrafuser.evaluation.journal import Entry, Journal, make_key
from ultrafuser.evaluation.questions import (
    CONVERSATION,
    Question,
    make_batches,
    read_context,
    read_options,
    write_context,
)
from ultrafuser.generation import Generator, SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.memory import peak_bytes, reset_peak

DEFAULT_MAX_LENGTH = 2048  # of models whose configuration names no context length; lm-eval takes the same
LEAST = -1e9  # nats; stands for an impossible answer, since JSON has no infinity

Progress = Callable[[int, int], None]


class GeneratorLM(TemplateLM):  # type: ignore[misc]
    """A Generator that answers lm-eval's requests, many at a time.

    Neither the batch nor the order of requests changes a greedy answer or a score beyond rounding: a sampled answer
    has a seed of its own, made from the prompt.

    Args:
        generator: The model under test. Plain text, and with it stock tasks, needs a `FusedGenerator`.
        digest: Identifies the model's content; needed with a journal.
        journal: Where answers are kept; None keeps them in memory.
        batch_size: Requests between two writes of the journal, and at most in one batch.
        seed: Of sampled answers.
        max_tokens: No answer is longer, whatever its request allows.
        progress: Told how many of the present requests are answered, of how many.

    Raises:
        ConfigError: A journal without a digest.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        digest: str = "",
        journal: Journal | None = None,
        batch_size: int = 16,
        seed: int = 0,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        if journal is not None and not digest:
            raise ConfigError("a journal needs the digest of the model, or it would answer for another one")
        self.generator, self.digest, self.journal = generator, digest, journal
        self.batch_size, self.seed, self.max_tokens, self.progress = batch_size, seed, max_tokens, progress
        self.num_cut = 0  # contexts of plain text that lost their beginning, being longer than the model reads
        self._answers: dict[str, Entry] = {} if journal is None else journal.entries
        self.used: dict[str, list[str]] = {}  # keys of the answers of each task, in the order of requests

    @property
    def fused(self) -> FusedGenerator:
        """The generator, where plain tokens are needed.

        Raises:
            ConfigError: It answers conversations only.
        """
        if not isinstance(self.generator, FusedGenerator):
            raise ConfigError(
                f"a {type(self.generator).__name__} answers conversations only: tasks of plain text, and tasks that "
                "score given answers, need the model itself"
            )
        return self.generator

    @property
    def eot_token_id(self) -> int:
        """Id of the shared end token."""
        return self.fused.encoder.end_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or the end token where there is none."""
        bos = self.fused.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens that every specialist can read."""
        configs = self.fused.model.config.specialist_configs.values()
        known = [n for config in configs if isinstance(n := getattr(config, "max_position_embeddings", None), int)]
        return min(known, default=DEFAULT_MAX_LENGTH)

    @property
    def tokenizer_name(self) -> str:
        """Marks lm-eval's own request caches, which are never used here."""
        return self.digest

    def get_model_info(self) -> dict[str, str]:
        """What lm-eval writes into its results."""
        return {"model_sha": self.digest}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as JSON: one rendered string could not serve n templates.

        Raises:
            ConfigError: The task begins the answer itself (`gen_prefix`), which no chat endpoint allows.
        """
        if not add_generation_prompt:
            raise ConfigError(
                "this task begins the model's answer (gen_prefix), which is not supported in conversations"
            )
        return write_context(parse_conversation(chat_history))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of plain text, as lm-eval's own HF model gets them."""
        tokenizer = self.fused.tokenizer
        if add_special_tokens is None and string.startswith(tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False  # the text brings its own BOS
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(tokenizer(string, **special)["input_ids"])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, is it the greedy continuation) of each (context, continuation)."""
        del disable_tqdm
        asked = [self._scored(request) for request in requests]
        self._answer(asked, self._score)
        found = [self._answers[question.key] for question in asked]
        return [(entry["log_prob"], entry["is_greedy"]) for entry in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each text, in windows of the model's context."""
        del disable_tqdm
        asked = [self._rolled(_task(request), request.args[0]) for request in requests]
        self._answer(asked, self._roll)
        return [float(self._answers[question.key]["log_prob"]) for question in asked]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, generation options)."""
        del disable_tqdm
        repeats: dict[tuple[str, str], int] = {}
        asked = []
        for request in requests:
            context, options = request.args[:2]
            place = (_task(request), context)
            repeats[place] = repeats.get(place, -1) + 1
            asked.append(self._generated(_task(request), context, options, repeats[place]))
        self._answer(asked, self._generate)
        return [str(self._answers[question.key]["text"]) for question in asked]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Scores of tokens, for whoever calls lm-eval's own entry; nothing here does."""
        pairs = [self._fit(list(prompt), list(ids)) for _, prompt, ids in requests]
        rows = [(tuple(prompt),) * len(self.fused.names) for prompt, _ in pairs]
        return [(s.log_prob, s.is_greedy) for s in self.fused.score_continuations(rows, [tuple(i) for _, i in pairs])]

    def _scored(self, request: Any) -> Question:
        context, continuation = request.args
        key = make_key("score", self.digest, _task(request), context, continuation)
        return Question(key, _task(request), context, len(context) + len(continuation), continuation)

    def _rolled(self, task: str, text: str) -> Question:
        return Question(make_key("roll", self.digest, task, text), task, text, len(text))

    def _generated(self, task: str, context: str, options: dict[str, Any], repeat: int) -> Question:
        params = read_options(options, task)
        if self.max_tokens is not None:
            params = replace(params, max_tokens=min(params.max_tokens, self.max_tokens))
        params = self._fitting(context, params, task)
        drawn = [repeat, self.seed] if params.temperature > 0 else []
        values = [params.max_tokens, params.temperature, params.top_p, params.top_k, list(params.stop)]
        key = make_key("generate", self.digest, task, context, values, drawn)
        return Question(key, task, context, len(context), params=params)

    def _fitting(self, context: str, params: SamplingParams, task: str) -> SamplingParams:
        """No more tokens than the context has room for. Each prompt is looked at alone, or the batch would decide."""
        conversation = read_context(context)
        if conversation is None or not isinstance(self.generator, FusedGenerator):
            return params
        length = max(map(len, self.generator.encoder.encode_prompt(conversation)))
        if (room := self.max_length - length) < 1:
            raise DataError(
                f"task {task!r}: a prompt has {length} tokens and the model reads {self.max_length}: leave it out. "
                f"The prompt begins {conversation[-1].content[:60]!r}"
            )
        return replace(params, max_tokens=min(params.max_tokens, room))

    def _answer(self, asked: Sequence[Question], answer: Callable[[Sequence[Question]], list[Entry]]) -> None:
        """Answer what the journal does not know, batch by batch; each batch is on disk before the next begins."""
        for question in asked:
            self.used.setdefault(question.task, []).append(question.key)
        waiting = {question.key: question for question in asked if question.key not in self._answers}
        total = len({question.key for question in asked})
        done = total - len(waiting)
        self._tell(done, total)
        device = self.generator.model.device if isinstance(self.generator, FusedGenerator) else None
        reset_peak(device)
        for batch in make_batches(waiting.values(), self.batch_size):
            start = time.perf_counter()
            entries = answer(batch)
            cost = {"seconds": (time.perf_counter() - start) / len(batch), "memory_bytes": peak_bytes(device)}
            self._keep(
                [
                    (question.key, {"task": question.task, "model": self.digest, **entry, **cost})
                    for question, entry in zip(batch, entries, strict=True)
                ]
            )
            done += len(batch)
            self._tell(done, total)

    def _keep(self, entries: list[tuple[str, Entry]]) -> None:
        if self.journal is not None:
            self.journal.append(entries)
        else:
            self._answers.update(entries)

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)

    def entries(self, task: str) -> list[Entry]:
        """The answers a task has used, each once."""
        return [self._answers[key] for key in dict.fromkeys(self.used.get(task, []))]

    def _score(self, batch: Sequence[Question]) -> list[Entry]:
        if not isinstance(self.generator, FusedGenerator):
            return [self._score_foreign(question) for question in batch]
        rows, continuations = zip(*(self._encode(q.context, q.continuation) for q in batch), strict=True)
        scores = self.generator.score_continuations(rows, continuations)
        return [
            {"log_prob": max(score.log_prob, LEAST), "is_greedy": score.is_greedy, "tokens": len(continuation)}
            for score, continuation in zip(scores, continuations, strict=True)
        ]

    def _score_foreign(self, question: Question) -> Entry:
        """Scores of a generator that shows nothing but its answers' log-probabilities; what is greedy it cannot say."""
        conversation = read_context(question.context)
        if conversation is None:
            self.fused  # noqa: B018  says what is missing
        assert conversation is not None
        score = self.generator.score([(*conversation, Message("assistant", question.continuation))])[0]
        total = sum(score.log_probs[:-1])  # without the end token: a continuation has none
        if total != total:
            raise ModelError("the generator gives log-probabilities that are no numbers (NaN)")
        return {"log_prob": max(total, LEAST), "is_greedy": False, "tokens": score.num_tokens - 1}

    def _encode(self, context: str, continuation: str) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
        conversation = read_context(context)
        if conversation is None:
            prompt, ids = self._encode_plain(context, continuation)
            return (tuple(prompt),) * len(self.fused.names), tuple(ids)
        rows = self.fused.encoder.encode_prompt(conversation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        longest = max(map(len, rows)) + len(ids)
        if not ids or longest > self.max_length:
            raise DataError(f"a prompt with its answer has {longest} tokens, the model reads {self.max_length}")
        return rows, tuple(ids)

    def _encode_plain(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            prompt, ids = self._encode_pair(context, continuation)
        else:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            prompt = [self.prefix_token_id]
            if ids and ids[0] == prompt[0]:
                prompt, ids = ids[:1], ids[1:]
        return self._fit(prompt, ids)

    def _fit(self, prompt: list[int], ids: list[int]) -> tuple[list[int], list[int]]:
        room = self.max_length + 1 - len(ids)  # the last token is predicted, never read
        if not ids or room < 1:
            raise DataError(
                f"a text to score has {len(ids)} tokens: it must have at least 1 and at most {self.max_length}"
            )
        self.num_cut += len(prompt) > room
        return prompt[-room:], ids

    def _roll(self, batch: Sequence[Question]) -> list[Entry]:
        return [self._roll_one(question.context) for question in batch]

    def _roll_one(self, text: str) -> Entry:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        pairs = [make_disjoint_window(window) for window in windows]
        prompts = [(tuple(prompt),) * len(self.fused.names) for prompt, _ in pairs]
        scores = self.fused.score_continuations(prompts, [tuple(ids) for _, ids in pairs])
        log_prob = sum(score.log_prob for score in scores)
        return {"log_prob": max(log_prob, LEAST), "tokens": sum(len(ids) for _, ids in pairs)}

    def _generate(self, batch: Sequence[Question]) -> list[Entry]:
        """All of a batch have the same options; a sampled batch has one prompt, so its seed is the prompt's own."""
        params = batch[0].params
        if params.temperature > 0:
            params = replace(params, seed=int(batch[0].key[:8], 16) + self.seed)
        conversations = [c for question in batch if (c := read_context(question.context)) is not None]
        if len(conversations) == len(batch):
            completions = self.generator.generate(conversations, params)
        else:
            room = self.max_length - params.max_tokens
            prompts = [self.tok_encode(question.context)[-max(room, 1) :] for question in batch]
            completions = self.fused.complete([prompt or [self.prefix_token_id] for prompt in prompts], params)
        return [
            {
                "prompt": question.context.removeprefix(CONVERSATION),
                "text": completion.text,
                "tokens": len(completion.token_ids),
                "finish": completion.finish_reason,
            }
            for question, completion in zip(batch, completions, strict=True)
        ]


def _task(request: Any) -> str:
    return str(getattr(request, "task_name", None) or "")
