"""The training loop: steps over one model, from the newest checkpoint to the last step.

One loop serves every phase: a specialist's fine-tuning (n = 1), stage 1 (the gate alone), stage 2 (everything). The
loss of a step is the sum of response NLL over the response tokens of the whole batch, however it is cut into pieces.

Source: Ding et al. 2024 (arXiv 2403.08281), Algorithm 1, Appendix B.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultrafuser.alignment.collate import collate, micro_batches
from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.data.compose import compose
from ultrafuser.data.dataset import truncate
from ultrafuser.data.sampler import Draw, Sampler
from ultrafuser.errors import CheckpointError, TrainingError
from ultrafuser.model.memory import peak_bytes
from ultrafuser.train.checkpoint import Checkpoint, list_checkpoints, read_newest, write_checkpoint
from ultrafuser.train.optimizer import NamedAdamW
from ultrafuser.train.phase import Phase, choose_parameters, hash_phase
from ultrafuser.train.signals import StopRequest
from ultrafuser.train.sums import Sums
from ultrafuser.train.tracking import Tracker

logger = logging.getLogger(__name__)

COMPOSED = "composed"  # the domain that joined records are counted under


class Loop:
    """Runs a phase to its end, going on from the newest whole checkpoint.

    Raises:
        CheckpointError: The checkpoints there were made with other settings, or the disk refuses.
        TrainingError: The loss or the gradient is no longer finite; names the records of the batch.
    """

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.stage, self.train = phase.stage, phase.train
        self.device = phase.model.device
        self.trained = choose_parameters(
            phase.model, train_specialists=phase.stage.train_specialists, only=phase.trained
        )
        self.optimizer = NamedAdamW(self.trained, phase.stage)
        self.sampler = Sampler(
            {domain: len(records) for domain, records in phase.records.items()},
            records_per_domain=phase.stage.records_per_domain,
            seed=phase.seed,
            composed_share=phase.stage.composed_share,
            kind=phase.train.sampler,
        )
        self.fingerprint = hash_phase(phase, self.trained)
        self.checkpoints = phase.folder / "checkpoints"

    def run(self) -> None:
        """Train until the last step; returns with the model trained and its last checkpoint on disk."""
        step = self._resume()
        if step >= self.stage.steps:
            return
        self._begin(step)
        model = self.phase.model
        model.train()
        model.loss_chunk, model.loss_backend = self.train.loss_chunk, self.train.loss_backend
        if self.train.activation_checkpointing:
            for specialist in model.specialists.values():
                specialist.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            with Tracker(self.phase.name, self.phase.folder, step, self.stage.steps) as tracker, StopRequest() as stop:
                while step < self.stage.steps:
                    values = self._step(step)
                    step += 1
                    is_last = step == self.stage.steps
                    if is_last or step % self.train.validate_every == 0:
                        values["validation"] = self.validate()
                    tracker.note(values)
                    if is_last or stop.made or step % self.train.checkpoint_every == 0:
                        self._save(step)
                    if stop.made:
                        raise KeyboardInterrupt
        finally:
            model.train(False)

    def _begin(self, step: int) -> None:
        """What is to be done once, before the first step that is run."""

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step on the batch of this step; returns its line of metrics."""
        began = time.perf_counter()
        torch.manual_seed(_mix(self.phase.seed, self.phase.name, step))  # dropout, too, depends on the step alone
        records = [self._record(draw) for draw in self.sampler.batch(step)]
        num_tokens = sum(record.num_response_tokens for record in records)
        sums = Sums()
        for piece, nll, weights in self._forward(records):
            loss = nll.sum() / num_tokens
            if self.stage.gate_entropy and len(self.phase.model.names) > 1:
                loss = loss + self.stage.gate_entropy * (weights * weights.clamp_min(1e-9).log()).sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            sums.add(piece, nll, weights)
        norm = self._clip()
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
            for piece in self._forward(list(records)[: self.train.validation_records]):
                sums.add(*piece)
        self.phase.model.train()
        return sums.loss_per_domain()

    def _forward(self, records: Sequence[EncodedRecord]) -> Iterator[tuple[list[EncodedRecord], Tensor, Tensor]]:
        """Piece by piece: its records, NLL [M] and gate weights [M, N] of their response tokens."""
        for piece in micro_batches(records, max_columns=self.train.micro_batch_tokens):
            batch = collate(piece, pad_id=self.phase.encoder.pad_id)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.train.precision == "bf16"):
                nll, weights, _ = self.phase.model.response_nll(**batch.tensors(self.device))
            yield piece, nll, weights

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

    def _clip(self) -> float:
        """Norm of the whole gradient before it is clipped."""
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        if self.stage.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.trained.values()), self.stage.max_grad_norm, norm)
        return float(norm)

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
        write_checkpoint(
            self.checkpoints,
            Checkpoint(step, dict(self.trained), self.optimizer.state(), {"fingerprint": self.fingerprint}),
            keep=self.train.keep_checkpoints,
        )

    @torch.no_grad()
    def _resume(self) -> int:
        """Take over the newest whole checkpoint; returns the step to go on with."""
        checkpoint = read_newest(self.checkpoints)
        if checkpoint is None:
            return 0
        if checkpoint.state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{self.checkpoints} was made with other settings, data or weights: choose another output folder, or "
                "delete it to start this phase anew"
            )
        for name, value in checkpoint.parameters.items():
            self.trained[name].copy_(value)
        self.optimizer.load(checkpoint.optimizer)
        if 0 < checkpoint.step < self.stage.steps:
            logger.warning("%s goes on from step %d of %d", self.phase.name, checkpoint.step, self.stage.steps)
        return checkpoint.step


def _mix(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
