"""The training loop of stage 1 with hidden states from disk instead of specialists.

It trains what `Loop` trains, on the same batches cut in the same pieces, and gives the same numbers to rounding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.config.training import Stage1CacheConfig
from ultrafuser.data.sampler import Draw
from ultrafuser.errors import TrainingError
from ultrafuser.model.fusion import gate_weights
from ultrafuser.train.hidden.composed import encode_composed
from ultrafuser.train.hidden.file import HiddenFile
from ultrafuser.train.hidden.fill import Specialists, fill
from ultrafuser.train.hidden.plan import GB, Plan, Window, describe_plan, make_plan, measure_flops
from ultrafuser.train.hidden.store import HiddenStore, check_folder, hash_vocabulary
from ultrafuser.train.loop import Loop
from ultrafuser.train.parallel.strategy import Share
from ultrafuser.train.phase import Phase


class CachedLoop(Loop):
    """Runs stage 1 on a model of which only heads and gate need be in memory.

    Args:
        phase: A stage that trains the gate alone.
        specialists: Where the specialists come from.
        cache: Mode and budget.
        folder: Of the hidden states.

    Raises:
        ConfigError: The disk budget is too small.
        TrainingError: A specialist with dropout, a folder that cannot be written, and what `Loop` raises.
    """

    def __init__(self, phase: Phase, specialists: Specialists, cache: Stage1CacheConfig, folder: Path) -> None:
        super().__init__(phase)
        self.specialists, self.cache = specialists, cache
        for name, facts in specialists.facts.items():
            if facts.dropout is not None:
                raise TrainingError(
                    f"specialist {name!r} has dropout ({facts.dropout}), which is drawn anew in every step, so its "
                    "hidden states cannot be kept: set it to 0 in its config.json, or train.stage1_cache.mode: off"
                )
        check_folder(folder)
        vocabulary = hash_vocabulary(phase.encoder.tokenizer)
        self.store = HiddenStore(
            folder,
            budget_bytes=cache.disk_gb * GB,
            identities={
                name: {
                    "weights": facts.digest,
                    "dtype": str(facts.dtype),
                    "precision": phase.train.precision,
                    "template": hashlib.sha256(template.source.encode()).hexdigest(),
                    "tokenizer": vocabulary,
                }
                for (name, facts), template in zip(specialists.facts.items(), phase.encoder.templates, strict=True)
            },
        )
        templates = [[template.source, *template.end_of_turn] for template in phase.encoder.templates]
        ids = {domain: [record.id for record in records] for domain, records in phase.sources.items()}
        self._content = [templates, vocabulary, phase.max_length, ids]  # decides what composed records are as tokens
        self.plan: Plan | None = None
        self._composed: dict[Draw, EncodedRecord] = {}
        self._validation, self._steps = Readers(self.store), Readers(self.store)
        self._reading = self._steps

    def make_plan(self) -> Plan:
        """Which hidden states this stage needs, and in which windows.

        Raises:
            ConfigError: They do not fit the budget.
        """
        batches = [self.sampler.batch(step) for step in range(self.stage.steps)]
        self._composed = encode_composed(
            self.store.folder,
            [draw for draw in dict.fromkeys(itertools.chain(*batches)) if draw.joined is not None],
            super()._record,
            identity=self._content,
        )
        validation = [list(records)[: self.train.validation_records] for records in self.phase.validation.values()]
        return make_plan(
            ([self._record(draw) for draw in batch] for batch in batches),
            itertools.chain(*validation),
            self.specialists.facts,
            mode=self.cache.mode,
            budget_bytes=self.store.budget_bytes,
        )

    def run(self) -> None:
        """Train until the last step; see `Loop.run`."""
        try:
            super().run()
        finally:
            self._validation.close()
            self._steps.close()

    def validate(self) -> dict[str, float]:
        """Response loss of each domain on its validation records; see `Loop.validate`."""
        self._reading = self._validation
        try:
            return super().validate()
        finally:
            self._reading = self._steps

    def _hash(self) -> str:
        # In the weights of a model with heads alone the loop's own hash does not see the backbones.
        digests = [facts.digest for facts in self.specialists.facts.values()]
        return hashlib.sha256(json.dumps([super()._hash(), digests]).encode()).hexdigest()

    def _begin(self, step: int) -> None:
        """Make and print the plan; make the files of validation and of the first window that is needed."""
        plan = self.plan = self.make_plan()
        first = plan.window_of(step)
        ahead = [window for window in plan.windows if window.steps.start >= first.steps.start]
        missing = self.store.missing([*plan.all[: len(plan.all) - len(plan.windows)], *ahead])
        if self.cache.mode == "full":
            loads = sum(bool(windows) for windows in missing.values())
        else:
            # Validation is made with the first window, and another window deletes what does not fit beside it.
            loads = sum(len({w.steps or first.steps for w in windows}) for windows in missing.values())
        dtype = torch.bfloat16 if self._bf16 else next(iter(self.specialists.facts.values())).dtype
        flops = measure_flops(self.device, dtype)
        say(describe_plan(plan, folder=self.store.folder, missing=missing, loads=loads, flops_per_s=flops))
        self.store.notice_others(missing)
        self._fill([*plan.all[: len(plan.all) - len(plan.windows)], *(ahead if self.cache.mode == "full" else [first])])
        self._validation.open([plan.validation] if plan.validation.records else [])

    def _fill(self, windows: Sequence[Window]) -> None:
        assert self.plan is not None
        missing = self.store.missing(windows)
        if not any(missing.values()):
            return
        size = {name: facts.hidden_size * facts.dtype.itemsize for name, facts in self.specialists.facts.items()}
        needed = sum(size[name] * window.num_tokens for name, lacking in missing.items() for window in lacking)
        validation = [self.store.path(name, self.plan.validation) for name in size]
        keep = [*validation, *(self.store.path(name, window) for name in size for window in windows)]
        self.store.make_room(needed, self.plan, keep)
        fill(
            self.store,
            missing,
            self.specialists,
            pad_id=self.phase.encoder.pad_id,
            max_columns=self.train.micro_batch_tokens,
            bf16=self._bf16,
            report=say,
        )

    def _step(self, step: int) -> dict[str, Any]:
        if not self._steps.holds(step):
            assert self.plan is not None
            window = self.plan.window_of(step)
            self._steps.close()
            self._fill([window])
            self._steps.open([window])
        return super()._step(step)

    def _forward(self, records: Sequence[EncodedRecord]) -> Iterator[tuple[Share, Tensor, Tensor]]:
        """Piece by piece, as `Loop` cuts them: hidden states from disk, gate, heads."""
        model = self.phase.model
        for share in self.strategy.deal(records, max_columns=self.train.micro_batch_tokens):
            piece = share.records
            hiddens = {name: self._reading.rows(name, piece).to(self.device) for name in model.names}
            labels = torch.tensor([token for r in piece for turn in r.turns for token in turn.response])
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
                scores = model.fusion_gate(list(hiddens.values()), list(hiddens))
                if model.config.granularity == "prompt":
                    scores = scores[response_starts(piece).to(self.device)]
                weights = gate_weights(scores)
                nll = model.token_loss(hiddens, weights, labels.to(self.device)).nll
            yield share, nll, weights

    def _record(self, draw: Draw) -> EncodedRecord:
        return super()._record(draw) if draw.joined is None else self._composed[draw]

    @property
    def _bf16(self) -> bool:
        return self.train.precision == "bf16"


class Readers:
    """The open files of some windows, and where each record stands in them."""

    def __init__(self, store: HiddenStore) -> None:
        self.store = store
        self.windows: list[Window] = []
        self._files: dict[str, HiddenFile] = {}
        self._places: dict[str, dict[str, tuple[int, int]]] = {}

    def open(self, windows: Sequence[Window]) -> None:
        """Open the files of a window (or of none)."""
        self.close()
        self.windows = list(windows)
        for window in windows:
            for name in self.store.identities:
                self._files[name] = HiddenFile(self.store.path(name, window))
                ids = self.store.order(name, window)
                stops = [0, *itertools.accumulate(window.records[id].num_response_tokens for id in ids)]
                self._places[name] = dict(zip(ids, itertools.pairwise(stops), strict=True))

    def holds(self, step: int) -> bool:
        """Whether the records of a step are here."""
        return any(step in window.steps for window in self.windows)

    def rows(self, name: str, records: Sequence[EncodedRecord]) -> Tensor:
        """A specialist's hidden states of some records, one after another."""
        places = (self._places[name][record.id] for record in records)
        return torch.cat([self._files[name].rows(*place) for place in places])

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self.windows, self._files, self._places = [], {}, {}


def response_starts(records: Sequence[EncodedRecord]) -> Tensor:
    """For each response token of some records the row of the first token of its response."""
    lengths = torch.tensor([len(turn.response) for record in records for turn in record.turns])
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def say(text: str) -> None:
    """To people, beside the progress."""
    print(text, file=sys.stderr, flush=True)
