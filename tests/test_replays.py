"""Revisions and their callers, with real hands; and all ways to turn back time through a real kernel."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import Start, scripted, writes
from tests.test_kernel import thoughts
from uvm import errors
from uvm.hands.pool import HandPool
from uvm.image import history
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.txn import Txn
from uvm.messenger import Messenger
from uvm.replays import Replay, Replays
from uvm.trials import TrialRunner

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PRICE = "def price(self, name):\n    return {'apple': 3}[name]"
TOTAL = "def total(self, names):\n    return sum(self.price(name) for name in names)"
HALF = "def half(self, names):\n    return self.total(names) / 2"
OTHER = "def other(self, names):\n    return len(names)"
TEXT = "def price(self, name):\n    return '3 EUR'"
FOUR = "def price(self, name):\n    return 4"
SAME = "def price(self, name):\n    return {'apple': 3, 'pear': 2}[name]"
ENDLESS = "def price(self, name):\n    while True: pass"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def runner() -> AsyncIterator[TrialRunner]:
    pool = HandPool(count=2, timeout_s=1.0, memory_mib=128)
    await pool.start()
    yield TrialRunner(Messenger(pool))
    await pool.close()


@pytest.fixture
def image() -> Iterator[LivingImage]:
    image = LivingImage.in_memory()
    image.open()
    yield image
    image.close()


def method(source: str, *trials: dict[str, Any]) -> UvmMethod:
    selector, _, rest = source.removeprefix("def ").partition("(")
    parameters = tuple(rest.partition(")")[0].split(", ")[1:])
    return UvmMethod(selector, parameters, source + "\n", "", {}, [{"kwargs": {}, **one} for one in trials])


def example(args: list[Any], returns: Any) -> dict[str, Any]:
    return {"args": args, "origin": "example", "returns": returns}


async def plant(image: LivingImage, name: str, *methods: UvmMethod, **slots: Any) -> None:
    def unit(txn: Txn) -> None:
        target = txn.names.get(name) or txn.create(name, (), slots)
        for one in methods:
            history.install(txn, target, one)

    await image.attempt("plant", unit)


async def replay(image: LivingImage, runner: TrialRunner, source: str, **bounds: Any) -> Replay:
    """Returns what a new `price` of the shop breaks; the image must be as before."""
    before = image.last_transaction()
    async with image.transaction("trial") as txn:
        txn.doom()
        shop = txn.find("shop")
        present = shop.methods()["price"].source
        found = await Replays(runner, **bounds).run(txn, shop, method(source))
        assert shop.methods()["price"].source == present
    assert image.last_transaction() == before
    return found


@pytest.fixture
def shop(image: LivingImage) -> LivingImage:
    async def stock() -> None:
        await plant(image, "shop", method(PRICE), method(TOTAL, example([["apple"] * 2], 6)))
        await plant(image, "shop", method(HALF, example([["apple"]], 1.5)), method(OTHER, example([[]], 0)))

    asyncio.run(stock())
    return image


async def test_callers_and_their_callers_are_tried(shop: LivingImage, runner: TrialRunner) -> None:
    found = await replay(shop, runner, FOUR)
    assert found.callers == ["shop.total", "shop.half"]
    assert (found.ran, found.left_out) == (2, 0)
    assert found.broken == [
        "shop.total relies on this method, and with it shop.total(['apple', 'apple']) must return 6, "
        "but it returned 8.",
        "shop.half relies on this method, and with it shop.half(['apple']) must return 1.5, "
        "but it returned 2.0.",
    ]
    assert [finding.rule for finding in found.findings()] == ["caller", "caller"]


async def test_what_keeps_its_promises_breaks_nothing(shop: LivingImage, runner: TrialRunner) -> None:
    assert (await replay(shop, runner, SAME)).broken == []


async def test_a_caller_that_raises_now_is_broken_and_who_expects_it_is_not(
    shop: LivingImage, runner: TrialRunner
) -> None:
    called = {"args": [["apple"]], "origin": "call"}
    raises = {"args": [["plum"]], "origin": "example", "raises": "KeyError"}
    await plant(shop, "shop", method(TOTAL, called, raises))
    assert len((await replay(shop, runner, "def price(self, name):\n    raise KeyError(name)")).broken) == 2
    told = (await replay(shop, runner, TEXT)).broken
    assert ["TypeError" in one for one in told] == [True, True, True]  # half's, the call, and what must raise
    assert (await replay(shop, runner, FOUR)).broken[0].endswith("must raise KeyError, but it returned 4.")


async def test_what_failed_before_is_not_broken(shop: LivingImage, runner: TrialRunner) -> None:
    await plant(shop, "shop", method(TOTAL, example([["apple"]], 99)), method(HALF))
    found = await replay(shop, runner, TEXT)
    assert (found.ran, found.broken) == (1, [])


async def test_callers_live_on_other_objects_too(shop: LivingImage, runner: TrialRunner) -> None:
    def unit(txn: Txn) -> None:
        till = txn.create("till", (), {"shop": txn.find("shop")})
        source = "def bill(self):\n    return self.shop.price('apple')"
        history.install(txn, till, method(source, example([], 3)))

    await shop.attempt("till", unit)
    found = await replay(shop, runner, FOUR)
    assert "till.bill" in found.callers
    assert any("till.bill() must return 3" in one for one in found.broken)


async def test_trials_have_bounds(shop: LivingImage, runner: TrialRunner) -> None:
    await plant(shop, "shop", method(TOTAL, *[example([["apple"] * n], 3 * n) for n in range(9)]))
    found = await replay(shop, runner, SAME, max_trials=4)
    assert (found.ran, found.left_out) == (4, 6)
    ticks = iter([0.0, 0.0, 0.0, 61.0, 61.0])
    found = await replay(shop, runner, SAME, clock=lambda: next(ticks))
    assert (found.ran, found.left_out) == (2, 8)


async def test_the_second_look_has_the_same_bound(shop: LivingImage, runner: TrialRunner) -> None:
    ticks = iter([0.0, 0.0, 0.0, 61.0, 61.0])  # then the time is up
    await plant(shop, "shop", method(TOTAL, example([["apple"]], 99), example([["apple"] * 2], 99)))
    await plant(shop, "shop", method(HALF))
    found = await replay(shop, runner, FOUR, clock=lambda: next(ticks))
    assert (found.ran, len(found.broken)) == (2, 2)
    found = await replay(shop, runner, FOUR)
    assert (found.ran, found.broken) == (2, [])


async def test_what_passes_is_no_finding_about_a_caller(
    shop: LivingImage, runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any, **__: Any) -> Any:
        raise errors.QueueFull("no hand can be made now")

    monkeypatch.setattr(runner._messenger, "run", full)
    with pytest.raises(errors.QueueFull):
        await replay(shop, runner, FOUR)


async def test_a_version_that_never_ends_breaks_its_callers(shop: LivingImage, runner: TrialRunner) -> None:
    found = await replay(shop, runner, ENDLESS, max_trials=1)
    assert "did not end in time" in found.broken[0]


async def test_methods_call_each_other_in_a_circle(shop: LivingImage, runner: TrialRunner) -> None:
    ping = "def ping(self, n):\n    return self.pong(n - 1) if n else self.price('apple')"
    pong = "def pong(self, n):\n    return self.ping(n - 1) if n else self.price('apple')"
    await plant(shop, "shop", method(ping, example([3], 3)), method(pong, example([2], 3)))
    found = await replay(shop, runner, FOUR)
    assert {"shop.ping", "shop.pong"} <= set(found.callers)
    assert len(found.broken) == 4


class Shop:
    """A shop of a real kernel."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    async def ask(self, command: str, **fields: Any) -> Any:
        return await self.kernel.request(command, **fields)

    async def send(self, selector: str, *args: Any, as_of: Any = None) -> Any:
        fields = {"target_oid": "shop_obj", "selector": selector, "args": list(args), "on_missing": "error"}
        return await self.ask("send_message", **fields, as_of=as_of)

    async def teach(self, selector: str, args: list[Any], returns: Any, kind: str) -> dict[str, Any]:
        parameters = {"price": ["name"], "total": ["names"], "sell": ["n"], "pears": []}[selector]
        shown = [{"args": args, "returns": returns}]
        record: dict[str, Any] = await self.kernel.teach(
            "shop_obj", selector, parameters, f"The {selector}.", shown, type=kind
        )
        return record

    async def sources(self, selector: str) -> list[str]:
        rows = await self.ask("method_history", target_oid="shop_obj", selector=selector)
        return [row["source"].strip() for row in rows]


async def test_turning_back_time_on_a_real_kernel(start_kernel: Start, tmp_path: Path) -> None:
    """As_of, undo, revert_method and a refused revision, with methods in real hands, and a kill after all."""
    sell = "def sell(self, n):\n    self.stock -= n\n    self._p_changed = True\n    return self.stock"
    pears = "def pears(self):\n    return self.price('pear')"
    lines = [*writes("price", PRICE, TEXT, TEXT + "  # as asked", SAME), *writes("total", TOTAL)]
    lines += [*writes("sell", sell), *writes("pears", pears)]
    process = start_kernel(scripted(tmp_path, lines, MAX_SYNTHESIS_ATTEMPTS="2"))
    async with process.client() as kernel:
        shop = Shop(kernel)
        await shop.ask("create_object", name="shop_obj", slots={"stock": 10})
        first = await shop.teach("price", ["apple"], 3, "unhandled_message")
        await shop.teach("total", [["apple", "apple"]], 6, "unhandled_message")
        await shop.teach("sell", [1], 9, "unhandled_message")

        # A revision that breaks who calls it is refused, although its own examples hold.
        with pytest.raises(errors.MissionFailed, match=r"shop_obj\.total relies on this method") as refused:
            await shop.teach("price", ["apple"], "3 EUR", "revision")
        assert refused.value.details["attempts"] == 2
        assert await shop.sources("price") == [PRICE]
        assert await shop.send("total", ["apple"]) == 3
        told = [one["message"] for one in thoughts(process, "finding") if one["rule"] == "caller"]
        assert any("TypeError" in one for one in told)
        assert [len(one["broken"]) for one in thoughts(process, "replay")][:1] == [1]

        # One that keeps what they rely on is not.
        second = await shop.teach("price", ["pear"], 2, "revision")
        assert await shop.sources("price") == [PRICE, SAME]
        await shop.teach("pears", [], 2, "unhandled_message")

        # The past answers with the code and the data of then, and can't be changed.
        assert [await shop.send("sell", 3), await shop.send("sell", 2)] == [7, 5]
        sold = [one for one in thoughts(process, "commit") if one["note"].endswith("sell")]
        then = sold[-2]["transaction_id"]
        assert await shop.send("stock", as_of=then) == 7
        for past, known in ((first, False), (second, True)):
            sent = shop.send("price", "pear", as_of=past["method"]["transaction_id"])
            if known:
                assert await sent == 2
            else:
                with pytest.raises(errors.MethodRaised, match="KeyError"):
                    await sent
        with pytest.raises(errors.DoesNotUnderstand):
            await shop.send("pears", as_of=first["method"]["transaction_id"])
        for selector, args in (("sell", [1]), ("clone", ["second_shop_obj"])):
            with pytest.raises(errors.InvalidField, match="the past can't be"):
                await shop.send(selector, *args, as_of=then)

        # Undo: one sale of two.
        with pytest.raises(errors.NotUndoable, match="changed later"):
            await shop.ask("undo", transaction_id=then)
        await shop.ask("undo", transaction_id=sold[-1]["transaction_id"])
        assert await shop.send("stock") == 7

        # An earlier version comes back, says what it breaks, and the memory follows.
        reverted = await shop.ask("revert_method", target_oid="shop_obj", selector="price", version=1)
        assert [row["source"].strip() for row in reverted] == [PRICE, SAME, PRICE]
        assert [row["user"] for row in reverted] == ["architect"] * 3
        assert ["shop_obj.pears relies on" in one for one in reverted[-1]["broken"]] == [True]
        assert reverted[1]["diff"].splitlines()[-1] == "+    return {'apple': 3, 'pear': 2}[name]"
        assert (await remembered(shop))["shop_obj.price"] == PRICE
        with pytest.raises(errors.MethodRaised, match="KeyError"):
            await shop.send("pears")
        await shop.ask("undo", transaction_id=reverted[-1]["transaction_id"])
        assert await shop.send("pears") == 2
        assert SAME in (await remembered(shop))["shop_obj.price"]

        # A mission's method is undone; the mission itself is not.
        await shop.ask("undo", transaction_id=second["method"]["transaction_id"])
        assert await shop.sources("price") == [PRICE]
        with pytest.raises(errors.NotUndoable, match="undone already"):
            await shop.ask("undo", transaction_id=second["method"]["transaction_id"])
    process.kill()
    process.start()
    async with process.client() as kernel:
        shop = Shop(kernel)
        assert "taken up from the journal" not in process.log
        row = await shop.ask("mission", mission_id=second["mission_id"])
        done = second["method"]["transaction_id"]
        assert (row["state"], row["undone"], row["transaction_id"]) == ("complete", done, done)
        assert [await shop.send("total", ["apple"]), await shop.send("stock", as_of=then)] == [3, 7]


async def remembered(shop: Shop) -> dict[str, str]:
    """Returns what the memory knows of each method: its source."""
    rows = await shop.ask("recall", query="The price.", k=20)
    return {
        row["subject"]: row["text"].partition("```python\n")[2].removesuffix("```").strip() for row in rows
    }
