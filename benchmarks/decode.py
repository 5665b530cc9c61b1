"""Decoding speed of the engine beside transformers and two obvious fused loops, in one run.

    python benchmarks/decode.py --json decode.json        # the demo's and SmolLM2's fusion, where they are
    python benchmarks/decode.py runs/x/model --quick      # any fused model, a few minutes
    python benchmarks/decode.py runs/x/model --only drafts --kinds lookup+self --seeds 2   # drafts against none
    python benchmarks/decode.py runs/x/model --only drafts --kinds lookup+self --count 1.6,0.2   # on a busy machine

Alternatives, each measured on the same prompts, to the same number of tokens, in fp32:
  transformers   one specialist (the first) with a growing cache, called token by token
  careful loop   every specialist with a growing cache, the gate, a weighted sum: what one writes by hand
  no cache       the same, every token from the whole text again (as MoCo does)
The engine runs one specialist, then 2, 3 and, with the first one once more, 4; stacked and one after another; with
exact and with reduced weights; plain and with drafts, on text, code and math prompts, greedy and sampled. What is
learnt about drafts is kept from prompt to prompt and from domain to domain, as in a server that has answered a prompt
of each domain before; each set of kinds has its own.

`--count PASS,TOKEN` takes no times: a pass of two to nine rows is said to cost PASS passes of one row and a drafted
token TOKEN, decisions follow from that, and the speed-up is counted. So it is the same however busy the machine is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from ultrafuser.chat.messages import Message
from ultrafuser.demo.world.build import DOMAINS, make_items
from ultrafuser.engine.bench import (
    DecodeTiming,
    Rows,
    as_rows,
    quality_loss,
    read_bandwidth,
    score_texts,
    time_decoding,
    time_prefill,
)
from ultrafuser.engine.drafts import Costs, DraftKind, Planner
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.weights import DraftWeights
from ultrafuser.errors import ConfigError
from ultrafuser.files import write_text_atomically
from ultrafuser.generation import SamplingParams
from ultrafuser.model.build import read_templates
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fusion import fuse_logits, gate_weights
from ultrafuser.provenance import describe_run

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ULTRAFUSER_DATA", ROOT.parent / "shared" / "data"))
DRAFTS: tuple[tuple[DraftKind, ...], ...] = ((), ("lookup",), ("self",), ("lookup", "self"))
DEMO = "runs/demo/model"
PLACES = (DEMO, "runs/smollm2/stage1-gate")


def read_prompts(place: str, num_each: int) -> dict[str, list[str]]:
    """Questions that no training has seen: of the demo's own world, or of the benchmarks."""
    if Path(place).resolve() == (ROOT / DEMO).resolve():
        return {name: [item.question for item in make_items(name, "test", num_each, seed=7)] for name in DOMAINS}
    if not DATA.is_dir():
        raise SystemExit(
            f"the benchmarks' questions are not in {DATA}: set ULTRAFUSER_DATA to the folder that has eval/"
        )
    alpaca = json.loads((DATA / "eval" / "alpaca_eval_text_davinci_003.json").read_text(encoding="utf-8"))
    with gzip.open(DATA / "eval" / "humaneval.jsonl.gz", "rt", encoding="utf-8") as file:
        code = [json.loads(line)["prompt"] for line in file]
    with (DATA / "eval" / "gsm8k_test.jsonl").open(encoding="utf-8") as file:
        math = [json.loads(line)["question"] for line in file]
    # Every so many, so that they are not all of one kind.
    picked = {"text": [item["instruction"] for item in alpaca], "code": code, "math": math}
    return {domain: texts[5 :: len(texts) // (num_each + 1)][:num_each] for domain, texts in picked.items()}


def transformers_ms(model: Any, ids: Sequence[int], num_tokens: int) -> float:
    """Median milliseconds of a token of one specialist in transformers."""
    cache = DynamicCache(config=model.config)
    text = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    times = []
    for _ in range(num_tokens):
        began = time.perf_counter()
        token = logits[:, -1].argmax(dim=-1, keepdim=True)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        int(token)  # as whoever shows it does: a GPU has then done the token before
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def loop_ms(model: FusedForCausalLM, rows: Rows, num_tokens: int, *, cached: bool) -> float:
    """Median milliseconds of a token of the fused loop that one writes by hand, with a cache per specialist or none."""
    specialists: list[Any] = list(model.specialists.values())
    caches = [DynamicCache(config=s.config) if cached else None for s in specialists]
    views = [torch.tensor([list(row)], device=model.device) for row in rows]
    new = views
    times = []
    for step in range(num_tokens + 1):
        began = time.perf_counter()
        hidden, logits = [], []
        for specialist, ids, cache in zip(specialists, new, caches, strict=True):
            output = specialist.base_model(input_ids=ids, past_key_values=cache, use_cache=cached)
            hidden.append(output.last_hidden_state[:, -1])
            logits.append(specialist.lm_head(hidden[-1]))
        weights = gate_weights(model.fusion_gate(hidden, model.names))
        token: Tensor = fuse_logits(logits, weights).argmax(dim=-1, keepdim=True)
        int(token)
        views = [torch.cat([view, token], dim=1) for view in views]
        new = [token] * len(views) if cached else views
        if step:
            times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def prefill_seconds(model: FusedForCausalLM, rows: Rows, repetitions: int = 3) -> float:
    """Seconds in which transformers reads one prompt with every specialist, the best of a few."""
    best = float("inf")
    for _ in range(repetitions):
        began = time.perf_counter()
        for specialist, row in zip(model.specialists.values(), rows, strict=True):
            cache = DynamicCache(config=specialist.config)
            text = torch.tensor([list(row)], device=model.device)
            logits = specialist(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            int(logits[0, -1].argmax())
        best = min(best, time.perf_counter() - began)
    return best


class CountedCosts(Costs):
    """Costs that are said and not measured, in passes of one row; passes and drafted tokens are counted.

    Args:
        of_block: Of a pass of two to nine rows.
        of_token: Of a drafted token.
    """

    def __init__(self, of_block: float, of_token: float) -> None:
        super().__init__()
        self.of_block, self.of_token = of_block, of_token
        self.rows: Counter[int] = Counter()
        self.drafted = 0
        for kind in ("self", "model"):
            self.feeds[kind, 1] = of_token

    def of_pass(self, num_choices: int, rows: float) -> float:
        """What is said of a pass, between one row and two as on a line."""
        del num_choices
        return 1 + (self.of_block - 1) * min(rows - 1, 1)

    def observe_pass(self, num_choices: int, rows: int, seconds: float) -> None:
        """Count it."""
        del num_choices, seconds
        self.rows[rows] += 1

    def observe_feed(self, kind: DraftKind, num_choices: int, seconds: float, num_tokens: int = 1) -> None:
        """Count it."""
        del kind, num_choices, seconds
        self.drafted += num_tokens

    @property
    def spent(self) -> float:
        """Passes of one row that all of it would have taken."""
        return sum(number * self.of_pass(1, rows) for rows, number in self.rows.items()) + self.drafted * self.of_token


class Bench:
    """All measurements of one fused model.

    Args:
        place: Its folder.
        quick: A few tokens and prompts.
        num_seeds: Of sampled answers; 0 takes what `quick` says.
        kinds: Sets of drafts that are compared with none.
        draft_weights: Format of who runs ahead.
    """

    def __init__(
        self,
        place: str,
        *,
        quick: bool,
        num_seeds: int = 0,
        kinds: Sequence[tuple[DraftKind, ...]] = DRAFTS[1:],
        draft_weights: DraftWeights = "auto",
    ) -> None:
        self.place = place
        self.tokens = 16 if quick else 32
        self.draft_tokens = 32 if quick else 64
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.whole: FusedForCausalLM = FusedForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        num_each = 2 if quick else 3
        self.prompts = read_prompts(place, num_each)
        # What was asked before drafts are measured: none of the prompts above.
        self.first_prompts = [texts[-1] for texts in read_prompts(place, num_each + 4).values()]
        self.seeds = tuple(range(num_seeds or (1 if quick else 2)))
        self.kinds = tuple(kinds)
        self.draft_weights = draft_weights
        limits = [config.max_position_embeddings for config in self.whole.config.specialist_configs.values()]
        self.context = min([1024, *limits])
        self.timings: list[DecodeTiming] = []
        self.ratios: dict[str, float] = {}

    def engine(self, names: Sequence[str], **options: Any) -> Engine:
        """An engine over some of the specialists; a name may come twice, for n = 4."""
        templates = dict(zip(self.whole.names, read_templates(self.whole.config), strict=True))
        parts = {
            f"{name}{i}" if name in names[:i] else name: self.whole.specialists[name] for i, name in enumerate(names)
        }
        model = FusedForCausalLM.from_specialists(
            parts,
            templates=[templates[name] for name in names],
            tokenizer=self.tokenizer,
            gate_hidden_size=self.whole.config.gate_hidden_size,
            gate_num_layers=self.whole.config.gate_num_layers,
        )
        model.fusion_gate.load_state_dict(self.whole.fusion_gate.state_dict())
        settings = {"max_context": self.context, "drafts": (), **options}
        return Engine(model, self.tokenizer, EngineOptions(**settings))

    def rows(self, engine: Engine, texts: Sequence[str]) -> list[Rows]:
        """Prompts of every specialist."""
        return [engine.encoder.encode_prompt((Message("user", text),)) for text in texts]

    def add(self, timing: DecodeTiming) -> DecodeTiming:
        """Keep a line and show it."""
        self.timings.append(timing)
        t, bandwidth = timing, f"{timing.bandwidth:6.1f} GB/s" if timing.bandwidth else ""
        print(
            f"  {t.name:34} n={t.num_specialists} batch {t.batch:2}: {t.ms_per_token:7.1f} ms/token "
            f"{t.tokens_per_s:7.1f} tokens/s {t.tokens_per_pass:5.2f} tokens/pass "
            f"{t.memory_bytes / 1e6:6.0f} MB {bandwidth}",
            flush=True,
        )
        return timing

    def by_hand(
        self, name: str, num_specialists: int, measure: Callable[[Rows], float], prompts: Sequence[Rows]
    ) -> float:
        """A line of an alternative, the median over prompts."""
        ms = statistics.median(measure(rows) for rows in prompts)
        parts = list(self.whole.specialists.values())[:num_specialists]
        size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        self.add(DecodeTiming(name, num_specialists, 1, ms, 1e3 / ms, 1.0, None, size))
        return ms

    def run(self) -> None:
        """Everything."""
        names = list(self.whole.names)
        everything = [text for texts in self.prompts.values() for text in texts]
        prompts = self.rows(self.engine(names[:1]), everything)  # one template: for the lone specialist
        base = [(row[0],) * len(names) for row in prompts]
        one = self.by_hand(
            "transformers",
            1,
            lambda r: transformers_ms(next(iter(self.whole.specialists.values())), r[0], self.tokens),
            base[:3],
        )
        careful = self.by_hand(
            "careful loop", len(names), lambda r: loop_ms(self.whole, r, self.tokens, cached=True), base[:3]
        )
        self.by_hand("no cache", len(names), lambda r: loop_ms(self.whole, r, 4, cached=False), base[:1])

        alone = []
        for name in names:
            engine = self.engine([name])
            alone.append(self.time(engine, everything, f"engine, {name} alone").ms_per_token)
        for count in (2, 3, 4):
            chosen = [*names, names[0]][:count]
            for runner in ("sequential", "stacked"):
                try:
                    engine = self.engine(chosen, runner=runner)
                except ConfigError as error:  # these specialists cannot be stacked
                    print(f"  engine, {runner}, n={count}: {error}")
                    continue
                for batch in (1, 4, 16) if count == len(names) else (1,):
                    self.time(engine, everything, f"engine, {runner}", batch=batch)
        plain = {t.name: t for t in self.timings if t.num_specialists == len(names) and t.batch == 1}
        best = min(
            (plain[f"engine, {r}"] for r in ("sequential", "stacked") if f"engine, {r}" in plain),
            key=lambda t: t.ms_per_token,
        )
        runner = best.name.removeprefix("engine, ")
        self.ratios["fused / sum of its specialists alone"] = best.ms_per_token / sum(alone)
        self.ratios["careful loop / engine"] = careful / best.ms_per_token
        self.ratios["transformers, one specialist / engine, the same alone"] = one / alone[0]
        many = max(
            (t for t in self.timings if t.batch == 16 and t.num_specialists == len(names)), key=lambda t: t.tokens_per_s
        )
        self.ratios["16 together / one, tokens per second"] = many.tokens_per_s / best.tokens_per_s
        self.prefill(names, runner)
        self.speculate(names, runner=runner)
        self.reduced(names, everything)

    def time(self, engine: Engine, texts: Sequence[str], name: str, *, batch: int = 1) -> DecodeTiming:
        """One line of the engine."""
        prompts = self.rows(engine, texts)
        chosen = prompts[:3] if batch == 1 else (prompts * batch)[:batch]
        return self.add(time_decoding(engine, chosen, name=name, batch=batch, max_tokens=self.tokens))

    def prefill(self, names: Sequence[str], runner: str) -> None:
        """Reading a prompt of 512 tokens."""
        engine = self.engine(names, runner=runner, chunk=512)
        ids = tuple((self.tokenizer("The quick brown fox jumps over the lazy dog. " * 80)["input_ids"] * 10)[:512])
        rows = (ids,) * len(names)
        ours, theirs = time_prefill(engine, rows), prefill_seconds(self.whole, rows)
        print(f"  512 prompt tokens, {len(names)} specialists: {1e3 * ours:.0f} ms, transformers {1e3 * theirs:.0f} ms")
        self.ratios["prefill: transformers / engine"] = theirs / ours

    def speculate(self, names: Sequence[str], **options: Any) -> None:
        """Drafts on each domain, greedy and sampled, against plain decoding of the same prompts."""
        form = options.get("weights", "exact")
        engine = self.engine(names, **{"drafts": ("lookup", "self"), "draft_weights": self.draft_weights, **options})
        print(f"  drafts in {engine.runner.draft_form}")
        planners = {kinds: engine.make_planner(kinds, 1) for kinds in ((), *self.kinds)}
        for kinds in self.kinds:
            self.warm_up(engine, planners[kinds])
        for domain, texts in self.prompts.items():
            prompts = self.rows(engine, texts)
            for temperature in (0.0, 0.7):
                seeds = self.seeds if temperature else self.seeds[:1]
                speeds: dict[tuple[DraftKind, ...], list[float]] = {kinds: [] for kinds in planners}
                # Plain and drafted take turns, so that what else the machine does meets all alike.
                for seed in seeds:
                    for kinds, planner in planners.items():
                        engine.planner = planner
                        label = f"{domain}, T={temperature:g}, {form}, {'+'.join(kinds) or 'plain'}"
                        params = SamplingParams(temperature=temperature, seed=seed)
                        timing = time_decoding(
                            engine, prompts, name=label, batch=1, max_tokens=self.draft_tokens, params=params
                        )
                        speeds[kinds].append(self.add(timing).tokens_per_s)
                for kinds in self.kinds:
                    ratio = statistics.median(speeds[kinds]) / statistics.median(speeds[()])
                    self.ratios[f"{domain}, T={temperature:g}, {form}: {'+'.join(kinds)} / plain"] = ratio

    def warm_up(self, engine: Engine, planner: Planner) -> None:
        """Let it answer one other prompt of each domain, greedy and sampled; it then knows what passes cost."""
        engine.planner = planner
        for temperature in (0.0, 0.7):
            params = SamplingParams(temperature=temperature, seed=99)
            prompts = self.rows(engine, self.first_prompts)
            time_decoding(engine, prompts, name="", batch=1, max_tokens=self.draft_tokens // 2, params=params)

    def count(self, names: Sequence[str], of_block: float, of_token: float) -> None:
        """What drafts on each domain would give at such costs."""
        engine = self.engine(names, drafts=("lookup", "self"), draft_weights=self.draft_weights)
        print(f"  drafts in {engine.runner.draft_form}")
        planners = {kinds: engine.make_planner(kinds, 1) for kinds in self.kinds}
        for planner in planners.values():
            planner.costs = CountedCosts(of_block, of_token)
            self.warm_up(engine, planner)
        for domain, texts in self.prompts.items():
            prompts = self.rows(engine, texts)
            for temperature in (0.0, 0.7):
                for seed in self.seeds if temperature else self.seeds[:1]:
                    params = SamplingParams(temperature=temperature, seed=seed)
                    for kinds, planner in planners.items():
                        label = f"{domain}, T={temperature:g}, seed {seed}: {'+'.join(kinds)}"
                        self.ratios[label] = self.count_one(
                            engine, planner, prompts, CountedCosts(of_block, of_token), label, params
                        )

    def count_one(
        self,
        engine: Engine,
        planner: Planner,
        prompts: Sequence[Rows],
        costs: CountedCosts,
        label: str,
        params: SamplingParams,
    ) -> float:
        """One line; tokens for every pass of one row that was spent."""
        engine.planner, planner.costs = planner, costs
        before = engine.stats()
        time_decoding(engine, prompts, name=label, batch=1, max_tokens=self.draft_tokens, params=params)
        after = engine.stats()
        passes, tokens = sum(costs.rows.values()), after.generated_tokens - before.generated_tokens - len(prompts)
        print(
            f"  {label:34} {tokens:4} tokens in {passes:4} passes, "
            f"{after.drafted_tokens - before.drafted_tokens:4} drafted, "
            f"{after.accepted_tokens - before.accepted_tokens:4} kept: {tokens / costs.spent:5.2f}  "
            f"rows {dict(sorted(costs.rows.items()))}",
            flush=True,
        )
        return tokens / costs.spent

    def reduced(self, names: Sequence[str], everything: Sequence[str]) -> None:
        """Weights in fp16 and int8, with what they lose."""
        texts = [tuple(self.tokenizer(text)["input_ids"][:256]) for text in everything]
        texts = [ids for ids in texts if len(ids) > 1]
        exact = score_texts(self.engine(names), texts)
        for form in ("half", "int8"):
            engine = self.engine(names, weights=form)
            timing = self.time(engine, everything, f"engine, {form} weights")
            for batch in (4, 16):
                self.time(engine, everything, f"engine, {form} weights", batch=batch)
            loss = quality_loss(score_texts(engine, texts), exact)
            print(
                f"    {form}: {loss.loss:.4f} nats/token, exact {loss.exact_loss:.4f}, "
                f"same most likely token {loss.agreement:.2%}"
            )
            self.ratios[f"{form}: nats/token more than exact"] = loss.loss - loss.exact_loss
            self.ratios[f"{form}: same most likely token"] = loss.agreement
            self.ratios[f"{form}: exact / {form}, ms per token"] = (
                min(
                    t.ms_per_token
                    for t in self.timings
                    if t.name in ("engine, sequential", "engine, stacked")
                    and t.batch == 1
                    and t.num_specialists == len(names)
                )
                / timing.ms_per_token
            )
        self.speculate(names, weights="half")


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="fused models; default: the demo's and SmolLM2's, where they are")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("all", "drafts"), default="all")
    parser.add_argument("--kinds", action="append", help="A set of drafts, as lookup+self; may be given again.")
    parser.add_argument("--seeds", type=int, default=0, help="Of sampled answers; default: 2, quick 1.")
    parser.add_argument("--draft-weights", choices=("auto", "exact", "half", "int8", "int4"), default="auto")
    parser.add_argument("--count", metavar="PASS,TOKEN", help="Count drafts at such costs instead of taking times.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    kinds = [cast(tuple[DraftKind, ...], tuple(kind.split("+"))) for kind in options.kinds or []] or DRAFTS[1:]
    if unknown := {kind for some in kinds for kind in some} - {"lookup", "self"}:
        raise SystemExit(f"--kinds {'+'.join(sorted(unknown))} is unknown: lookup, self, or lookup+self")
    try:
        counted = [float(cost) for cost in options.count.split(",")] if options.count else []
    except ValueError:
        counted = [0.0]
    if counted and not (len(counted) == 2 and min(counted) > 0):
        raise SystemExit(f"--count {options.count}: two numbers are wanted, as 1.6,0.2")
    places = options.models or [str(ROOT / place) for place in PLACES if (ROOT / place / "config.json").is_file()]
    if not places:
        raise SystemExit("no fused model is there: name one, or run `make demo` first")
    report: dict[str, Any] = {
        "only": options.only,
        "counted_at": counted,
        "run": describe_run(),
        "threads": options.threads,
        "read_bandwidth_gb_per_s": 0.0 if counted else read_bandwidth(),
        "models": {},
    }
    if not counted:
        print(f"memory is read at {report['read_bandwidth_gb_per_s']:.1f} GB/s with {options.threads} threads")
    for place in places:
        label = str(Path(place).resolve().relative_to(ROOT)) if Path(place).resolve().is_relative_to(ROOT) else place
        print(label)
        drafts = {"num_seeds": options.seeds, "kinds": kinds, "draft_weights": options.draft_weights}
        bench = Bench(place, quick=options.quick, **drafts)
        names = list(bench.whole.names)
        if counted:
            bench.count(names, *counted)
        elif options.only == "drafts":
            bench.speculate(names)
        else:
            bench.run()
        for name, ratio in bench.ratios.items():
            print(f"    {name}: {ratio:.3f}")
        fractions = {
            f"{t.name}, n={t.num_specialists}": t.bandwidth / report["read_bandwidth_gb_per_s"]
            for t in bench.timings
            if t.bandwidth and t.batch == 1
        }
        report["models"][label] = {
            "timings": as_rows(bench.timings),
            "ratios": bench.ratios,
            "fraction_of_read_bandwidth": fractions,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if options.json is not None:
            write_text_atomically(json.dumps(report, indent=1) + "\n", options.json)


if __name__ == "__main__":
    main()
