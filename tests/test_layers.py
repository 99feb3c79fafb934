"""The layers of the house: a module imports only from layers below its own, and nobody in a circle."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"uvm.errors", "uvm.states", "uvm.process", "uvm.disk"},
    {"uvm.pressure", "uvm.codec", "uvm.capabilities", "uvm.grant_options", "uvm.keyfiles", "uvm.handshakes"},
    {"uvm.messages", "uvm.keys"},
    {"uvm.lanes", "uvm.metacognition", "uvm.image", "uvm.guardian", "uvm.client"},
    {"uvm.hands", "uvm.memory", "uvm.mind", "uvm.upkeep"},
    {"uvm.broker"},
    {"uvm.parser", "uvm.prompts", "uvm.messenger"},
    {"uvm.trials"},
    {"uvm.cycle", "uvm.replays"},
    {"uvm.psm", "uvm.outcomes"},
    {"uvm.missions", "uvm.objects", "uvm.awakening"},
    {"uvm.granting"},
    {"uvm.undoing"},
    {"uvm.versions"},
    {"uvm.commands"},
    {"uvm.admission", "uvm.listening", "uvm.heartbeat"},
    {"uvm.publisher"},
    {"uvm.bridge"},
]
ORGANS = {organ: level for level, organs in enumerate(LAYERS) for organ in organs}
assert len(ORGANS) == sum(map(len, LAYERS)), "a module stands in two layers"
# What clients use stays free of the kernel's organs.
CLIENT_SIDE = {"uvm.client": {"uvm.errors", "uvm.messages", "uvm.codec", "uvm.handshakes", "uvm.keyfiles"}}
CLIENT_SIDE["uvm.parser"] = CLIENT_SIDE["uvm.client"] | {"uvm.capabilities", "uvm.mind"}


def organ_of(module: str) -> str | None:
    return next((organ for organ in ORGANS if module == organ or module.startswith(organ + ".")), None)


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & modules().keys() or {node.module}
    return found


@cache
def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / "uvm").rglob("*.py"))
    }


def test_every_module_has_a_layer() -> None:
    assert [name for name in modules() if name != "uvm" and organ_of(name) is None] == []


def test_imports_go_down() -> None:
    wrong = []
    for name, path in modules().items():
        mine = organ_of(name)
        for imported in imports_of(path):
            theirs = organ_of(imported)
            if mine and theirs and mine != theirs and ORGANS[theirs] >= ORGANS[mine]:
                wrong.append(f"{name} imports {imported}")
            if mine in CLIENT_SIDE and theirs and theirs not in {mine, *CLIENT_SIDE[mine]}:
                wrong.append(f"{name} imports {imported}")
    assert sorted(set(wrong)) == []


def test_organs_know_no_settings_and_no_kernel() -> None:
    top = {"config", "batos", "chat_client", "min_watchdog_service", "upkeep"}
    assert {name: imports_of(path) & top for name, path in modules().items() if imports_of(path) & top} == {}


def test_no_module_imports_in_a_circle() -> None:
    known = modules()
    graph = {name: imports_of(path) & known.keys() - {name} for name, path in known.items()}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert graph == {}
