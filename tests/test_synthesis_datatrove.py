"""Near duplicates at scale: datatrove's steps for real, and the same verdicts as the gate's."""

import random
from pathlib import Path

import pytest

from synthesis_memory import MemoryContext, MemoryView, an_item
from ultrafuser.errors import DataError
from ultrafuser.synthesis.gates.at_scale import near_duplicates, near_duplicates_of
from ultrafuser.synthesis.gates.duplicates import NearDuplicatesGate
from ultrafuser.synthesis.gates.settings import NearDuplicatesSettings

pytest.importorskip("datatrove")


def planted(num_texts: int, num_copies: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Texts of random words, behind them copies with one word changed, and the copies' keys."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    texts = [(f"a{number:05}", " ".join(draw.choices(words, k=draw.randint(20, 60)))) for number in range(num_texts)]
    copies = []
    for number in range(num_copies):
        copied = texts[number][1].split()
        copied[draw.randrange(len(copied))] = "changed"
        copies.append((f"b{number:05}", " ".join(copied)))
    return texts + copies, [key for key, _ in copies]


def dropped_by_the_gate(texts: list[tuple[str, str]]) -> list[str]:
    gate, context = NearDuplicatesGate(NearDuplicatesSettings()), MemoryContext()
    dropped = []
    for key, text in texts:
        item = an_item(text, key=key)
        if gate.judge(item, context) is not None:
            dropped.append(key)
        else:
            gate.kept(item, context)
    return dropped


@pytest.mark.slow
def test_datatrove_and_the_gate_drop_the_same_copies(tmp_path: Path):
    texts, copies = planted(2000, 100)
    texts += [("c0", "Bread"), ("c1", "Soup"), ("c2", "bread!")]  # shorter than a word sequence

    found = near_duplicates(texts, tmp_path / "run", NearDuplicatesSettings(), num_tasks=2)

    assert found == dropped_by_the_gate(texts) == [*copies, "c2"]


@pytest.mark.slow
def test_kept_instructions_of_a_view_are_compared_and_an_interrupted_run_goes_on(tmp_path: Path):
    view = MemoryView()
    texts, _ = planted(30, 5)
    for number, (key, text) in enumerate(texts):
        state = "dropped" if number == 0 else "kept"  # so its copy is like none
        view.put(an_item(text, key=key, stage="instructions" if number % 2 else "strong", state=state))

    class StoppedError(Exception):
        pass

    def stop_at_the_second(steps, num_tasks, logs):
        if logs.name == "2":
            raise StoppedError
        from ultrafuser.synthesis.gates.datatrove_steps import locally

        locally(steps, num_tasks, logs)

    settings = NearDuplicatesSettings()
    with pytest.raises(StoppedError):
        near_duplicates_of(
            view, ("instructions", "strong"), tmp_path / "run", settings, num_tasks=1, execute=stop_at_the_second
        )
    found = near_duplicates_of(view, ("instructions", "strong"), tmp_path / "run", settings, num_tasks=1)

    assert found == ["b00001", "b00002", "b00003", "b00004"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")

    with pytest.raises(DataError, match="holds something else"):
        near_duplicates([("a", "b")], tmp_path, NearDuplicatesSettings())
