"""What a sentence says for certain, whatever it means: its words, numbers, quotations, ids and signatures.

Readings are checked against this; it knows no objects. Imports nothing of BAT OS.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property

LOOKED_AT = 16_000  # characters of a text that are searched for what it says
SHOWN_CHARACTERS = 1200  # of a longer text the model sees beginning and end

_QUOTATION = re.compile(
    r'"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«\s*([^»]*?)\s*»|「([^」]*)」|『([^』]*)』|`([^`]*)`'
    r"|\u2018([^\u2019]*)\u2019|(?<!\w)'((?:[^']|(?<=\w)'(?=\w))*)'(?!\w)"
)
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\d[\d.,]*|\d[\d.,]*")
_NUMERAL = re.compile(r"(?<![\w.,])-?\d[\d.,]*(?![\w])")
_SIGNATURE = re.compile(r"(?<![\w.])([^\W\d]\w*)\(\s*((?:[^\W\d]\w*(?:\s*,\s*[^\W\d]\w*)*)?)\s*\)")
_MISSION = re.compile(r"\b[0-9a-f]{16}-[0-9a-f]{6}\b")
_TRANSACTION = re.compile(r"\b[0-9a-f]{16}\b(?!-)")
_WORD = re.compile(r"\w+")

# Number words of the languages that are asked most; what is not here is asked about.
_COUNTED = """
0 zero null zéro cero nul ноль
1 one once a an eins ein eine einen einmal un une uno una um uma een один
2 two twice double zwei zweimal deux dos due dois duas twee два две дважды
3 three thrice drei dreimal trois tres tre três drie три трижды
4 four vier viermal quatre cuatro quattro quatro четыре
5 five fünf fünfmal cinq cinco cinque vijf пять
6 six sechs sechsmal seis sei zes шесть
7 seven sieben siebenmal sept siete sette sete zeven семь
8 eight acht achtmal huit ocho otto oito восемь
9 nine neun neunmal neuf nueve nove negen девять
10 ten zehn zehnmal dix diez dieci dez tien десять
11 eleven elf onze once undici одиннадцать
12 twelve dozen zwölf dutzend douze douzaine doce docena dodici dodicina doze dúzia twaalf dozijn двенадцать
20 twenty zwanzig vingt veinte venti vinte twintig двадцать
100 hundred hundert cent cien cento cem honderd сто
1000 thousand tausend mille mil duizend тысяча
"""
_NUMBER_WORDS: dict[str, set[float]] = {}
for _line in _COUNTED.strip().splitlines():
    _value, *_words = _line.split()
    for _name in _words:
        _NUMBER_WORDS.setdefault(_name, set()).add(float(_value))


class Sentence:
    """One thing that a user typed.

    Attributes:
        text: as it was typed, without the space around it.
        head: as much of it as is looked at closely.
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self.head = self.text[:LOOKED_AT]

    @cached_property
    def shown(self) -> str:
        """The sentence as the model sees it: on one line, without invisible characters, not too long."""
        text = "".join(" " if c.isspace() else c for c in self.text if c.isspace() or _is_visible(c))
        text = re.sub(" {2,}", " ", unicodedata.normalize("NFC", text)).strip()
        if len(text) <= SHOWN_CHARACTERS:
            return text
        half = SHOWN_CHARACTERS // 2
        return f"{text[:half]} … {text[-half:]}"

    @cached_property
    def words(self) -> list[str]:
        """The words in small letters; an identifier is one word."""
        return words_of(self.head)

    @cached_property
    def quotations(self) -> list[str]:
        """The texts in quotation marks."""
        found = (next((g for g in match.groups() if g is not None), "") for match in self._quoted)
        return list(found)

    @cached_property
    def numbers(self) -> set[float]:
        """Every value that a numeral or a number word in the sentence may stand for."""
        text = self.head.replace("\u2212", "-")
        found = {value for match in _NUMBER.finditer(text) for value in numeral_values(match.group())}
        found |= {value for word in self.words for value in _NUMBER_WORDS.get(word, ())}
        return found | {unicodedata.numeric(c) for c in self.head if c.isnumeric() and not c.isdecimal()}

    @cached_property
    def numerals(self) -> list[str]:
        """The numbers that stand alone in digits, outside of quotations."""
        return [
            match.group().rstrip(".,") for match in _NUMERAL.finditer(self.unquoted.replace("\u2212", "-"))
        ]

    @cached_property
    def signatures(self) -> list[tuple[str, list[str]]]:
        """What looks like the head of a function: its name and the names of its parameters."""
        return [
            (match[1], [name.strip() for name in match[2].split(",") if name.strip()])
            for match in _SIGNATURE.finditer(self.unquoted)
        ]

    @cached_property
    def missions(self) -> list[str]:
        """What looks like the id of a mission."""
        return _MISSION.findall(self.head)

    @cached_property
    def transactions(self) -> list[str]:
        """What looks like the id of a transaction."""
        return _TRANSACTION.findall(self.head)

    @cached_property
    def unquoted(self) -> str:
        """The sentence with a space in place of each quotation."""
        return _QUOTATION.sub(lambda match: " " * len(match.group()), self.head)

    @cached_property
    def _spoken(self) -> str:
        return f" {' '.join(self.words)} "

    @cached_property
    def _quoted(self) -> list[re.Match[str]]:
        return list(_QUOTATION.finditer(self.head))

    def says(self, words: Sequence[str]) -> bool:
        """Returns whether these words, in small letters, follow each other in the sentence."""
        return f" {' '.join(words)} " in self._spoken

    def verbatim(self, text: str, *, cut: bool = False) -> str | None:
        """Returns `text` in the letters and spaces of the sentence, or None where it does not occur.

        Args:
            cut: `text` was cut short: what follows in the sentence belongs to it.
        """
        parts = text.split()
        if not parts:
            return None
        match = re.search(r"\s+".join(map(re.escape, parts)), self.text, re.IGNORECASE)
        if match is None:
            return None
        return self.text[match.start() :] if cut else match.group()

    def is_all(self, text: str) -> bool:
        """Returns whether `text` is the whole sentence, quotation marks and punctuation aside."""
        return words_of(text) == self.words


def words_of(text: str) -> list[str]:
    """Returns the words of a text in small letters."""
    return _WORD.findall(text.casefold())


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs", "Cn")


def numeral_values(numeral: str) -> set[float]:
    """Returns what a numeral may mean in any country: 1,000 is 1000 here and 1 there."""
    found = set()
    for candidate in (
        numeral.rstrip(".,"),
        numeral.rstrip(".,").replace(",", ""),
        numeral.rstrip(".,").replace(".", "").replace(",", "."),
    ):
        try:
            found.add(float(candidate))
        except ValueError:
            continue
    return found
