"""What the training loop asks of the way in which processes share a model and a batch.

The loop is written once, for one process; whatever differs between one and several is behind this protocol. Each
process runs the same steps in the same order, so that exchanges inside a forward or a backward pass meet: above all it
runs as many passes as every other one, if need be with a share that does not count.

Shapes: M response tokens, N specialists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.train.parallel.world import World
from ultrafuser.train.sums import Sums


class Share(NamedTuple):
    """What one process runs in one forward pass.

    Attributes:
        records: Of the batch; at least one.
        counts: False: the pass is run because others run one; neither its loss nor its gradient may count.
    """

    records: list[EncodedRecord]
    counts: bool = True


class Strategy(Protocol):
    """How the processes of a run share a model and a batch."""

    @property
    def world(self) -> World:
        """The processes."""
        ...

    @property
    def loss_scale(self) -> float:
        """What a share's sum of NLL over the batch's tokens is multiplied by before its backward pass.

        So that the gradient is, in the end, that of the mean over the response tokens of the whole batch.
        """
        ...

    def loads(self, names: Sequence[str]) -> Sequence[str]:
        """Those specialists whose weights this process needs; of the others shapes, on the meta device, are enough."""
        ...

    def prepare(self, model: FusedForCausalLM, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Share out a whole model, in place; without waiting for another process, since the model is loaded in turn.

        Returns:
            What is trained, by the same names, as this process holds it; of what it does not hold nothing.
        """
        ...

    def deal(self, records: Sequence[EncodedRecord], *, max_columns: int) -> list[Share]:
        """This process's forward passes over a batch that all processes know; as many as every other one's."""
        ...

    def response_nll(
        self, model: FusedForCausalLM, batch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "M N"]]:
        """NLL and gate weights of each response token of a collated share (`Batch.tensors`)."""
        ...

    def clip(self, trained: Mapping[str, nn.Parameter], max_norm: float | None) -> float:
        """Scale the gradients to a norm of at most `max_norm` in place; returns the norm of all of them before."""
        ...

    def add_up(self, sums: Sums, *, domains: Sequence[str], num_specialists: int) -> Sums:
        """The sums of all processes, each response token counted once.

        Args:
            sums: Of this process's shares.
            domains: All that may be in some process's sums.
            num_specialists: N.
        """
        ...
