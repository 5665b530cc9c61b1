"""What a run came to, in numbers and in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser.errors import SynthesisError
from ultrafuser.synthesis.queue import Spent
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.storage.counts import StageCount


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to.

    Attributes:
        counts: Every stage, at its end.
        spent: By all runs together.
        num_answers: Of this run.
        seconds: It took.
        to_review: Stages whose sample a person is to look at before their domain goes on.
        was_stopped: By a person, before all was done.
    """

    counts: Sequence[StageCount]
    spent: Spent
    num_answers: int
    seconds: float
    to_review: Sequence[tuple[str, StageName]] = ()
    was_stopped: bool = False

    @property
    def num_failed(self) -> int:
        """Requests that were given up."""
        return sum(count.nodes.get("failed", 0) for count in self.counts)

    @property
    def is_complete(self) -> bool:
        """Whether every domain has come to its end."""
        return not self.to_review and not self.was_stopped

    @property
    def num_kept(self) -> dict[str, int]:
        """Answers of each domain that passed all gates."""
        kept = {count.domain: 0 for count in self.counts}
        for count in self.counts:
            if count.stage == "responses":
                kept[count.domain] = count.items.get("kept", 0)
        return kept

    def check(self) -> None:
        """Refuse a run that came to its end with nothing.

        Raises:
            SynthesisError: A domain is complete and has no answer; says where to look.
        """
        if self.is_complete and (empty := [domain for domain, number in self.num_kept.items() if not number]):
            raise SynthesisError(
                f"domain {empty[0]!r} has come to its end without one answer: `ultrafuser synthesize status` shows at "
                "which stage all was unreadable, failed or dropped; mend that and go on with --from STAGE"
            )

    def text(self) -> str:
        """A line for each thing to know, and what to do next."""
        lines = [f"{domain}: {number} answers kept" for domain, number in self.num_kept.items()]
        tokens = f"{self.spent.prompt_tokens} tokens read and {self.spent.completion_tokens} written"
        lines.append(
            f"{self.num_answers} requests in {self.seconds:.1f} s; in all {self.spent.num_answers}, {tokens}, "
            f"cost {self.spent.cost:.2f}"
        )
        if self.num_failed:
            lines.append(f"{self.num_failed} requests were given up: --retry-failed asks them again")
        lines += [
            f"{domain} waits until a person has looked at its {stage}: `ultrafuser synthesize review`"
            for domain, stage in self.to_review
        ]
        if self.was_stopped:
            lines.append("stopped; the same command goes on")
        return "\n".join(lines)
