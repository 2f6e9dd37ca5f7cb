"""The runtime folder: sockets, lock and resolved configuration of one server, for its user alone."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from cableway.ipc.errors import EXIT_IN_USE, UserError

MAX_SOCKET_PATH_BYTES = 107
"""What the kernel holds of a Unix socket's path."""
_LONGEST_SOCKET_NAME = "engine-00.frontends.sock"
SUPERVISOR_SOCKET = "supervisor.sock"
CONFIG = "config.json"
METRICS = "metrics"
"""Folder in which the frontends add up their counters."""
_LOCK = "lock"
_MAX_NAME_LEN = 30


class RuntimeFolderError(UserError):
    """The runtime folder cannot be used: in use by another server, not ours, or too long a path."""

    exit_code = EXIT_IN_USE


def base_folder() -> Path:
    """Where this user's runtime folders are: below XDG_RUNTIME_DIR when that is the user's own, else in /tmp."""
    given = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if given.is_absolute() and given.is_dir() and given.stat().st_uid == os.getuid():
        return given / "cableway"
    return Path(f"/tmp/cableway-{os.getuid()}")


def folder_for(host: str, port: int, uds: str = "") -> Path:
    """The folder of the server at this address."""
    address = uds or f"{host}-{port}"
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", address)[-_MAX_NAME_LEN:]
    if name != address:
        name = f"{name.strip('_')}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
    return base_folder() / name


def prepare(folder: Path) -> None:
    """Make the folder with mode 0700, or check that the one there belongs to this user and to nobody else.

    Raises:
        RuntimeFolderError: it is a link, a file, another user's, open to others, or its path is too long for sockets.
    """
    if len(os.fsencode(folder / _LONGEST_SOCKET_NAME)) > MAX_SOCKET_PATH_BYTES:
        raise RuntimeFolderError(f"runtime folder {folder}: path too long for Unix sockets; choose a shorter one")
    chain = [folder.parent, folder] if folder.parent == base_folder() else [folder]
    for path in chain:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            _check_private(path)
        except OSError as error:
            raise RuntimeFolderError(f"runtime folder {path}: {error.strerror}") from None


def _check_private(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise RuntimeFolderError(f"runtime folder {path}: not a folder")
    if status.st_uid != os.getuid():
        raise RuntimeFolderError(f"runtime folder {path}: belongs to another user")
    if status.st_mode & 0o077:
        raise RuntimeFolderError(f"runtime folder {path}: open to other users; run chmod 700 on it")


class Lock:
    """A folder's lock, held until it is released or the process ends, however it ends. Makes the folder if need be.

    A supervisor holds it alone. Processes that an outside supervisor starts share it, and each holds its own
    `role-rank` alone, so that neither a second server nor a second process of that role and rank can come in between.

    Raises:
        RuntimeFolderError: see `prepare`; or somebody else holds the lock.
    """

    def __init__(self, folder: Path, process: str = ""):
        self._folder = folder
        self._files = [_locked(folder, _LOCK, fcntl.LOCK_SH if process else fcntl.LOCK_EX, "another server")]
        if process:
            self._files.append(_locked(folder, f"{process}.lock", fcntl.LOCK_EX, f"another {process}"))

    def keep_over_exec(self) -> None:
        """Leave the lock to the program this process turns into."""
        for file in self._files:
            os.set_inheritable(file, True)

    def release(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    def remove_folder(self) -> None:
        """Remove what is ours in the folder, the folder too when nothing else is in it, and release."""
        with contextlib.suppress(OSError):  # not empty, or gone by another's hand
            _remove_ours(self._folder)
            (self._folder / _LOCK).unlink(missing_ok=True)
            self._folder.rmdir()
        self.release()


def _locked(folder: Path, name: str, kind: int, rival: str) -> int:
    while True:
        prepare(folder)
        try:
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # an ending server removed the folder in this moment
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise RuntimeFolderError(f"runtime folder {folder} is in use by {rival}") from None
        try:
            if os.path.samestat(os.fstat(file), os.stat(folder / name)):
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # what was locked is no longer what is there


def clean(folder: Path) -> None:
    """Remove what an earlier server left in a folder that the caller has locked, and other dead servers' folders."""
    _remove_ours(folder)
    for other in base_folder().iterdir() if base_folder().is_dir() else ():
        if other.is_symlink():
            if not other.exists():
                other.unlink(missing_ok=True)
        elif other != folder:
            with contextlib.suppress(RuntimeFolderError, OSError):
                Lock(other).remove_folder()


def _remove_ours(folder: Path) -> None:
    """A user may have named a folder that holds other things: only what we make is touched."""
    shutil.rmtree(folder / METRICS, ignore_errors=True)
    for path in folder.iterdir():
        if path.is_socket() or path.name == CONFIG or (path.suffix == ".lock" and path.stat().st_size == 0):
            path.unlink(missing_ok=True)


def announce(folder: Path) -> None:
    """Make a folder outside of `base_folder` known to `live_folders`."""
    if folder.parent == base_folder():
        return
    base_folder().mkdir(mode=0o700, exist_ok=True)
    _check_private(base_folder())
    link = base_folder() / f"at-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)


def live_folders() -> Iterator[Path]:
    """Folders of the servers of this user that run now."""
    if not base_folder().is_dir():
        return
    for path in sorted(base_folder().iterdir()):
        if answers(path / SUPERVISOR_SOCKET):
            yield path.resolve()


def answers(path: Path) -> bool:
    """Whether someone listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
