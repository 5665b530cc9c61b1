"""Loss and gate weights of a batch, summed over its pieces by domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.alignment.encode import EncodedRecord


@dataclass(slots=True)
class Sums:
    """Running sums over response tokens; however a batch is cut into pieces, the sums are the same to rounding."""

    nll: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, records: Sequence[EncodedRecord], nll: Float[Tensor, " M"], weights: Float[Tensor, "M N"]) -> None:
        """Count the M response tokens of some records, in their order."""
        lengths = [record.num_response_tokens for record in records]
        pieces = torch.split(nll.detach(), lengths), torch.split(weights.detach(), lengths)
        for record, values, rows in zip(records, *pieces, strict=True):
            domain = record.domain
            self.nll[domain] = self.nll.get(domain, 0.0) + float(values.sum())
            self.tokens[domain] = self.tokens.get(domain, 0) + len(values)
            total = rows.sum(dim=0).cpu()
            self.weights[domain] = self.weights[domain] + total if domain in self.weights else total

    def over(self, add_up: Callable[[Tensor], Tensor], *, domains: Sequence[str], num_specialists: int) -> Sums:
        """The sums of several processes put together; the same in each.

        Args:
            add_up: Sums a tensor over the processes.
            domains: All that may occur, in the same order in every process.
            num_specialists: N.
        """
        table = torch.zeros(len(domains), 2 + num_specialists, dtype=torch.float64)
        for row, domain in zip(table, domains, strict=True):
            if domain in self.nll:
                row[0], row[1], row[2:] = self.nll[domain], self.tokens[domain], self.weights[domain]
        total = Sums()
        for row, domain in zip(add_up(table), domains, strict=True):
            if row[1] > 0:
                total.nll[domain], total.tokens[domain] = float(row[0]), int(row[1])
                total.weights[domain] = row[2:]
        return total

    def loss(self) -> float:
        """NLL per response token, nats."""
        return sum(self.nll.values()) / max(1, sum(self.tokens.values()))

    def loss_per_domain(self) -> dict[str, float]:
        """NLL per response token of each domain, nats."""
        return {domain: self.nll[domain] / self.tokens[domain] for domain in sorted(self.nll)}

    def gate_weights(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Mean weight of each specialist by domain."""
        return {
            domain: dict(zip(names, (self.weights[domain] / self.tokens[domain]).tolist(), strict=True))
            for domain in sorted(self.weights)
        }
