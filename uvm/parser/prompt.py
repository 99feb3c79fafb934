"""What the model is told: rules, a conversation that shows them, then the real objects, then the sentence.

In this order the engine keeps the beginning, which never changes, and after the first sentence reads only
what is new. The examples have objects of their own: none of their words is an answer to a real sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

from uvm.mind.backends import Message
from uvm.parser.context import Context, Method
from uvm.parser.scene import Scene

RULES = """\
You turn what the user says, in any language, into one JSON command for BAT OS, a running system (the \
kernel) of objects that have methods.

{"call":"OBJECT.METHOD","with":{...}}  use a method that is listed
{"learn":"OBJECT.new_method","with":["parameter",...]}  write a new method; on genesis_obj unless the user \
names another object; an English snake_case name in the user's words; what the caller gives are the \
parameters, what the object itself keeps is none
{"improve":"OBJECT.METHOD"}  change or fix a method that is listed
{"inspect":"OBJECT"}  show what an object has and can do, or the source code of one of its methods
{"history":"OBJECT.METHOD"}  earlier versions of a method
{"revert":"OBJECT.METHOD"}  bring back the previous version of a method
{"create":"name","like":"OBJECT"}  make a new object; "like" only if it is a copy of another
{"set":"OBJECT.slot","to":value}  keep a value on an object
{"remember":"text"}  keep a fact
{"recall":"topic"}  search the memory for what is known about a topic
{"list":"objects"}  list the objects
{"list":"missions"}  list the missions
{"report":"status"}  how the system is
{"stop":"kernel"}  stop the system
{"show":"help"}  how to use the system
{"none":"talk"}  small talk, nothing to do"""

EXAMPLE_CONTEXT = Context(
    {
        "genesis_obj": {"wrap": ["text", "width"], "cube": ["n"]},
        "lamp_obj": {"dim": ["level"], "is_on": []},
        "brick_prototype_obj": {},
    }
)
EXAMPLES = [
    ("Write a function that divides two numbers.", '{"learn":"genesis_obj.divide","with":["a","b"]}'),
    ("cube 4", '{"call":"genesis_obj.cube","with":{"n":4}}'),
    ("what are you capable of, brick?", '{"inspect":"brick_prototype_obj"}'),
    ("can you make the lamp blink some number of times", '{"learn":"lamp_obj.blink","with":["times"]}'),
    ("everything all right?", '{"report":"status"}'),
    ("is the lamp on?", '{"call":"lamp_obj.is_on"}'),
    (
        'wrap "to be or not to be" at 10',
        '{"call":"genesis_obj.wrap","with":{"text":"to be or not to be","width":10}}',
    ),
    (
        "Écris une fonction qui dit si un mot commence par une majuscule",
        '{"learn":"genesis_obj.starts_with_capital","with":["word"]}',
    ),
    ("good morning", '{"none":"talk"}'),
    ("what have you learned about Ada?", '{"recall":"Ada"}'),
    ("set the lamp to 30", '{"call":"lamp_obj.dim","with":{"level":30}}'),
    ("cube should refuse negative numbers", '{"improve":"genesis_obj.cube"}'),
    ("please shut down", '{"stop":"kernel"}'),
    ("show me how wrap works", '{"inspect":"genesis_obj"}'),
    ("was kann lamp_obj?", '{"inspect":"lamp_obj"}'),
    ("make dim like it was before", '{"revert":"lamp_obj.dim"}'),
    ("define hypot(x, y)", '{"learn":"genesis_obj.hypot","with":["x","y"]}'),
    ("which versions of dim are there", '{"history":"lamp_obj.dim"}'),
    ("make chair_obj, a copy of the lamp", '{"create":"chair_obj","like":"lamp_obj"}'),
    ("note that Ada lives in London", '{"remember":"Ada lives in London"}'),
    ("let the lamp count how often it was switched", '{"learn":"lamp_obj.count_switches","with":[]}'),
    ("new object: tree_obj", '{"create":"tree_obj"}'),
    ("the owner of lamp_obj is Grace", '{"set":"lamp_obj.owner","to":"Grace"}'),
    ("what objects are there", '{"list":"objects"}'),
    ("how do I talk to you?", '{"show":"help"}'),
    ("take the last change to wrap back", '{"revert":"genesis_obj.wrap"}'),
    ("state of the system", '{"report":"status"}'),
    ("sort people by age", '{"learn":"genesis_obj.sort_people_by_age","with":["people"]}'),
    ("Was weißt du über Vögel?", '{"recall":"Vögel"}'),
    ("thank you", '{"none":"talk"}'),
    ("quit the kernel", '{"stop":"kernel"}'),
]


def conversation(scene: Scene) -> list[Message]:
    """Returns the prompt for the sentence of a scene."""
    return [*_BEGINNING, _objects(scene.objects, scene.methods), Message("user", scene.sentence.shown)]


def _objects(names: Sequence[str], methods: Sequence[Method]) -> Message:
    lines = []
    for name in names:
        own = ", ".join(str(method).removeprefix(f"{name}.") for method in methods if method.target == name)
        lines.append(f"{name}: {own or 'no methods'}")
    return Message("system", "\n".join(["Objects:", *lines]))


def _beginning() -> list[Message]:
    shown = _objects(list(EXAMPLE_CONTEXT.objects), EXAMPLE_CONTEXT.methods())
    turns = [Message("system", f"{RULES}\n\n{shown.content}")]
    for sentence, answer in EXAMPLES:
        turns += [Message("user", sentence), Message("assistant", answer)]
    return turns


_BEGINNING = _beginning()
