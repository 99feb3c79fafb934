"""The parser without a model: exact syntax, what is offered in which scene, and what is made of answers."""

import json
from typing import Any

import pytest

from uvm.errors import BatosError, GenerationCancelled, InvalidField, UnknownCommand
from uvm.mind.backends.scripted import STALL, Scripted
from uvm.parser import SLASHES, Context, Parser, Reading, parse_exact
from uvm.parser.arguments import LONGEST
from uvm.parser.exact import LOCAL
from uvm.parser.examples import examples_in
from uvm.parser.prompt import EXAMPLE_CONTEXT, EXAMPLES, conversation
from uvm.parser.scene import MAX_METHODS, MAX_OBJECTS, Scene
from uvm.parser.sentence import SHOWN_CHARACTERS, Sentence
from uvm.parser.verbs import read, schema_of

CONTEXT = Context(
    {
        "genesis_obj": {"square": ["x"], "shout": ["text"], "repeat": ["text", "times"]},
        "shop_obj": {"add_item": ["name", "quantity"], "total": []},
        "robin_prototype_obj": {},
        "market_obj": {},
    },
    {"market_obj": ["shop_obj"], "shop_obj": ["market_obj"]},
)
NEWBORN = Context({"alfred_prototype_obj": {}, "genesis_obj": {}, "traits_obj": {}})


def scene(say: str, context: Context = CONTEXT) -> Scene:
    return Scene(context, Sentence(say))


def offers_of(say: str, context: Context = CONTEXT) -> list[Any]:
    schema = schema_of(scene(say, context))
    assert schema is not None
    return list(schema["anyOf"])


def forms(say: str, verb: str, context: Context = CONTEXT) -> list[Any]:
    """Returns what the grammar lets follow `verb`."""
    offers = offers_of(say, context)
    return [offer["properties"][verb] for offer in offers if verb in offer["properties"]]


def called(say: str, context: Context = CONTEXT) -> list[str]:
    return [form["const"] for form in forms(say, "call", context)]


def parse(say: str, *answers: Any, context: Context = CONTEXT) -> Reading:
    """Returns the reading of a sentence where the model gives these answers, one after the other."""
    model = Scripted([(None, json.dumps(answer)) for answer in answers])
    return Parser(lambda: model).read(say, context)


def arguments(say: str, call: str, **given: Any) -> Any:
    """Returns the arguments of the call that is understood, or the question that is asked."""
    reading = parse(say, {"call": call, "with": given}, {"recall": say})
    told = reading.told()
    return told["args"] if told["command"] == "send_message" else told


# Exact syntax


def message(target: str, selector: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    command = {"command": "send_message", "target_oid": target, "selector": selector, "args": list(args)}
    return {**command, "kwargs": kwargs} if kwargs else command


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("genesis_obj.square(12)", message("genesis_obj", "square", 12)),
        (" shop_obj.total() ", message("shop_obj", "total")),
        ('o.m(1, "x", k=[1, 2.5, None])', message("o", "m", 1, "x", k=[1, 2.5, None])),
        ("o.m(-3, {'a': (1, {2})}, b'x')", message("o", "m", -3, {"a": (1, {2})}, b"x")),
        ("o.m(\n  'two lines',\n)", message("o", "m", "two lines")),
        ("o.m('\\d')", message("o", "m", "\\d")),
        ("00000000000000a1.m(1)", message("00000000000000a1", "m", 1)),
        ("/status", {"command": "status"}),
        ("/PING", {"command": "ping"}),
        ("/objects", {"command": "list_objects"}),
        ("/objects shop", {"command": "list_objects", "prefix": "shop"}),
        ("/inspect shop_obj", {"command": "inspect", "target_oid": "shop_obj"}),
        ("/missions failed", {"command": "missions", "state": "failed"}),
        ("/mission 12-ab", {"command": "mission", "mission_id": "12-ab"}),
        ("/cancel 12-ab", {"command": "cancel_mission", "mission_id": "12-ab"}),
        ("/remember two\nlines", {"command": "remember", "text": "two\nlines"}),
        ("/recall  what is it", {"command": "recall", "query": "what is it"}),
        ("/history o.m", {"command": "method_history", "target_oid": "o", "selector": "m"}),
        ("/revert o.m", {"command": "revert_method", "target_oid": "o", "selector": "m"}),
        ("/revert o.m 2", {"command": "revert_method", "target_oid": "o", "selector": "m", "version": 2}),
        ("/undo 00000000000000ff", {"command": "undo", "transaction_id": "00000000000000ff"}),
        ("/set o.s = [1, 'x']", {"command": "set_slot", "target_oid": "o", "slot": "s", "value": [1, "x"]}),
        ("/unset o.s", {"command": "delete_slot", "target_oid": "o", "slot": "s"}),
        ("/create a_obj", {"command": "create_object", "name": "a_obj"}),
        ("/create a_obj b_obj c", {"command": "create_object", "name": "a_obj", "parents": ["b_obj", "c"]}),
        ("/shutdown", {"command": "shutdown"}),
        ("/help", {"command": "help"}),
        ("/quit", {"command": "quit"}),
    ],
)
def test_exact_syntax(text: str, command: dict[str, Any]) -> None:
    assert parse_exact(text) == command


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("o.m(12", InvalidField, "never closed"),
        ("o.m(apples)", InvalidField, "'apples'"),
        ("o.m(1) + 1", InvalidField, "no call"),
        ("o.m(1 + f(2))", InvalidField, "no value"),
        ("o.m(**{'a': 1})", InvalidField, "can't stand"),
        ("o.m(*[1])", InvalidField, "no value"),
        ("o._m(1)", InvalidField, "underscore"),
        ("o.m(" + "[" * 200 + "]" * 200 + ")", InvalidField, ""),
        ("o.m(" + "-" * 50_000 + "1)", InvalidField, ""),
        ("/nonsense", UnknownCommand, "/help"),
        ("/", UnknownCommand, "/help"),
        ("/status now", InvalidField, "/status"),
        ("/inspect", InvalidField, "/inspect OBJECT"),
        ("/inspect a b", InvalidField, "/inspect OBJECT"),
        ("/missions nonsense", InvalidField, "/missions"),
        ("/history o", InvalidField, "/history OBJECT.METHOD"),
        ("/history o.m 2", InvalidField, "/history OBJECT.METHOD"),
        ("/revert o.m 0", InvalidField, "/revert"),
        ("/undo 12", InvalidField, "/undo TRANSACTION"),
        ("/set o.s", InvalidField, "/set OBJECT.SLOT = VALUE"),
        ("/set o.s = apples", InvalidField, "in quotes"),
        ("/create", InvalidField, "/create NAME"),
        ("/create 2nd", InvalidField, "identifier"),
        ("/remember", InvalidField, "/remember TEXT"),
    ],
)
def test_a_mistake_in_exact_syntax_says_what_is_right(text: str, error: type[BatosError], says: str) -> None:
    with pytest.raises(error) as caught:
        parse_exact(text)
    assert says in str(caught.value)


def test_every_slash_command_is_shown_with_its_usage() -> None:
    for name, slash in SLASHES.items():
        assert slash.meaning
        if slash.usage and not slash.usage.startswith("["):
            with pytest.raises(InvalidField, match=f"/{name}"):
                parse_exact(f"/{name}")
        else:
            command = parse_exact(f"/{name}")
            assert command is not None
            assert (command["command"] in LOCAL) == (name in ("help", "quit"))


@pytest.mark.parametrize(
    "text",
    ["square 12", "what is square(12)?", "gcd(a, b)", "create gcd(a, b)", "shout (loud)", "f(1) and g(2)"],
)
def test_what_is_no_exact_syntax_is_a_sentence(text: str) -> None:
    assert parse_exact(text, CONTEXT) is None


def test_a_call_without_an_object_goes_to_the_one_that_understands_it() -> None:
    assert parse_exact("square(12)", CONTEXT) == message("genesis_obj", "square", 12)
    assert parse_exact("cube(12)", CONTEXT) == message("genesis_obj", "cube", 12)
    assert parse_exact("total()", Context({"genesis_obj": {}, "a": {"total": []}})) == message("a", "total")
    with pytest.raises(InvalidField, match=r"shop_obj\.total, market_obj\.total"):
        parse_exact("total()", CONTEXT)


# What there is


def test_an_object_understands_what_its_parents_do_and_circles_end() -> None:
    assert CONTEXT.understood("market_obj") == {"add_item": ("name", "quantity"), "total": ()}
    assert called("market_obj, the total please") == ["market_obj.add_item", "market_obj.total"]
    assert [method.name for method in CONTEXT.own_methods() if method.target == "market_obj"] == []


def test_a_context_comes_from_a_file_or_from_the_kernel() -> None:
    data = {"objects": {"a": {"methods": {"m": ["x"]}}, "b": {"methods": {}, "parents": ["a"]}}}
    rows = [
        {"name": "a", "oid": "1", "selectors": {"m": ["x"]}},
        {"name": "b", "oid": "2", "selectors": {}, "parents": ["a"]},
    ]
    for context in (Context.from_json(data), Context.from_rows(rows)):
        assert context.understood("b") == {"m": ("x",)}
        assert context.home == "a"


@pytest.mark.parametrize(
    "data", [None, [], {}, {"objects": []}, {"objects": {"a": {}}}, {"objects": {"a": 1}}]
)
def test_a_context_of_another_form_is_refused(data: Any) -> None:
    with pytest.raises(InvalidField, match="objects"):
        Context.from_json(data)


# What a sentence says


def test_quotations_in_every_style() -> None:
    text = """say "a b", 'it's me', “c”, „d“, «e», 「f」 and `g`, but don't take this"""
    assert Sentence(text).quotations == ["a b", "it's me", "c", "d", "e", "f", "g"]


@pytest.mark.parametrize(
    ("say", "number"),
    [
        ("12", 12),
        ("-3.5 and more", -3.5),
        ("\u22124", -4),
        ("3x please", 3),
        ("costs 1,000.", 1000),
        ("kostet 3,5", 3.5),
        ("twice", 2),
        ("drei Mal", 3),
        ("三回", 3),
        ("½", 0.5),
    ],
)
def test_numbers_in_every_style(say: str, number: float) -> None:
    assert number in Sentence(say).numbers


def test_the_model_sees_one_short_line_without_invisible_characters() -> None:
    assert Sentence("a\u202e\x1b[0m\n\n b\u200b\tc").shown == "a[0m b c"
    long = Sentence("x" * 100_000)
    assert len(long.shown) <= SHOWN_CHARACTERS + 3
    assert len(long.text) == 100_000


# What is offered


def test_only_what_exists_is_offered() -> None:
    assert called("do something") == [method.name for method in CONTEXT.methods()]
    offers = offers_of("do something")
    calls = {offer["properties"]["call"]["const"]: offer for offer in offers if "call" in offer["properties"]}
    assert list(calls["shop_obj.add_item"]["properties"]["with"]["properties"]) == ["name", "quantity"]
    assert calls["shop_obj.add_item"]["properties"]["with"]["required"] == ["name", "quantity"]
    assert "with" not in calls["shop_obj.total"]["properties"]


def test_a_newborn_image_offers_no_calls_but_learning() -> None:
    offered = {next(iter(offer["properties"])) for offer in offers_of("hello", NEWBORN)}
    assert offered == {
        "learn",
        "inspect",
        "create",
        "remember",
        "recall",
        "list",
        "report",
        "stop",
        "show",
        "none",
    }


def test_names_in_the_sentence_narrow_the_offer() -> None:
    assert called("shop_obj, what is it?") == ["shop_obj.add_item", "shop_obj.total"]
    assert "shop_obj.total" not in called("shout: dinner is ready")
    assert forms("show me the shop", "inspect") == [{"enum": ["shop_obj"]}]
    assert forms("the code of shout", "inspect") == [{"enum": ["genesis_obj"]}]
    assert forms("roll add_item back", "revert") == [{"enum": ["shop_obj.add_item"]}]
    assert forms("teach robin to sing", "learn")[0]["pattern"].startswith(
        "^(genesis_obj|robin_prototype_obj)"
    )
    assert forms("teach robin_prototype_obj to sing", "learn")[0]["pattern"].startswith(
        "^(robin_prototype_obj)"
    )


def test_a_new_signature_is_to_be_learned_as_it_stands() -> None:
    assert called("create gcd(a, b)") == []
    offers = offers_of("create gcd(a, b)")
    learn = next(offer["properties"] for offer in offers if "learn" in offer["properties"])
    assert learn == {"learn": {"enum": ["genesis_obj.gcd"]}, "with": {"const": ["a", "b"]}}
    assert called("make square(x) faster") != []
    assert called("what is 'gcd(a, b)'?") != []


def test_ids_are_offered_where_the_sentence_has_them() -> None:
    mission, transaction = "0123456789abcdef-a1b2c3", "03e1f4a1b2c3d4e5"
    assert forms(f"stop {mission}", "cancel") == [{"enum": [mission]}]
    assert forms(f"take {transaction} back", "undo") == [{"enum": [transaction]}]
    assert forms("stop it", "cancel") == forms("take it back", "undo") == []


def test_of_a_large_image_the_likeliest_is_shown() -> None:
    many = {f"thing{i}_obj": {f"act{i}_{j}": ["x"] for j in range(5)} for i in range(100)}
    context = Context({**many, "genesis_obj": {}, "bank_obj": {"pay_out": ["amount"]}})
    shown = scene("bank, please pay out 30", context)
    assert len(shown.methods) == MAX_METHODS
    assert len(shown.objects) <= MAX_OBJECTS + MAX_METHODS
    assert {"bank_obj", "genesis_obj"} <= set(shown.objects)
    assert "bank_obj.pay_out" in called("bank, please pay out 30", context)


# What the model is told


def test_the_prompt_begins_with_what_never_changes() -> None:
    one, other = conversation(scene("square 12")), conversation(scene("hello", NEWBORN))
    assert one[:-2] == other[:-2]
    assert one[-1].content == "square 12"
    assert "shop_obj: add_item(name, quantity), total()" in one[-2].content


def test_the_examples_follow_their_own_grammar() -> None:
    for say, answer in EXAMPLES:
        shown = Scene(EXAMPLE_CONTEXT, Sentence(say))
        if '"none"' not in answer:
            assert read(json.loads(answer), shown)["command"]
        assert next(iter(json.loads(answer))) in json.dumps(schema_of(shown))


# What is made of an answer


@pytest.mark.parametrize(
    ("say", "call", "given", "args"),
    [
        ("square 12", "genesis_obj.square", {"x": "12"}, [12]),
        ("square 12", "genesis_obj.square", {"x": 12.0}, [12]),
        ("square 2.5", "genesis_obj.square", {"x": 2.5}, [2.5]),
        ("shout '42'", "genesis_obj.shout", {"text": 42}, ["42"]),
        ("shout hello world", "genesis_obj.shout", {"text": "shout hello world"}, ["hello world"]),
        ("shout HELLO", "genesis_obj.shout", {"text": "hello"}, ["HELLO"]),
        ('shout "bolt M4" now', "genesis_obj.shout", {"text": "bolt"}, ["bolt M4"]),
        ("say hi three times", "genesis_obj.repeat", {"text": "hi", "times": 3}, ["hi", 3]),
        ("4 apples", "shop_obj.add_item", {"name": "apple", "quantity": 4}, ["apple", 4]),
        ("square 1, 2 and 3", "genesis_obj.square", {"x": ["1", 2, 3]}, [[1, 2, 3]]),
        ("shout 007", "genesis_obj.shout", {"text": "007"}, ["007"]),
    ],
)
def test_arguments_are_as_the_sentence_writes_them(
    say: str, call: str, given: dict[str, Any], args: list[Any]
) -> None:
    got = arguments(say, call, **given)
    assert got == args
    assert [type(value) for value in got] == [type(value) for value in args]


def test_a_call_with_made_up_arguments_is_refused_and_another_reading_taken() -> None:
    answers = {"call": "genesis_obj.square", "with": {"x": 5}}, {"report": "status"}
    assert parse("u ok?", *answers).told() == {"command": "status"}


def test_a_call_that_leaves_a_number_out_gives_way_to_one_that_does_not() -> None:
    shout, repeat = (
        {"call": "genesis_obj.shout", "with": {"text": "HELLO"}},
        {"call": "genesis_obj.repeat", "with": {"text": "HELLO", "times": 5}},
    )
    assert parse("say HELLO 5 times", shout, repeat).told() == message("genesis_obj", "repeat", "HELLO", 5)
    doubtful = parse("shout HELLO at 5", shout, {"call": "genesis_obj.square", "with": {"x": 7}})
    assert doubtful.question is not None
    assert "no place for 5" in doubtful.question
    assert scene("say HELLO 5 times").without("call genesis_obj.shout", only="call").only == "call"


def test_after_a_guessed_call_no_call_is_offered() -> None:
    model = Scripted(
        [(None, json.dumps({"call": "genesis_obj.square", "with": {"x": 5}})), (None, '{"report":"status"}')]
    )
    assert Parser(lambda: model).read("u ok?", CONTEXT).told() == {"command": "status"}
    guessed = scene("u ok?").without("call")
    assert '"call"' not in json.dumps(schema_of(guessed))
    assert schema_of(scene("u ok?").without("call", only="call")) is None


def test_a_call_of_the_whole_sentence_is_refused() -> None:
    answers = {"call": "genesis_obj.shout", "with": {"text": "stop the system"}}, {"stop": "kernel"}
    assert parse("stop the system", *answers).told() == {"command": "shutdown"}


def test_a_call_that_lacks_one_argument_is_asked_about() -> None:
    told = parse(
        "put apples into the shop", {"call": "shop_obj.add_item", "with": {"name": "apples", "quantity": 1}}
    )
    assert told.told()["command"] == "clarify"
    assert told.question is not None
    assert "quantity" in told.question
    assert told.command == message("shop_obj", "add_item", "apples", 1)


def test_where_no_reading_holds_the_user_is_asked() -> None:
    model = Scripted([(None, json.dumps({"call": "genesis_obj.square", "with": {"x": 5}}))])
    reading = Parser(lambda: model).read("blah", CONTEXT)
    assert reading.told()["command"] == "clarify"
    assert len(model.prompts) == 3


def test_of_a_long_text_the_model_writes_the_beginning() -> None:
    text = "word " * 2_000
    assert parse(f"remember {text}", {"remember": ("word " * 30)[:LONGEST]}).told()["text"] == text.strip()
    call = {"call": "genesis_obj.shout", "with": {"text": ("word " * 30)[:LONGEST]}}
    assert parse(f"shout {text}", call).told()["args"] == [text.strip()]
    assert parse(f"shout '{text}' now", call).told()["args"] == [text]


def test_an_answer_that_does_not_end_is_no_reading() -> None:
    reading = parse("remember " + "long " * 300, {"remember": "long " * 300})
    assert reading.command is None
    assert reading.question


def test_learning() -> None:
    say = "Create a function to greet me by name."
    reading = parse(say, {"learn": "genesis_obj.greet_by_name", "with": ["name"]}, context=NEWBORN)
    brief = {
        "type": "unhandled_message",
        "selector": "greet_by_name",
        "parameters": ["name"],
        "description": say,
    }
    assert reading.told() == {
        "command": "initiate_cognitive_cycle",
        "target_oid": "genesis_obj",
        "mission_brief": brief,
    }


def test_parameters_become_legal_names() -> None:
    reading = parse("convert it", {"learn": "genesis_obj.convert", "with": ["self", "from", "to", "to"]})
    assert reading.told()["mission_brief"]["parameters"] == ["from_", "to"]


def test_what_is_known_already_is_not_learned_anew_by_mistake() -> None:
    answers = (
        {"learn": "shop_obj.add_item", "with": ["name", "quantity"]},
        {"call": "shop_obj.add_item", "with": {"name": "oranges", "quantity": 6}},
    )
    assert parse("Ajoute 6 oranges au magasin", *answers).told() == message(
        "shop_obj", "add_item", "oranges", 6
    )


def test_an_improvement_is_a_revision() -> None:
    say = "square should also accept strings, so that square('a') gives 'aa'"
    brief = parse(say, {"improve": "genesis_obj.square"}).told()["mission_brief"]
    assert brief == {
        "type": "revision",
        "selector": "square",
        "description": say,
        "examples": [{"args": ["a"], "returns": "aa"}],
    }


def test_a_new_object_has_a_name_from_the_sentence_and_parents_that_it_mentions() -> None:
    told = parse("clone shop_obj into stall_obj", {"create": "stall_obj", "like": "shop_obj"}).told()
    assert told == {"command": "create_object", "name": "stall_obj", "parents": ["shop_obj"]}
    answers = {"create": "tip_calculator"}, {"learn": "genesis_obj.tip", "with": ["bill"]}
    assert parse("build a tip calculator", *answers).told()["command"] == "initiate_cognitive_cycle"
    assert parse("create shop_obj", {"create": "shop_obj"}, {"create": "shop_obj"}).question


def test_small_talk_is_nothing_to_do() -> None:
    reading = parse("good morning", {"none": "talk"})
    assert reading.command is None
    assert reading.question is not None
    assert "/help" in reading.question


def test_a_slot_is_set_on_an_object_that_is_named() -> None:
    told = parse("the owner of shop_obj is Ada", {"set": "shop_obj.owner", "to": "Ada"}).told()
    assert told == {"command": "set_slot", "target_oid": "shop_obj", "slot": "owner", "value": "Ada"}
    assert forms("the owner of the shop is Ada", "set") == []
    assert parse("the total of shop_obj is 3", {"set": "shop_obj.total", "to": 3}, {"none": "talk"}).question
    assert parse("the owner of shop_obj", {"set": "shop_obj.owner", "to": "Bob"}, {"none": "talk"}).question


def test_texts_are_kept_word_for_word() -> None:
    say = "remember: The Backup  runs at noon"
    assert parse(say, {"remember": "the backup runs at noon"}).told()["text"] == "The Backup  runs at noon"
    assert parse(say, {"remember": "something else"}).told()["text"] == say


@pytest.mark.parametrize("text", ["", "  \n ", "\u200b\u202e", "x" * 100_001])
def test_nothing_and_too_much_are_refused_without_a_model(text: str) -> None:
    def no_model() -> Scripted:
        raise AssertionError("a model was asked for")

    with pytest.raises(InvalidField):
        Parser(no_model).read(text, CONTEXT)


def test_a_reading_can_be_cancelled() -> None:
    model = Scripted([(None, STALL)])
    with pytest.raises(GenerationCancelled):
        Parser(lambda: model).read("hello", CONTEXT, cancelled=lambda: True)


# Examples in a sentence


@pytest.mark.parametrize(
    ("text", "selector", "count", "examples"),
    [
        ("double(4) should give 8", "double", 1, [([4], 8)]),
        ("write gcd so that gcd(12, 18) == 6 and gcd(5, 7) == 1", "gcd", 2, [([12, 18], 6), ([5, 7], 1)]),
        ("reverse a word: 'abc' -> 'cba', \"x\" → \"x\"", "reverse", 1, [(["abc"], "cba"), (["x"], "x")]),
        ("now() returns 5", "now", 0, [([], 5)]),
        ("flip(True) is False", "flip", 1, [([True], False)]),
        ("first([3, 4]) returns 3", "first", 1, [([[3, 4]], 3)]),
        ("square(2) should give 4", "double", 1, []),
        ("double(4, 5) gives 8", "double", 1, []),
        ("add two numbers", "add", 2, []),
        ("double(x) returns x + x", "double", 1, []),
        ("double(4) returns 8apples", "double", 1, []),
    ],
)
def test_examples(text: str, selector: str, count: int, examples: list[tuple[list[Any], Any]]) -> None:
    expected = [{"args": args, "returns": returns} for args, returns in examples]
    assert examples_in(text, selector, count) == expected


@pytest.mark.parametrize("piece", ["“a ", "'a ", "1, ", "f(", "f(a, ", "(", "a.", "1.", "-> 1 "])
def test_long_texts_cost_little(piece: str) -> None:
    many = Context({f"o{i}_obj": {f"act_{j}": ["x", "y"] for j in range(10)} for i in range(100)})
    text = "learn " + piece * (90_000 // len(piece))
    model = Scripted([(None, '{"learn":"o1_obj.it","with":["x"]}'), (None, '{"none":"talk"}')])
    with pytest.raises(InvalidField, match="description"):
        Parser(lambda: model).read(text, many)
