"""Fusing logits, weights without a gate, and the loss in chunks: each against the obvious sum or loop."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ultrafuser.model.fusion import fuse_logits, gate_weights, hold_scores, perplexity_scores, uniform_scores
from ultrafuser.model.loss import fused_nll

B, T, N, V = 2, 4, 3, 11


def some_logits() -> tuple[list[Tensor], Tensor]:
    return [2 * torch.randn(B, T, V) for _ in range(N)], gate_weights(torch.randn(B, T, N))


def test_fused_logits_are_the_weighted_sum_of_equation_1():
    logits, weights = some_logits()

    fused = fuse_logits(logits, weights)

    for b in range(B):
        for t in range(T):
            expected = sum(weights[b, t, j] * logits[j][b, t] for j in range(N))
            torch.testing.assert_close(fused[b, t], expected)


def test_fusing_equals_one_head_over_concatenated_weighted_hidden_states():
    """`sum_j w_j W_j h_j = [W_1|...|W_n] concat(w_1 h_1, ..., w_n h_n)`, for hidden sizes that differ too."""
    sizes = (5, 8, 6)
    hiddens, heads = [torch.randn(B, T, h) for h in sizes], [torch.randn(V, h) for h in sizes]
    weights = gate_weights(torch.randn(B, T, N))

    fused = fuse_logits([h @ head.T for h, head in zip(hiddens, heads, strict=True)], weights)

    one = torch.cat([weights[..., j, None] * hiddens[j] for j in range(N)], dim=-1) @ torch.cat(heads, dim=1).T
    torch.testing.assert_close(fused, one, rtol=1e-4, atol=1e-4)


def test_logprobs_and_logits_are_the_same_distribution():
    logits, weights = some_logits()

    torch.testing.assert_close(
        fuse_logits(logits, weights, "logprobs").softmax(dim=-1), fuse_logits(logits, weights).softmax(dim=-1)
    )


def test_probs_are_the_arithmetic_mean_of_the_distributions():
    logits, weights = some_logits()

    fused = fuse_logits(logits, weights, "probs")

    mean = sum(weights[..., j, None] * logits[j].softmax(dim=-1) for j in range(N))
    torch.testing.assert_close(fused.exp(), mean)


def test_a_weight_of_zero_gives_finite_gradients_in_probs():
    scores = torch.tensor([[0.0, -200.0]], requires_grad=True)
    logits = [torch.randn(1, V), torch.randn(1, V)]

    F.cross_entropy(fuse_logits(logits, gate_weights(scores), "probs"), torch.tensor([3])).backward()

    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("space", ["logits", "logprobs", "probs"])
def test_one_specialist_passes_through_unchanged(space: str):
    logits = torch.randn(B, T, V)

    fused = fuse_logits([logits], torch.ones(B, T, 1), space)

    torch.testing.assert_close(fused.softmax(dim=-1), logits.softmax(dim=-1))


def test_fusion_is_in_fp32_whatever_the_specialists_are_in():
    logits, weights = some_logits()

    fused = fuse_logits([o.bfloat16() for o in logits], weights)

    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, fuse_logits([o.bfloat16().float() for o in logits], weights), rtol=0, atol=0)


def test_uniform_weights_are_one_over_n():
    weights = gate_weights(uniform_scores(torch.randn(B, T, 8), N))

    torch.testing.assert_close(weights, torch.full((B, T, N), 1 / N))


def test_perplexity_weights_are_inverse_perplexities():
    """PackLLM's similarity variant: softmax of minus the mean NLL, at temperature 1 `1 / perplexity` normalised."""
    nlls = [torch.rand(1, 5) * 3 for _ in range(2)]
    visible = torch.tensor([[False, True, True, False, True]])

    weights = gate_weights(torch.stack([perplexity_scores(nll, visible, 1.0) for nll in nlls], dim=-1))

    for t in range(5):
        inverse = []
        for nll in nlls:
            seen = [float(nll[0, i]) for i in range(t + 1) if visible[0, i]]
            inverse.append(1 / math.exp(sum(seen) / max(len(seen), 1)))
        torch.testing.assert_close(weights[0, t], torch.tensor(inverse) / sum(inverse))


def test_a_lower_temperature_sharpens_perplexity_weights():
    visible = torch.ones(1, 1, dtype=torch.bool)
    good, bad = torch.tensor([[1.0]]), torch.tensor([[2.0]])

    def weight(temperature: float) -> float:
        scores = [perplexity_scores(nll, visible, temperature) for nll in (good, bad)]
        return float(gate_weights(torch.stack(scores, dim=-1))[0, 0, 0])

    assert 0.5 < weight(2.0) < weight(1.0) < weight(0.1)


@pytest.mark.parametrize("carried", [None, torch.randn(B, N)])
def test_held_scores_are_those_of_the_latest_prompts_last_column(carried: Tensor | None):
    scores, starts = torch.randn(B, 7, N), torch.zeros(B, 7, dtype=torch.bool)
    starts[0, [1, 4]] = True
    starts[1, 5] = True

    held = hold_scores(scores, starts, carried)

    for b in range(B):
        latest = None
        for t in range(7):
            latest = t if starts[b, t] else latest
            before = scores[b, t] if carried is None else carried[b]
            assert torch.equal(held[b, t], before if latest is None else scores[b, latest])


@pytest.mark.parametrize("space", ["logits", "logprobs", "probs"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_loss_in_chunks_equals_cross_entropy_of_all_fused_logits(space: str, chunk: int):
    """Values and gradients: of hidden states, heads and weights."""
    m, sizes = 9, (5, 8)
    inputs = [torch.randn(m, h) for h in sizes] + [torch.randn(V, h) for h in sizes] + [torch.randn(m, 2)]
    inputs = [value.requires_grad_() for value in inputs]
    labels = torch.randint(0, V, (m,))
    hiddens, heads, scores = inputs[:2], inputs[2:4], inputs[4]
    weights = gate_weights(scores)

    chunked = fused_nll(hiddens, weights, labels, [lambda h, w=w: h @ w.T for w in heads], space=space, chunk=chunk)
    whole = F.cross_entropy(
        fuse_logits([h @ w.T for h, w in zip(hiddens, heads, strict=True)], weights, space), labels, reduction="none"
    )

    torch.testing.assert_close(chunked, whole)
    actual = torch.autograd.grad(chunked.sum(), inputs, retain_graph=True)
    for a, b in zip(actual, torch.autograd.grad(whole.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_to_predict_is_an_empty_loss():
    assert fused_nll([torch.zeros(0, 5)], torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), [lambda h: h]).shape == (
        0,
    )
