"""Own template per specialist: a paged cache of simulated steps holds, for each, its own prompt and the response.

The obvious way is a list of ids for each specialist; the arithmetic must fill and read the engine's blocks alike,
however a prompt is cut into chunks and whoever shares a step.
"""

import random
from itertools import pairwise

import pytest
import torch

from ultrafuser.vllm_plugin.positions import (
    NO_SLOT,
    own_ids,
    own_positions,
    own_sequence_lengths,
    own_slots,
    pads,
)

BLOCK = 4


class Engine:
    """A scheduler that gives each request a chunk of its tokens, and one cache for each specialist."""

    def __init__(self, prompts: list[list[list[int]]], responses: list[list[int]], seed: int) -> None:
        self.draw = random.Random(seed)
        self.prompts, self.responses = prompts, responses
        self.lengths = torch.tensor([[len(row) for row in rows] for rows in prompts])
        self.stored = torch.full((*self.lengths.shape, int(self.lengths.max())), -7)
        for r, rows in enumerate(prompts):
            for n, row in enumerate(rows):
                self.stored[r, n, : len(row)] = torch.tensor(row)
        self.sequences = [
            max(rows, key=len) + answer for rows, answer in zip(prompts, responses, strict=True)
        ]  # what the engine itself sees
        self.done = [0] * len(prompts)
        blocks = -(-max(map(len, self.sequences)) // BLOCK)
        order = list(range(blocks * len(prompts)))
        self.draw.shuffle(order)
        self.table = torch.tensor(order).reshape(len(prompts), blocks)
        self.caches = torch.full((self.lengths.shape[1], len(order) * BLOCK), -1)

    def step(self, chunk: int) -> None:
        """Feed the next tokens of every unfinished request."""
        ids, positions, request_of = [], [], []
        for r, sequence in enumerate(self.sequences):
            size = min(self.draw.randint(1, chunk), len(sequence) - self.done[r])
            for position in range(self.done[r], self.done[r] + size):
                ids.append(sequence[position])
                positions.append(position)
                request_of.append(r)
            self.done[r] += size
        engine_ids, of = torch.tensor(ids), torch.tensor(request_of)
        own = own_positions(torch.tensor(positions), of, self.lengths)
        read = own_ids(engine_ids, own, of, self.stored, self.lengths)
        slots = own_slots(own, of, self.table, BLOCK)
        self.check_visible_keys(own, of)
        for n in range(own.shape[0]):
            written = slots[n] != NO_SLOT
            self.caches[n, slots[n][written]] = read[n][written]

    def check_visible_keys(self, own: torch.Tensor, of: torch.Tensor) -> None:
        """Aligned at the bottom right, the row of a token sees as many keys as its own position and itself."""
        keys = own_sequence_lengths(torch.tensor(self.done), self.lengths)
        for r in range(len(self.sequences)):
            rows = (of == r).nonzero()[:, 0]
            for q, row in enumerate(rows.tolist()):
                visible = (keys[:, r] - (len(rows) - 1 - q)).clamp(min=0)
                assert torch.equal(visible, (own[:, row] + 1).clamp(min=0))

    def held(self, r: int, n: int) -> list[int]:
        """What the cache of a specialist holds of a request."""
        length = int(own_sequence_lengths(torch.tensor(self.done), self.lengths)[n, r])
        flat = [int(block) * BLOCK + offset for block in self.table[r] for offset in range(BLOCK)]
        return self.caches[n, torch.tensor(flat[:length], dtype=torch.long)].tolist()


def make_engine(seed: int) -> Engine:
    draw = random.Random(seed)
    count = draw.randint(1, 5)
    prompts = [[[draw.randrange(100, 999) for _ in range(draw.randint(1, 17))] for _ in range(3)] for _ in range(count)]
    responses = [[draw.randrange(1000, 1999) for _ in range(draw.randint(1, 9))] for _ in range(count)]
    return Engine(prompts, responses, seed)


@pytest.mark.parametrize("seed", range(40))
def test_every_specialist_ends_with_its_own_prompt_and_the_shared_response(seed: int):
    engine = make_engine(seed)

    while any(done < len(sequence) for done, sequence in zip(engine.done, engine.sequences, strict=True)):
        engine.step(chunk=random.Random(seed).choice([1, 3, 30]))

    for r, (rows, answer) in enumerate(zip(engine.prompts, engine.responses, strict=True)):
        for n, row in enumerate(rows):
            assert engine.held(r, n) == row + answer


def test_prompts_of_one_length_change_nothing():
    """Then a shared template's arithmetic must come out: the engine's own positions and slots."""
    lengths = torch.full((2, 3), 5)
    positions, of = torch.tensor([0, 1, 2, 6]), torch.tensor([0, 0, 1, 1])
    table = torch.tensor([[3, 1], [0, 2]])

    own = own_positions(positions, of, lengths)

    assert torch.equal(own, positions.expand(3, -1))
    assert own_slots(own, of, table, BLOCK)[0].tolist() == [12, 13, 2, 10]
    assert not pads(lengths).any()


def test_a_shorter_prompt_starts_later_and_writes_nothing_before():
    lengths = torch.tensor([[5, 2]])
    positions, of = torch.arange(6), torch.zeros(6, dtype=torch.long)
    prompts = torch.tensor([[[1, 2, 3, 4, 5], [8, 9, 0, 0, 0]]])

    own = own_positions(positions, of, lengths)
    ids = own_ids(torch.tensor([1, 2, 3, 4, 5, 77]), own, of, prompts, lengths)

    assert own[1].tolist() == [-3, -2, -1, 0, 1, 2]
    assert ids[1].tolist() == [0, 0, 0, 8, 9, 77]
    assert own_slots(own, of, torch.tensor([[0, 1]]), BLOCK)[1].tolist() == [NO_SLOT] * 3 + [0, 1, 2]


def test_a_chunk_before_the_first_token_leaves_a_specialist_without_keys():
    lengths = torch.tensor([[9, 2]])

    counts = [own_sequence_lengths(torch.tensor([done]), lengths)[:, 0].tolist() for done in (4, 7, 8, 12)]

    assert counts == [[4, 0], [7, 0], [8, 1], [12, 5]]
    assert all(before <= after for (_, before), (_, after) in pairwise(counts))
