"""Running one view ahead of the others: how a specialist or a small model writes a draft.

Shapes: H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultrafuser.engine.certainty import Course
from ultrafuser.engine.choice import Choice
from ultrafuser.engine.runner import Feed, Runner

_LAG = 8  # tokens; less than the margin of a slot


def run_ahead(
    runner: Runner, choices: Sequence[Choice], views: Sequence[int], length: int, course: Course | None = None
) -> tuple[list[list[int]], list[Tensor]]:
    """Let one view of each choice write `length` tokens by itself.

    Its cache then holds the draft but its last token; the draft does not count as seen, so one that is thrown away
    costs nothing more. With weights for drafts what the cache holds is not exact: the view reads it again with the
    others, over the same columns.

    Args:
        runner: The model.
        choices: In the order of their slots.
        views: Who writes, for each choice.
        length: Tokens, at least one; with a course the most there may be.
        course: Says after every token whether the draft goes on.

    Returns:
        For each choice its draft, and the hidden states [length, H] from which it was written.
    """
    for choice, view in zip(choices, views, strict=True):
        # A view that lags far behind catches up alone: beside it others would be filled up beyond their slots.
        if (behind := len(choice.pending(view)) - 1) > _LAG:
            runner.hidden({view: Feed([choice.slot], [choice.seen[view]], [choice.pending(view)[:behind]])})
            choice.seen[view] += behind
    drafts: list[list[int]] = [[] for _ in choices]
    hidden: list[list[Tensor]] = [[] for _ in choices]
    for step in range(length):
        margins = [0.0] * len(choices)
        for view in sorted(set(views)):
            mine = [i for i, own in enumerate(views) if own == view]
            tokens = [list(choices[i].pending(view)) if step == 0 else drafts[i][-1:] for i in mine]
            starts = [
                choices[i].seen[view] + (0 if step == 0 else len(choices[i].pending(view)) + step - 1) for i in mine
            ]
            feed = Feed([choices[i].slot for i in mine], starts, tokens)
            states = runner.hidden({view: feed}, reduced=True)[view]
            last = torch.stack([states[row, len(t) - 1] for row, t in enumerate(tokens)])
            logits = runner.logits(view, last, reduced=True)
            for row, i in enumerate(mine):
                hidden[i].append(last[row])
                token, margins[i] = choices[i].sampler.guess(logits[row], [*choices[i].response, *drafts[i]])
                drafts[i].append(token)
        if course is not None and not course.goes_on(margins):
            break
    return drafts, [torch.stack(states) for states in hidden]
