"""Reading prompts, a chunk at a time, each specialist its own.

Shapes: T tokens of a chunk, N specialists, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser.engine.choice import Choice
from ultrafuser.engine.decoding import token_log_probs
from ultrafuser.engine.requests import TokenPiece
from ultrafuser.engine.runner import Feed, Runner

_SCORED_AT_ONCE = 64  # prompt positions whose logits over the vocabulary are held together


def read_chunk(runner: Runner, choice: Choice, size: int) -> int:
    """Read up to `size` more tokens of the prompt with every view that has some left.

    Returns:
        Tokens of the longest chunk.
    """
    views = [v for v in range(runner.num_views) if v >= runner.num_specialists or choice.active[v]]
    tokens = {view: list(choice.pending(view)[:size]) for view in views}
    feeds = {view: Feed([choice.slot], [choice.seen[view]], [part]) for view, part in tokens.items() if part}
    hidden = {view: states[0, : len(tokens[view])] for view, states in runner.hidden(feeds).items()}
    if runner.model.config.weighting == "perplexity":
        for view in hidden:
            if view < runner.num_specialists:
                _add_nll(runner, choice, view, tokens[view], hidden[view])
    if choice.request.score_prompt:
        _score(runner, choice, hidden)
    for view, states in hidden.items():
        choice.tails[view] = states[-1]
        choice.seen[view] += len(tokens[view])
    return max((len(part) for part in tokens.values()), default=0)


def has_read_prompt(runner: Runner, choice: Choice) -> bool:
    """Whether nothing of the prompt is left, in any view that runs."""
    views = [v for v in range(runner.num_views) if v >= runner.num_specialists or choice.active[v]]
    return all(not choice.pending(view) for view in views)


def first_weights(runner: Runner, choice: Choice) -> Tensor:
    """Weights [1, N] of the first token; where the model holds weights for the whole response, held from here on."""
    config = runner.model.config
    tails = {view: tail[None] for view, tail in choice.tails.items() if view < runner.num_specialists}
    scores = runner.scores(tails)
    if config.weighting == "perplexity":
        means = [nll / max(count, 1) for nll, count in choice.prompt_nll[: runner.num_specialists]]
        scores = -torch.tensor([means], device=scores.device) / config.perplexity_temperature
    if config.granularity == "prompt" or config.weighting == "perplexity":
        choice.held_scores = scores[0]
    active = torch.tensor([choice.active], device=scores.device)
    fixed = None if choice.weights is None else choice.weights[None].to(scores.device)
    return runner.weights(scores, active, fixed)


def first_logits(runner: Runner, choice: Choice, weights: Tensor) -> Tensor:
    """Fused logits [V] of the first token of the response."""
    tails = {view: tail[None] for view, tail in choice.tails.items() if view < runner.num_specialists}
    return runner.fused(tails, weights)[0]


def _predictors(choice: Choice, view: int, states: Tensor) -> Tensor:
    """Hidden states that predict the tokens of a chunk; at the beginning of a text the first token has none."""
    before = states[:-1]
    tail = choice.tails.get(view)
    return before if tail is None else torch.cat([tail[None], before])


def _add_nll(runner: Runner, choice: Choice, view: int, tokens: list[int], states: Tensor) -> None:
    """Add how well a specialist predicted this chunk of its prompt, for perplexity weights."""
    predictors = _predictors(choice, view, states)
    targets = torch.tensor(tokens[len(tokens) - len(predictors) :], device=states.device)
    total, count = choice.prompt_nll[view]
    for rows, ids in zip(torch.split(predictors, _SCORED_AT_ONCE), torch.split(targets, _SCORED_AT_ONCE), strict=True):
        total -= float(runner.logits(view, rows).log_softmax(dim=-1).gather(1, ids[:, None]).sum())
    choice.prompt_nll[view] = (total, count + len(targets))


def _score(runner: Runner, choice: Choice, hidden: dict[int, Tensor]) -> None:
    """Log-probabilities of the chunk's own tokens under the fused model; all specialists read the same text."""
    row = next(row for row, active in zip(choice.rows, choice.active, strict=False) if active)
    views = [view for view in hidden if view < runner.num_specialists]
    predictors = {view: _predictors(choice, view, hidden[view]) for view in views}
    num_predicted = len(next(iter(predictors.values())))
    start = len(choice.prompt_pieces)
    if start == 0:
        choice.prompt_pieces.append(TokenPiece(row[0], choice.detokenizer.push(row[0])))
        start = 1
    num_top = choice.request.params.log_probs or 0
    active = torch.tensor([choice.active])
    for first in range(0, num_predicted, _SCORED_AT_ONCE):
        part = {view: states[first : first + _SCORED_AT_ONCE] for view, states in predictors.items()}
        scores = runner.scores(part)
        fixed = None if choice.weights is None else choice.weights.expand(len(scores), -1).to(scores.device)
        logits = runner.fused(part, runner.weights(scores, active.to(scores.device), fixed))
        for i, values in enumerate(logits):
            token = row[start + first + i]
            log_prob, top = token_log_probs(values, token, num_top)
            choice.prompt_pieces.append(TokenPiece(token, choice.detokenizer.push(token), (), log_prob, top))
