"""Records come out of every kind of file alike; what is wrong is said with file and line."""

import gzip
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser.chat.messages import Message
from ultrafuser.data.files import read_objects
from ultrafuser.data.records import Problems, Record, content_id, read_records
from ultrafuser.errors import ConfigError, DataError

RAW = [{"instruction": f"Say {n}.", "output": f"{n} é"} for n in range(3)]


def lines(raw: Iterable[object] = RAW) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in raw).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(RAW), path)


def contents(records: Iterable[Record]) -> list[tuple[str, ...]]:
    return [tuple(message.content for message in record.messages) for record in records]


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\r\n")),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.json": lambda path: path.write_text(json.dumps(RAW, indent=1)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(RAW).encode())),
    "lines.json": lambda path: path.write_bytes(lines()),
    "a.csv": lambda path: path.write_text("instruction,output\nSay 0.,0 é\nSay 1.,1 é\nSay 2.,2 é\n", encoding="utf-8"),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)

    records = list(read_records(tmp_path / name, domain="text"))

    assert contents(records) == [(f"Say {n}.", f"{n} é") for n in range(3)]
    assert {record.domain for record in records} == {"text"}


def test_aqua_cot_has_three_columns_and_spells_its_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"1+1?\\nOptions:\\n(A) 2\t(A)\tCount.\\nDone.\n")

    (record,) = read_records(path, domain="math")

    assert contents([record]) == [("1+1?\nOptions:\n(A) 2", "Count.\nDone.\nThe answer is (A).")]
    assert record.source == f"{path}:1"


def test_the_source_is_the_line_or_the_index(tmp_path: Path) -> None:
    by_line = write(tmp_path / "a.jsonl", b"\n" + lines())
    by_index = write(tmp_path / "a.json", json.dumps(RAW).encode())

    assert [record.source for record in read_records(by_line, domain="d")] == [f"{by_line}:{n}" for n in (2, 3, 4)]
    assert [record.source for record in read_records(by_index, domain="d")] == [f"{by_index}[{n}]" for n in range(3)]


def test_a_folder_gives_its_data_files_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", lines(RAW[1:2]))
    write(tmp_path / "a.json", json.dumps(RAW[:1]).encode())
    write(tmp_path / "README.md", b"# no data")
    write(tmp_path / ".hidden.json", b"nonsense")

    assert [content[0] for content in contents(read_records(tmp_path, domain="d"))] == ["Say 0.", "Say 1."]
    assert len(list(read_records(tmp_path, domain="d", limit=1))) == 1


def test_a_field_can_name_the_domain(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([RAW[0] | {"topic": " code "}, RAW[1] | {"topic": ""}]))
    problems = Problems()

    (record,) = read_records(path, domain_field="topic", on_error="skip", problems=problems)

    assert record.domain == "code"
    assert problems.counts == {"no domain": 1}


def test_the_id_depends_on_the_messages_alone(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", lines(RAW[:1]))
    two = write(tmp_path / "b.json", json.dumps([{"prompt": "Say 0.", "completion": " 0 é "}]).encode())

    ids = {next(read_records(path, domain=domain)).id for path, domain in ((one, "text"), (two, "code"))}

    assert len(ids) == 1
    assert len(ids.pop()) == 32


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=4, unique=True))
def test_another_split_of_the_text_into_messages_is_another_id(pairs: list[tuple[str, str]]) -> None:
    conversation = tuple(Message(role, content) for role, content in pairs)  # type: ignore[arg-type]
    joined = (Message("user", "".join(content for _, content in pairs)),)

    assert (content_id(conversation) == content_id(joined)) == (conversation == joined)


BAD_LINES = [
    (b'{"instruction": \n', "not JSON: Expecting value at column"),
    (b'{"instruction": "\xff"}\n', "not UTF-8: invalid start byte at byte 18"),
    (b"[1]\n", "must be an object"),
    (b'{"instruction": "a", "output": ""}\n', "assistant message 1 is empty"),
    (b'{"title": "a"}\n', "no format has the keys title"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_record_is_an_error_with_file_and_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(RAW[:2]) + line)

    with pytest.raises(DataError) as caught:
        list(read_records(path, domain="d"))

    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)


def test_what_is_skipped_is_counted_and_the_first_ones_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"".join(line for line, _ in BAD_LINES) * 3 + lines())
    problems = Problems(max_examples=2)

    records = list(read_records(path, domain="d", on_error="skip", problems=problems))

    assert len(records) == 3
    assert problems.counts == {"unreadable": 9, "no response": 3, "unknown format": 3}
    assert problems.total == 15
    assert problems.summary() == "9 unreadable, 3 no response, 3 unknown format"
    assert len(problems.examples) == 6
    assert problems.examples[0].message.startswith(f"{path}:1: ")


def test_skipping_without_a_place_for_the_problems_is_refused() -> None:
    with pytest.raises(ConfigError, match="problems=Problems"):
        read_records("a.jsonl", domain="d", on_error="skip")


def test_nothing_to_train_on_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", BAD_LINES[3][0] * 2)

    with pytest.raises(DataError, match=r"nothing to train on: .*2 no response.*a\.jsonl:1: "):
        list(read_records(path, domain="d", on_error="skip", problems=Problems()))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.csv", b"instruction,output\n", "is empty"),
        ("a.json", b'[{"instruction": "a"},\n{]', ":2: not JSON"),
        ("a.json", b'[{"instruction": "a"},\n"\xff"]', ":2: not UTF-8"),
        ("a.csv", b"instruction,output\na,b\na,b,c\n", ":3: more cells than the header has"),
        ("a.tsv", b"question\tanswer\n", ":1: 2 columns between tabs where 3"),
        ("a.jsonl.gz", b"no gzip", "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-9], "damaged gzip"),
        ("a.json.gz", gzip.compress(lines(), mtime=0)[:-9], "damaged gzip"),
        ("a.parquet", b"no parquet", "no readable Parquet"),
        ("a.txt", b"text", "no known ending"),
    ],
)
def test_an_empty_or_damaged_file_is_an_error(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, content)

    with pytest.raises(DataError) as caught:
        list(read_records(path, domain="d"))

    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_damaged_file_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-9])

    with pytest.raises(DataError, match="damaged gzip"):
        list(read_records(path, domain="d", on_error="skip", problems=Problems()))


def test_a_missing_file_and_a_folder_without_data_are_errors_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "missing.jsonl", domain="d")
    with pytest.raises(DataError, match="folder without data files"):
        read_records(tmp_path, domain="d")


@pytest.mark.parametrize(("domain", "domain_field"), [(None, None), ("d", "field"), ("", None), (None, "")])
def test_the_domain_is_named_exactly_once(domain: str | None, domain_field: str | None) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        read_records("a.jsonl", domain=domain, domain_field=domain_field)


def test_other_options_that_make_no_sense_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="limit"):
        read_records("a.jsonl", domain="d", limit=0)
    with pytest.raises(ConfigError, match="alpacca"):
        read_records("a.jsonl", domain="d", file_format="alpacca")
    with pytest.raises(ConfigError, match="owner/name"):
        read_records("hub:", domain="d")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(DataError, match=r"pip install 'ultrafuser\[data\]'"):
        list(read_records(path, domain="d"))


def test_hub_data_sets_without_datasets_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(DataError, match=r"pip install 'ultrafuser\[data\]'"):
        list(read_records("hub:owner/name", domain="d"))


def test_a_hub_id_names_configuration_revision_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str]]:
        asked.extend([*args, kwargs["revision"], kwargs["split"]])
        return RAW

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    records = list(read_records("hub:owner/name:main@v1#train[:1%]", domain="d"))

    assert asked == ["owner/name", "main", "v1", "train[:1%]"]
    assert records[2].source == "hub:owner/name:main@v1#train[:1%][2]"


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nwith many details")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    with pytest.raises(DataError) as caught:
        list(read_records("hub:owner/name", domain="d"))

    assert "hub:owner/name cannot be read: Couldn't reach the hub (offline?" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_raw_objects_are_read_strictly(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{\n')
    objects = read_objects(path)

    assert next(objects) == {"a": 1}
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        next(objects)
