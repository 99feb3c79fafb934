"""Messages on a real image with real hands: what a write set may do to it, and what must still hold then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from uvm.codec import Ref, encode
from uvm.errors import Conflict, DoesNotUnderstand, GrantMissing, HandDied, SlotProtected, WriteSetRefused
from uvm.hands.calls import Created, Outcome, SlotChanges
from uvm.hands.frames import pack
from uvm.hands.pool import HandPool
from uvm.image import history
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.txn import Txn
from uvm.messenger import Messenger, apply, lost_in_storage

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ADD = "def add(self, n):\n    self.n += n\n    self._p_changed = True\n    return self.n"
LEAVE = """def leave(self, other):
    if other.on_call:
        self.on_call = False
        self._p_changed = True
    return self.on_call"""
BREED = "def breed(self, name):\n    young = self.clone(name)\n    young.n = 1\n    return young"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def messenger() -> AsyncIterator[Messenger]:
    pool = HandPool(count=2, timeout_s=30.0, memory_mib=128)
    await pool.start()
    yield Messenger(pool)
    await pool.close()


@pytest.fixture
def image() -> Iterator[LivingImage]:
    image = LivingImage.in_memory()
    image.open()
    yield image
    image.close()


def method(source: str) -> UvmMethod:
    selector = source.removeprefix("def ").partition("(")[0]
    return UvmMethod(selector, (), source, "", {}, [])


async def plant(image: LivingImage, name: str, *sources: str, parent: str = "", **slots: Any) -> str:
    """Makes an object and returns its oid."""
    async with image.transaction("plant") as txn:
        methods = {one.selector: one for one in map(method, sources)}
        parents = (txn.find(parent),) if parent else ()
        return txn.create(name, parents, {**slots, **methods}).oid


async def slots(image: LivingImage, name: str) -> dict[str, Any]:
    async with image.reading() as txn:
        return dict(txn.plain(txn.find(name).data()))


async def send(messenger: Messenger, txn: Txn, target: str, selector: str, *args: Any) -> Any:
    return (await messenger.send(txn, txn.find(target), selector, list(args), {}))[0]


# Nothing that a hand did not see is overwritten


async def test_messages_one_after_the_other_in_one_transaction_build_on_each_other(
    messenger: Messenger, image: LivingImage
) -> None:
    await plant(image, "it", ADD, BREED, n=0)
    async with image.transaction("several") as txn:
        assert [await send(messenger, txn, "it", "add", n) for n in (1, 2)] == [1, 3]
        young = await send(messenger, txn, "it", "breed", "young")
        assert [await send(messenger, txn, "young", "add", n) for n in (1, 2)] == [2, 4]
        assert young == Ref(txn.find("young").oid)
    assert (await slots(image, "it"), await slots(image, "young")) == ({"n": 3}, {"n": 4})


@pytest.mark.parametrize("born_in_it", [False, True])
async def test_of_two_at_once_in_one_transaction_the_later_is_a_conflict(
    messenger: Messenger, image: LivingImage, born_in_it: bool
) -> None:
    await plant(image, "it", ADD, n=0)
    async with image.transaction("two at once") as txn:
        if born_in_it:
            txn.create("young", (txn.find("it"),), {"n": 0})
        target = "young" if born_in_it else "it"
        sends = [send(messenger, txn, target, "add", n) for n in (1, 2)]
        ended = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(end) for end in ended if not isinstance(end, int)] == [Conflict]
    assert await slots(image, target) in ({"n": 1}, {"n": 2})


async def test_a_write_set_from_an_earlier_transaction_is_a_conflict_once_the_object_changed(
    messenger: Messenger, image: LivingImage
) -> None:
    await plant(image, "it", ADD, n=0)
    async with image.transaction("kept") as txn:
        kept = await messenger.run(txn, txn.find("it"), "add", [1], {})
        assert lost_in_storage(txn, kept) == []
    async with image.transaction("still as it was") as txn:
        assert apply(txn, kept) == 1
    async with image.transaction("no longer") as txn:
        for use in (apply, lost_in_storage):
            with pytest.raises(Conflict, match="it has changed since"):
                use(txn, kept)
    assert await slots(image, "it") == {"n": 1}


async def test_a_conflict_is_run_again(messenger: Messenger, image: LivingImage) -> None:
    await plant(image, "it", ADD, n=0)
    tries = []

    async def unit(txn: Txn) -> Any:
        tries.append(1)
        if len(tries) == 1:
            kept = await messenger.run(txn, txn.find("it"), "add", [1], {})
            await send(messenger, txn, "it", "add", 10)
            return apply(txn, kept)
        return await send(messenger, txn, "it", "add", 1)

    assert await image.attempt("add", unit) == 1  # the 10 went with the first try
    assert (await slots(image, "it"), len(tries)) == ({"n": 1}, 2)


# What a method looked up elsewhere still holds when it commits


async def on_call(messenger: Messenger, image: LivingImage) -> None:
    """Two of whom one must stay: each leaves if the other is there, and both decide at the same time."""
    oids = [await plant(image, name, LEAVE, on_call=True) for name in ("ann", "bob")]
    tries = []

    async def ann(txn: Txn) -> Any:
        tries.append(1)
        left = await send(messenger, txn, "ann", "leave", Ref(oids[1]))
        if len(tries) == 1:
            async with image.transaction("bob is faster") as other:
                assert await send(messenger, other, "bob", "leave", Ref(oids[0])) is False
        return left

    assert await image.attempt("ann", ann) is True
    assert len(tries) == 2


async def test_two_messages_that_read_what_the_other_writes_do_not_both_succeed(
    messenger: Messenger, image: LivingImage
) -> None:
    await on_call(messenger, image)
    assert [(await slots(image, name))["on_call"] for name in ("ann", "bob")] == [True, False]


async def test_who_only_reads_never_conflicts(messenger: Messenger, image: LivingImage) -> None:
    look = "def look(self, other):\n    return other.n"
    oid = await plant(image, "busy", n=1)
    await plant(image, "reader", look)
    async with image.transaction("reads") as txn:
        assert await send(messenger, txn, "reader", "look", Ref(oid)) == 1
        async with image.transaction("writes") as other:
            other.edit(other.find("busy"), {"n": 2})


async def test_a_busy_prototype_does_not_hold_up_its_heirs(messenger: Messenger, image: LivingImage) -> None:
    await plant(image, "prototype", ADD, n=5)
    await plant(image, "heir", parent="prototype")
    async with image.transaction("heir") as txn:
        assert await send(messenger, txn, "heir", "add", 1) == 6
        async with image.transaction("prototype") as other:
            await send(messenger, other, "prototype", "add", 1)
    assert (await slots(image, "heir"), await slots(image, "prototype")) == ({"n": 6}, {"n": 6})


# What the image adds to the checks of the channel


def outcome(txn: Txn, target: str, *created: Created, **changes: Any) -> Outcome:
    oid = txn.find(target).oid
    writes = {oid: SlotChanges(changes, ())} if changes else {}
    return Outcome(1, writes, created, {}, "", 0.0, seen={oid: txn.edition(txn.find(target))})


@pytest.mark.parametrize(
    "slot", ["add", "inherited", "clone", "parents", "_slots", "_p_changed", "two words"]
)
async def test_what_is_no_data_slot_is_not_written(image: LivingImage, slot: str) -> None:
    await plant(image, "prototype", "def inherited(self):\n    return 1")
    await plant(image, "it", ADD, parent="prototype", n=1)
    async with image.reading() as txn:
        before = encode(txn.plain(txn.find("it").data()))
        with pytest.raises(WriteSetRefused, match=r"no data slot|no new object"):
            apply(txn, outcome(txn, "it", **{slot: 2}))
        with pytest.raises(WriteSetRefused):
            apply(txn, outcome(txn, "it", Created("new:1", "it", (txn.find("it").oid,))))
        assert encode(txn.plain(txn.find("it").data())) == before
        assert [parent.name for parent in txn.find("it").parents] == ["prototype"]
        assert txn.find("it").methods()["add"].source == ADD


async def test_a_slot_called_parents_is_refused_with_a_hint(messenger: Messenger, image: LivingImage) -> None:
    await plant(image, "it", "def f(self):\n    self.parents = []\n    self._p_changed = True")
    async with image.reading() as txn:
        with pytest.raises(Exception, match="'parents' can't be changed by a method"):
            await send(messenger, txn, "it", "f")


# What a hand makes up


LIE = "def lie(self, frame):\n    import random\n    random._os.write(3, frame)\n    random._os._exit(0)"


@pytest.mark.parametrize("selector", ["add", "n", "clone", "files"])
async def test_a_miss_of_what_is_there_is_a_lie(
    messenger: Messenger, image: LivingImage, selector: str
) -> None:
    await plant(image, "base", ADD, n=1)
    target = await plant(image, "it", LIE, parent="base")
    told: dict[str, Any] = {"message": "m", "target": target, "parameters": [], "call": None}
    async with image.reading() as txn:
        with pytest.raises(HandDied, match="which is there"):
            await send(messenger, txn, "it", "lie", pack("missed", told | {"selector": selector}))
        with pytest.raises(DoesNotUnderstand):
            await send(messenger, txn, "it", "lie", pack("missed", told | {"selector": "sing"}))


async def test_the_kernel_itself_says_which_grant_is_missing(
    messenger: Messenger, image: LivingImage
) -> None:
    target = await plant(image, "it", LIE)
    told = {"message": "run: /grant it files / write", "exception": "E", "traceback": [], "selector": "f"}
    async with image.reading() as txn:
        with pytest.raises(GrantMissing, match="it has no grant 'clock'"):
            await send(messenger, txn, "it", "lie", pack("raised", {**told, "grant": [target, "clock"]}))


async def test_a_method_never_takes_the_place_of_data(image: LivingImage) -> None:
    await plant(image, "it", ADD, n=1)
    async with image.reading() as txn:
        history.check_place(txn.find("it"), "add")
        with pytest.raises(SlotProtected, match="data slot"):
            history.install(txn, txn.find("it"), method("def n(self):\n    return 1"))
