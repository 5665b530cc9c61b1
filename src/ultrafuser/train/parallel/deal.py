"""One batch dealt to several processes: equal numbers of forward passes, of about equal length.

Every process knows the whole batch, so each finds out alone what the others do, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.alignment.collate import micro_batches
from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.train.parallel.strategy import Share


def deal(records: Sequence[EncodedRecord], *, parts: int, part: int, max_columns: int) -> list[Share]:
    """The forward passes of one of `parts` over a batch.

    Records are dealt out by length, so every part gets about as many tokens. Parts cut their records into pieces; the
    ones with fewer pieces cut them once more, and where nothing is left to cut they run a pass that does not count.

    Args:
        records: The batch, the same in all processes.
        parts: Among how many it is dealt.
        part: Which, from 0.
        max_columns: Rows x columns of a piece, at most.

    Returns:
        Shares, as many for each part; none where there are no records.
    """
    ordered = sorted(records, key=lambda record: (record.num_columns, record.id))
    hands = [list(micro_batches(ordered[i::parts], max_columns=max_columns)) for i in range(parts)]
    rounds = max(map(len, hands))
    hand = hands[part]
    while len(hand) < rounds and (longest := max(map(len, hand), default=0)) > 1:
        at = next(i for i, piece in enumerate(hand) if len(piece) == longest)
        piece = hand[at]
        hand[at : at + 1] = [piece[: longest // 2], piece[longest // 2 :]]
    shares = [Share(piece) for piece in hand]
    return shares + [Share(ordered[:1], counts=False)] * (rounds - len(shares))
