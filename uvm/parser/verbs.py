"""What a sentence can ask for: each verb offers forms of an answer, and turns an answer into a command.

An answer is an object whose first key is the verb: `{"call": "shop_obj.add_item", "with": {…}}`. It is short,
for each token costs time, and has the verb first, because that decides. Forms name only what exists.
"""

from __future__ import annotations

from uvm.parser import method_verbs as methods
from uvm.parser import object_verbs as objects
from uvm.parser.exact import Command
from uvm.parser.forms import DEFINITIONS, Answer, Doubt, Schema, Verb, form
from uvm.parser.scene import Scene

VERBS: dict[str, Verb] = {
    "call": Verb(methods.offer_call, methods.read_call),
    "learn": Verb(methods.offer_learn, methods.read_learn),
    "improve": Verb(methods.offer_methods("improve"), methods.read_improve),
    "inspect": Verb(objects.offer_inspect, objects.read_inspect),
    "history": Verb(methods.offer_methods("history"), methods.read_methods("history", "method_history")),
    "revert": Verb(methods.offer_methods("revert"), methods.read_methods("revert", "revert_method")),
    "create": Verb(objects.offer_create, objects.read_create),
    "set": Verb(objects.offer_set, objects.read_set),
    "remember": Verb(objects.offer_text("remember"), objects.read_text("remember", "text")),
    "recall": Verb(objects.offer_text("recall"), objects.read_text("recall", "query")),
    "list": Verb(objects.offer_list, objects.read_list),
    "report": Verb(
        lambda scene: [form(report={"const": "status"})], lambda answer, scene: {"command": "status"}
    ),
    "stop": Verb(
        lambda scene: [form(stop={"const": "kernel"})], lambda answer, scene: {"command": "shutdown"}
    ),
    "show": Verb(lambda scene: [form(show={"const": "help"})], lambda answer, scene: {"command": "help"}),
    "none": Verb(lambda scene: [form(none={"const": "talk"})], objects.read_none),
    "cancel": Verb(
        objects.offer_ids("cancel", lambda scene: scene.sentence.missions),
        lambda answer, scene: {"command": "cancel_mission", "mission_id": answer["cancel"]},
    ),
    "undo": Verb(
        objects.offer_ids("undo", lambda scene: scene.sentence.transactions),
        lambda answer, scene: {"command": "undo", "transaction_id": answer["undo"]},
    ),
}


def schema_of(scene: Scene) -> Schema | None:
    """Returns the JSON schema of all answers that make sense in a scene, or None where none is left."""
    left = [name for name in VERBS if name not in scene.refused and scene.only in (None, name)]
    forms = [one for name in left for one in VERBS[name].offer(scene)]
    return {"anyOf": forms, "$defs": DEFINITIONS} if forms else None


def read(answer: Answer, scene: Scene) -> Command:
    """Returns the command that the model's answer means.

    Raises:
        Doubt: the sentence does not bear it out.
    """
    verb = next(iter(answer))
    try:
        return VERBS[verb].read(answer, scene)
    except Doubt as doubt:
        doubt.refuses = doubt.refuses or verb
        raise
