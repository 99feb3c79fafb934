"""The edge of the wire: what is not a valid message becomes a typed error."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uvm import codec, errors
from uvm.messages import (
    COMMANDS,
    MissionBrief,
    Rejected,
    SendMessage,
    is_public_name,
    pack_error,
    pack_request,
    parse_request,
    unpack,
)

BASE: dict[str, Any] = {"target_oid": "genesis_obj", "selector": "square", "args": [3]}


def rejected(data: bytes) -> errors.BatosError:
    with pytest.raises(Rejected) as rejection:
        parse_request(data)
    return rejection.value.error


def test_a_good_request() -> None:
    request = parse_request(pack_request("7", "send_message", BASE))
    assert request.id == "7"
    assert isinstance(request.command, SendMessage)
    assert (request.command.selector, request.command.args, request.command.on_missing) == (
        "square",
        [3],
        "create",
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"selector": "two words"}, "selector"),
        ({"selector": "__class__"}, "selector"),
        ({"selector": "lambda"}, "selector"),
        ({"selector": "\uff45val"}, "selector"),
        ({"selector": "x" * 101}, "selector"),
        ({"selector": 3}, "selector"),
        ({"target_oid": "../etc"}, "target_oid"),
        ({"target_oid": ""}, "target_oid"),
        ({"args": {"a": 1}}, "args"),
        ({"args": (1, 2)}, "args"),
        ({"kwargs": {1: 2}}, "kwargs.1.[key]"),
        ({"on_missing": "maybe"}, "on_missing"),
        ({"as_of": "yesterday"}, "as_of"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], field: str) -> None:
    error = rejected(pack_request("1", "send_message", BASE | change))
    assert isinstance(error, errors.InvalidField)
    assert error.details["field"].startswith(field)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ([1, 2], errors.MalformedMessage),
        ({1: 2}, errors.MalformedMessage),
        ({"v": 1, "command": "ping"}, errors.InvalidField),
        ({"v": 1, "id": "x" * 65, "command": "ping"}, errors.InvalidField),
        ({"v": 1, "id": 2**64, "command": "ping"}, errors.InvalidField),
        ({"v": 1, "id": True, "command": "ping"}, errors.InvalidField),
        ({"v": 2, "id": "1", "command": "ping"}, errors.UnsupportedVersion),
        ({"v": True, "id": "1", "command": "ping"}, errors.UnsupportedVersion),
        ({"id": "1", "command": "ping"}, errors.UnsupportedVersion),
        ({"v": 1, "id": "1"}, errors.UnknownCommand),
        ({"v": 1, "id": "1", "command": "explode"}, errors.UnknownCommand),
        ({"v": 1, "id": "1", "command": ["ping"]}, errors.UnknownCommand),
    ],
)
def test_wrong_messages(message: Any, kind: type[errors.BatosError]) -> None:
    assert type(rejected(codec.encode(message))) is kind


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_bytes_never_pass(data: bytes) -> None:
    with pytest.raises(Rejected):
        parse_request(data)


def test_every_command_is_in_the_protocol_document() -> None:
    from pathlib import Path

    document = (Path(__file__).parent.parent / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
    missing = [name for name, model in COMMANDS.items() if f"`{name}`" not in document]
    fields = {field for model in COMMANDS.values() for field in model.model_fields}
    missing += [field for field in fields if f"`{field}`" not in document]
    assert missing == []


class TestBrief:
    def brief(self, **fields: Any) -> MissionBrief:
        return MissionBrief.model_validate({"selector": "f", **fields})

    def test_a_bare_miss_carries_its_call(self) -> None:
        brief = self.brief(args=["Ada", 3])
        assert (brief.parameter_names(), brief.call(), brief.arity()) == (None, (["Ada", 3], {}), 2)

    def test_described_args_name_the_parameters(self) -> None:
        brief = self.brief(args=["name", "times"], description="greet")
        assert (brief.parameter_names(), brief.call(), brief.arity()) == (["name", "times"], None, 2)

    def test_explicit_parameters_win(self) -> None:
        brief = self.brief(args=["Ada"], parameters=["name"], description="greet")
        assert (brief.parameter_names(), brief.call()) == (["name"], (["Ada"], {}))

    def test_a_miss_whose_arguments_are_unknown(self) -> None:
        brief = self.brief(parameters=["price"])
        assert (brief.call(), brief.arity()) == (None, 1)

    def test_a_miss_without_arguments(self) -> None:
        assert self.brief().call() == ([], {})

    @pytest.mark.parametrize(
        "fields",
        [
            {"examples": [{"args": [1]}]},
            {"examples": [{"args": [1], "returns": 1, "raises": "ValueError"}]},
            {"parameters": ["a", "a"]},
            {"parameters": ["self"]},
            {"type": "joke"},
            {"description": "x" * 20_000},
            {"selector": "_hidden"},
        ],
    )
    def test_nonsense_is_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="validation error"):
            self.brief(**fields)

    def test_none_is_a_value_to_return(self) -> None:
        assert self.brief(examples=[{"args": [1], "returns": None}]).examples[0].returns is None


def test_errors_cross_the_wire_as_what_they_are() -> None:
    miss = errors.DoesNotUnderstand("no", target="0" * 16, selector="f", args=[1])
    reply = unpack(pack_error("1", miss))
    back = errors.from_wire(reply["error"])
    assert isinstance(back, errors.DoesNotUnderstand)
    assert (back.target, back.selector, back.details["args"]) == ("0" * 16, "f", [1])


def test_an_error_with_unserialisable_details_still_crosses() -> None:
    deep: Any = 10**5000
    for _ in range(62):
        deep = [deep]
    error = errors.MethodRaised("no", selector="f", value=object(), args=deep)
    assert unpack(pack_error("1", error))["error"]["details"] == {"selector": "f"}


@pytest.mark.parametrize(
    "odd", [10**5000, [10**5000], "x" * 5000, {"a": 1}], ids=["int", "list", "str", "dict"]
)
def test_what_costs_much_to_print_is_not_printed(odd: Any) -> None:
    for fields in ({"v": odd, "command": "ping"}, {"v": 1, "command": odd}):
        with pytest.raises(Rejected) as caught:
            parse_request(codec.encode({"id": "7", **fields}))
        assert caught.value.id == "7"
        assert len(str(caught.value)) < 200


def test_an_unknown_error_is_internal() -> None:
    reply = unpack(pack_error(None, KeyError("x")))
    assert reply["error"]["type"] == "InternalError"
    assert type(errors.from_wire(reply["error"])) is errors.BatosError


@pytest.mark.parametrize(
    ("name", "public"), [("a", True), ("_a", False), ("a b", False), (3, False), ("0" * 16, False)]
)
def test_public_names(name: Any, public: bool) -> None:
    assert is_public_name(name) is public
