"""One process that holds the model and runs the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from ultrafuser.alignment.collate import micro_batches
from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.train.parallel.strategy import Share
from ultrafuser.train.parallel.world import World
from ultrafuser.train.sums import Sums


@dataclass(frozen=True, slots=True)
class Single:
    """The strategy of one process; see `Strategy`."""

    world: World
    loss_scale: float = 1.0

    def loads(self, names: Sequence[str]) -> Sequence[str]:
        """All of them."""
        return names

    def prepare(self, model: FusedForCausalLM, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Nothing to share."""
        del model
        return dict(trained)

    def deal(self, records: Sequence[EncodedRecord], *, max_columns: int) -> list[Share]:
        """All pieces of the batch."""
        return [Share(piece) for piece in micro_batches(records, max_columns=max_columns)]

    def response_nll(
        self, model: FusedForCausalLM, batch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "M N"]]:
        """The model's own."""
        nll, weights, _ = model.response_nll(**batch)
        return nll, weights

    def clip(self, trained: Mapping[str, nn.Parameter], max_norm: float | None) -> float:
        """By torch's own functions."""
        norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(list(trained.values()), max_norm, norm)
        return float(norm)

    def add_up(self, sums: Sums, *, domains: Sequence[str], num_specialists: int) -> Sums:
        """They are all there is."""
        del domains, num_specialists
        return sums
