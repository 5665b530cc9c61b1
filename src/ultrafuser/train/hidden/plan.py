"""Which hidden states stage 1 needs, cut into windows of steps that fit a disk budget.

The batch of a step is a pure function of (seed, step), so all of this is known before anything runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.errors import ConfigError
from ultrafuser.model.lean import SpecialistFacts

FULL_WINDOW_BYTES = 4 * 10**9  # in mode full: what a kill can lose of one specialist is a part of this
GB = 10**9


@dataclass(frozen=True)
class Window:
    """Steps whose records have their hidden states in the same files, or the validation records.

    Attributes:
        label: Names the files.
        steps: The steps; empty for validation.
        records: Every record of these steps once, by id.
    """

    label: str
    steps: range
    records: Mapping[str, EncodedRecord]

    @cached_property
    def num_tokens(self) -> int:
        """Response tokens: rows of each file."""
        return sum(record.num_response_tokens for record in self.records.values())

    @cached_property
    def num_columns(self) -> int:
        """Columns that a specialist reads, at most."""
        return sum(record.num_columns for record in self.records.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """All windows of a stage."""

    windows: Sequence[Window]
    validation: Window
    facts: Mapping[str, SpecialistFacts]

    @property
    def all(self) -> list[Window]:
        """Validation first, then the windows in order."""
        return [*([self.validation] if self.validation.records else []), *self.windows]

    def num_bytes(self, window: Window) -> int:
        """Bytes of a window's hidden states, of all specialists."""
        return window.num_tokens * bytes_per_token(self.facts)

    def window_of(self, step: int) -> Window:
        """The window that a step belongs to."""
        return next(window for window in self.windows if step in window.steps)


def bytes_per_token(facts: Mapping[str, SpecialistFacts]) -> int:
    """Bytes of one response token's hidden states, of all specialists."""
    return sum(fact.hidden_size * fact.dtype.itemsize for fact in facts.values())


def make_plan(
    batches: Iterable[Sequence[EncodedRecord]],
    validation: Iterable[EncodedRecord],
    facts: Mapping[str, SpecialistFacts],
    *,
    mode: str,
    budget_bytes: float,
) -> Plan:
    """Cut a stage into windows.

    In mode `window` a window takes as many steps as fit, so that specialists are loaded as seldom as can be. In mode
    `full` everything must fit, and windows are only where a killed run goes on.

    Args:
        batches: The records of every step, from step 0 on: a longer stage has the same first windows.
        validation: Records that are validated on; their hidden states stay for all of the stage.
        facts: Of the specialists.
        mode: `window` or `full`.
        budget_bytes: The most that may lie on disk at once.

    Raises:
        ConfigError: A step, or in mode `full` the whole, does not fit; says what would.
    """
    whole = Plan([], Window("validation", range(0), {record.id: record for record in validation}), facts)
    room = budget_bytes - whole.num_bytes(whole.validation)
    limit = min(FULL_WINDOW_BYTES, room) if mode == "full" else room
    windows: list[Window] = []
    start, used = 0, 0
    records: dict[str, EncodedRecord] = {}
    per_token = bytes_per_token(facts)
    for step, batch in enumerate(batches):
        new = {record.id: record for record in batch if record.id not in records}
        size = per_token * sum(record.num_response_tokens for record in new.values())
        if records and used + size > limit:
            windows.append(_window(start, step, records))
            start, records, used = step, {}, 0
            new = {record.id: record for record in batch}
            size = per_token * sum(record.num_response_tokens for record in new.values())
        if size > room:
            raise ConfigError(
                f"train.stage1_cache.disk_gb {budget_bytes / GB:g} is too small for the validation records and step "
                f"{step}: they take {(budget_bytes - room + size) / GB:.6f} GB. Raise it, or set "
                "train.stage1_cache.mode: off"
            )
        records |= new
        used += size
        last = step
    if records:
        windows.append(_window(start, last + 1, records))
    plan = Plan(windows, whole.validation, facts)
    if mode == "full" and (total := sum(map(plan.num_bytes, plan.all))) > budget_bytes:
        raise ConfigError(
            f"train.stage1_cache.disk_gb {budget_bytes / GB:g} is too small to keep all hidden states: they take "
            f"{total / GB:.6f} GB. Raise it, or set train.stage1_cache.mode: window"
        )
    return plan


def describe_plan(
    plan: Plan, *, folder: object, missing: Mapping[str, Sequence[Window]], loads: int, flops_per_s: float
) -> str:
    """The plan in a few lines: windows, bytes, loads of specialists, hours of forward passes.

    Args:
        plan: All of it.
        folder: Where files lie.
        missing: Windows whose file is still to be made, by specialist.
        loads: How often a specialist is loaded for these.
        flops_per_s: Of the machine.
    """
    seconds = sum(
        2 * plan.facts[name].num_parameters * window.num_columns / flops_per_s
        for name, windows in missing.items()
        for window in windows
    )
    parts = sum(map(len, missing.values()))
    lines = [
        f"hidden states of stage 1 in {folder}: {len(plan.windows)} window{'s'[: len(plan.windows) > 1]} of steps, "
        f"{sum(map(plan.num_bytes, plan.all)) / GB:.3f} GB in all, at most "
        f"{max(map(plan.num_bytes, plan.all)) / GB:.3f} GB a window",
        f"{parts} of {len(plan.all) * len(plan.facts)} files are to be made: {loads} loads of a specialist, about "
        f"{seconds / 3600:.2f} h of forward passes at {flops_per_s / 1e9:.0f} GFLOP/s"
        if parts
        else "all files are there: no forward pass",
    ]
    shown = plan.all if len(plan.all) <= 8 else [*plan.all[:6], plan.all[-1]]
    lines += [
        f"  {window.label}: {len(window.records)} records, {window.num_tokens} response tokens, "
        f"{plan.num_bytes(window) / GB:.3f} GB"
        for window in shown
    ]
    return "\n".join(lines)


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of this machine, by a matrix product like those of a small layer."""
    left, right = (torch.ones(512, 1024, dtype=dtype, device=device) for _ in range(2))
    rates = []
    for _ in range(4):
        began = time.perf_counter()
        float((left @ right.T).sum())  # waits for the device
        rates.append(2 * 512 * 512 * 1024 / (time.perf_counter() - began))
    return max(rates)


def _window(start: int, stop: int, records: Mapping[str, EncodedRecord]) -> Window:
    return Window(f"steps-{start:06d}-{stop - 1:06d}", range(start, stop), records)
