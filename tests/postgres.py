"""A real PostgreSQL for tests: a private cluster in a temporary folder, reached through a Unix socket."""

import atexit
import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

_NAMES = itertools.count(1)


def new_database() -> str:
    """The URL of a new, empty database; skips the test where PostgreSQL is not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server on this machine (Debian: apt install postgresql)")
    folder = _start(binaries)
    name = f"test_{next(_NAMES)}"
    with psycopg.connect(f"host={folder} user=lowssl dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://lowssl@/{name}?host={folder}"


def _binaries() -> Path | None:
    """The folder of initdb and postgres of the newest version."""
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = sorted(debian, key=lambda path: float(path.parts[-3]))[-1:]
    on_path = shutil.which("initdb")
    found = newest or ([Path(on_path).resolve()] if on_path else [])
    return found[0].parent if found else None


@functools.cache
def _start(binaries: Path) -> Path:
    """Start the cluster once for all tests of this process, which also stops it; returns the socket's folder."""
    # Short: a socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="lowssl-pg-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to be root
        users = {user.pw_name: user for user in pwd.getpwall()}
        user = users.get("postgres") or users["nobody"]
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
    data = folder / "data"
    environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8", "HOME": str(folder)}
    initdb = [binaries / "initdb", "-D", data, "-U", "lowssl", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, env=environment, cwd=folder, **identity)
    # The data of a test need not survive anything.
    settings = [f"-c{setting}" for setting in ("listen_addresses=", "fsync=off", f"unix_socket_directories={folder}")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, *settings],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for the tests; they stop the server at their end
            **identity,
        )
    atexit.register(_stop, server)
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"host={folder} user=lowssl dbname=postgres").close()
            return folder
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text()) from None
            time.sleep(0.05)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)  # "fast": does not wait for clients
    server.wait(timeout=60)
