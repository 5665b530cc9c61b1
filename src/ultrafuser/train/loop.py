"""The training loop: steps over one model, from the newest checkpoint to the last step.

One loop serves every phase: a specialist's fine-tuning (n = 1), stage 1 (the gate alone), stage 2 (everything). The
loss of a step is the sum of response NLL over the response tokens of the whole batch, however it is cut into pieces and
dealt to processes. Several processes run the same loop side by side; how they share model and batch is a `Strategy`.

Source: Ding et al. 2024 (arXiv 2403.08281), Algorithm 1, Appendix B.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ultrafuser.alignment.collate import collate
from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.data.compose import compose
from ultrafuser.data.dataset import truncate
from ultrafuser.data.sampler import Draw, Sampler
from ultrafuser.errors import CheckpointError, TrainingError
from ultrafuser.model.memory import peak_bytes
from ultrafuser.train.checkpoint import (
    Checkpoint,
    find_newest,
    list_checkpoints,
    read_checkpoint,
    read_state,
    write_checkpoint,
)
from ultrafuser.train.optimizer import NamedAdamW
from ultrafuser.train.parallel.checkpoint import load_shards, write_shards
from ultrafuser.train.parallel.single import Single
from ultrafuser.train.parallel.strategy import Share, Strategy
from ultrafuser.train.parallel.world import World, lost_peer
from ultrafuser.train.phase import (
    Phase,
    check_tokens,
    choose_parameters,
    describe_weights,
    hash_phase,
    join_weights,
)
from ultrafuser.train.report import PhaseReport
from ultrafuser.train.signals import StopRequest
from ultrafuser.train.sums import Sums

logger = logging.getLogger(__name__)

COMPOSED = "composed"  # the domain that joined records are counted under


class Loop:
    """Runs a phase to its end, going on from the newest whole checkpoint.

    Args:
        phase: What to train; its model is whole.
        strategy: How several processes share it; None: this process is the only one.

    Raises:
        CheckpointError: The checkpoints there were made with other settings, or the disk refuses.
        TrainingError: The loss or the gradient is no longer finite; names the records of the batch. Or another process
            ended.
        VocabularyError: A record has a token that not every specialist has.
    """

    def __init__(self, phase: Phase, strategy: Strategy | None = None) -> None:
        self.phase = phase
        self.stage, self.train = phase.stage, phase.train
        self.strategy: Strategy = strategy if strategy is not None else Single(World(device=phase.model.device))
        self.world = self.strategy.world
        self.device = self.world.device
        check_tokens(phase)
        trained = choose_parameters(phase.model, train_specialists=phase.stage.train_specialists, only=phase.trained)
        self._weights = describe_weights(phase.model, trained)
        self.trained = self.strategy.prepare(phase.model, trained)
        self.optimizer = NamedAdamW(self.trained, phase.stage)
        self.sampler = Sampler(
            {domain: len(records) for domain, records in phase.records.items()},
            records_per_domain=phase.stage.records_per_domain,
            seed=phase.seed,
            composed_share=phase.stage.composed_share,
            kind=phase.train.sampler,
        )
        self.checkpoints = phase.folder / "checkpoints"

    def run(self) -> None:
        """Train until the last step; returns with the model trained and its last checkpoint on disk."""
        try:
            self._run()
        except RuntimeError as error:
            if (reason := lost_peer(error)) is None:
                raise
            saved = list_checkpoints(self.checkpoints)
            start = f"from {saved[-1].name}" if saved else "from the start of the phase"
            raise TrainingError(
                f"{self.phase.name}: a process of this run ended or does not answer ({reason}); start again to go on "
                f"{start}"
            ) from error

    def _run(self) -> None:
        self.world.agree("model", list(self._weights))
        self.fingerprint = self._hash()
        self.world.agree("model, data or recipe", self.fingerprint)
        step = self._resume()
        if step >= self.stage.steps:
            return
        self._begin(step)
        model = self.phase.model
        model.train()
        model.loss_chunk, model.loss_backend = self.train.loss_chunk, self.train.loss_backend
        # Frozen specialists keep no activations anyway, and torch's checkpoints hold the inputs of layers for a while.
        if self.train.activation_checkpointing and self.stage.train_specialists:
            for specialist in model.specialists.values():
                specialist.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            with self._report(step) as report, StopRequest(self.world) as stop:
                while step < self.stage.steps:
                    values = self._step(step)
                    step += 1
                    is_last = step == self.stage.steps
                    if is_last or step % self.train.validate_every == 0:
                        values["validation"] = self.validate()
                    if report is not None:
                        report.note(values)
                    is_stopping = self._stops(report, stop)
                    if is_last or is_stopping or step % self.train.checkpoint_every == 0:
                        self._save(step)
                        if report is not None:
                            report.saved(list_checkpoints(self.checkpoints)[-1])
                        is_stopping = is_stopping or self._stops(report, stop)
                    if is_stopping:
                        raise report.stopped() if report is not None and report.wish else KeyboardInterrupt
        finally:
            model.train(False)

    def _report(self, step: int) -> AbstractContextManager[PhaseReport | None]:
        """Who is told of every step; of several processes the first tells."""
        return PhaseReport(self.phase, step) if self.world.is_main else nullcontext()

    def _stops(self, report: PhaseReport | None, stop: StopRequest) -> bool:
        """Whether all processes stop now: for a signal, or because a callback asked for it."""
        stop.made = stop.made or (report is not None and report.wish is not None)
        return stop.agreed()

    def _hash(self) -> str:
        """Of all that decides the result of the phase; what each process holds of the model goes into it."""
        return hash_phase(self.phase, join_weights(self.world.gather(self._weights)))

    def _begin(self, step: int) -> None:
        """What is to be done once, before the first step that is run."""

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step on the batch of this step; returns its line of metrics."""
        began = time.perf_counter()
        self._seed(step)
        records = [self._record(draw) for draw in self.sampler.batch(step)]
        num_tokens = sum(record.num_response_tokens for record in records)
        sums = Sums()
        for share, nll, weights in self._forward(records):
            loss = nll.sum() / num_tokens
            if self.stage.gate_entropy and len(self.phase.model.names) > 1:
                loss = loss + self.stage.gate_entropy * (weights * weights.clamp_min(1e-9).log()).sum() / num_tokens
            # A share that does not count goes backward all the same: other processes wait for it on the way.
            (loss * (self.strategy.loss_scale if share.counts else 0.0)).backward()  # type: ignore[no-untyped-call]
            if share.counts:
                sums.add(share.records, nll, weights)
        sums = self._over_all(sums)
        norm = self.strategy.clip(self.trained, self.stage.max_grad_norm)
        if not (math.isfinite(sums.loss()) and math.isfinite(norm)):
            raise self._not_finite(step, sums, norm, records)
        rate = self.optimizer.step(step)
        seconds = time.perf_counter() - began
        return {
            "step": step,
            "loss": sums.loss(),
            "loss_per_domain": sums.loss_per_domain(),
            "gate_weights": sums.gate_weights(self.phase.model.names),
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "memory_bytes": peak_bytes(self.device),
            "seconds": seconds,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Response loss of each domain on its validation records, nats per token."""
        self.phase.model.train(False)
        sums = Sums()
        for records in self.phase.validation.values():
            for share, nll, weights in self._forward(list(records)[: self.train.validation_records]):
                if share.counts:
                    sums.add(share.records, nll, weights)
        self.phase.model.train()
        return self._over_all(sums).loss_per_domain()

    def _over_all(self, sums: Sums) -> Sums:
        """The sums of all processes."""
        domains = sorted({*self.phase.records, *self.phase.validation, COMPOSED})
        return self.strategy.add_up(sums, domains=domains, num_specialists=len(self.phase.model.names))

    def _seed(self, step: int) -> None:
        """Dropout, too, depends on the step alone (and on the process, for each has other records)."""
        place = (self.world.rank,) if self.world.size > 1 else ()
        torch.manual_seed(_mix(self.phase.seed, self.phase.name, step, *place))

    def _forward(self, records: Sequence[EncodedRecord]) -> Iterator[tuple[Share, Tensor, Tensor]]:
        """This process's shares of a batch: NLL [M] and gate weights [M, N] of their response tokens."""
        for share in self.strategy.deal(records, max_columns=self.train.micro_batch_tokens):
            batch = collate(share.records, pad_id=self.phase.encoder.pad_id).tensors(self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.train.precision == "bf16"):
                nll, weights = self.strategy.response_nll(self.phase.model, batch)
            yield share, nll, weights

    def _record(self, draw: Draw) -> EncodedRecord:
        record = self.phase.records[draw.domain][draw.index]
        if draw.joined is None:
            return record
        first = self.phase.sources[draw.domain][draw.index]
        second = self.phase.sources[draw.joined[0]][draw.joined[1]]
        name = f"{first.id}+{second.id}"
        joined = self.phase.encoder.encode(compose(first.messages, second.messages), id=name, domain=COMPOSED)
        if self.phase.max_length is None or joined.num_columns <= self.phase.max_length:
            return joined
        # Two records that fit alone may not fit together; where not even both questions do, the first stands alone.
        return truncate(joined, self.phase.max_length) or record

    def _not_finite(self, step: int, sums: Sums, norm: float, records: Sequence[EncodedRecord]) -> TrainingError:
        bad = [domain for domain, nll in sums.nll.items() if not math.isfinite(nll)]
        shown = [record for record in records if not bad or record.domain in bad]
        names = ", ".join(f"{record.domain}:{record.id[:12]}" for record in shown[:4])
        saved = list_checkpoints(self.checkpoints)
        return TrainingError(
            f"{self.phase.name}, step {step}: loss {sums.loss()} and gradient norm {norm} are not finite. Batch: "
            f"{names}{f' and {len(shown) - 4} more' if len(shown) > 4 else ''}. The last good checkpoint is "
            f"{saved[-1] if saved else 'the start of the phase'}; lower the learning rate or look at these records"
        )

    def _save(self, step: int) -> None:
        checkpoint = Checkpoint(step, dict(self.trained), self.optimizer.state(), {"fingerprint": self.fingerprint})
        if self.world.size == 1:
            write_checkpoint(self.checkpoints, checkpoint, keep=self.train.keep_checkpoints)
        else:
            write_shards(self.checkpoints, checkpoint, keep=self.train.keep_checkpoints, world=self.world)

    @torch.no_grad()
    def _resume(self) -> int:
        """Take over the newest whole checkpoint; returns the step to go on with."""
        path = find_newest(self.checkpoints, self.world)
        if path is None:
            return 0
        state = read_state(path)
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{self.checkpoints} was made with other settings, data or weights: choose another output folder, or "
                "delete it to start this phase anew"
            )
        if self.world.size == 1:
            checkpoint = read_checkpoint(path)
            for name, value in checkpoint.parameters.items():
                self.trained[name].copy_(value)
            self.optimizer.load(checkpoint.optimizer)
        else:
            slots = self.optimizer.slots()
            load_shards(path, self.trained, slots, self.world)
            self.optimizer.load(slots, copy=False)
        step: int = state["step"]
        if self.world.is_main and 0 < step < self.stage.steps:
            logger.warning("%s goes on from step %d of %d", self.phase.name, step, self.stage.steps)
        return step


def _mix(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
