"""Inspect a run or a model: every part in turn, numbers and figures into one folder, one page over all.

A part that cannot be done (no model, no metrics, no records) says so in one line, and the others are done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.analysis.inspection.curves import Curves, find_curves, read_curves
from ultrafuser.analysis.inspection.embeddings import (
    embed_by_encoder,
    embed_by_specialist,
    find_embeddings,
    instruction,
)
from ultrafuser.analysis.inspection.findings import PARTS, Finding, Part, write_finding
from ultrafuser.analysis.inspection.gate import find_gate, find_heatmap
from ultrafuser.analysis.inspection.losses import MeanInterval, find_losses
from ultrafuser.analysis.inspection.observe import Observation, observe
from ultrafuser.analysis.inspection.page import write_page
from ultrafuser.analysis.inspection.plots import INSTALL, write_plots
from ultrafuser.analysis.inspection.records import Sample, Target, locate, sample_records
from ultrafuser.analysis.inspection.stability import (
    CheckpointLosses,
    find_stability,
    kept_checkpoints,
    score_checkpoints,
)
from ultrafuser.analysis.inspection.tokens import find_question, find_tokens
from ultrafuser.analysis.report import write_report
from ultrafuser.analysis.results import read_results
from ultrafuser.config.load import load_recipe
from ultrafuser.drawing.figures import can_draw
from ultrafuser.errors import ConfigError, DataError, ModelError, UltrafuserError
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.specialist import first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What to inspect and how.

    Attributes:
        parts: Which parts, of `PARTS`; "question" needs `question`.
        data: A file of records; None: the run's held-out records.
        limit: Records of each domain, at most.
        answers: Answers shown of each domain.
        max_tokens: Longest answer, in tokens.
        question: Asked as it is; None: nothing is asked.
        encoder: A specialist's name or the folder of a sentence encoder; None: the first specialist.
        interval: Adds intervals to the losses.
    """

    parts: Sequence[Part] = PARTS
    data: Path | None = None
    limit: int = 100
    answers: int = 2
    max_tokens: int = 128
    question: str | None = None
    encoder: str | None = None
    interval: MeanInterval | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What came of it: the page, the findings, and one sentence for each part that could not be done."""

    page: Path
    findings: list[Finding]
    missing: list[str]


def parse_parts(text: str | None, *, question: bool) -> tuple[Part, ...]:
    """Read `losses,gate`; None means all, or the question alone where one is asked.

    Raises:
        ConfigError: An unknown part, or none, or `question` without one.
    """
    if text is None:
        return ("question",) if question else tuple(part for part in PARTS if part != "question")
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in PARTS]:
        raise ConfigError(f"--only {unknown[0]!r} is no part: choose from {', '.join(PARTS)}")
    if "question" in wanted and not question:
        raise ConfigError("--only question needs a question: ask it with --question")
    if not wanted:
        raise ConfigError(f"--only names no part: choose from {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in wanted or (part == "question" and question))


def inspect(folder: Path, options: Options = Options(), *, output: Path | None = None) -> Inspection:
    """Inspect a run folder or the folder of a fused model.

    Args:
        folder: Of the run or the model.
        options: What and how.
        output: Where to write; None: `inspection/` in the folder. Findings of other parts there are kept.

    Raises:
        DataError: There is no such folder, or the output cannot be written.
    """
    target = locate(folder)
    output = output if output is not None else target.output
    subject = Subject(target, options)
    findings, missing = [], []
    for part in options.parts:
        if part == "question" and options.question is None:
            continue
        try:
            finding = _FIND[part](subject)
        except UltrafuserError as error:
            missing.append(f"{part}: {error}")
            continue
        findings.append(finding)
        write_finding(finding, output)
        if can_draw():
            write_plots(finding, output)
    if not can_draw():
        missing.append(INSTALL)
    page = write_page(output, name=folder.resolve().name, notes=missing)
    if target.run is not None and output == target.output:
        _link_from_report(target.run)
    return Inspection(page, findings, missing)


def _link_from_report(run: Path) -> None:
    """Write the run's report anew, now that there is a page that it can link."""
    results = run / "results.json"
    if not (results.is_file() and (run / "report.html").is_file()):
        return
    try:
        write_report(read_results(results), run / "report.html")
    except DataError as error:
        logger.warning("the report does not link the inspection: %s", error)


class Subject:
    """A run or model with what several parts need, made once and only when needed."""

    def __init__(self, target: Target, options: Options) -> None:
        self.target, self.options = target, options

    @cached_property
    def generator(self) -> FusedGenerator:
        """The fused model, on a GPU if there is one."""
        if not (self.target.model / "config.json").is_file():
            raise ModelError(f"no model at {self.target.model}: train one first")
        try:
            generator = FusedGenerator.from_pretrained(str(self.target.model))
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"the model at {self.target.model} cannot be loaded: {first_line(error)}") from error
        if torch.cuda.is_available():
            generator.model.to(torch.device("cuda"))
        return generator

    @cached_property
    def sample(self) -> Sample:
        """The records."""
        return sample_records(self.target, data=self.options.data, limit=self.options.limit)

    @cached_property
    def observations(self) -> list[Observation]:
        """Every record that is short enough, observed."""
        encoder, longest = self.generator.encoder, self.sample.max_length
        encoded: list[EncodedRecord] = []
        for domain, records in self.sample.records.items():
            for index, record in enumerate(records, start=1):
                item = encoder.encode(record.messages, id=f"{domain}:{index}", domain=domain)
                if longest is None or item.num_columns <= longest:
                    encoded.append(item)
        if not encoded:
            raise DataError(f"{self.sample.source}: every one is longer than max_length {longest}")
        return observe(self.generator.model, encoded, pad_id=encoder.pad_id)

    @cached_property
    def specialists(self) -> list[str]:
        """Names in order, as far as the recipe or the model tells."""
        try:
            return list(load_recipe(self.target.recipe).specialists)
        except ConfigError:
            return self.generator.names if (self.target.model / "config.json").is_file() else []

    def note(self) -> str:
        """Which records the numbers are of."""
        return f"Measured on {self.sample.source}, at most {self.options.limit} of each domain."


def _losses(subject: Subject) -> Finding:
    found = find_losses(subject.observations, subject.generator.names, interval=subject.options.interval)
    return found.model_copy(update={"notes": [subject.note()]})


def _gate(subject: Subject) -> Finding:
    found = find_gate(subject.observations, subject.generator.names)
    return found.model_copy(update={"notes": [subject.note()]})


def _heatmap(subject: Subject) -> Finding:
    return find_heatmap(subject.observations, subject.generator.names)


def _tokens(subject: Subject) -> Finding:
    chosen = [record for part in subject.sample.records.values() for record in part[: subject.options.answers]]
    return find_tokens(subject.generator, chosen, max_tokens=subject.options.max_tokens)


def _question(subject: Subject) -> Finding:
    assert subject.options.question is not None, "parts are left out before"
    return find_question(subject.generator, subject.options.question, max_tokens=subject.options.max_tokens)


def _curves(subject: Subject) -> Finding:
    if subject.target.run is None:
        raise DataError("a model folder has no metrics: name the folder of the run")
    return find_curves(subject.target.run, subject.specialists)


def _stability(subject: Subject) -> Finding:
    if subject.target.run is None:
        raise DataError("a model folder has no checkpoints: name the folder of the run")
    validation: Curves = read_curves(subject.target.run)[1]
    checkpoints = kept_checkpoints(subject.target.run)
    scored: CheckpointLosses = {}
    notes = [
        f"Checkpoints kept of the last phase: {len(checkpoints)}. To compare several, raise train.keep_checkpoints."
    ]
    if len(checkpoints) > 1:
        conversations = {d: [r.messages for r in records] for d, records in subject.sample.records.items()}
        scored = score_checkpoints(subject.generator, checkpoints, conversations)
        notes = [subject.note()]
    return find_stability(validation, scored, specialists=subject.specialists, notes=notes)


def _embeddings(subject: Subject) -> Finding:
    records = [record for part in subject.sample.records.values() for record in part]
    texts = [instruction(record) for record in records]
    encoder = subject.options.encoder
    if encoder is not None and Path(encoder).is_dir():
        embeddings, by = embed_by_encoder(Path(encoder), texts), f"the encoder {Path(encoder).name}"
    else:
        names = subject.generator.names
        if encoder is not None and encoder not in names:
            raise ConfigError(f"--encoder {encoder!r} is no folder and no specialist; there are {', '.join(names)}")
        name = encoder or names[0]
        embeddings, by = embed_by_specialist(subject.generator, name, texts), f"the specialist {name}"
    labels = [record.domain for record in records]
    return find_embeddings(embeddings, labels, by=by, specialists=subject.specialists)


_FIND: dict[Part, Callable[[Subject], Finding]] = {
    "losses": _losses,
    "gate": _gate,
    "heatmap": _heatmap,
    "tokens": _tokens,
    "question": _question,
    "curves": _curves,
    "stability": _stability,
    "embeddings": _embeddings,
}
