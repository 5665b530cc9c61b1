"""The soak test of `benchmarks/soak.py`, cut short: nothing lost, mixed up or leaked."""

import os
import sys
from pathlib import Path

import pytest

from server_helpers import MODEL, make_engine, serving

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from soak import Soak


@pytest.mark.slow
def test_many_impatient_clients_get_their_own_answers_and_leave_nothing_behind():
    with serving(make_engine(max_choices=8)) as served:
        findings = Soak(served.url, MODEL, max_tokens=12).run(num_clients=32, seconds=4.0, pid=os.getpid())

    # Clients and server are one process here, and the clients' connections are closed by then.
    assert findings["wrong"] == 0, findings
    assert findings["lost"] == 0
    assert findings["idle_at_end"]
    assert findings["whole"] + findings["streamed"] > 10
    assert findings["left"] + findings["impatient"] > 0
    assert findings["files_after"] <= findings["files_before"] + 2
