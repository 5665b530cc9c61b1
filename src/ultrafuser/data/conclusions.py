"""What a worked solution concludes: the piece of text that holds its answer, before anybody does mathematics with it.

A conclusion is, in this order: the last `\\boxed{}`; what follows the last "the answer is" or `####`; the last number.
A conclusion that leaves the choice open ("7 or 8") is none: hedging must not pay.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ultrafuser.errors import DataError

MAX_CHARACTERS = 4096  # of an extracted answer; a longer one is no answer
MAX_BOXES = 50  # looked at, from the last: text of a model may be made to take for ever

_NUMBER = r"(?:(?<![\w)])[-+]\s?)?\$?\s?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?"
_MARKER = re.compile(
    r"####|\banswer\s*(?:is|was|equals|(?:would|should|must)\s+be|=|:)\s*:?|\banswer\s*\*\*\s*:?", re.IGNORECASE
)
_PLAIN = re.compile(r"-?\d{1,60}(\.\d{1,60})?(/\d{1,60})?")
_ASIDE = re.compile(r"\([^()]*\)")
_HEDGE = re.compile(rf"{_NUMBER}[^.\n\d]{{0,20}}\b(?:or|and|and/or)\b[^.\n\d]{{0,20}}{_NUMBER}", re.IGNORECASE)
_LATEX = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]*[\\^_{}=][^$\n]*)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def conclusion(text: str) -> str | None:
    """The answer a solution ends with, as the solution writes it; None where it does not settle on one.

    Sources: the pitfalls of lm-eval's `flexible-extract` for GSM8K ("$18.00", "18...", "18 (that is 50% of 36)").
    """
    if "\\boxed" in text or "\\fbox" in text:
        return _short(boxed(text))
    markers = list(_MARKER.finditer(text))
    if markers:
        return _short(_after_marker(text[markers[-1].end() :]))
    numbers = list(re.finditer(_NUMBER, _without_dots(text)))
    return _short(clean_number(numbers[-1][0])) if numbers else None


def boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` that its own brace closes; None without one, or if that is empty."""
    for match in list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))[: -MAX_BOXES - 1 : -1]:
        depth = 1
        for end in range(match.end(), min(len(text), match.end() + MAX_CHARACTERS)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[match.end() : end].strip() or None
    return None


def gsm8k_gold(answer: str) -> str:
    """The number after `####` of a GSM8K solution.

    Raises:
        DataError: There is none.
    """
    number = clean_number(answer.rpartition("####")[2].strip())
    if "####" not in answer or not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise DataError(f"a GSM8K answer ends with '#### ' and a number, this one with {answer[-40:]!r}")
    return number


def clean_number(text: str) -> str:
    """A number without dollar sign, thousands separators, spaces and a full stop behind it."""
    return re.sub(r"[$,\s]", "", text).rstrip(".").removeprefix("+")


def plain_number(text: str) -> Fraction | None:
    """The value of a whole number, a decimal or a fraction of two; None for anything else."""
    number = clean_number(text)
    if not _PLAIN.fullmatch(number):
        return None
    above, _, below = number.partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / Fraction(below or 1)


def _after_marker(rest: str) -> str | None:
    """The answer in what follows "the answer is": one line, one sentence, its asides left out."""
    line = next((line for line in rest.splitlines() if line.strip(" *:$_")), "")
    line = line[:MAX_CHARACTERS].replace("**", "").strip(" :*_")
    if latex := _LATEX.match(line):
        return next(group for group in latex.groups() if group).strip()
    line = _ASIDE.sub(" ", _without_dots(line)) if re.search(r"\d\s*\(", line) else _without_dots(line)
    sentence = re.split(r"(?<=[\w)%])\.(?:\s|$)|[;!?]", line)[0].strip()
    if _HEDGE.search(sentence):
        return None
    if "=" in sentence and not re.match(r"[a-zA-Z]\s*=", sentence):
        sentence = sentence.rpartition("=")[2]
    if "\\" in sentence or not (numbers := re.findall(_NUMBER, sentence)):
        return sentence.strip(" $") or None
    if re.fullmatch(r"[\[({]?[-+\d./\s]+(?:,\s*[-+\d./\s]+)+[\])}]?", sentence) and not re.fullmatch(_NUMBER, sentence):
        return sentence  # several numbers: a tuple, a set, an interval
    return clean_number(numbers[0]) + ("\\%" if re.match(r"\s*%", sentence.split(numbers[0], 1)[1]) else "")


def _without_dots(text: str) -> str:
    return re.sub(r"\.{2,}|…", " ", text)


def _short(text: str | None) -> str | None:
    return text if text and len(text) <= MAX_CHARACTERS else None
