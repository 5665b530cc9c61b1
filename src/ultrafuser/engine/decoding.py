"""One decoding pass over running choices: feed, weigh, fuse, choose, and keep what a draft got right.

Shapes: M rows whose next token is chosen, N specialists, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrafuser.engine.choice import Choice
from ultrafuser.engine.requests import FinishReason, TokenPiece
from ultrafuser.engine.runner import Feed, Runner
from ultrafuser.model.generator import NOT_A_NUMBER


@dataclass(slots=True)
class Block:
    """What one choice reads in a pass.

    Attributes:
        choice: Whose.
        drafts: Guesses at its next tokens.
        rows: Positions whose next token is chosen: the last `rows` of what is read.
        known: Hidden states [rows, H] of views that have read the block already.
    """

    choice: Choice
    drafts: list[int]
    rows: int
    known: dict[int, Tensor]


@dataclass(slots=True)
class Advance:
    """What a pass gave one choice: tokens that may be shown, why it is over (if it is), how many tokens it took."""

    pieces: list[TokenPiece]
    reason: FinishReason | None
    num_tokens: int
    error: str = ""
    agreed: bool | None = None  # with what specialists that were left out until now would have changed


def decode(
    runner: Runner,
    blocks: Sequence[Block],
    *,
    skipped: Mapping[int, set[int]] | None = None,
    audited: Mapping[int, set[int]] | None = None,
) -> list[Advance]:
    """Read the blocks with all their specialists and take the tokens that the fused model chooses.

    Args:
        runner: The model.
        blocks: One for each choice, in the order of their slots.
        skipped: Views of a choice (by its slot) that do not run in this pass.
        audited: Views of a choice that run now and did not before: `Advance.agreed` says whether the token would have
            been the same without them.
    """
    skipped = skipped or {}
    views = range(runner.num_specialists)
    running = [[block for block in blocks if _runs(block.choice, view, skipped)] for view in views]
    feeds, lengths = {}, {}
    for view in views:
        readers = [block for block in running[view] if view not in block.known]
        if readers:
            tokens = [_tokens(block, view) for block in readers]
            slots = [block.choice.slot for block in readers]
            feeds[view] = Feed(slots, [block.choice.seen[view] for block in readers], tokens)
            lengths[view] = dict(zip(slots, (len(t) for t in tokens), strict=True))
    hidden = runner.hidden(feeds)
    rows = {
        view: _rows(blocks, view, hidden.get(view), lengths.get(view, {}), feeds.get(view))
        for view in views
        if running[view]
    }
    weights = _weigh(runner, blocks, rows, skipped)
    logits = runner.fused(rows, weights)
    without = _without(runner, blocks, rows, audited) if audited else {}
    advances = _take(runner, blocks, logits, weights, skipped)
    for block, advance in zip(blocks, advances, strict=True):
        if block.choice.slot in without and advance.num_tokens:
            advance.agreed = without[block.choice.slot] == block.choice.response[-1]
    return advances


def _runs(choice: Choice, view: int, skipped: Mapping[int, set[int]]) -> bool:
    return choice.active[view] and view not in skipped.get(choice.slot, ())


def _tokens(block: Block, view: int) -> list[int]:
    """What a view reads: what it has not seen, then the guesses whose successors are chosen in this pass."""
    return [*block.choice.pending(view), *block.drafts[: block.rows - 1]]


def _rows(
    blocks: Sequence[Block], view: int, hidden: Tensor | None, lengths: Mapping[int, int], feed: Feed | None
) -> Tensor:
    """Hidden states [M, H] of one view where a next token is chosen; zeros for choices that it does not read."""
    if hidden is not None and feed is not None and len(feed.slots) == len(blocks):
        one_row = all(block.rows == 1 and lengths[block.choice.slot] == 1 for block in blocks)
        if one_row:
            return hidden[:, 0]
    order = {slot: i for i, slot in enumerate(feed.slots)} if feed is not None else {}
    some = hidden if hidden is not None else next(block.known[view] for block in blocks if view in block.known)
    parts = []
    for block in blocks:
        slot = block.choice.slot
        if view in block.known:
            parts.append(block.known[view])
        elif slot in order:
            assert hidden is not None
            stop = lengths[slot]
            parts.append(hidden[order[slot], stop - block.rows : stop])
        else:
            parts.append(some.new_zeros((block.rows, some.shape[-1])))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _weigh(
    runner: Runner, blocks: Sequence[Block], rows: Mapping[int, Tensor], skipped: Mapping[int, set[int]]
) -> Tensor:
    """Weights [M, N]: of the gate, held from the prompt, or fixed by the request."""
    first = next(iter(rows.values()))
    if all(block.choice.held_scores is not None or block.choice.weights is not None for block in blocks):
        scores = first.new_zeros(
            (len(first), runner.num_specialists), dtype=torch.float32
        )  # what stands instead follows
    else:
        scores = runner.scores(rows)
    device = scores.device
    counts = torch.tensor([block.rows for block in blocks], device=device)
    if any(block.choice.held_scores is not None for block in blocks):
        held = torch.stack(
            [
                block.choice.held_scores.to(device) if block.choice.held_scores is not None else scores.new_zeros(())
                for block in blocks
            ]
        )
        scores = held.repeat_interleave(counts, dim=0)
    plain = not skipped and all(all(block.choice.active) and block.choice.weights is None for block in blocks)
    if plain:
        return runner.weights(scores, scores.new_ones((1, 1), dtype=torch.bool))
    runs = [[_runs(block.choice, view, skipped) for view in range(scores.shape[1])] for block in blocks]
    active = torch.tensor(runs, device=device).repeat_interleave(counts, dim=0)
    none = torch.full((scores.shape[1],), torch.nan)
    fixed = torch.stack([none if block.choice.weights is None else block.choice.weights for block in blocks])
    return runner.weights(scores, active, fixed.to(device).repeat_interleave(counts, dim=0))


def _without(
    runner: Runner, blocks: Sequence[Block], rows: Mapping[int, Tensor], audited: Mapping[int, set[int]]
) -> dict[int, int]:
    """The token of each audited choice, by slot, had its views been left out."""
    logits = runner.fused(rows, _weigh(runner, blocks, rows, audited))
    starts = itertools.accumulate((block.rows for block in blocks), initial=0)
    return {
        block.choice.slot: block.choice.sampler.pick(logits[row], block.choice.response)
        for block, row in zip(blocks, starts, strict=False)
        if block.choice.slot in audited
    }


def _take(
    runner: Runner,
    blocks: Sequence[Block],
    logits: Tensor,
    weights: Tensor,
    skipped: Mapping[int, set[int]],
) -> list[Advance]:
    """Choose tokens position by position, as long as the guesses agree."""
    largest = logits.argmax(dim=-1).tolist()
    bad = logits.isnan().any(dim=-1).tolist()
    all_weights, own = weights.tolist(), logits.unbind()
    advances, row = [], 0
    for block in blocks:
        choice, before = block.choice, len(block.choice.response)
        advance = Advance([], None, 0)
        for i in range(block.rows):
            at = row + i
            if bad[at]:
                advance.reason, advance.error = "error", NOT_A_NUMBER
                break
            plain = choice.sampler.takes_largest
            token = largest[at] if plain else choice.sampler.pick(own[at], choice.response)
            log_prob, top = token_log_probs(own[at], token, choice.request.params.log_probs)
            pieces, advance.reason = choice.append(token, tuple(all_weights[at]), log_prob, top)
            advance.pieces += pieces
            advance.num_tokens += 1
            if advance.reason is not None or i >= len(block.drafts) or token != block.drafts[i]:
                break
        row += block.rows
        kept = max(advance.num_tokens - 1, 0)  # guesses that stay in the caches; the last token is in none
        for view in range(runner.num_specialists):
            if _runs(choice, view, skipped):
                choice.seen[view] = len(choice.rows[view]) + before + kept
        advances.append(advance)
    return advances


def token_log_probs(
    logits: Tensor, token: int, num_top: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probability of a token and the most likely ones, if they were asked for."""
    if num_top is None:
        return None, ()
    log_probs = logits.float().log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = log_probs.topk(min(num_top, len(log_probs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return float(log_probs[token]), top
