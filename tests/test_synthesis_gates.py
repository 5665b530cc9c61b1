"""Gates: what each keeps and what it drops, for which reason.

Speed of `python benchmarks/gates.py ../shared/data/text/alpaca_claude_t45_5k.json --benchmarks ../shared/data/eval`
on one of 2 cores that others used, too, November 25, 2026, in texts a second, instructions / answers: length 54,000 /
28,000, truncated - / 9,500, refusals 18,500 / 9,700, language 2,200 / 900, code - / 89,000, duplicates 15,000 / -,
near duplicates 950 / -, overlap 14,700 / 8,400. So all of 330,000 instructions take some 9 minutes, 310,000 answers 8.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthesis_memory import MemoryContext, MemoryView, an_item, recipe_for
from ultrafuser.errors import ConfigError, DataError
from ultrafuser.synthesis.domain import load_domain
from ultrafuser.synthesis.gates.agreement import AgreementGate, comparable
from ultrafuser.synthesis.gates.build import build_gates
from ultrafuser.synthesis.gates.code import CodeGate
from ultrafuser.synthesis.gates.duplicates import DuplicatesGate, NearDuplicatesGate, bands_for
from ultrafuser.synthesis.gates.evolution import EvolutionGate
from ultrafuser.synthesis.gates.form import LengthGate, RefusalsGate, TruncatedGate
from ultrafuser.synthesis.gates.language import LanguageGate
from ultrafuser.synthesis.gates.settings import (
    DuplicatesSettings,
    EvolutionSettings,
    LanguageSettings,
    LengthSettings,
    NearDuplicatesSettings,
    RefusalsSettings,
    TruncatedSettings,
)
from ultrafuser.synthesis.gates.texts import blocks, jaccard, prose, shingles
from ultrafuser.synthesis.recipe import DomainConfig

EVERY_GATE = [
    LengthGate(LengthSettings(min_words=2, max_words=50)),
    TruncatedGate(TruncatedSettings()),
    RefusalsGate(RefusalsSettings()),
    LanguageGate("en", LanguageSettings()),
    CodeGate(),
    EvolutionGate(EvolutionSettings()),
    DuplicatesGate(DuplicatesSettings()),
    NearDuplicatesGate(NearDuplicatesSettings()),
    AgreementGate(),
]


def judged(gate, text: str, *, stage: str = "responses", original: str | None = None, **values) -> str | None:
    context = MemoryContext(finish_reason=values.pop("finish_reason", "stop"))
    parent = None
    if original is not None:
        context.view.put(an_item(original, key="original", state="kept"))
        parent = "original"
    return gate.judge(an_item(text, stage=stage, parent=parent, **values), context)


@pytest.mark.parametrize(
    ("settings", "text", "reason"),
    [
        ({"min_words": 2}, "One.", "too few words"),
        ({"min_words": 2}, "Two words.", None),
        ({"min_words": 3}, "你好吗", None),  # each is a word
        ({"max_words": 2}, "One two three", "too many words"),
        ({"min_characters": 5}, "  abc  ", "too few characters"),
        ({"max_characters": 5}, "abcdef", "too many characters"),
    ],
)
def test_length(settings, text, reason):
    assert judged(LengthGate(LengthSettings(**settings)), text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, but I can't assist with that request.", "refusal"),
        ("I’m sorry, but as a matter of fact I cannot help with this.", "refusal"),
        ("Unfortunately, I am not able to provide that.", "refusal"),
        ("I cannot comply with this.", "refusal"),
        ("I must respectfully decline.", "refusal"),
        ("As an AI language model, I have no feelings. But here is a poem.", "speaks of itself as a model"),
        ("Well, as a large language model I do not eat.", "speaks of itself as a model"),
        ("I'm just an AI, so take this with salt.", "speaks of itself as a model"),
        ("This lies beyond my knowledge cutoff.", "speaks of itself as a model"),
        ("I was trained by OpenAI.", "speaks of itself as a model"),
        ("I'm sorry I missed your party; I can't help feeling bad about it.", None),
        ("Dear Ann,\n\nI'm sorry, but I can't come on Sunday.", None),
        ("I cannot help the way I feel\nwhen the river is high.", None),
        ("As an AI researcher, you should read this paper.", None),
        ("Sorry is a word that children learn early.", None),
        ("I can't believe how good bread can be.", None),
    ],
)
def test_refusals_and_self_talk_are_told_from_people_who_are_sorry(text, reason):
    assert judged(RefusalsGate(RefusalsSettings()), text) == reason


@pytest.mark.parametrize(
    ("text", "drops"),
    [
        ("Here are 10 instructions about bread:", True),
        ("Write a letter to [your name] about bread.", True),
        ("Rewrite the given instruction with more detail.", True),
        ("Here are my ingredients: flour and salt. What can I bake?", False),
        ("Index a list with x[name] in Python.", False),
    ],
)
def test_instructions_that_speak_of_their_making_are_dropped(text, drops):
    gate = RefusalsGate(RefusalsSettings())

    assert (judged(gate, text, stage="instructions") is not None) == drops
    assert judged(gate, text, stage="responses") is None


def test_patterns_for_other_languages_can_be_added():
    gate = RefusalsGate(RefusalsSettings(patterns=("^Als KI",)))

    assert judged(gate, "Als KI habe ich keine Gefühle.") == "pattern of the recipe"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n ... \n", "empty"),
        ("Bread needs time.\n```python\nprint(1)", "code block without an end"),
        ("Knead it. Then leave it to rest in a warm place until the", "ends within a sentence"),
        ("It takes flour, water, salt and some yeast,", "ends within a sentence"),
        ("Knead it well. Then the dough is left to rest in some warm place overnight", "ends within a sentence"),
        ("Paris", None),
        ("Knead it. Then let it rest.", None),
        ("Roses are red\nviolets are blue\nand all of the others have some colour as well", None),
        ("Apples, pears, plums, cherries, quinces, apricots, peaches and a melon", None),
        ("So:\n```python\nprint(1)\n```", None),
        ("So $x = 5$ and therefore it all comes down to this: $$x^2 = 25$$", None),
        ("Try it today with all of your friends. You will love it! #bread #baking", None),
        ("1. Mix all of the flour with water\n2. Bake it for forty minutes at 230 degrees", None),
        ("| a | b |\n|---|---|\n| one of these things | and one of the others here |", None),
        ("面包需要时间。", None),
    ],
)
def test_texts_that_stop_before_their_end(text, reason):
    assert judged(TruncatedGate(TruncatedSettings()), text) == reason


def test_an_answer_out_of_tokens_is_truncated_however_it_ends():
    assert judged(TruncatedGate(TruncatedSettings()), "All is said.", finish_reason="length") == "out of tokens"


def test_sentences_are_left_alone_where_that_is_wished():
    gate = TruncatedGate(TruncatedSettings(sentences=False))

    assert judged(gate, "Write a story that ends in the midst of a sentence with the") is None


GERMAN = "Bitte erkläre mir, warum der Teig über Nacht im Kühlschrank gehen soll und was dabei geschieht."


@pytest.mark.parametrize(
    ("text", "original", "reason"),
    [
        ("Please explain why dough should rest in the fridge overnight.", None, None),
        (GERMAN, None, "language de"),
        (
            "请解释为什么面团要在冰箱里放一夜，以及在这段时间里发生了什么变化。请举例说明并给出实验方法。",
            None,
            "language zh",
        ),
        ("Guten Tag", None, None),  # too short to tell
        (GERMAN, "How would you say this in German?", None),
        (GERMAN, "Translate: Please explain why the dough should rest.", None),
        ("Translate into English: " + GERMAN, None, None),
        ("Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt.", None, None),
        (
            "```python\nfür_alle = [größe for größe in maße if größe über_schreitet grenze and nicht leer]\n```",
            None,
            None,
        ),
        (r"$$\int_0^1 \frac{\partial f}{\partial x}\,dx = \sum_{n=1}^\infty a_n$$ $x_1, \ldots, x_n$", None, None),
        ("🙌😅🎉" * 30, None, None),
    ],
)
def test_languages(text, original, reason):
    assert judged(LanguageGate("en", LanguageSettings()), text, original=original) == reason


def test_a_domain_may_be_in_another_language():
    gate = LanguageGate("de", LanguageSettings())

    assert judged(gate, GERMAN) is None
    assert (
        judged(gate, "Please explain why dough should rest in the fridge overnight and what happens.") == "language en"
    )


def test_a_language_that_nobody_knows_is_refused_at_once():
    with pytest.raises(ConfigError, match="language 'xx' is not one that py3langid knows"):
        LanguageGate("xx", LanguageSettings())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```python\nprint('x')\n```", None),
        ("```python\nprint 'x'\n```", "Python does not parse"),
        ("```py\ndef f(:\n```", "Python does not parse"),
        ("```Python\n    indented = 1\n    print(indented)\n```", None),
        ("1. First:\n   ```python\n   if x:\n       y()\n   ```\n2. Then.", None),
        ("```python\n>>> 1 + 1\n2\n>>> for x in y:\n...     x\n```", None),
        ("```python\n%matplotlib inline\n!pip install x\nprint(1)\n```", None),
        ('```python\nx = ("%d"\n     % 3)\n```', None),
        ("```python\nasync def f():\n    await g()\n```", None),
        ("```js\nlet x = ;\n```", None),  # nothing is said of other languages
        ("```\nfree text (\n```", None),
        ('```json\n{"a": [1, 2]}\n```', None),
        ('```json\n{"a": 1 "b": 2}\n```', "JSON does not parse"),
        ('```json\n{\n  // a comment\n  "a": 1,\n  ...\n}\n```', None),
        ('```json\n{\n  // a comment\n  "a": [1, 2, ...]\n}\n```', None),
        ('```json\n{"a": 1}\n{"a": 2}\n```', None),
        ("````markdown\n```python\nprint 'shown'\n```\n````", None),
        ("```python\n" + "(" * 5000 + "\n```", "Python does not parse"),
        ("```python\nx = " + "-" * 30_000 + "1\n```", "Python does not parse"),
        ("```json\n" + "[" * 40_000 + "\n```", "JSON does not parse"),
        ("```python\n" + "x = (\n" * 20_000 + "\n```", None),  # too long to be looked at
        ("```python\nx = '\0'\n```", "Python does not parse"),
    ],
)
def test_code_that_does_not_parse(text, reason):
    assert judged(CodeGate(), text) == reason


def test_code_that_is_shown_for_its_mistakes_may_have_them():
    broken = "```python\nprint 'x'\n```\nThis is how it was in Python 2."

    assert judged(CodeGate(), broken, original="Why does this give a SyntaxError?") is None
    assert judged(CodeGate(), broken, original="How do I print?") == "Python does not parse"


ORIGINAL = "How do I bake a simple white bread at home without a machine?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "How do I bake a white bread at home for a guest who must not have salt, in an oven that only reaches 180?",
            None,
        ),
        (ORIGINAL, "same as the original"),
        (ORIGINAL.upper() + "!!", "same as the original"),
        ("How to bake?", "shorter than the original"),
        ("#Rewritten Prompt#: " + ORIGINAL + " And why does it matter?", "speaks of the request"),
        ("Answer the rewritten instruction about bread with yeast and salt and some sugar.", "speaks of the request"),
        (" ".join(f"word{number}" for number in range(400)), "much longer than the original"),
    ],
)
def test_failed_evolutions_are_dropped(text, reason):
    assert judged(EvolutionGate(EvolutionSettings()), text, stage="evolved", original=ORIGINAL) == reason


def test_a_broader_evolution_may_be_shorter():
    gate, text = EvolutionGate(EvolutionSettings()), "Why is rye dough sour?"

    assert judged(gate, text, stage="evolved", original=ORIGINAL, detail={"method": "breadth"}) is None
    assert (
        judged(gate, text, stage="evolved", original=ORIGINAL, detail={"method": "deepen"})
        == "shorter than the original"
    )


def keep_or_drop(gate, items) -> list[str | None]:
    context = MemoryContext()
    verdicts = []
    for item in items:
        verdicts.append(gate.judge(item, context))
        if verdicts[-1] is None:
            gate.kept(item, context)
    return verdicts


def test_exact_duplicates_are_the_same_but_for_case_and_signs():
    texts = ["Bake a loaf.", "bake  a LOAF", "Bake two loaves.", "???", "!!!", "???"]

    verdicts = keep_or_drop(
        DuplicatesGate(DuplicatesSettings()), [an_item(text, key=f"{n}") for n, text in enumerate(texts)]
    )

    assert verdicts == [None, "same text", None, None, None, "same text"]


def test_instructions_of_all_stages_are_compared_and_topics_are_not():
    gate = DuplicatesGate(DuplicatesSettings())
    stages = ["instructions", "strong", "complicated", "sub_topics", "meta_topics", "responses"]

    verdicts = keep_or_drop(gate, [an_item("Bake a loaf.", key=stage, stage=stage) for stage in stages])

    assert verdicts == [None, "same text", "same text", None, None, None]


def test_within_a_topic_only_its_own_are_compared():
    gate = DuplicatesGate(DuplicatesSettings(scope="topic"))
    items = [an_item("Bake.", key=f"{n}", parent=parent) for n, parent in enumerate("aba")]

    assert keep_or_drop(gate, items) == [None, None, "same text"]


def test_a_complex_form_is_no_duplicate_of_its_original():
    long = "How do I bake a white bread at home when I have only rye flour, no machine and an hour of time"
    items = [an_item(long, key="a"), an_item(long + " left?", key="b", stage="complicated", parent="a")]

    assert keep_or_drop(NearDuplicatesGate(NearDuplicatesSettings()), items) == [None, None]


SENTENCE = (
    "A bakery sells rolls at 40 cents each and wants to know how many it has to sell on a day to cover a rent of 90 "
    "euros when flour costs it 12 cents a roll"
)


@pytest.mark.parametrize(
    ("other", "drops"),
    [
        (SENTENCE.replace("bakery", "shop"), True),
        (SENTENCE + ". Explain.", True),
        (SENTENCE.replace("rolls", "buns").replace("40", "60").replace("rent", "wage").replace("12", "25"), False),
        ("How long does a sourdough rest?", False),
    ],
)
def test_near_duplicates_share_most_of_their_word_sequences(other, drops):
    gate = NearDuplicatesGate(NearDuplicatesSettings())

    verdicts = keep_or_drop(gate, [an_item(SENTENCE, key="a"), an_item(other, key="b")])

    assert verdicts == [None, "like another text" if drops else None]
    assert (jaccard(shingles(SENTENCE, 3), shingles(other, 3)) >= 0.7) == drops


@pytest.mark.parametrize("text", ["", "a", "a b", "???", "\ud800"])
def test_texts_of_a_few_words_can_be_near_duplicates_too(text):
    gate = NearDuplicatesGate(NearDuplicatesSettings())

    assert keep_or_drop(gate, [an_item(text, key="a"), an_item(text, key="b")]) == [None, "like another text"]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_bands_find_nine_in_ten_of_the_pairs_at_the_threshold(threshold):
    num_bands, rows = bands_for(threshold, 128)

    assert num_bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** num_bands >= 0.9


@given(st.lists(st.sampled_from(["bake", "bread", "salt", "flour", "soup", "egg"]), min_size=1, max_size=30))
def test_no_text_is_dropped_for_a_likeness_that_is_not_there(words):
    """Bands may err in both directions; the verdict does only in one."""
    gate = NearDuplicatesGate(NearDuplicatesSettings(threshold=0.5))
    items = [an_item(SENTENCE, key="a"), an_item(" ".join(words), key="b"), an_item(" ".join(words[::-1]), key="c")]

    verdicts = keep_or_drop(gate, items)

    if verdicts[2] is not None:
        sets = [shingles(item.text, 3) for item in items]
        assert max(jaccard(sets[2], sets[0]), jaccard(sets[2], sets[1])) >= 0.5


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        (r"So it is \boxed{5}.", "The answer is 5.", True),
        (r"\boxed{\frac{1}{2}}", "The answer is 0.5", True),
        (r"\boxed{\dfrac{3}{4}}", r"\boxed{\frac34}", True),
        (r"\boxed{1,234}", "#### 1234", True),
        (r"\boxed{50\%}", r"\boxed{50 \%}", True),
        (r"\boxed{50\%}", r"\boxed{50}", False),
        (r"\boxed{x = 3}", r"\boxed{3}", True),
        (r"\boxed{\left(1, 2\right)}", r"\boxed{(1,2)}", True),
        (r"\boxed{2\sqrt{3}}", r"\boxed{2 \sqrt{3}}", True),
        (r"\boxed{\text{no solution}}", r"\boxed{No solution}", True),
        (r"\boxed{5}", r"\boxed{6}", False),
        (r"\boxed{-5}", r"\boxed{5}", False),
        (r"\boxed{12\text{ cm}}", r"\boxed{12 cm}", True),
    ],
)
def test_conclusions_are_compared_in_one_spelling(first, second, agree):
    assert (comparable(first) == comparable(second)) == agree


@pytest.mark.parametrize(
    ("answers", "verdicts"),
    [
        ([r"\boxed{5}", "The answer is 5."], [None, "spare sample"]),
        ([r"\boxed{5}", r"\boxed{6}"], ["samples disagree", "samples disagree"]),
        ([r"\boxed{5}", r"\boxed{6}", r"\boxed{5}"], [None, "spare sample", "spare sample"]),
        ([r"\boxed{6}", r"\boxed{5}", r"\boxed{5}"], ["samples disagree", None, "spare sample"]),
        (["It depends.", r"\boxed{5}"], ["no conclusion", "samples disagree"]),
        ([r"\boxed{5}"], ["no second sample"]),
    ],
)
def test_one_of_the_answers_that_agree_is_kept(answers, verdicts):
    view = MemoryView()
    for number, text in enumerate(answers):
        view.put(an_item(text, key=f"{number}", stage="responses", parent="p", state="new"))
    context, gate = MemoryContext(view), AgreementGate()

    found = []
    for number in range(len(answers)):
        item = view.item(f"{number}")
        found.append(gate.judge(item, context))
        view.put(replace(item, state="kept" if found[-1] is None else "dropped"))

    assert found == verdicts


def test_samples_of_other_rounds_are_no_witnesses():
    """What two rounds of disagreeing samples have in common by chance is no agreement."""
    view = MemoryView()
    view.put(an_item(r"\boxed{5}", key="old", stage="responses", parent="p", state="dropped"))
    view.put(an_item(r"\boxed{5}", key="new", stage="responses", parent="p", state="new", round=1))

    assert AgreementGate().judge(view.item("new"), MemoryContext(view)) == "no second sample"


QUESTION = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four."
)


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    (tmp_path / "gsm8k_test.jsonl").write_text(
        json.dumps({"question": QUESTION, "answer": "She sells nine. #### 18"}) + "\n", encoding="utf-8"
    )
    with gzip.open(tmp_path / "humaneval.jsonl.gz", "wt", encoding="utf-8") as file:
        row = {
            "task_id": "HumanEval/0",
            "prompt": "def has_close_elements(numbers): pass",
            "canonical_solution": "pass",
        }
        file.write(json.dumps(row) + "\n")
    return tmp_path


def test_what_overlaps_with_a_test_set_is_dropped(benchmarks: Path):
    gates = {"instructions": {"overlap": {"benchmarks": ["gsm8k", "humaneval"]}}}
    domain = load_domain("cooking", DomainConfig(settings={"gates": gates}))
    (gate,) = (
        gate
        for gate in build_gates("instructions", domain, recipe_for("cooking", benchmarks=benchmarks))
        if gate.name == "overlap"
    )

    assert judged(gate, "Solve: " + QUESTION.upper(), stage="instructions") == "overlaps with gsm8k"
    assert judged(gate, "Janet's ducks lay 16 eggs a day. How many cakes can she bake?", stage="instructions") is None


def test_a_test_set_that_is_missing_is_an_error_and_not_passed_over(benchmarks: Path):
    domain = load_domain("cooking", DomainConfig())

    with pytest.raises(DataError, match="lacks mbpp"):
        build_gates("instructions", domain, recipe_for("cooking", benchmarks=benchmarks))


def test_gates_stand_in_their_order_and_only_where_they_are_wished():
    domain, recipe = load_domain("code", DomainConfig()), recipe_for("code")

    names = {
        stage: [gate.name for gate in build_gates(stage, domain, recipe)]
        for stage in ("meta_topics", "instructions", "complicated", "responses")
    }

    assert names["meta_topics"] == ["length", "refusals", "duplicates"]
    assert names["instructions"] == ["length", "refusals", "language", "duplicates", "near_duplicates"]
    assert names["complicated"][:2] == ["length", "truncated"]
    assert "evolution" in names["complicated"]
    assert names["responses"] == ["length", "truncated", "refusals", "language", "code"]


def test_blocks_end_with_a_fence_of_their_own_kind():
    text = "a\n````md\n```py\nx\n```\n````\nb\n~~~json\n{}\n~~~\nc\n```py\nopen"

    assert [(block.language, block.code, block.is_open) for block in blocks(text)] == [
        ("md", "```py\nx\n```", False),
        ("json", "{}", False),
        ("py", "open", True),
    ]
    assert prose(text).split() == ["a", "b", "c"]


@given(
    st.one_of(
        st.text(max_size=300), st.lists(st.sampled_from(["```", "\n", "$", "\\boxed{", "1/0", "as an AI"])).map("".join)
    )
)
def test_every_gate_takes_every_text_and_says_the_same_again(text):
    for gate in EVERY_GATE:
        reasons = []
        for _ in range(2):
            context = MemoryContext()
            context.view.put(an_item("Original", key="p", state="kept"))
            reasons.append(gate.judge(an_item(text, parent="p"), context))
        assert reasons[0] == reasons[1]
        assert reasons[0] is None or len(reasons[0]) < 60


@pytest.mark.parametrize("gate", EVERY_GATE, ids=lambda gate: gate.name)
@pytest.mark.parametrize(
    "piece", ["```\n", "$", "\\boxed{", "a ", "I am ", "[", "sorry ", "(1/", "\\frac{1}", "= ", "<a "]
)
def test_no_text_takes_a_gate_for_ever(gate, piece):
    """Patterns that try all ways would hang on one of these."""
    judged(gate, piece * (40_000 // len(piece)), original="Original")
