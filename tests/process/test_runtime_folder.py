"""Runtime folders and listening sockets: private, one server each, clean after whatever was there before."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cableway.ipc import runtime
from cableway.ipc.listen import AddressError, Listener
from cableway.ipc.runtime import Lock, RuntimeFolderError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "cableway"


def test_folders_are_named_by_address_and_below_the_users_own(base: Path) -> None:
    assert runtime.folder_for("127.0.0.1", 8000) == base / "127.0.0.1-8000"
    assert runtime.folder_for("::1", 8000) != runtime.folder_for("::", 8000) != runtime.folder_for("", 8000)
    assert len(runtime.folder_for("a" * 250, 8000).name) < 40
    assert runtime.folder_for("h", 1, "/a/b.sock") != runtime.folder_for("h", 1, "/a_b.sock")


def test_the_folder_is_private(base: Path) -> None:
    folder = runtime.folder_for("h", 1)
    Lock(folder).release()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (base, folder)] == [0o700, 0o700]
    folder.chmod(0o755)
    with pytest.raises(RuntimeFolderError, match="open to other users"):
        Lock(folder)


def test_a_planted_link_or_file_is_refused(base: Path, tmp_path: Path) -> None:
    folder = runtime.folder_for("h", 1)
    Lock(folder).remove_folder()
    folder.symlink_to(tmp_path)
    with pytest.raises(RuntimeFolderError, match="not a folder"):
        Lock(folder)


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match="too long"):
        Lock(tmp_path / ("x" * 100))


def test_one_server_a_folder(base: Path) -> None:
    folder = runtime.folder_for("h", 1)
    lock = Lock(folder)
    for rival in ("", "worker-0"):
        with pytest.raises(RuntimeFolderError, match="in use by another server"):
            Lock(folder, rival)
    lock.release()
    Lock(folder).release()


def test_lone_processes_share_a_folder_but_not_a_rank(base: Path) -> None:
    folder = runtime.folder_for("h", 1)
    locks = [Lock(folder, "worker-0"), Lock(folder, "enginecore-0")]
    with pytest.raises(RuntimeFolderError, match="another worker-0"):
        Lock(folder, "worker-0")
    with pytest.raises(RuntimeFolderError, match="another server"):
        Lock(folder)
    for lock in locks:
        lock.release()


def test_what_a_dead_server_left_is_cleaned_and_nothing_else(base: Path) -> None:
    folder, other, live = (runtime.folder_for("h", port) for port in (1, 2, 3))
    for path in (folder, other):
        Lock(path).release()
        with closing(socket.socket(socket.AF_UNIX)) as left:
            left.bind(str(path / "engine-0.workers.sock"))
        (path / runtime.METRICS).mkdir()
    (folder / "notes.txt").write_text("the user's own")
    held = Lock(live)
    lock = Lock(folder)
    runtime.clean(folder)
    assert {path.name for path in folder.iterdir()} == {"lock", "notes.txt"}
    assert {path.name for path in base.iterdir()} == {folder.name, live.name}
    lock.remove_folder()
    held.remove_folder()
    assert [str(path.relative_to(folder)) for path in folder.iterdir()] == ["notes.txt"]
    assert not live.exists()


def test_only_folders_with_a_supervisor_that_answers_are_live(base: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for folder in (runtime.folder_for("h", 1), runtime.folder_for("h", 2), elsewhere):
        Lock(folder).release()
        runtime.announce(folder)
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for each, folder in zip(sockets, (runtime.folder_for("h", 1), runtime.folder_for("h", 2), elsewhere), strict=True):
        each.bind(str(folder / runtime.SUPERVISOR_SOCKET))
        each.listen()
    sockets[1].close()
    assert sorted(runtime.live_folders()) == sorted([runtime.folder_for("h", 1), elsewhere])
    sockets[0].close()
    sockets[2].close()


# ---------------------------------------------------------------------------------------------------------------------
# Listening


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with closing(Listener("127.0.0.1", 0)) as first:
        with pytest.raises(AddressError, match=f"port {first.port} on 127.0.0.1 is taken"):
            Listener("127.0.0.1", first.port)
        port = first.port
    Listener("127.0.0.1", port).close()


def test_a_host_of_two_families_listens_on_one_port() -> None:
    with closing(Listener("localhost", 0)) as listener:
        ports = {each.getsockname()[1] for each in listener.sockets}
        assert ports == {listener.port}
        assert listener.url == f"http://localhost:{listener.port}"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 300])
def test_an_address_of_elsewhere_is_refused(host: str) -> None:
    with pytest.raises(AddressError, match=host[:10]):
        Listener(host, 0)


def test_a_unix_socket_is_for_its_user_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with closing(Listener("ignored", 1, str(path))) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(AddressError, match="taken"):
            Listener("", 0, str(path))
        assert listener.port == 0
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced_but_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path))
    Listener("", 0, str(path)).close()
    path.write_text("a file")
    with pytest.raises(AddressError, match="something else"):
        Listener("", 0, str(path))
    assert os.path.exists(path)
