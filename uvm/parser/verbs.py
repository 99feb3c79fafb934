"""What a sentence can ask for: each verb offers the model its forms and turns the model's answer into a command.

An answer is an object whose first key is the verb: `{"call": "shop_obj.add_item", "with": {…}}`. It is short,
for each token costs time, and says the verb first, because that is what decides. Forms name only what exists.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from uvm.parser.arguments import Ungrounded, settle
from uvm.parser.context import Method
from uvm.parser.examples import examples_in
from uvm.parser.exact import Command
from uvm.parser.scene import Scene

Schema = dict[str, Any]
Answer = dict[str, Any]

_NAME = "[A-Za-z][A-Za-z0-9_]*"
_TEXT: Schema = {"type": "string"}
_SCALAR: list[Schema] = [{"type": "number"}, {"type": "string"}, {"type": "boolean"}]
_VALUE: Schema = {"anyOf": [*_SCALAR, {"type": "array", "items": {"anyOf": _SCALAR}}]}
_LISTS = {"objects": "list_objects", "missions": "missions"}


class Doubt(Exception):
    """A reading that the sentence does not bear out.

    Args:
        question: what to ask the user, if it comes to that.
        command: what was understood, where it is complete.
        certain: asking is right; no other reading is likelier.
    """

    def __init__(self, question: str, command: Command | None = None, *, certain: bool = False) -> None:
        super().__init__(question)
        self.question = question
        self.command = command
        self.certain = certain


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: the forms it offers in a scene, and the command that an answer means."""

    offer: Callable[[Scene], list[Schema]]
    read: Callable[[Answer, Scene], Command]


def schema_of(scene: Scene) -> Schema:
    """Returns the JSON schema of all answers that make sense in a scene."""
    offers = [form for name, verb in VERBS.items() if name not in scene.refused for form in verb.offer(scene)]
    return {"anyOf": offers}


def read(answer: Answer, scene: Scene) -> Command:
    """Returns the command that the model's answer means.

    Raises:
        Doubt: the sentence does not bear it out.
    """
    return VERBS[next(iter(answer))].read(answer, scene)


def label(answer: Answer) -> str:
    """Returns the name by which a scene refuses an answer: one method's calls, or a whole verb."""
    verb, subject = next(iter(answer.items()))
    return f"{verb} {subject}" if verb == "call" else str(verb)


def _form(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _one_of(names: Iterable[str]) -> Schema:
    return {"enum": list(names)}


# call


def _offer_call(scene: Scene) -> list[Schema]:
    if _new_signatures(scene):
        return []
    return [
        _form(
            call={"const": method.name},
            **({"with": _form(**dict.fromkeys(method.parameters, _VALUE))} if method.parameters else {}),
        )
        for method in scene.callable
    ]


def _read_call(answer: Answer, scene: Scene) -> Command:
    method = _method(answer["call"], scene)
    values = answer.get("with", {})
    args, missing = [], []
    for parameter in method.parameters:
        try:
            args.append(settle(values[parameter], method, scene))
        except Ungrounded:
            args.append(values[parameter])
            missing.append(parameter)
    command = {
        "command": "send_message",
        "target_oid": method.target,
        "selector": method.selector,
        "args": args,
    }
    if missing:
        question = f"{method}: what is {' and '.join(missing)}?"
        told = len(missing) < len(method.parameters) and scene.likeness(method) > 0
        raise Doubt(question, command, certain=told)
    return command


# learn and improve


def _offer_learn(scene: Scene) -> list[Schema]:
    targets = scene.named or list(dict.fromkeys([*filter(None, [scene.context.home]), *scene.mentioned]))
    if not targets:
        return []
    signatures = _new_signatures(scene)
    if signatures:
        return [
            _form(learn=_one_of(f"{target}.{name}" for target in targets), **{"with": {"const": parameters}})
            for name, parameters in signatures
        ]
    name = {"type": "string", "pattern": f"^{_NAME}$"}
    method = {"type": "string", "pattern": f"^({'|'.join(targets)})[.]{_NAME}$"}
    return [_form(learn=method, **{"with": {"type": "array", "items": name}})]


def _new_signatures(scene: Scene) -> list[tuple[str, list[str]]]:
    known = {method.selector for method in scene.context.methods()}
    return [
        (name, parameters)
        for name, parameters in scene.sentence.signatures
        if name not in known and not name.startswith("_") and not keyword.iskeyword(name)
    ]


def _read_learn(answer: Answer, scene: Scene) -> Command:
    target, _, selector = answer["learn"].partition(".")
    if selector in scene.context.objects[target]:
        raise Doubt(f"{target} knows {selector} already; shall it be changed?", _revision(answer["learn"], scene))
    if keyword.iskeyword(selector):
        raise Doubt(f"{selector} can't be the name of a method; which one do you want?")
    parameters = list(dict.fromkeys(_parameter(name) for name in answer["with"] if name != "self"))
    brief: dict[str, Any] = {
        "type": "unhandled_message",
        "selector": selector,
        "parameters": parameters,
        "description": scene.sentence.text,
    }
    return _cycle(target, brief, examples_in(scene.sentence.text, selector, len(parameters)))


def _parameter(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


def _read_improve(answer: Answer, scene: Scene) -> Command:
    return _revision(answer["improve"], scene)


def _revision(name: str, scene: Scene) -> Command:
    target, _, selector = name.partition(".")
    count = len(scene.context.understood(target)[selector])
    brief = {"type": "revision", "selector": selector, "description": scene.sentence.text}
    return _cycle(target, brief, examples_in(scene.sentence.text, selector, count))


def _cycle(target: str, brief: dict[str, Any], examples: list[dict[str, Any]]) -> Command:
    mission_brief = {**brief, "examples": examples} if examples else brief
    return {"command": "initiate_cognitive_cycle", "target_oid": target, "mission_brief": mission_brief}


# objects


def _offer_inspect(scene: Scene) -> list[Schema]:
    holders = [method.target for method in scene.methods if scene.mentions(method)]
    names = scene.mentioned or list(dict.fromkeys(holders)) or scene.objects
    return [_form(inspect=_one_of(names))] if names else []


def _read_inspect(answer: Answer, scene: Scene) -> Command:
    return {"command": "inspect", "target_oid": answer["inspect"]}


def _offer_create(scene: Scene) -> list[Schema]:
    if _new_signatures(scene):
        return []
    like = {"like": _one_of(scene.mentioned)} if scene.mentioned else {}
    return [_form(like, create={"type": "string", "pattern": f"^{_NAME}$"})]


def _read_create(answer: Answer, scene: Scene) -> Command:
    name = answer["create"]
    command = {"command": "create_object", "name": name}
    if answer.get("like", name) != name:
        command["parents"] = [answer["like"]]
    if scene.sentence.verbatim(name) is None and not scene.sentence.says(name.casefold().split("_")[:1]):
        raise Doubt("What shall the new object be called?")
    if name in scene.context.objects:
        raise Doubt(f"{name} exists already; what shall the new object be called?")
    return command


def _offer_methods(verb: str) -> Callable[[Scene], list[Schema]]:
    def offer(scene: Scene) -> list[Schema]:
        methods = scene.own_methods
        return [_form(**{verb: _one_of(method.name for method in methods)})] if methods else []

    return offer


def _read_methods(verb: str, command: str) -> Callable[[Answer, Scene], Command]:
    def read(answer: Answer, scene: Scene) -> Command:
        method = _method(answer[verb], scene)
        found = {"command": command, "target_oid": method.target, "selector": method.selector}
        if verb == "revert" and len(scene.own_methods) > 1 and not scene.likeness(method):
            raise Doubt(f"Shall {method.name} go back to its earlier version?", found)
        return found

    return read


# memory and system


def _offer_text(verb: str) -> Callable[[Scene], list[Schema]]:
    return lambda scene: [_form(**{verb: _TEXT})]


def _read_text(verb: str, field: str) -> Callable[[Answer, Scene], Command]:
    def read(answer: Answer, scene: Scene) -> Command:
        return {"command": verb, field: scene.sentence.verbatim(answer[verb]) or scene.sentence.text}

    return read


def _offer_list(scene: Scene) -> list[Schema]:
    return [_form(list=_one_of(_LISTS))]


def _read_list(answer: Answer, scene: Scene) -> Command:
    return {"command": _LISTS[answer["list"]]}


def _offer_ids(verb: str, ids: Callable[[Scene], list[str]]) -> Callable[[Scene], list[Schema]]:
    def offer(scene: Scene) -> list[Schema]:
        found = ids(scene)
        return [_form(**{verb: _one_of(found)})] if found else []

    return offer


def _method(name: str, scene: Scene) -> Method:
    target, _, selector = name.partition(".")
    return Method(target, selector, scene.context.understood(target)[selector])


VERBS: dict[str, Verb] = {
    "call": Verb(_offer_call, _read_call),
    "learn": Verb(_offer_learn, _read_learn),
    "improve": Verb(_offer_methods("improve"), _read_improve),
    "inspect": Verb(_offer_inspect, _read_inspect),
    "history": Verb(_offer_methods("history"), _read_methods("history", "method_history")),
    "revert": Verb(_offer_methods("revert"), _read_methods("revert", "revert_method")),
    "create": Verb(_offer_create, _read_create),
    "remember": Verb(_offer_text("remember"), _read_text("remember", "text")),
    "recall": Verb(_offer_text("recall"), _read_text("recall", "query")),
    "list": Verb(_offer_list, _read_list),
    "report": Verb(
        lambda scene: [_form(report={"const": "status"})], lambda answer, scene: {"command": "status"}
    ),
    "stop": Verb(
        lambda scene: [_form(stop={"const": "kernel"})], lambda answer, scene: {"command": "shutdown"}
    ),
    "cancel": Verb(
        _offer_ids("cancel", lambda scene: scene.sentence.missions),
        lambda answer, scene: {"command": "cancel_mission", "mission_id": answer["cancel"]},
    ),
    "undo": Verb(
        _offer_ids("undo", lambda scene: scene.sentence.transactions),
        lambda answer, scene: {"command": "undo", "transaction_id": answer["undo"]},
    ),
}
