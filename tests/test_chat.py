"""`ultrafuser chat`: what is asked of the model, turn by turn, what is shown, and what commands change."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from page_helpers import Reply, scripted_server
from training_helpers import TOKENIZER, make_fused
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.cli.answers import EngineAnswers, ServerAnswers, Stream, Voices, open_answers
from ultrafuser.cli.main import app
from ultrafuser.cli.talk import Talk
from ultrafuser.drawing.palette import LIGHT_PAGE, PALETTE, STRENGTH
from ultrafuser.engine.requests import GenerationRequest, Listener, StreamEvent, TokenPiece
from ultrafuser.errors import ModelError, UltrafuserError
from ultrafuser.generation import SamplingParams
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.generator import FusedGenerator

NAMES = ["text", "code"]
QUESTION = (Message("user", "what is 2 + 2?"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fused(make_fused(), tmp_path_factory.mktemp("chat") / "model", tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EngineAnswers]:
    answers = EngineAnswers(str(folder))
    yield answers
    answers.close()


class Scripted:
    """Answers by counting, and remembers what it was asked."""

    def __init__(self) -> None:
        self.names = list(NAMES)
        self.asked: list[list[str]] = []
        self.voices: list[Voices] = []
        self.params: list[SamplingParams] = []
        self.interrupted_after: int | None = None
        self.num_closed = 0
        self.failure: UltrafuserError | None = None

    def stream(self, conversation: Conversation, params: SamplingParams, voices: Voices) -> Stream:
        self.asked.append([f"{message.role}: {message.content}" for message in conversation])
        self.voices.append(voices)
        self.params.append(params)
        if self.failure is not None:
            raise self.failure
        try:
            for index, text in enumerate(["answer", f" {len(self.asked)}"]):
                if index == self.interrupted_after:
                    raise KeyboardInterrupt
                yield TokenPiece(index, text, ((0.9, 0.1), (0.2, 0.8))[index])
        finally:
            self.num_closed += 1

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Stands in for the model of every `chat`."""
    answers = Scripted()
    monkeypatch.setattr("ultrafuser.cli.answers.open_answers", {"model": answers}.__getitem__)
    return answers


def chat(*options: str, said: str = "", place: object = "model", code: int = 0) -> str:
    result = CliRunner().invoke(app, ["chat", str(place), *options], input=said)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code
    return result.output


def test_a_conversation_goes_on_until_it_is_begun_anew(scripted: Scripted):
    chat("--system", "Be brief.", said="one\n\ntwo\n/new\nthree\n")

    assert scripted.asked == [
        ["system: Be brief.", "user: one"],
        ["system: Be brief.", "user: one", "assistant: answer 1", "user: two"],
        ["system: Be brief.", "user: three"],
    ]


def test_single_turn_forgets_what_was_said(scripted: Scripted):
    chat("--single-turn", said="one\ntwo\n")

    assert scripted.asked == [["user: one"], ["user: two"]]


def test_one_message_is_answered_and_the_specialists_are_named(scripted: Scripted):
    output = chat("--message", "/one", "--seed", "3", "--temperature", "0.5", "--max-tokens", "9")

    assert scripted.asked == [["user: /one"]]
    assert scripted.params == [SamplingParams(max_tokens=9, temperature=0.5, seed=3)]
    assert output == " text   code \nanswer 1\n"


@pytest.mark.usefixtures("scripted")
def test_an_unknown_specialist_cannot_answer_alone():
    with pytest.raises(ModelError, match="no specialist 'law' to answer alone; the model has text, code"):
        chat("--solo", "law", said="one\n")


def test_tokens_appear_one_by_one_on_the_colours_of_their_specialists():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", highlight=False)
    seen: list[str] = []

    class Watched(Scripted):
        def stream(self, *arguments: Any) -> Stream:
            for piece in super().stream(*arguments):
                yield piece
                seen.append(screen.getvalue())

    Talk(Watched(), SamplingParams(), console=console).ask("one")

    text, code = PALETTE[0].over(LIGHT_PAGE, 0.9 * STRENGTH), PALETTE[1].over(LIGHT_PAGE, 0.8 * STRENGTH)
    assert ["answer" in shown for shown in seen] == [True, True]
    assert [" 1" in shown for shown in seen] == [False, True]
    assert f"48;2;{text.red};{text.green};{text.blue}manswer" in seen[0]
    assert f"48;2;{code.red};{code.green};{code.blue}m 1" in seen[1]


def test_a_long_line_is_left_to_the_terminal():
    class Wordy(Scripted):
        def stream(self, *arguments: Any) -> Stream:
            del arguments
            yield TokenPiece(0, "x" * 50, (0.9, 0.1))

    screen = io.StringIO()
    Talk(Wordy(), SamplingParams(), console=Console(file=screen, width=20)).ask("one")

    assert screen.getvalue() == "x" * 50 + "\n"


def test_commands_choose_who_takes_part(scripted: Scripted):
    output = chat("--solo", "text", said="one\n/solo code\ntwo\n/without text\nthree\n/all\nfour\n/again\n")

    assert scripted.voices == [
        Voices(solo="text"),
        Voices(solo="code"),
        Voices(without=("text",)),
        Voices(),
        Voices(),
    ]
    assert scripted.asked[4] == scripted.asked[3]
    assert "code alone> " in output
    assert "without text> " in output


def test_alone_shows_every_specialists_own_answer_side_by_side(scripted: Scripted):
    output = chat(said="one\ntwo\n/alone\nthree\n")

    assert scripted.voices[2:4] == [Voices(solo="text"), Voices(solo="code")]
    assert scripted.asked[2] == scripted.asked[3] == scripted.asked[1]
    lines = [line.removeprefix("> ").split() for line in output.splitlines()]
    assert lines[lines.index(["text", "code"], 1) + 1] == ["answer", "3", "answer", "4"]
    assert scripted.asked[4][-2:] == ["assistant: answer 2", "user: three"], "they are not part of the conversation"


@pytest.mark.usefixtures("scripted")
def test_weights_gives_the_means_of_the_last_answer():
    output = chat(said="one\n/weights\n")

    rows = [line.split() for line in output.splitlines() if "tokens" in line]
    assert rows == [["text", "0.550", "1", "of", "2", "tokens"], ["code", "0.450", "1", "of", "2", "tokens"]]


def test_set_changes_how_tokens_are_chosen(scripted: Scripted):
    settings = ["temperature 0.7", "top_p 0.9", "top_k 5", "min_p 0.1", "max_tokens 7", "seed none", "stop a\\nb"]
    output = chat(said="".join(f"/set {line}\n" for line in settings) + "one\n")

    assert scripted.params == [
        SamplingParams(max_tokens=7, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=None, stop=("a\nb",))
    ]
    assert "top_k 5\n" in output


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/sing", "there is no command /sing; /help lists them"),
        ("/solo law", "there is no specialist 'law'; the model has text, code"),
        ("/without text code", "/without needs one name or more, not all, of text, code"),
        ("/set top_p 2", "top_p is 2.0; it must be from 1e-09 to 1"),
        ("/set top_k many", "top_k cannot be 'many'"),
        ("/set heat 1", "/set needs one of temperature, top_p"),
        ("/alone", "there is no question yet"),
        ("/weights", "there are no weights yet"),
    ],
)
def test_a_command_that_makes_no_sense_is_explained_and_changes_nothing(scripted: Scripted, line: str, complaint: str):
    output = chat(said=f"{line}\none\n")

    assert f"ultrafuser: {complaint}" in output
    assert (scripted.voices, scripted.params) == ([Voices()], [SamplingParams(seed=0)])


def test_help_lists_every_command(scripted: Scripted):
    output = chat(said="/help\n")

    assert set(Talk(scripted, SamplingParams()).commands) <= set(output.split())


def test_ctrl_c_stops_the_answer_and_not_the_program(scripted: Scripted):
    scripted.interrupted_after = 1
    output = chat(said="one\ntwo\n")

    assert scripted.asked[1] == ["user: one", "assistant: answer", "user: two"], "what had come is kept"
    assert scripted.num_closed == 2
    assert output.count("stopped") == 2


def test_ctrl_c_at_the_only_question_ends_like_any_interrupted_command(scripted: Scripted):
    scripted.interrupted_after = 0
    chat("-m", "one", code=130)


def test_an_answer_that_fails_is_no_end_of_the_conversation(scripted: Scripted, monkeypatch: pytest.MonkeyPatch):
    scripted.failure = ModelError("too hot")
    monkeypatch.setattr(scripted, "names", NAMES)
    output = chat(said="one\ntwo\n")

    assert scripted.asked == [["user: one"], ["user: two"]]
    assert output.count("ultrafuser: too hot") == 2
    with pytest.raises(ModelError, match="too hot"):
        chat("-m", "one")


# On the engine.


def plain(text: str) -> str:
    """What a terminal shows of it unchanged."""
    return "".join(character for character in text if character.isascii() and character.isprintable())


def test_greedy_answers_are_those_of_the_model(folder: Path):
    expected = FusedGenerator(make_fused(), TOKENIZER).generate([QUESTION], SamplingParams(max_tokens=40))[0]

    output = chat("-m", QUESTION[0].content, "--max-tokens", "40", place=folder)

    assert len(plain(expected.text)) > 3
    assert plain(output).endswith(plain(expected.text))


def test_solo_and_without_are_obeyed(engine: EngineAnswers):
    generator = FusedGenerator(make_fused(), TOKENIZER)
    params = SamplingParams(max_tokens=12)
    with generator.alone("code"):
        expected = generator.generate([QUESTION], params)[0]

    for voices in (Voices(solo="code"), Voices(without=("text",))):
        pieces = list(engine.stream(QUESTION, params, voices))
        assert tuple(piece.token_id for piece in pieces)[: len(expected.token_ids)] == expected.token_ids != ()
        assert {piece.gate_weights for piece in pieces} == {(0.0, 1.0)}


@pytest.fixture
def endings(engine: EngineAnswers, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How every choice of the engine ended."""
    seen: list[str] = []
    submit = engine._engine.submit

    def watched(request: GenerationRequest, listener: Listener) -> Any:
        def listen(event: StreamEvent) -> None:
            if event.finish_reason is not None:
                seen.append(event.finish_reason)
            listener(event)

        return submit(request, listen)

    monkeypatch.setattr(engine._engine, "submit", watched)
    return seen


LONG = SamplingParams(max_tokens=10_000, ignore_end=True)


def test_whoever_stops_reading_ends_the_work(engine: EngineAnswers, endings: list[str]):
    pieces = engine.stream(QUESTION, LONG, Voices())
    next(pieces)
    pieces.close()

    await_end(endings)
    assert endings == ["cancelled"]


def test_an_engine_that_fails_says_why(engine: EngineAnswers, monkeypatch: pytest.MonkeyPatch):
    def fail(request: GenerationRequest, listener: Listener) -> Any:
        listener(StreamEvent(0, (TokenPiece(5, "so", (0.5, 0.5)),)))
        listener(StreamEvent(0, finish_reason="error", error="out of memory"))
        return submit(request, len)

    submit = engine._engine.submit
    monkeypatch.setattr(engine._engine, "submit", fail)
    pieces = engine.stream(QUESTION, SamplingParams(max_tokens=1), Voices())

    assert next(pieces).text == "so"
    with pytest.raises(ModelError, match=r"^out of memory$"):
        list(pieces)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, as at a terminal: a shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_tokens_are_shown_ends_the_work(engine: EngineAnswers, endings: list[str]):
    class Screen(io.StringIO):
        pressed = False

        def write(self, text: str) -> int:
            written = super().write(text)
            if len(self.getvalue()) > 3 and not self.pressed:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
            return written

    talk = Talk(engine, LONG, console=Console(file=Screen(), highlight=False))

    assert not talk.ask("what is 2 + 2?")
    assert 0 < len(talk.weights) < 50
    assert talk.history[-1].role == "assistant"
    await_end(endings)
    assert endings == ["cancelled"]


def await_end(endings: list[str]) -> None:
    end = time.monotonic() + 10
    while not endings:
        assert time.monotonic() < end, "the answer goes on"
        time.sleep(0.01)


# On a server.


def test_a_server_answers_like_a_model_here():
    reply = Reply([("Good", (0.7, 0.2, 0.1)), (" day", (0.2, 0.7, 0.1))])
    with scripted_server() as server:
        server.replies = [reply]
        output = chat(
            "--system",
            "Be brief.",
            "--seed",
            "0",
            said="/set stop END\none\n/weights\n/solo math\ntwo\n",
            place=server.address,
        )

    assert "Good day\n" in output
    assert ["text", "0.450", "1", "of", "2", "tokens"] in [
        line.removeprefix("> ").split() for line in output.splitlines()
    ]
    assert server.bodies[0] == {
        "model": "demo",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 256,
        "seed": 0,
        "stop": ["END"],
        "stream": True,
        "fusion": {"weights": True},
    }
    assert server.bodies[1]["fusion"] == {"weights": True, "override": {"math": 1.0}}


def test_a_server_that_refuses_or_fails_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with scripted_server() as server:
        server.replies = [
            Reply(status=503, message="The queue is full."),
            Reply(fails_after=1, message="The engine ended."),
            Reply(breaks_after=1),
        ]
        output = chat(said="one\ntwo\nthree\n", place=server.address + "/v1/")
        server.key = "s3cret"
        with pytest.raises(ModelError, match=r"needs an API key .*\(the key is read from OPENAI_API_KEY\)"):
            open_answers(server.address)
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
        assert ServerAnswers(server.address).names == ["text", "code", "math"]

    assert "refuses: The queue is full." in output
    assert "failed: The engine ended." in output
    assert "broke off in the middle of the answer" in output
    with pytest.raises(ModelError, match=r"cannot be reached: .*: is it up\?"):
        open_answers(server.address)


def test_a_client_that_stops_reading_ends_the_request():
    with scripted_server() as server:
        server.replies = [Reply(held=True)]
        pieces = ServerAnswers(server.address).stream(QUESTION, SamplingParams(), Voices())
        server.release()
        assert next(pieces).text == "Good"
        pieces.close()
        server.await_gone(1)
