"""Crafted records: an image that somebody else wrote must not run code, and must not end the kernel.

Each record is put into a real image file past the kernel, then the kernel's own code reads it. What stock
ZODB does with the same file is the control, where it is cheap to show.
"""

import asyncio
import base64
import fractions
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from BTrees.OOBTree import OOBTree
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import UndoError

from uvm import codec
from uvm.errors import ForbiddenClass, ImageDamaged, TransactionNotFound, ValueNotStorable
from uvm.image import defused
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod, UvmObject

PROTO = b"\x80\x03"
Refused = (ForbiddenClass, ImageDamaged)


def named(name: str) -> bytes:
    """The opcode that pushes what a dotted name is."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value: bytes) -> bytes:
    return b"C" + bytes([len(value)]) + value


def called(name: str, *args: bytes) -> bytes:
    """Pushes the result of a call."""
    return named(name) + b"(" + b"".join(args) + b"tR"


def reference(oid: bytes, kind: bytes) -> bytes:
    return raw(oid) + kind + b"\x86Q"


def plain(value: Any) -> bytes:
    """Pushes a plain value, with BINBYTES for bytes as ZODB has them."""
    return pickle.dumps(value, 2)[2:-1]


OBJECT = named("uvm.image.prototypes.UvmObject")
MAPPING = named("persistent.mapping.PersistentMapping")
SET = named("builtins.set")


def record(state: bytes, kind: bytes = OBJECT) -> bytes:
    return PROTO + kind + b"." + PROTO + state + b"."


class Forge:
    """An image with one object, `victim`, whose records can be written past the kernel.

    Attributes:
        canary: a file that only executed code would make.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "live_image.fs"
        self.canary = folder / "canary"
        self.touch = text(f"touch {self.canary}")
        asyncio.run(self._make())

    async def _make(self) -> None:
        image = self.opened()
        async with image.transaction("make the victim") as txn:
            victim = txn.create("victim", (), {"n": 1})
            self.victim, self.slots = victim._p_oid, None
        async with image.reading() as txn:
            self.slots = txn.find("victim")._slots._p_oid
            self.names = txn.names._p_oid
        image.close()

    def opened(self) -> LivingImage:
        image = LivingImage(str(self.path), self.folder / "blobs")
        image.open()
        return image

    def write(self, *records: tuple[bytes, bytes], note: str = "forged", extension: bytes = b"") -> bytes:
        """Writes records in a transaction and returns its id."""
        storage = FileStorage(str(self.path))
        unit = TransactionMetaData(description=note, extension=extension)
        storage.tpc_begin(unit)
        for oid, data in records:
            try:
                before = storage.load(oid)[1]
            except KeyError:
                before = b"\0" * 8
            storage.store(oid, before, data, "", unit)
        storage.tpc_vote(unit)
        tid: bytes = storage.tpc_finish(unit)
        storage.close()
        return tid

    def read(self) -> Any:
        """Reads the victim as the kernel's commands do and returns its slots."""
        return asyncio.run(self._read())

    async def _read(self) -> Any:
        image = self.opened()
        try:
            async with image.reading() as txn:
                for name in list(txn.names):
                    found = txn.find(name)
                    [owner.label for owner in found.chain()]
                    found.lookup("anything")
                    methods = {key: method.record() for key, method in found.methods().items()}
                    told = txn.plain(found.data())
                    codec.encode([told, list(map(str, methods))])
                return told
        finally:
            image.close()


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    return Forge(tmp_path)


def stock(forge: Forge, code: str) -> None:
    """Does what `code` says with stock ZODB, in a process of its own."""
    program = f"import ZODB, transaction, os, sys\nfile = {str(forge.path)!r}\n{code}"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60)


# Records that name what they must not

FORGED: dict[str, Callable[[Forge], tuple[str, bytes]]] = {
    "class is a function": lambda f: ("victim", PROTO + named("os.system") + b".}."),
    "class is called": lambda f: ("victim", PROTO + called("os.system", f.touch) + b"." + PROTO + b"}."),
    "class with arguments": lambda f: (
        "victim",
        PROTO + named("subprocess.Popen") + f.touch + b"\x85\x86." + PROTO + b"}.",
    ),
    "class as names": lambda f: ("victim", PROTO + text("os") + text("system") + b"\x86N\x86.}."),
    "state calls os.system": lambda f: ("victim", record(called("os.system", f.touch))),
    "state calls eval": lambda f: (
        "victim",
        record(called("builtins.eval", text(f"open({str(f.canary)!r}, 'w')"))),
    ),
    "state calls __import__": lambda f: ("victim", record(called("builtins.__import__", text("os")))),
    "getattr": lambda f: ("victim", record(called("builtins.getattr", OBJECT, text("__init__")))),
    "_reconstructor": lambda f: (
        "victim",
        record(called("copyreg._reconstructor", OBJECT, named("builtins.object"), b"N")),
    ),
    "__newobj__": lambda f: (
        "victim",
        record(called("copyreg.__newobj__", named("subprocess.Popen"), f.touch)),
    ),
    "module of an allowed class": lambda f: ("victim", record(called("uvm.image.prototypes.hashlib.sha256"))),
    "dotted name": lambda f: ("victim", record(named("builtins.set.__class__"))),
    "INST": lambda f: ("victim", record(b"(" + f.touch + b"ios\nsystem\n")),
    "OBJ": lambda f: ("victim", record(b"(" + named("os.system") + f.touch + b"o")),
    "STACK_GLOBAL": lambda f: (
        "victim",
        b"\x80\x04" + OBJECT + b".\x80\x04\x8c\x02os\x8c\x06system\x93" + f.touch + b"\x85R.",
    ),
    "EXT1": lambda f: ("victim", record(b"\x82\x01" + f.touch + b"\x85R")),
    "ZODB.broken": lambda f: (
        "victim",
        PROTO + named("ZODB.broken.PersistentBroken") + b"." + PROTO + b"}.",
    ),
    "reference with a class tuple": lambda f: (
        "slots",
        record(b"}" + text("data") + b"}" + text("x")
               + reference(b"\0" * 7 + b"\x99", text("os") + text("system") + b"\x86") + b"ss", MAPPING),
    ),
    "reference with a function": lambda f: (
        "slots",
        record(b"}" + text("data") + b"}" + text("x")
               + reference(b"\0" * 7 + b"\x99", named("os.system")) + b"ss", MAPPING),
    ),
    "reference with a builtin": lambda f: (
        "slots",
        record(b"}" + text("data") + b"}" + text("x") + reference(b"\0" * 7 + b"\x99", SET) + b"ss", MAPPING),
    ),
    "reference to nothing": lambda f: (
        "victim",
        record(b"}(" + text("_slots") + reference(b"\0" * 7 + b"\x99", MAPPING)
               + text("parents") + b")" + text("name") + b"Nu"),
    ),
    "reference to another database": lambda f: (
        "victim",
        record(b"](" + text("m") + text("other") + raw(b"\0" * 8) + OBJECT + b"\x87eQ"),
    ),
    "reference of no kind": lambda f: ("victim", record(b"](" + text("zz") + b")eQ")),
    # what allowed names can be made to do
    "BUILD on a class": lambda f: (
        "victim", record(named("fractions.Fraction") + b"N}" + text("__abs__") + SET + b"s\x86b"),
    ),
    "BUILD on a persistent class": lambda f: (
        "victim", record(OBJECT + b"N}" + text("lookup") + SET + b"s\x86b"),
    ),
    "a fraction without end": lambda f: (
        "victim", record(called("fractions.Fraction", text("1e999999999"))),
    ),
    "REDUCE with wrong arguments": lambda f: ("victim", record(called("datetime.date", text("x"), b"N"))),
    "class metadata with hostile arguments": lambda f: (
        "victim", PROTO + named("builtins.set") + b"]\x85\x86." + PROTO + b"}.",
    ),
    # allowed classes, hostile state
    "state is no dict": lambda f: ("victim", record(plain(5))),
    "state shadows a method": lambda f: ("victim", record(plain({"lookup": 1, "name": "x"}))),
    "slots are a dict": lambda f: ("victim", record(plain({"_slots": {}, "parents": (), "name": "x"}))),
    "parents are numbers": lambda f: (
        "victim",
        record(b"}(" + text("_slots") + reference(f.slots or b"", MAPPING)
               + text("parents") + plain((1, 2)) + text("name") + b"Nu"),
    ),
    "keys of slots are numbers": lambda f: ("slots", record(plain({"data": {1: 2}}), MAPPING)),
    "slots of another class": lambda f: ("slots", record(b"N", named("BTrees.OOBTree.OOBTree"))),
    "a method without text": lambda f: (
        "slots",
        record(b"}" + text("data") + b"}" + text("f")
               + named("uvm.image.prototypes.UvmMethod") + b")\x81"
               + plain({"selector": "f", "source": 7}) + b"bss", MAPPING),
    ),
    "half a record": lambda f: ("victim", PROTO + OBJECT + b"." + PROTO + b"}X\xff\xff\xff\xff"),
    "no pickle": lambda f: ("victim", b"\xff" * 40),
    "a header alone": lambda f: ("victim", PROTO),
    "deep value": lambda f: (
        "slots",
        record(b"}" + text("data") + b"}" + text("x") + b"]" * 10_000 + b"a" * 9_999 + b"ss", MAPPING),
    ),
    "deep": lambda f: ("victim", record(b"]" * 10_000 + b"a" * 9_999)),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_record_runs_nothing(forge: Forge, case: str) -> None:
    where, data = FORGED[case](forge)
    forge.write((getattr(forge, where), data))
    before = dict(vars(UvmObject)), fractions.Fraction.__abs__
    with pytest.raises((*Refused, ValueNotStorable)):
        forge.read()
    assert not forge.canary.exists()
    assert (dict(vars(UvmObject)), fractions.Fraction.__abs__) == before


@pytest.mark.parametrize("case", ["class is called", "state calls os.system", "INST", "state calls eval"])
def test_stock_zodb_runs_them(forge: Forge, case: str) -> None:
    """The control: the records above are live ammunition."""
    where, data = FORGED[case](forge)
    forge.write((getattr(forge, where), data))
    stock(forge, "ZODB.DB(file).open().root()['names']['victim']._slots")
    assert forge.canary.exists()


def test_weak_references_are_no_values(forge: Forge) -> None:
    weak = b"](" + text("w") + raw(forge.victim) + b"\x85eQ"
    forge.write((forge.slots or b"", record(b"}" + text("data") + b"}" + text("x") + weak + b"ss", MAPPING)))
    with pytest.raises(ValueNotStorable, match="WeakRef"):
        forge.read()


def test_a_circle_of_parents_and_a_huge_value_do_no_harm(forge: Forge) -> None:
    state = (
        b"}(" + text("_slots") + reference(forge.slots or b"", MAPPING)
        + text("parents") + reference(forge.victim, OBJECT) + b"\x85" + text("name") + text("victim") + b"u"
    )  # fmt: skip
    forge.write((forge.victim, record(state)))
    assert forge.read() == {"n": 1}
    forge.write((forge.slots or b"", record(plain({"data": {"big": "x" * (20 << 20)}}), MAPPING)))
    assert len(forge.read()["big"]) == 20 << 20


# BTrees: the C code behind them believes what it is told


def tree_state(children: bytes, first: bytes) -> bytes:
    return b"(" + children + b"t" + first + b"\x86"


BUCKET, TREE = named("BTrees.OOBTree.OOBucket"), named("BTrees.OOBTree.OOBTree")
NEW, OTHER = b"\0" * 7 + b"\x77", b"\0" * 7 + b"\x78"
KEY_AND_VALUE = text("a") + b"K\x01"
FORGED_TREES: dict[str, list[tuple[bytes | None, bytes]]] = {
    "no tuple": [(None, record(b"K\x05", TREE))],
    "no children": [(None, record(tree_state(b"", b"N"), TREE))],
    "first is a mapping": [(None, record(tree_state(reference(NEW, BUCKET), reference(NEW, MAPPING)), TREE))],
    "child is itself": [(None, b"")],  # filled in by the test: it needs the tree's own oid
    "an empty bucket": [
        (None, record(tree_state(reference(NEW, BUCKET), reference(NEW, BUCKET)), TREE)),
        (NEW, record(b")\x85", BUCKET)),
    ],
    "half a pair": [(None, record(b"(" + text("a") + b"t\x85\x85\x85", TREE))],
    "the next bucket is a mapping": [
        (None, record(tree_state(reference(NEW, BUCKET), reference(NEW, BUCKET)), TREE)),
        (
            NEW,
            record(b"(" + KEY_AND_VALUE + b"t" + reference(OTHER, MAPPING) + b"\x86", BUCKET),
        ),
        (OTHER, record(plain({"data": {}}), MAPPING)),
    ],
    "the next bucket is itself": [
        (None, record(tree_state(reference(NEW, BUCKET), reference(NEW, BUCKET)), TREE)),
        (NEW, record(b"(" + KEY_AND_VALUE + b"t" + reference(NEW, BUCKET) + b"\x86", BUCKET)),
    ],
}


@pytest.mark.parametrize("case", FORGED_TREES)
def test_a_forged_tree_does_not_end_the_process(forge: Forge, case: str) -> None:
    records = [(oid or forge.names, data) for oid, data in FORGED_TREES[case]]
    if case == "child is itself":
        own = tree_state(reference(forge.names, TREE), reference(NEW, BUCKET))
        records = [(forge.names, record(own, TREE))]
    forge.write(*records)
    code = (
        "import sys; from pathlib import Path; from uvm.image.image import LivingImage; import asyncio\n"
        "from uvm.errors import ImageDamaged\n"
        "async def main():\n"
        "    image = LivingImage(sys.argv[1], Path(sys.argv[1] + '.blobs')); image.open()\n"
        "    async with image.reading() as txn:\n"
        "        txn.names.get('a'); len(txn.names); list(txn.names.items())\n"
        "try: asyncio.run(main())\n"
        "except ImageDamaged: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(forge.path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr[-600:]


async def test_sound_trees_of_every_size_are_read(tmp_path: Path) -> None:
    image = LivingImage(str(tmp_path / "live_image.fs"), tmp_path / "blobs")
    image.open()
    for size in (1, 29, 61, 700, 20_000):
        async with image.transaction("grow") as txn:
            tree = txn.root["tree"] = OOBTree()
            tree.update({f"{n:05}": n for n in range(size)})
        async with image.transaction("shrink") as txn:
            txn.forget_cached()
            for n in range(0, size, 2):
                del txn.root["tree"][f"{n:05}"]
        async with image.reading() as txn:
            txn.forget_cached()
            assert len(txn.root["tree"]) == size // 2
    image.close()


# Where ZODB reads pickles that no connection loads


def conflicting(forge: Forge, evil: bytes) -> bytes:
    """Writes three versions of a bucket, the first forged; returns the id of the second, to be undone."""

    def bucket(n: int) -> bytes:
        return record(b"(" + text("k") + b"K" + bytes([n]) + b"t\x85", BUCKET)

    forge.write((NEW, evil))
    undo = forge.write((NEW, bucket(1)))
    forge.write((NEW, bucket(2)))
    return undo


def undo_in_storage(image: LivingImage, tid: str) -> None:
    """Undoes as ZODB does, record by record."""
    with image._db.transaction() as connection:
        image._db.undo(base64.encodebytes(bytes.fromhex(tid)).rstrip(), connection.transaction_manager.get())


def test_an_undo_that_must_resolve_a_conflict_runs_nothing(forge: Forge) -> None:
    undo = conflicting(forge, PROTO + BUCKET + b"." + PROTO + called("os.system", forge.touch) + b".")
    image = forge.opened()
    with pytest.raises(UndoError):
        undo_in_storage(image, undo.hex())
    with pytest.raises(Refused):
        asyncio.run(image.changes(undo.hex()))
    image.close()
    assert not forge.canary.exists()
    stock(
        forge,
        f"import base64\ndb = ZODB.DB(file)\n"
        f"db.undo(base64.encodebytes({undo!r}).rstrip())\ntransaction.commit()",
    )
    assert forge.canary.exists()  # the control


def test_a_conflict_that_can_be_resolved_still_is(forge: Forge) -> None:
    image = forge.opened()

    async def race() -> dict[str, int]:
        async with image.transaction("make") as txn:
            txn.root["tree"] = OOBTree({"a": 1})
        async with image.transaction("mine") as mine:
            mine.root["tree"]["b"] = 2
            async with image.transaction("theirs") as theirs:
                theirs.root["tree"]["c"] = 3
        async with image.reading() as txn:
            return dict(txn.root["tree"])

    # A tree of one bucket that was never stored apart can't be resolved; two buckets can.
    async def race_in_buckets() -> int:
        async with image.transaction("make") as txn:
            txn.root["tree"] = OOBTree({f"{n:03}": n for n in range(200)})
        async with image.transaction("mine") as mine:
            mine.root["tree"]["000"] = -1
            async with image.transaction("theirs") as theirs:
                theirs.root["tree"]["001"] = -2
        async with image.reading() as txn:
            return int(txn.root["tree"]["000"] + txn.root["tree"]["001"])

    assert asyncio.run(race()) == {"a": 1, "b": 2, "c": 3}
    assert asyncio.run(race_in_buckets()) == -3
    image.close()


def test_listing_transactions_for_an_undo_runs_nothing(forge: Forge) -> None:
    evil = PROTO + called("os.system", forge.touch) + b"."
    forge.write((NEW, record(b"N", TREE)), extension=evil)
    good = forge.write((NEW, record(b"N", TREE)))
    image = forge.opened()
    image._db.undoLog(0, 10)
    undo_in_storage(image, good.hex())
    asyncio.run(image.changes(good.hex()))
    with pytest.raises(TransactionNotFound):  # after a look at all of them
        asyncio.run(image.changes("0" * 16))
    image.close()
    assert not forge.canary.exists()
    stock(forge, "ZODB.DB(file).undoLog(0, 10)")
    assert forge.canary.exists()


def test_a_forged_index_runs_nothing(forge: Forge) -> None:
    index = forge.path.with_name("live_image.fs.index")
    evil = PROTO + called("os.system", forge.touch) + b"."
    index.write_bytes(evil)
    assert forge.read() == {"n": 1}  # the index is made anew
    assert not forge.canary.exists()
    index.write_bytes(evil)
    stock(forge, "ZODB.DB(file)")
    assert forge.canary.exists()


def test_a_zodb_that_was_not_looked_into_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defused._REPLACED, ("ZODB.utils", "reads_pickles_anew"), print)
    with pytest.raises(AttributeError):
        LivingImage.in_memory().open()


def test_packing_runs_nothing(forge: Forge) -> None:
    forge.write((forge.victim, record(called("os.system", forge.touch))))
    image = forge.opened()
    image._db.pack()
    image.close()
    assert not forge.canary.exists()


def test_what_the_kernel_writes_it_can_read(forge: Forge) -> None:
    """The shapes are those of what is really written."""

    async def write() -> None:
        image = forge.opened()
        async with image.transaction("write") as txn:
            victim = txn.find("victim")
            victim._slots["f"] = UvmMethod("f", ("x",), "def f(self, x):\n    return x\n", "", {}, [])
            victim._slots["third"] = Fraction(-1, 3)
            txn.create("child", (victim,), {})
        image.close()

    asyncio.run(write())
    forge.read()
