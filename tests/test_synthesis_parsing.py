"""What models answer, and what is read from it: JSON, nearly JSON, lists and talk."""

import json

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from ultrafuser.synthesis.parsing import (
    FORMATS,
    MAX_CHARACTERS,
    MAX_ITEMS,
    SCHEMAS,
    Topic,
    read_instruction,
    read_instructions,
    read_text,
    read_topics,
)
from ultrafuser.synthesis.stages.base import UnreadableError

LINE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=80).map(
    lambda text: " ".join(text.split())
)
NONEMPTY = LINE.filter(bool)
BREAD = Topic("Sourdough Bread", "It needs patience.", "A beginner's first loaf.")
SOUP = Topic("Clear Soups", "They show every mistake.", "A dinner for six.")
JSON = json.dumps(
    {
        "topics": [
            {"name": topic.name, "relevance": topic.relevance, "use_case": topic.use_case} for topic in (BREAD, SOUP)
        ]
    }
)


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"```json\n{JSON}\n```",
        f"Sure! Here are the topics:\n\n{JSON}\n\nLet me know if you need more.",
        f"<think>\nSome {{braces}} here.\n</think>\n{JSON}",
        JSON.replace('"topics"', '"sub_topics"'),
        json.dumps(json.loads(JSON)["topics"]),
        JSON.replace('"}, {', '"},\n{').replace("]}", ",]}"),  # a comma too many
        JSON.replace('{"topics": ', "{'topics': ").replace('"use_case"', "'use_case'"),
        JSON[:-2],  # cut at the end
        JSON.replace('"use_case"', '"Use Case"').replace('"name"', '"Name"'),
        "Topic: Sourdough Bread\nRelevance: It needs patience.\nUse case: A beginner's first loaf.\n\n"
        "Topic: Clear Soups\nRelevance: They show every mistake.\nUse case: A dinner for six.",
        "1. **Name:** Sourdough Bread\n   - **Relevance:** It needs patience.\n   - **Use case:** A beginner's first "
        "loaf.\n2. **Name:** Clear Soups\n   - **Relevance:** They show every mistake.\n   - **Use case:** A "
        "dinner for six.",
        "1. **Sourdough Bread**\n   - Relevance: It needs patience.\n   - Use case: A beginner's first loaf.\n\n"
        "2. **Clear Soups**\n   - Relevance: They show every mistake.\n   - Use case: A dinner for six.\n",
        "### Topic 1: Sourdough Bread\nRelevance: It needs patience.\nUse-case: A beginner's first loaf.\n"
        "### Topic 2: Clear Soups\nRelevance: They show every mistake.\nUse-case: A dinner for six.",
    ],
)
def test_topics_are_read_in_whatever_form(text: str):
    assert read_topics(text) == [BREAD, SOUP]


def test_topics_of_a_plain_list_have_a_name_and_perhaps_a_relevance():
    text = "Topics:\n\n1. Sourdough Bread: It needs patience.\n2) **Clear Soups** - They show every mistake.\n3. Jam\n"

    assert read_topics(text) == [
        Topic("Sourdough Bread", "It needs patience."),
        Topic("Clear Soups", "They show every mistake."),
        Topic("Jam"),
    ]


def test_a_topics_name_has_no_space_around_it():
    assert read_topics('1. " Sourdough Bread "\n2. ** Jam **: sweet\n') == [
        Topic("Sourdough Bread"),
        Topic("Jam", "sweet"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '{"instructions": ["Bake a loaf.", "Boil an egg:\\nhow long?"]}',
        '["Bake a loaf.", "Boil an egg:\\nhow long?"]',
        '{"instructions": [{"instruction": "Bake a loaf."}, {"Question": "Boil an egg:\\nhow long?"}]}',
        '```\n{"instructions": ["Bake a loaf.", "Boil an egg:\\nhow long?"\n```',
        "1. Bake a loaf.\n2. Boil an egg:\nhow long?",
        "Of course:\n\n1. Instruction: Bake a loaf.\n2. **Instruction:** Boil an egg:\nhow long?\n\nI hope this helps!",
        "- Bake a loaf.\n- Boil an egg:\nhow long?",
        "1. Instruction 1: Bake a loaf.\n\n2. Instruction 2: Boil an egg:\nhow long?",
        "#1: Bake a loaf.\n#2: Boil an egg:\nhow long?",
    ],
)
def test_instructions_are_read_in_whatever_form(text: str):
    assert read_instructions(text) == ["Bake a loaf.", "Boil an egg:\nhow long?"]


def test_a_list_inside_an_instruction_stays_in_it():
    text = "1. Order these:\n   - eggs\n   - flour\n2. Bake."

    assert read_instructions(text) == ["Order these:\n   - eggs\n   - flour", "Bake."]


def test_code_in_json_keeps_its_lines_and_braces():
    code = "Repair:\n```python\nd = {'a': [1, 2]}\nprint(d)\n```"

    assert read_instructions(json.dumps({"instructions": [code]})) == [code]


@pytest.mark.parametrize(
    "text",
    [
        '{"instruction": "Bake a loaf."}',
        '```json\n{"instruction": "Bake a loaf."}\n```',
        "Bake a loaf.",
        '"Bake a loaf."',
        "Sure, here is the rewritten instruction:\n\nBake a loaf.",
        "**New instruction:** Bake a loaf.",
        '{"rewritten": "x", "instruction": "Bake a loaf."}',
        '{"instruction": "Bake a loaf.',
    ],
)
def test_one_instruction_is_read_in_whatever_form(text: str):
    assert read_instruction(text) == "Bake a loaf."


def test_an_instruction_that_holds_json_stays_whole():
    """What begins as prose is no answer in JSON, though it has some in it."""
    text = 'Turn {"a": 1} into YAML and explain each line.'

    assert read_instruction(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty answer"),
        (" \n\t", "empty answer"),
        ("<html><body>502 Bad Gateway</body></html>", "no topics in the answer"),
        ("I cannot do that.", "no topics in the answer"),
        ("{}", "no topics in the answer"),
        ('{"topics": []}', "no topics in the answer"),
        ("<think>and so on, without an end", "thoughts without an answer"),
        ("x" * (MAX_CHARACTERS + 1), f"answer of more than {MAX_CHARACTERS} characters"),
    ],
)
def test_reasons_can_be_counted(text: str, reason: str):
    with pytest.raises(UnreadableError) as caught:
        read_topics(text)

    assert str(caught.value) == reason


def test_thoughts_are_no_part_of_an_answer():
    assert read_text("<think>Hm.</think>\n\nBread.\n") == "Bread."
    assert read_text("Write <think> like this.") == "Write <think> like this."


@given(st.lists(NONEMPTY, min_size=1, max_size=12))
def test_instructions_in_json_come_back_as_they_are(texts: list[str]):
    assert read_instructions(json.dumps({"instructions": texts})) == [text.strip() for text in texts]


@given(st.lists(st.builds(Topic, NONEMPTY, LINE, LINE), min_size=1, max_size=12))
def test_topics_in_json_come_back_as_they_are(topics: list[Topic]):
    values = [{"name": topic.name, "relevance": topic.relevance, "use_case": topic.use_case} for topic in topics]

    assert read_topics(json.dumps({"topics": values})) == topics


JSON_PIECES = (
    '{"topics": [',
    '{"name": "',
    '"}',
    "]",
    "}",
    "[",
    "{",
    ":",
    ",",
    '"',
    "\\",
    "null",
    "1e999",
    "nan",
    "\\u12",
)
OTHER_PIECES = ("1. ", "- ", "\n", "```json\n", "```", "Topic: ", "Relevance: ", "<think>", "</think>", "\ud800", "\0")
PIECES = st.sampled_from((*JSON_PIECES, *OTHER_PIECES))


@given(st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=40).map("".join)))
def test_any_text_gives_items_or_one_kind_of_error(text: str):
    for read in (read_topics, read_instructions, read_instruction, read_text):
        for arguments in ({}, {"is_cut": True}) if read in (read_topics, read_instructions) else ({},):
            try:
                found = read(text, **arguments)
            except UnreadableError as error:
                found = str(error)
                event(found)
            assert found
            assert "\0" not in str(found)
            str(found).encode()  # what is stored has to be UTF-8


@pytest.mark.parametrize("piece", ["[", '{"a":', "1. x\n", "```\n", "Topic: x\n", '{"name": "x"},', "- {\n", "\\"])
def test_reading_ends_soon_and_gives_no_more_than_a_limit(piece: str):
    """Deep nests, endless lists and a thousand fences are read in about the time of their length."""
    try:
        found = read_topics(piece * (150_000 // len(piece)))
    except UnreadableError:
        return
    assert len(found) <= MAX_ITEMS


def test_instructions_about_json_are_not_taken_for_an_answer_in_json():
    text = '1. Sort {"a": ["x", "y"]} by value.\n2. Turn ["x"] into a set.'

    assert read_instructions(text) == ['Sort {"a": ["x", "y"]} by value.', 'Turn ["x"] into a set.']


def test_every_schema_is_strict_and_has_a_form_in_words():
    assert SCHEMAS.keys() == FORMATS.keys()
    for schema in SCHEMAS.values():
        assert schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])
