"""A chat in a terminal: questions and commands in, tokens in their specialists' colours out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ultrafuser.analysis.terminal import colour_tokens
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.cli.answers import Answers, Stream, Voices
from ultrafuser.drawing.palette import heaviest
from ultrafuser.engine.check import check_params
from ultrafuser.errors import ConfigError, UltrafuserError
from ultrafuser.generation import SamplingParams

HELP = """\
/new                  forget what was said
/again                answer the last question anew
/solo NAME            let one specialist answer alone
/without NAME ...     leave specialists out
/all                  let all take part again
/alone                what each specialist alone answers to the last question, side by side
/weights              mean weights of the last answer
/set                  how tokens are chosen; /set temperature 0.7 changes it
/help                 this list
Ctrl-C stops an answer, Ctrl-D leaves."""
SETTINGS: dict[str, Callable[[str], object]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": lambda value: None if value == "none" else int(value),
    "stop": lambda value: () if value == "none" else (value.replace("\\n", "\n"),),
}


class Talk:
    """One conversation.

    Args:
        answers: Who answers.
        params: How, at first.
        voices: Who takes part, at first.
        system: A system message, or none.
        single_turn: Forget what was said before each question.
        console: Where answers are shown; what is said about them goes to stderr.
    """

    def __init__(
        self,
        answers: Answers,
        params: SamplingParams,
        *,
        voices: Voices = Voices(),
        system: str | None = None,
        single_turn: bool = False,
        console: Console | None = None,
    ) -> None:
        self.answers, self.params, self.voices = answers, params, voices
        self.single_turn = single_turn
        self.console = console or Console(highlight=False)
        self.aside = Console(stderr=True, highlight=False, markup=False)
        self.opening: list[Message] = [Message("system", system)] if system else []
        self.history: list[Message] = list(self.opening)  # ends with an answer
        self.asked: Conversation = ()  # what the last answer is to; ends with a question
        self.weights: list[tuple[float, ...]] = []  # of the last answer
        self.commands: dict[str, Callable[[list[str]], None]] = {
            "/new": self._new,
            "/again": self._again,
            "/solo": self._solo,
            "/without": self._without,
            "/all": self._all,
            "/alone": self._alone,
            "/weights": self._weights,
            "/set": self._set,
            "/help": self._help,
        }

    def run(self) -> None:
        """Read lines until there are no more."""
        while True:
            try:
                line = self.console.input(Text(f"{self.voices}> ", style="bold")).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.aside.print("\nCtrl-D leaves.")
                continue
            try:
                self.take(line)
            except UltrafuserError as error:
                self.aside.print(f"ultrafuser: {error}")

    def take(self, line: str) -> None:
        """One line: a command, a question, or nothing."""
        if not line:
            return
        if not line.startswith("/"):
            self.ask(line)
            return
        name, *words = line.split()
        if name not in self.commands:
            raise ConfigError(f"there is no command {name}; /help lists them")
        self.commands[name](words)

    def ask(self, question: str) -> bool:
        """Show the answer to a question as it comes; False when it was stopped."""
        history = self.opening if self.single_turn else self.history
        return self._answer((*history, Message("user", question)))

    def _answer(self, conversation: Conversation) -> bool:
        texts: list[str] = []
        self.asked, self.weights = conversation, []
        finished = True
        try:
            with closing(self._stream(conversation, self.voices)) as pieces:
                for piece in pieces:
                    texts.append(piece.text)
                    self.weights += [piece.gate_weights] if piece.gate_weights else []
                    shown = colour_tokens([piece.text], [piece.gate_weights], self.answers.names)
                    self.console.print(shown, end="", soft_wrap=True)
        except KeyboardInterrupt:
            finished = False
        finally:
            self.console.print()
        if not finished:
            self.aside.print("stopped")
        # A question without an answer is not part of the conversation.
        if answer := "".join(texts):
            self.history = [*conversation, Message("assistant", answer)]
        return finished

    def _stream(self, conversation: Conversation, voices: Voices) -> Stream:
        return self.answers.stream(conversation, self.params, voices)

    # Commands.

    def _new(self, words: list[str]) -> None:
        del words
        self.history, self.asked, self.weights = list(self.opening), (), []

    def _again(self, words: list[str]) -> None:
        del words
        self._answer(self._last())

    def _solo(self, words: list[str]) -> None:
        if len(words) != 1:
            raise ConfigError(f"/solo needs one name of {', '.join(self.answers.names)}")
        self.voices = Voices(solo=self._known(words)[0])

    def _without(self, words: list[str]) -> None:
        names = self._known(words)
        if not names or set(names) == set(self.answers.names):
            raise ConfigError(f"/without needs one name or more, not all, of {', '.join(self.answers.names)}")
        self.voices = Voices(without=tuple(dict.fromkeys(names)))

    def _all(self, words: list[str]) -> None:
        del words
        self.voices = Voices()

    def _alone(self, words: list[str]) -> None:
        del words
        conversation, names = self._last(), self.answers.names
        texts = dict.fromkeys(names, "")
        try:
            with ExitStack() as stack, Live(console=self.console, auto_refresh=False, transient=True) as live:
                streams = {
                    name: stack.enter_context(closing(self._stream(conversation, Voices(solo=name)))) for name in names
                }
                # In turn, so that all run at once: the engine works on the others while one is waited for.
                while streams:
                    for name, pieces in list(streams.items()):
                        piece = next(pieces, None)
                        if piece is None:
                            del streams[name]
                        else:
                            texts[name] += piece.text
                    live.update(_side_by_side(texts, names), refresh=True)
        except KeyboardInterrupt:
            self.aside.print("stopped")
        finally:
            self.console.print(_side_by_side(texts, names))

    def _weights(self, words: list[str]) -> None:
        del words
        if not self.weights:
            raise ConfigError("there are no weights yet: ask something first")
        table = Table("specialist", "mean weight", "leads", box=None)
        for index, name in enumerate(self.answers.names):
            mean = sum(row[index] for row in self.weights) / len(self.weights)
            leads = sum(heaviest(row) == index for row in self.weights)
            table.add_row(_name(name, self.answers.names), f"{mean:.3f}", f"{leads} of {len(self.weights)} tokens")
        self.console.print(table)

    def _set(self, words: list[str]) -> None:
        if len(words) >= 2 and words[0] in SETTINGS:
            name, value = words[0], " ".join(words[1:])
            try:
                changed = replace(self.params, **{name: SETTINGS[name](value)})  # type: ignore[arg-type]
            except ValueError:
                raise ConfigError(f"{name} cannot be {value!r}") from None
            check_params(changed, vocab_size=1)
            self.params = changed
        elif words:
            raise ConfigError(f"/set needs one of {', '.join(SETTINGS)}, and a value")
        for name in SETTINGS:
            self.aside.print(f"{name} {getattr(self.params, name)!r}")

    def _help(self, words: list[str]) -> None:
        del words
        self.aside.print(HELP)

    def _last(self) -> Conversation:
        if not self.asked:
            raise ConfigError("there is no question yet: ask something first")
        return self.asked

    def _known(self, names: list[str]) -> list[str]:
        for name in names:
            if name not in self.answers.names:
                raise ConfigError(f"there is no specialist {name!r}; the model has {', '.join(self.answers.names)}")
        return names


def _side_by_side(texts: dict[str, str], names: list[str]) -> Table:
    table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(_name(name, names), ratio=1, overflow="fold")
    table.add_row(*(colour_tokens([texts[name]], (), names) for name in names))
    return table


def _name(name: str, names: list[str]) -> Text:
    """A specialist's name on its colour."""
    return colour_tokens([f" {name} "], [[float(other == name) for other in names]], names)
