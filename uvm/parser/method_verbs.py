"""The verbs about methods: call, learn, improve, history, revert. Part of `verbs`, which has the table."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

from uvm.parser.arguments import Ungrounded, settle, unused_numerals
from uvm.parser.context import Method
from uvm.parser.exact import Command
from uvm.parser.examples import examples_in
from uvm.parser.forms import NAME, VALUE, Answer, Doubt, Schema, form, one_of
from uvm.parser.scene import Scene


def offer_call(scene: Scene) -> list[Schema]:
    if new_signatures(scene):
        return []
    return [
        form(
            call={"const": method.name},
            **({"with": form(**dict.fromkeys(method.parameters, VALUE))} if method.parameters else {}),
        )
        for method in scene.callable
    ]


def read_call(answer: Answer, scene: Scene) -> Command:
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
        told = len(missing) < len(method.parameters)
        tied = told or scene.resembles(method)  # else the call as such was a guess
        raise Doubt(
            question,
            command,
            certain=told and scene.likeness(method) > 0,
            refuses=f"call {method.name}" if tied else "call",
        )
    unused = unused_numerals(args, scene.sentence)
    if unused:
        question = f"{method} has no place for {' and '.join(unused)}."
        raise Doubt(question, command, refuses=f"call {method.name}", only="call")
    return command


def offer_learn(scene: Scene) -> list[Schema]:
    targets = scene.named or list(dict.fromkeys([*filter(None, [scene.context.home]), *scene.mentioned]))
    if not targets:
        return []
    signatures = new_signatures(scene)
    if signatures:
        return [
            form(learn=one_of(f"{target}.{name}" for target in targets), **{"with": {"const": parameters}})
            for name, parameters in signatures
        ]
    name = {"type": "string", "pattern": f"^{NAME}$"}
    method = {"type": "string", "pattern": f"^({'|'.join(targets)})[.]{NAME}$"}
    return [form(learn=method, **{"with": {"type": "array", "items": name}})]


def new_signatures(scene: Scene) -> list[tuple[str, list[str]]]:
    known = {method.selector for method in scene.context.methods()}
    return [
        (name, parameters)
        for name, parameters in scene.sentence.signatures
        if name not in known and not name.startswith("_") and not keyword.iskeyword(name)
    ]


def read_learn(answer: Answer, scene: Scene) -> Command:
    target, _, selector = answer["learn"].partition(".")
    if selector in scene.context.objects[target]:
        raise Doubt(
            f"{target} knows {selector} already; shall it be changed?", _revision(answer["learn"], scene)
        )
    if keyword.iskeyword(selector):
        raise Doubt(f"{selector} can't be the name of a method; which one do you want?")
    parameters = list(dict.fromkeys(_parameter(name) for name in answer["with"] if name != "self"))
    brief: dict[str, Any] = {
        "type": "unhandled_message",
        "selector": selector,
        "parameters": parameters,
        "description": scene.sentence.text,
    }
    return _cycle(target, brief, examples_in(scene.sentence.head, selector, len(parameters)))


def _parameter(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


def read_improve(answer: Answer, scene: Scene) -> Command:
    return _revision(answer["improve"], scene)


def _revision(name: str, scene: Scene) -> Command:
    target, _, selector = name.partition(".")
    count = len(scene.context.understood(target)[selector])
    brief = {"type": "revision", "selector": selector, "description": scene.sentence.text}
    return _cycle(target, brief, examples_in(scene.sentence.head, selector, count))


def _cycle(target: str, brief: dict[str, Any], examples: list[dict[str, Any]]) -> Command:
    mission_brief = {**brief, "examples": examples} if examples else brief
    return {"command": "initiate_cognitive_cycle", "target_oid": target, "mission_brief": mission_brief}


def offer_methods(verb: str) -> Callable[[Scene], list[Schema]]:
    def offer(scene: Scene) -> list[Schema]:
        methods = scene.own_methods
        return [form(**{verb: one_of(method.name for method in methods)})] if methods else []

    return offer


def read_methods(verb: str, command: str) -> Callable[[Answer, Scene], Command]:
    def read(answer: Answer, scene: Scene) -> Command:
        method = _method(answer[verb], scene)
        found = {"command": command, "target_oid": method.target, "selector": method.selector}
        if verb == "revert" and len(scene.own_methods) > 1 and not scene.likeness(method):
            raise Doubt(f"Shall {method.name} go back to its earlier version?", found)
        return found

    return read


def _method(name: str, scene: Scene) -> Method:
    target, _, selector = name.partition(".")
    return Method(target, selector, scene.context.understood(target)[selector])
