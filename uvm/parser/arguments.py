"""Arguments of a call: checked against the sentence, and written as the sentence writes them.

A small model sends numbers as strings, loses half of a quotation, or makes values up. What the sentence says
decides. Imports the scene only.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from uvm.parser.context import Method
from uvm.parser.scene import Scene, plain_words
from uvm.parser.sentence import Sentence, numeral_values, words_of

LONGEST = 120  # characters that the model writes of a text; what it began to quote goes on to the end
_NUMERAL = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d+)?")


class Ungrounded(Exception):
    """A value that the sentence does not have."""


def settle(value: Any, method: Method, scene: Scene) -> Any:
    """Returns the argument that the sentence gives where the model wrote `value`.

    Raises:
        Ungrounded: the sentence has nothing like it.
    """
    if isinstance(value, list):
        return [settle(item, method, scene) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return _settle_number(value, scene.sentence)
    return _settle_text(value, method, scene.sentence)


def _settle_number(value: int | float, sentence: Sentence) -> Any:
    if str(value) in sentence.quotations:
        return str(value)
    if value not in sentence.numbers and value * 100 not in sentence.numbers:
        raise Ungrounded
    return (
        int(value) if isinstance(value, float) and value.is_integer() and "." not in sentence.text else value
    )


def _settle_text(value: str, method: Method, sentence: Sentence) -> Any:
    for quotation in sentence.quotations:
        if value.strip() and value.strip().casefold() in quotation.casefold():
            return quotation
    if _NUMERAL.fullmatch(value):
        return _settle_number(ast.literal_eval(value), sentence)
    found = sentence.verbatim(_without_selector(value, method), cut=len(value) >= LONGEST)
    if found is None or sentence.is_all(found):
        raise Ungrounded
    return found


def unused_numerals(args: list[Any], sentence: Sentence) -> list[str]:
    """Returns the numbers that the sentence has in digits and a call leaves out."""
    used = " ".join(map(str, args))
    values = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", used)}
    return [text for text in sentence.numerals if text not in used and not values & numeral_values(text)]


def _without_selector(value: str, method: Method) -> str:
    """Drops the call itself from the beginning: of `shout hello` only hello is shouted."""
    count = len(plain_words(method.selector))
    if len(words_of(value)) > count and words_of(value)[:count] == plain_words(method.selector):
        return value.split(None, count)[-1]
    return value
