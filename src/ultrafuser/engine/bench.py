"""How fast an engine decodes, as ratios against named alternatives on the same machine in the same run.

Times are medians over steps or over prompts. Everything runs to `max_tokens`, whatever the model would have said.

Shapes: B choices at once, n specialists.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ultrafuser.chat.messages import Message
from ultrafuser.engine.choice import Choice
from ultrafuser.engine.drafts import DraftKind
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.requests import GenerationRequest, Ids, StreamEvent, TokenPiece
from ultrafuser.engine.runner import RunnerKind
from ultrafuser.engine.weights import WeightFormat
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.generation import SamplingParams
from ultrafuser.model.load import LoadOptions, load_model

Rows = tuple[Ids, ...]


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """One line of the table.

    Attributes:
        name: What was measured.
        num_specialists: n.
        batch: B.
        ms_per_token: Of one choice: median time of a pass over tokens it gave.
        tokens_per_s: Of all choices together, median over repetitions.
        tokens_per_pass: More than 1 where drafts were kept.
        bandwidth: GB/s at which weights were read, each once a pass; None with drafts.
        memory_bytes: Weights that a pass reads, and the caches at the end.
        extra_loss: Nats per token that these weights lose against exact ones; None for exact ones.
    """

    name: str
    num_specialists: int
    batch: int
    ms_per_token: float
    tokens_per_s: float
    tokens_per_pass: float
    bandwidth: float | None
    memory_bytes: int
    extra_loss: float | None = None


def bench_model(
    place: str, questions: Sequence[str], *, batches: Sequence[int], max_tokens: int, load: LoadOptions
) -> Iterator[DecodeTiming]:
    """Measure every way to run a model: one line at a time.

    Reduced weights come last; where these specialists do not allow them, or cannot be stacked, they are left out.

    Args:
        place: Folder or hub id.
        questions: Asked one by one, and again for larger batches; what reduced weights lose is measured on them.
        batches: Choices at once.
        max_tokens: Of every answer.
        load: Of the weights.
    """
    model, tokenizer = load_model(place, load)
    exact: list[TokenPiece] = []
    slots = max(batches)
    ways: list[tuple[RunnerKind, WeightFormat]] = [("stacked", "exact"), ("sequential", "exact")]
    ways += [("auto", "half"), ("auto", "int8")]
    kinds: list[tuple[DraftKind, ...]] = [(), ("lookup", "self")]
    for runner, weights in ways:
        for drafts in kinds:
            options = EngineOptions(runner=runner, weights=weights, drafts=drafts, max_choices=slots)
            try:
                engine = Engine(model, tokenizer, options)
            except ConfigError:
                continue
            texts = [tuple(tokenizer(text)["input_ids"]) for text in questions]
            lost = None
            if weights == "exact":
                exact = exact or score_texts(engine, texts)
            else:
                quality = quality_loss(score_texts(engine, texts), exact)
                lost = quality.loss - quality.exact_loss
            name = f"{runner}, {weights}, {'drafts' if drafts else 'plain'}"
            for batch in batches if not drafts else batches[:1]:
                prompts = [engine.encoder.encode_prompt((Message("user", text),)) for text in questions]
                prompts = prompts if batch == 1 else (prompts * batch)[:batch]
                timing = time_decoding(engine, prompts, name=name, batch=batch, max_tokens=max_tokens)
                yield replace(timing, extra_loss=lost)


def read_bandwidth(num_bytes: int = 800 * 2**20, repetitions: int = 5) -> float:
    """GB/s at which torch's threads read memory that is in no cache: the fastest of a few ways, the best time."""
    threads = torch.get_num_threads()
    values = torch.ones(num_bytes // (4096 * threads) * 1024 * threads)
    matrices, vectors = values.view(threads, -1, 1024), torch.ones((threads, 1024, 1))
    ways = (values.sum, values.max, lambda: torch.bmm(matrices, vectors))
    best = min(_seconds(way) for way in ways for _ in range(repetitions))
    return num_bytes / best / 1e9


def time_decoding(
    engine: Engine,
    prompts: Sequence[Rows],
    *,
    name: str,
    batch: int,
    max_tokens: int,
    params: SamplingParams = SamplingParams(),
) -> DecodeTiming:
    """Decode `batch` prompts at once, repeated over all prompts; reading the prompts is not counted.

    Args:
        engine: Idle.
        prompts: A multiple of `batch` of them; what is left over is not used.
        name: Of the line.
        batch: B.
        max_tokens: Tokens of every answer.
        params: Temperature and seed; the rest is set here.
    """
    speeds, passes, pass_ms, cached = [], [], [], 0
    for first in range(0, len(prompts) - batch + 1, batch):
        choices = _read_prompts(engine, prompts[first : first + batch], params, max_tokens)
        before, tokens, times = engine.stats().generated_tokens, 0, []
        while tokens < batch * max_tokens:
            times.append(_seconds(engine.step))
            tokens = engine.stats().generated_tokens - before
        cached = max(cached, engine.stats().cached_tokens)
        for choice in choices:
            choice.cancelled = True
        while engine.step():
            continue
        speeds.append(tokens / sum(times))
        passes.append(tokens / batch / len(times))
        pass_ms.append(1e3 * statistics.median(times))
    per_pass = statistics.median(passes)
    step_ms = statistics.median(pass_ms)
    return DecodeTiming(
        name=name,
        num_specialists=len(engine.names),
        batch=batch,
        ms_per_token=1e3 * batch / statistics.median(speeds),
        tokens_per_s=statistics.median(speeds),
        tokens_per_pass=per_pass,
        bandwidth=None if engine.planner.kinds else engine.weight_bytes / step_ms / 1e6,
        memory_bytes=engine.weight_bytes + engine.runner.bytes_per_token * cached,
    )


def time_prefill(engine: Engine, rows: Rows, repetitions: int = 3) -> float:
    """Seconds to read one prompt and choose the first token, the best of a few."""
    best = float("inf")
    for _ in range(repetitions):
        engine.add(GenerationRequest(rows, SamplingParams(max_tokens=1)), _ignore)
        began = time.perf_counter()
        while engine.step():
            continue
        best = min(best, time.perf_counter() - began)
    return best


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """What reduced weights lose against exact ones on the same text.

    Attributes:
        loss, exact_loss: Nats per token.
        agreement: Share of positions where both find the same token most likely.
        num_tokens: Positions.
    """

    loss: float
    exact_loss: float
    agreement: float
    num_tokens: int


def score_texts(engine: Engine, texts: Sequence[Ids]) -> list[TokenPiece]:
    """Log-probabilities of plain texts, which all specialists read alike, and the most likely token at each place."""
    pieces: list[TokenPiece] = []

    def listen(event: StreamEvent) -> None:
        pieces.extend(event.prompt)

    params = SamplingParams(max_tokens=1, log_probs=1)
    for ids in texts:
        engine.add(GenerationRequest((ids,) * len(engine.names), params, score_prompt=True), listen)
        while engine.step():
            continue
    return pieces


def quality_loss(reduced: Sequence[TokenPiece], exact: Sequence[TokenPiece]) -> QualityLoss:
    """Compare what two engines over the same specialists say of the same texts (`score_texts`)."""
    pairs = [(a, b) for a, b in zip(reduced, exact, strict=True) if a.log_prob is not None and b.log_prob is not None]
    return QualityLoss(
        loss=-sum(a.log_prob or 0.0 for a, _ in pairs) / len(pairs),
        exact_loss=-sum(b.log_prob or 0.0 for _, b in pairs) / len(pairs),
        agreement=sum(a.top[0][0] == b.top[0][0] for a, b in pairs) / len(pairs),
        num_tokens=len(pairs),
    )


def as_rows(timings: Sequence[DecodeTiming]) -> list[dict[str, object]]:
    """Plain values, for JSON."""
    return [asdict(timing) for timing in timings]


def _read_prompts(engine: Engine, prompts: Sequence[Rows], params: SamplingParams, max_tokens: int) -> list[Choice]:
    """Bring prompts so far that all of them decode, the first of them with `max_tokens` and a draft to go."""
    chunk = engine.options.chunk
    rounds = sum(-(-max(map(len, rows)) // chunk) for rows in prompts)  # the first decodes while others are read
    choices = []
    for number, rows in enumerate(prompts):
        seed = None if params.seed is None else params.seed + number
        wanted = SamplingParams(
            max_tokens=10 * rounds + max_tokens + 10,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=seed,
            ignore_end=True,
        )
        choices += engine.add(GenerationRequest(rows, wanted), _ignore)
    while engine.num_decoding < len(prompts):
        if not engine.step():
            raise ModelError(f"{len(prompts)} choices do not fit at once: allow a larger context, or measure fewer")
    return choices


def _seconds(function: object) -> float:
    assert callable(function)
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _ignore(event: StreamEvent) -> None:
    del event
