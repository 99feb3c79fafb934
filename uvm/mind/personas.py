"""The personas: who speaks, in whose words, through which model. Read from `codex/` once, at the start.

Imports `errors` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uvm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Persona:
    """A voice of the mind.

    Attributes:
        name: as the settings spell it, `ALFRED` for example.
        system: the system prompt; the first and constant part of everything it is asked.
        model: name of the model that speaks for it.
        temperature: of its answers, where the caller asks for no other.
        max_tokens: of its answers, where the caller asks for no other.
    """

    name: str
    system: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 1024


def load_personas(codex: Path, persona_models: Mapping[str, str]) -> dict[str, Persona]:
    """Returns the personas by name, each with the system prompt of its file in the codex.

    Args:
        codex: the folder; ALFRED's file is `alfred.md`.
        persona_models: name of the persona -> name of its model.

    Raises:
        ConfigError: a file is missing, empty or no text; the text names it.
    """
    return {
        name: Persona(name, read_codex(codex / f"{name.lower()}.md"), model)
        for name, model in persona_models.items()
    }


def read_codex(path: Path) -> str:
    """Returns a text of the codex without the space around it.

    Raises:
        ConfigError: the file is missing, empty or no text; the text names it.
    """
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}", path=str(path)) from None
    if not text:
        raise ConfigError(f"{path} is empty", path=str(path))
    return text
