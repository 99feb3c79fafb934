"""The verbs about objects, the memory and the system. Part of `verbs`, which has the table."""

from __future__ import annotations

from collections.abc import Callable

from uvm.parser.arguments import LONGEST, Ungrounded, settle
from uvm.parser.context import Method
from uvm.parser.exact import Command
from uvm.parser.forms import NAME, TEXT, VALUE, Answer, Doubt, Schema, form, one_of
from uvm.parser.method_verbs import new_signatures
from uvm.parser.scene import Scene

# "object" in the languages asked most, as far as all its forms have it
_OBJECT_WORDS = ("obje", "ogget", "prototyp", "clon", "copy", "kopie", "объект", "オブジェクト", "对象")
_LISTS = {"objects": "list_objects", "missions": "missions"}


def offer_inspect(scene: Scene) -> list[Schema]:
    holders = [method.target for method in scene.methods if scene.mentions(method)]
    names = scene.mentioned or list(dict.fromkeys(holders)) or scene.objects
    return [form(inspect=one_of(names))] if names else []


def read_inspect(answer: Answer, scene: Scene) -> Command:
    return {"command": "inspect", "target_oid": answer["inspect"]}


def offer_create(scene: Scene) -> list[Schema]:
    if new_signatures(scene):
        return []
    like = {"like": one_of(scene.mentioned)} if scene.mentioned else {}
    return [form(like, create={"type": "string", "pattern": f"^{NAME}$"})]


def read_create(answer: Answer, scene: Scene) -> Command:
    name = answer["create"]
    command = {"command": "create_object", "name": name}
    if answer.get("like", name) != name:
        command["parents"] = [answer["like"]]
    if name.casefold() not in scene.sentence.words and not _speaks_of_objects(scene):
        raise Doubt("What shall the new object be called?")
    if name in scene.context.objects:
        raise Doubt(f"{name} exists already; what shall the new object be called?")
    return command


def _speaks_of_objects(scene: Scene) -> bool:
    """Returns whether the sentence has the word object in one of the languages asked most."""
    return any(stem in word for word in scene.sentence.words for stem in _OBJECT_WORDS)


def offer_set(scene: Scene) -> list[Schema]:
    if not scene.named:
        return []
    slot = {"type": "string", "pattern": f"^({'|'.join(scene.named)})[.]{NAME}$"}
    return [form(set=slot, to=VALUE)]


def read_set(answer: Answer, scene: Scene) -> Command:
    target, _, slot = answer["set"].partition(".")
    if slot in scene.context.understood(target):
        raise Doubt(f"{slot} is a method of {target}; shall it be changed?", refuses="set")
    try:
        value = settle(answer["to"], Method(target, slot, ()), scene)
    except Ungrounded:
        raise Doubt(f"What shall be the {slot} of {target}?") from None
    return {"command": "set_slot", "target_oid": target, "slot": slot, "value": value}


def offer_text(verb: str) -> Callable[[Scene], list[Schema]]:
    return lambda scene: [form(**{verb: TEXT})]


def read_text(verb: str, field: str) -> Callable[[Answer, Scene], Command]:
    def read(answer: Answer, scene: Scene) -> Command:
        text = scene.sentence.verbatim(answer[verb], cut=len(answer[verb]) >= LONGEST)
        return {"command": verb, field: text or scene.sentence.text}

    return read


def offer_list(scene: Scene) -> list[Schema]:
    return [form(list=one_of(_LISTS))]


def read_list(answer: Answer, scene: Scene) -> Command:
    return {"command": _LISTS[answer["list"]]}


def offer_ids(verb: str, ids: Callable[[Scene], list[str]]) -> Callable[[Scene], list[Schema]]:
    def offer(scene: Scene) -> list[Schema]:
        found = ids(scene)
        return [form(**{verb: one_of(found)})] if found else []

    return offer


def read_none(answer: Answer, scene: Scene) -> Command:
    raise Doubt("That asks for nothing that I can do; /help shows what can be said", certain=True)
