"""A step of the engine, cut into what each specialist reads: checked on a model that runs by nothing but these slots.

The obvious way is the uncached loop, each specialist over its own prompt and the response. The other way runs the
same models over a paged cache of plain tensors, a share at a time, with requests that come and go between steps.
"""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM, apply_rotary_pos_emb

from helpers import make_trio
from ultrafuser.vllm_plugin.own_prompts import PromptTable, Share, Step, share_step

BLOCK = 4


class Pages:
    """Keys and values of one specialist, in slots; attention that knows nothing but them."""

    def __init__(self, model: LlamaForCausalLM, num_slots: int) -> None:
        config = model.config
        self.model, self.size = model, config.head_dim
        self.kv = torch.full((config.num_hidden_layers, 2, num_slots, config.num_key_value_heads, self.size), torch.nan)

    @torch.no_grad()
    def run(self, share: Share, table: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden states of a share, [T_i, H]."""
        slots = share.slots(table, BLOCK)
        model = self.model.model
        hidden = model.embed_tokens(share.input_ids)[None]
        angles = model.rotary_emb(hidden, share.positions[None])
        for number, layer in enumerate(model.layers):
            normed = layer.input_layernorm(hidden)
            heads = (1, share.num_tokens, -1, self.size)
            q, k, v = (
                getattr(layer.self_attn, name)(normed).view(heads).transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k = apply_rotary_pos_emb(q, k, *angles)
            self.kv[number, 0, slots], self.kv[number, 1, slots] = k[0].transpose(0, 1), v[0].transpose(0, 1)
            attended = self.attend(number, q[0], share, table, lengths)
            hidden = hidden + layer.self_attn.o_proj(attended[None])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return model.norm(hidden)[0]

    def attend(self, number: int, q: Tensor, share: Share, table: Tensor, lengths: Tensor) -> Tensor:
        """One request after another: its queries are the last of its keys, as of any varlen kernel."""
        found = []
        for r, (start, stop) in enumerate(zip(share.starts, share.starts[1:], strict=False)):
            request = int(share.requests[r])
            length = int(lengths[request]) - int(share.behind[r])
            flat = torch.tensor([int(table[request, p // BLOCK]) * BLOCK + p % BLOCK for p in range(length)])
            k, v = (self.kv[number, i, flat].transpose(0, 1) for i in (0, 1))
            repeats = q.shape[0] // k.shape[0]
            k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
            mask = torch.arange(length)[None] <= torch.arange(length - int(stop - start), length)[:, None]
            out = torch.nn.functional.scaled_dot_product_attention(q[:, start:stop], k, v, attn_mask=mask)
            found.append(out.transpose(0, 1).flatten(1))
        return torch.cat(found)


class Engine:
    """A scheduler of requests over shared blocks: chunks, rows of the table that are used again, padded steps."""

    def __init__(self, models: dict[str, LlamaForCausalLM], seed: int, num_rows: int = 3) -> None:
        self.draw = random.Random(seed)
        self.blocks = list(range(60))
        self.draw.shuffle(self.blocks)
        self.pages = [Pages(model, 60 * BLOCK) for model in models.values()]
        self.table = PromptTable(num_rows, len(models), torch.device("cpu"))
        self.free = list(range(num_rows))
        self.running: list[dict[str, Any]] = []

    def add(self, engine_prompt: list[int], prompts: tuple[tuple[int, ...], ...] | None, response: list[int]) -> None:
        row = self.free.pop(self.draw.randrange(len(self.free)))
        self.table.put(row, prompts)
        ids = engine_prompt + response
        blocks = [self.blocks.pop() for _ in range(-(-len(ids) // BLOCK))]
        self.running.append({"row": row, "ids": ids, "done": 0, "blocks": blocks, "hidden": []})

    def step(self, most: int) -> None:
        """Run a chunk of every request; hidden states of its last row, where vLLM would ask for logits, are kept."""
        self.draw.shuffle(self.running)
        sizes = [min(self.draw.randint(1, most), len(r["ids"]) - r["done"]) for r in self.running]
        ids = [token for r, size in zip(self.running, sizes, strict=True) for token in r["ids"][r["done"] :][:size]]
        positions = [r["done"] + i for r, size in zip(self.running, sizes, strict=True) for i in range(size)]
        padding = [0] * self.draw.randint(0, 3)
        step = Step(
            table_rows=np.array([r["row"] for r in self.running]),
            scheduled=np.array(sizes),
            computed=np.array([r["done"] for r in self.running]),
            input_ids=torch.tensor([*ids, *padding], dtype=torch.int32),
            positions=torch.tensor([*positions, *padding]),
        )
        width = max(len(r["blocks"]) for r in self.running)
        table = torch.tensor([r["blocks"] + [0] * (width - len(r["blocks"])) for r in self.running], dtype=torch.int32)
        lengths = torch.tensor([r["done"] + size for r, size in zip(self.running, sizes, strict=True)])
        hidden = []
        for pages, share in zip(self.pages, share_step(self.table, step), strict=True):
            assert share.place.shape == step.input_ids.shape
            own = pages.run(share, table, lengths) if share.num_tokens else torch.zeros(1, 16)
            hidden.append(share.spread(own))
        ends = np.cumsum(sizes) - 1
        for r, (request, size) in enumerate(zip(self.running, sizes, strict=True)):
            request["done"] += size
            request["hidden"].append((request["done"], [h[ends[r]] for h in hidden]))

    def finish(self) -> list[dict[str, Any]]:
        """Take out what is done: rows and blocks go to others, still full of it."""
        done = [r for r in self.running if r["done"] == len(r["ids"])]
        self.running = [r for r in self.running if r["done"] < len(r["ids"])]
        for request in done:
            self.free.append(request["row"])
            self.blocks += request["blocks"]
        return done


@pytest.fixture(scope="module")
def trio() -> dict[str, LlamaForCausalLM]:
    return make_trio()


@torch.no_grad()
def uncached(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """The obvious way: [T, H] of one sequence."""
    return model.model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("seed", range(6))
def test_paged_shares_compute_what_the_uncached_loop_does(seed: int, trio: dict[str, LlamaForCausalLM]):
    draw = random.Random(seed)
    engine = Engine(trio, seed)
    requests = []
    for index in range(7):
        rows = tuple(tuple(draw.randrange(5, 261) for _ in range(draw.randint(1, 15))) for _ in trio)
        own = None if index % 4 == 3 else rows  # some bring none: all read the engine's
        prompt = list(max(rows, key=len))
        response = [draw.randrange(5, 261) for _ in range(draw.randint(1, 6))]
        requests.append((prompt, own, response))
    waiting, finished = list(requests), 0

    while waiting or engine.running:
        while waiting and engine.free:
            engine.add(*waiting.pop())
        engine.step(most=draw.choice([1, 4, 20]))
        for done in engine.finish():
            finished += 1
            (prompt, own, response) = next(r for r in requests if r[0] + r[2] == done["ids"])
            rows = own or (tuple(prompt),) * len(trio)
            for n, model in enumerate(trio.values()):
                expected = uncached(model, [*rows[n], *response])
                for length, hidden in done["hidden"]:
                    if length < len(prompt):
                        continue  # nobody asks for logits before the prompt has been read
                    at = len(rows[n]) - 1 + length - len(prompt)
                    torch.testing.assert_close(hidden[n], expected[at], atol=2e-5, rtol=1e-4)
    assert finished == len(requests)


def test_a_step_before_a_specialists_first_token_leaves_it_nothing():
    table = PromptTable(2, 2, torch.device("cpu"))
    table.put(0, ((1, 2, 3, 4, 5), (9,)))
    step = Step(np.array([0]), np.array([3]), np.array([0]), torch.tensor([1, 2, 3]), torch.arange(3))

    long, short = share_step(table, step)

    assert long.input_ids.tolist() == [1, 2, 3]
    assert (short.num_tokens, short.longest_query, len(short.requests)) == (0, 0, 0)


def test_a_row_that_is_given_to_another_request_keeps_nothing_of_the_first():
    table = PromptTable(1, 2, torch.device("cpu"))
    table.put(0, ((1, 2, 3), (9,)))
    table.put(0, None)
    step = Step(np.array([0]), np.array([2]), np.array([0]), torch.tensor([7, 8]), torch.arange(2))

    assert not table.has_own(np.array([0]))
    for share in share_step(table, step):
        assert share.input_ids.tolist() == [7, 8]
        assert share.positions.tolist() == [0, 1]
