"""The gate scores each specialist alone, in fp32, by two linear layers with ReLU between."""

import pytest
import torch
from torch import nn

from ultrafuser.model.fusion import gate_weights
from ultrafuser.model.gate import Gate


def make_gate(**sizes: int) -> Gate:
    torch.manual_seed(1)
    return Gate(sizes, hidden_size=5)


def test_the_score_is_two_linear_layers_with_relu_between():
    gate = make_gate(text=8, code=8)
    hidden = torch.randn(2, 3, 8)

    scores = gate.score(hidden, "code")

    first, _, second = gate.layers
    by_hand = torch.relu(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(scores, by_hand.squeeze(-1))


def test_the_defaults_are_the_papers():
    gate = Gate({"text": 8, "code": 8})

    assert [type(layer) for layer in gate.layers] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [gate.layers[0].out_features, gate.layers[2].out_features] == [512, 1]


def test_specialists_of_one_size_share_every_weight():
    gate = make_gate(text=8, code=8)
    hidden = torch.randn(4, 8)

    assert len(gate.projections) == 0
    torch.testing.assert_close(gate.score(hidden, "text"), gate.score(hidden, "code"))


def test_specialists_of_different_sizes_get_a_projection_each():
    gate = make_gate(text=8, code=6)

    scores = gate([torch.randn(2, 3, 8), torch.randn(2, 3, 6)], ["text", "code"])

    assert {name: layer.in_features for name, layer in gate.projections.items()} == {"text": 8, "code": 6}
    assert scores.shape == (2, 3, 2)


def test_a_specialists_score_does_not_depend_on_the_others():
    """So specialists may be added or left out at load."""
    gate = make_gate(text=8, code=8, math=8)
    text, code, math = torch.randn(3, 4, 8)

    three = gate([text, code, math], ["text", "code", "math"])

    torch.testing.assert_close(gate([math, text], ["math", "text"]), three[:, [2, 0]])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_number_of_layers_is_a_setting(num_layers: int):
    gate = Gate({"text": 8}, hidden_size=5, num_layers=num_layers)

    assert sum(isinstance(layer, nn.Linear) for layer in gate.layers) == num_layers
    assert gate.score(torch.randn(3, 8), "text").shape == (3,)


def test_weights_are_a_softmax_over_the_specialists():
    scores = torch.tensor([[0.0, 1.0, 3.0]])

    torch.testing.assert_close(gate_weights(scores), torch.exp(scores) / torch.exp(scores).sum())


def test_the_gate_stays_in_fp32_when_its_model_is_cast():
    model = nn.ModuleDict({"gate": make_gate(text=8, code=6), "other": nn.Linear(2, 2)})
    before = [parameter.clone() for parameter in model["gate"].parameters()]

    model.to(torch.bfloat16)
    scores = model["gate"].score(torch.randn(3, 8, dtype=torch.bfloat16), "text")

    assert model["other"].weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, model["gate"].parameters(), strict=True))
    assert scores.dtype == torch.float32


def test_the_gate_computes_in_fp32_under_autocast():
    gate = make_gate(text=8)
    hidden = torch.randn(3, 8).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = gate.score(hidden, "text")

    torch.testing.assert_close(scores, gate.score(hidden.float(), "text"), rtol=0, atol=0)
