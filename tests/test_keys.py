"""Keys on disk: made, admitted, revoked, refused; what is wrong with them is said with the file's name."""

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import zmq.auth

from evals.kernels import KernelProcess
from uvm import keyfiles, keys
from uvm.errors import HomeError, InvalidField

needs_modes = pytest.mark.skipif(os.name == "nt", reason="no modes")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    keys.ensure_keys(tmp_path / "keys")
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@needs_modes
def test_what_is_made_is_private(home: Path) -> None:
    keys.add_client(home, "ada")
    for path in (home, *home.rglob("*")):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path
    assert not list(home.glob(".new-*"))  # nothing half-made is left


def test_making_them_again_changes_nothing(home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert keys.ensure_keys(home) == []
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    public, secret = keyfiles.read_pair(home / "client.key_secret")
    assert keys.clients(home) == {"client": public.decode()}
    assert zmq.curve_public(secret) == public


def test_a_home_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "keys"
    (home / "clients").mkdir(parents=True, mode=0o700)
    home.chmod(0o700)
    for name in ("kernel", "client"):
        zmq.auth.create_certificates(home, name)
        (home / f"{name}.key_secret").chmod(0o600)
    (home / "clients" / "client.key").write_bytes((home / "client.key").read_bytes())
    (home / "clients").chmod(0o700)
    assert keys.ensure_keys(home) == []
    assert list(keys.clients(home)) == ["client"]


def test_the_folder_of_a_new_client_is_all_that_it_needs(home: Path) -> None:
    folder = keys.add_client(home, "ada")
    assert {path.name for path in folder.iterdir()} == {"client.key_secret", "kernel.key"}
    public, _ = keyfiles.read_pair(folder / "client.key_secret")
    assert keys.clients(home)["ada"] == public.decode()
    assert keyfiles.read_public(folder / "kernel.key") == keyfiles.read_public(home / "kernel.key")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../ada", "a/b", "a\\b", "/etc/passwd", "Ada", "ada.key", "ada ", "-ada", "a\n", "a\0b",
     "grüß", "a" * 64, "kernel", "$(id)"],
)  # fmt: skip
def test_a_name_that_is_none_touches_nothing(home: Path, name: str) -> None:
    before = sorted(home.rglob("*"))
    for verb in (keys.add_client, keys.revoke_client):
        with pytest.raises(InvalidField, match="can't name a key"):
            verb(home, name)
    assert sorted(home.rglob("*")) == before


def test_a_name_is_taken_once(home: Path) -> None:
    keys.add_client(home, "ada")
    with pytest.raises(InvalidField, match="already"):
        keys.add_client(home, "ada")
    keys.revoke_client(home, "ada")
    with pytest.raises(InvalidField, match="no key 'ada'"):
        keys.revoke_client(home, "ada")
    keys.add_client(home, "ada")


def test_of_many_who_add_the_same_name_one_wins(home: Path) -> None:
    outcomes: list[str] = []

    def add() -> None:
        try:
            keys.add_client(home, "ada")
            outcomes.append("added")
        except InvalidField:
            outcomes.append("refused")

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["added"] + ["refused"] * 7
    public, _ = keyfiles.read_pair(home / "carry" / "ada" / "client.key_secret")
    assert keys.clients(home)["ada"] == public.decode()


def test_the_own_client_is_revoked_by_force_and_comes_back(home: Path) -> None:
    before = keys.clients(home)
    with pytest.raises(InvalidField, match="--force"):
        keys.revoke_client(home, "client")
    keys.revoke_client(home, "client", force=True)
    keys.ensure_keys(home)  # a start of the kernel does not admit it again
    assert keys.clients(home) == {}
    assert keys.add_client(home, "client") == home
    assert keys.clients(home) == before


# What is wrong with them


def becomes_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def becomes_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


def becomes_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


WRONG: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-25]),
    "garbage": lambda path: path.write_bytes(os.urandom(500)),
    "huge": lambda path: path.write_bytes(b"#" * 1_000_000),
    "no key": lambda path: path.write_text('curve\n    public-key = "' + "\x7f" * 40 + '"\n'),
    "a key too large": lambda path: path.write_text('curve\n    public-key = "' + "#" * 40 + '"\n'),
    "a folder": becomes_folder,
    "a link": becomes_link,
    "a dead link": becomes_dead_link,
}
KEY_FILES = ["kernel.key", "kernel.key_secret", "client.key_secret"]


@pytest.mark.parametrize("name", KEY_FILES)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_key_file_is_named(home: Path, name: str, wrong: str) -> None:
    WRONG[wrong](home / name)
    with pytest.raises(HomeError) as error:
        keys.ensure_keys(home)
    assert str(home / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ada", "client"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_key_file_of_a_client_stops_no_start(home: Path, name: str, wrong: str) -> None:
    keys.add_client(home, "ada")
    path = home / "clients" / f"{name}.key"
    WRONG[wrong](path)
    assert keys.ensure_keys(home) == []
    faults: list[BaseException] = []
    allowed = keys.AllowedClients(home, faults.append)
    (other,) = {"ada", "client"} - {name}
    assert allowed.allows(keys.clients(home)[other])
    assert [str(path) in str(fault) for fault in faults] == [True]
    assert keys.clients(home)[name].startswith("refused: ")


@needs_modes
@pytest.mark.skipif(os.name != "nt" and os.geteuid() != 0, reason="needs root")
def test_what_root_makes_belongs_to_the_owner_of_the_folder(tmp_path: Path) -> None:
    home = tmp_path / "keys"
    home.mkdir(mode=0o700)
    os.chown(home, 12345, 12346)
    keys.add_client(home, "ada")
    keys.revoke_client(home, "client", force=True)
    keys.add_client(home, "client")
    made = list(home.rglob("*"))
    assert len(made) == 11
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12345, 12346)}


def test_a_pair_of_two_halves_is_refused(home: Path, tmp_path: Path) -> None:
    keys.ensure_keys(tmp_path / "other")
    mine, other = ((folder / "client.key_secret").read_text() for folder in (home, tmp_path / "other"))
    half, rest = mine.split("secret-key")[0], other.split("secret-key")[1]
    (home / "client.key_secret").write_text(half + "secret-key" + rest)
    with pytest.raises(HomeError, match="no whole key pair"):
        keys.ensure_keys(home)


def test_the_keys_of_another_kernel_are_told_apart(home: Path, tmp_path: Path) -> None:
    keys.ensure_keys(tmp_path / "other")
    (home / "kernel.key").write_bytes((tmp_path / "other" / "kernel.key").read_bytes())
    with pytest.raises(HomeError, match="not the public half"):
        keys.ensure_keys(home)


@needs_modes
@pytest.mark.parametrize("name", ["kernel.key_secret", "client.key_secret"])
@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620])
def test_a_secret_open_to_others_is_refused(home: Path, name: str, bits: int) -> None:
    (home / name).chmod(bits)
    with pytest.raises(HomeError, match=f"chmod 600 .*{name}"):
        keys.ensure_keys(home)


@needs_modes
@pytest.mark.parametrize("name", [".", "clients", "carry"])
def test_a_folder_open_to_others_is_closed_or_refused(home: Path, name: str) -> None:
    (home / name).chmod(0o755)
    (line,) = keys.ensure_keys(home)
    assert str(home / name) in line
    assert mode(home / name) == 0o700
    for bits in (0o770, 0o707):
        (home / name).chmod(bits)
        with pytest.raises(HomeError, match="others can write"):
            keys.ensure_keys(home)


@needs_modes
def test_a_linked_folder_of_clients_is_refused(home: Path) -> None:
    (home / "clients").rename(home / "elsewhere")
    (home / "clients").symlink_to(home / "elsewhere")
    with pytest.raises(HomeError, match="is a link"):
        keys.ensure_keys(home)


@pytest.mark.slow
@needs_modes
def test_the_kernel_says_which_key_it_can_not_use(tmp_path: Path) -> None:
    kernel = KernelProcess(tmp_path / "home")
    secret = tmp_path / "home" / "keys" / "kernel.key_secret"
    keys.ensure_keys(secret.parent)
    secret.chmod(0o644)
    with pytest.raises(RuntimeError, match=r"can't start: others can read .*kernel\.key_secret"):
        kernel.start()
    assert kernel.process is not None
    assert kernel.process.returncode == 2


@pytest.mark.slow
def test_the_kernel_starts_without_a_client_whose_key_is_torn(tmp_path: Path) -> None:
    kernel = KernelProcess(tmp_path / "home")
    keys_dir = tmp_path / "home" / "keys"
    keys.add_client(keys_dir, "ada")
    (keys_dir / "clients" / "ada.key").write_bytes(b"")
    kernel.start()
    try:
        assert kernel.log.count("clients/ada.key") == 1
    finally:
        kernel.stop()


# The list that the running kernel asks


def test_the_list_follows_the_folder(home: Path) -> None:
    faults: list[BaseException] = []
    allowed = keys.AllowedClients(home, faults.append)
    local = keys.clients(home)["client"]
    assert allowed.allows(local)
    for _ in range(20):  # changes faster than the clock of the file system
        keys.add_client(home, "ada")
        ada = keys.clients(home)["ada"]
        assert allowed.allows(ada)
        before = allowed.revocations
        keys.revoke_client(home, "ada")
        assert not allowed.allows(ada)
        assert allowed.allows(local)
        assert allowed.revocations == before + 1
    assert not allowed.allows("")
    (home / "clients").rename(home / "gone")
    assert not allowed.allows(local)
    (home / "gone").rename(home / "clients")
    assert allowed.allows(local)
    assert faults == []


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Lets this process open no further file."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@needs_modes
def test_no_room_to_read_is_no_revocation(home: Path) -> None:
    faults: list[BaseException] = []
    allowed = keys.AllowedClients(home, faults.append)
    local = keyfiles.read_public(home / "clients" / "client.key")
    keys.add_client(home, "bob")
    with no_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            keyfiles.listed(home / "clients")
        assert allowed.allows(local.decode())
        assert allowed.callback("", local)
    assert allowed.revocations == 0
    assert [error.errno for error in faults if isinstance(error, OSError)] == [errno.EMFILE]  # told once
    assert allowed.allows(keys.clients(home)["bob"])
    assert keyfiles.listed(home / "nothing") == []


def aged(home: Path, shift_s: float) -> None:
    """Sets the times of the clients' folder and files, from now."""
    for path in (*(home / "clients").iterdir(), home / "clients"):
        os.utime(path, (time.time() + shift_s,) * 2)


def unexpected(fault: object) -> NoReturn:
    pytest.fail(str(fault))


def test_a_key_file_that_is_written_over_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.add_client(home, "ada")
    keys.add_client(home, "bob")
    ada, bob = keys.clients(home)["ada"], keys.clients(home)["bob"]
    path = home / "clients" / "ada.key"
    mine, other = path.read_bytes(), (home / "clients" / "bob.key").read_bytes()
    (home / "clients" / "bob.key").unlink()
    aged(home, -100)
    monkeypatch.setattr(keys, "_LOOK_S", 0.0)
    allowed = keys.AllowedClients(home, unexpected)
    assert (allowed.allows(ada), allowed.allows(bob)) == (True, False)
    path.write_bytes(other)
    assert (allowed.allows(ada), allowed.allows(bob)) == (False, True)
    assert allowed.revocations == 1
    path.write_bytes(mine)
    assert (allowed.allows(ada), allowed.allows(bob)) == (True, False)


@pytest.mark.parametrize("shift_s", [-3600, 3600])
def test_what_has_not_changed_is_not_read_again(
    home: Path, shift_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(home, shift_s)
    allowed = keys.AllowedClients(home, unexpected)
    monkeypatch.setattr(keys, "read_public", unexpected)
    for _ in range(3):
        assert not allowed.allows("")
