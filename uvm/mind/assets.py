"""Where the models lie, whether they are genuine, and how they get here.

The kernel asks `locate` for a verified path when a backend loads a model; `python -m uvm.mind.assets` (a
step of `puter.sh setup`) provisions what is missing. A file counts only with the SHA-256 of the catalogue; a
stamp beside it (digest, size, modification time) spares later starts the hashing. Imports `errors`,
`catalogue` and `sources`, and no engine: the kernel is live before torch or llama_cpp are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from uvm.errors import AssetError
from uvm.mind.catalogue import CATALOGUE, Asset, AssetFile
from uvm.mind.sources import Downloads, sources_of

__all__ = ["CATALOGUE", "Asset", "default_models_dir", "locate", "main", "provision", "sha256_of"]

Say = Callable[[str], None]
_GET_MODELS = "./puter.sh setup"
_REFRESH_S = 0.2
_JOINED = "joined"


def default_models_dir() -> Path:
    """Returns `BATOS_MODELS_DIR`, or `batos/models` in the user's cache folder, which all clones share."""
    if chosen := os.environ.get("BATOS_MODELS_DIR"):
        return Path(os.environ.get("BATOS_HOME", "")) / Path(chosen).expanduser()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "batos" / "models"


def sha256_of(path: Path, *, fresh: bool = False) -> str:
    """Returns the SHA-256 of a file in hex, from its stamp where file and stamp still agree.

    Args:
        path: the file.
        fresh: read the file even if the stamp agrees.
    """
    stamp = path.with_name(f".{path.name}.sha256")
    state = path.stat()
    seen = f"{state.st_size} {state.st_mtime_ns}"
    with suppress(OSError, ValueError):
        digest, stamped = stamp.read_text("ascii").split(" ", 1)
        if stamped == seen and not fresh:
            return digest
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with suppress(OSError):  # a read-only folder: hashed again next time
        stamp.write_text(f"{digest} {seen}", "ascii")
    return digest


def locate(name_or_path: str, models_dir: Path) -> Path:
    """Returns the path of a model: a verified asset of the catalogue, or a file or folder of the user's own.

    Args:
        name_or_path: a name in `CATALOGUE`, or a path.
        models_dir: where assets are kept.

    Raises:
        AssetError: it is missing or damaged; the text says what to do.
    """
    asset = CATALOGUE.get(name_or_path)
    if asset is None:
        path = Path(name_or_path).expanduser()
        if not path.exists():
            raise AssetError(f"{name_or_path}: no model of the catalogue and no file", path=name_or_path)
        return path
    for file in asset.files:
        path = models_dir / asset.name / file.name
        if not _is_genuine(path, file):
            state = "is damaged" if path.exists() else "is missing"
            raise AssetError(f"{asset.name}: {path} {state}; get it with: {_GET_MODELS}", path=str(path))
    return asset.path(models_dir)


def _is_genuine(path: Path, file: AssetFile, *, fresh: bool = False) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256_of(path, fresh=fresh) == file.sha256


def provision(
    names: Iterable[str],
    models_dir: Path,
    *,
    local: Sequence[Path] = (),
    verify: bool = False,
    say: Say = print,
) -> None:
    """Brings the named assets into `models_dir`, all at once, and leaves alone what is there and genuine.

    An interrupted run is continued by the next one; two runs side by side take turns.

    Args:
        names: names in `CATALOGUE`.
        models_dir: where assets are kept.
        local: files, or folders with files, that are tried before any download.
        verify: hash what is there again instead of trusting the stamps.
        say: takes one line of progress.

    Raises:
        AssetError: too little disk space, or an asset that no source has; the others are in place then.
    """
    wanted = [CATALOGUE[name] for name in names]
    if not _missing(wanted, models_dir, fresh=verify):
        return
    models_dir.mkdir(parents=True, exist_ok=True)
    with _turn(models_dir, say):
        missing = _missing(wanted, models_dir)
        _check_space(missing, models_dir)
        _install_all(missing, models_dir, local, say)


def _turn(models_dir: Path, say: Say) -> AbstractContextManager[object]:
    from filelock import FileLock, Timeout

    lock = FileLock(models_dir / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say("another set-up is fetching models; waiting for it")
        return lock.acquire()


def _missing(assets: Sequence[Asset], models_dir: Path, *, fresh: bool = False) -> list[Asset]:
    def complete(asset: Asset) -> bool:
        folder = models_dir / asset.name
        return all(_is_genuine(folder / file.name, file, fresh=fresh) for file in asset.files)

    return [asset for asset in assets if not complete(asset)]


def _check_space(assets: Sequence[Asset], models_dir: Path) -> None:
    """Parts and the file made of them lie side by side for a while: twice the size, less what has arrived."""
    needed = sum(2 * asset.size - _bytes_under(_work(asset, models_dir)) for asset in assets)
    free = shutil.disk_usage(models_dir).free
    if free < needed:
        gigabytes = f"{needed / 1e9:.1f} GB free, there are {free / 1e9:.1f} GB"
        raise AssetError(f"{models_dir} needs {gigabytes}", needed=needed, free=free)


def _install_all(assets: Sequence[Asset], models_dir: Path, local: Sequence[Path], say: Say) -> None:
    if not assets:
        return
    with Downloads() as downloads, ThreadPoolExecutor(len(assets)) as pool:
        running = {pool.submit(_install, asset, models_dir, local, downloads): asset for asset in assets}
        try:
            _watch(running, models_dir, say)
        except BaseException:
            downloads.stop()
            raise
    if failures := [str(error) for future in running if (error := future.exception())]:
        raise AssetError("; ".join(failures))


def _watch(running: Mapping[Future[str], Asset], models_dir: Path, say: Say) -> None:
    """Shows one bar over all bytes until every asset is done; without a terminal, only a line for each."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    def arrived(future: Future[str], asset: Asset) -> int:
        return asset.size if future.done() else min(asset.size, _bytes_under(_work(asset, models_dir)))

    console = Console()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("models", total=sum(asset.size for asset in running.values()))
        for asset in running.values():
            say(f"{asset.name}: {asset.size / 1e6:,.0f} MB to get")
        waiting = set(running)
        while waiting:
            done, waiting = wait(waiting, _REFRESH_S, FIRST_COMPLETED)
            for future in done:
                if not future.exception():
                    say(f"{running[future].name}: verified, from {future.result()}")
            bar.update(task, completed=sum(arrived(*row) for row in running.items()))


def _install(asset: Asset, models_dir: Path, local: Sequence[Path], downloads: Downloads) -> str:
    """Returns the name of the source that had the asset's files, or the last of them."""
    failures = []
    folder, work = models_dir / asset.name, _work(asset, models_dir)
    for source, read in sources_of(asset, work, local, downloads).items():
        missing = [file for file in asset.files if not _is_genuine(folder / file.name, file)]
        try:
            for file, chunks in read(missing):
                _place(file, chunks, folder / file.name, work, downloads)
        except AssetError as error:
            failures.append(f"{source}: {error}")
        else:
            shutil.rmtree(work, ignore_errors=True)
            return source
    raise AssetError(f"{asset.name}: no source has it ({'; '.join(failures)})", asset=asset.name)


def _place(file: AssetFile, chunks: Iterable[bytes], target: Path, work: Path, downloads: Downloads) -> None:
    """Writes what arrives beside the target and renames it into place if it is what the catalogue says.

    Raises:
        AssetError: it is something else; what arrived is thrown away, for it would be wrong again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    joined, digest, size = work / _JOINED, hashlib.sha256(), 0
    with joined.open("wb") as stream:
        for chunk in chunks:
            downloads.check()
            stream.write(chunk)
            digest.update(chunk)
            if (size := size + len(chunk)) > file.size:
                break
        stream.flush()
        os.fsync(stream.fileno())
    if digest.hexdigest() != file.sha256:
        shutil.rmtree(work)
        got = f"{size} bytes or more" if size > file.size else digest.hexdigest()
        raise AssetError(f"{file.name} has the wrong SHA-256: expected {file.sha256}, got {got}")
    joined.replace(target)
    sha256_of(target)


def _work(asset: Asset, models_dir: Path) -> Path:
    return models_dir / asset.name / ".partial"


def _bytes_under(work: Path) -> int:
    """Bytes that have arrived so far; files may come and go meanwhile."""
    total = 0
    for path in work.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() and path.name != _JOINED else 0
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Provisions the models that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser("python -m uvm.mind.assets", description="Gets and checks the models.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CATALOGUE)} (default: all)")
    parser.add_argument("--models-dir", type=Path, default=default_models_dir(), help="default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="hash files again instead of trusting stamps")
    parser.add_argument("--quiet", action="store_true", help="say nothing where nothing is missing")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(CATALOGUE):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(CATALOGUE)}")
    names = options.names or list(CATALOGUE)
    local = [Path(place) for place in os.environ.get("BATOS_ASSET_PATH", "").split(os.pathsep) if place]
    try:
        provision(names, options.models_dir, local=local, verify=options.verify)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next run continues here", file=sys.stderr)
        return 130
    if not options.quiet:
        print(f"{len(names)} models verified in {options.models_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
