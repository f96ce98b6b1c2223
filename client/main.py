"""`lowssl-client`: a device's front door: join a server, run, and see, pause and resume what runs."""

import argparse
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from client.folder import PAUSED, REPLIES, VARIABLE, ImagesAwayError, default_folder, locked, read_joined
from lowssl_core import __version__
from lowssl_core.command_line import run_for_user
from lowssl_core.errors import UserError
from lowssl_core.files import remove_unfinished, write_atomically

_NOT_JOINED = "no server joined yet: lowssl-client join URL --token T"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: 0, also where SIGTERM ended it, and 2 for what the user can mend.

    1 is for what may pass by itself: the folder of images is away, or the disk is full.
    """
    arguments = _parser().parse_args(argv)
    return run_for_user(f"lowssl-client {arguments.command}", lambda: _run_command(arguments))


def _run_command(arguments: argparse.Namespace) -> int:
    if arguments.folder is None:
        arguments.folder = default_folder()
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowssl-client",
        description="Train an encoder on this device's images, which never leave it, together with other devices.",
    )
    parser.add_argument("--version", action="version", version=f"lowssl-client {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help_, description=help_)
        command.set_defaults(run=run)
        command.add_argument(
            "--folder",
            type=Path,
            metavar="DIR",
            help=f"the device's key, model and memory (default: ${VARIABLE}, or ~/.local/state/lowssl-client)",
        )
        return command

    join = add("join", _join, "Make this device one of a server's.")
    join.add_argument("url", metavar="URL", help="the server, https://HOST:PORT")
    join.add_argument(
        "--token",
        required=True,
        metavar="T",
        help="from the server: lowssl federation token; - reads it from standard input, out of the list of processes",
    )
    join.add_argument(
        "--name", metavar="TEXT", default=socket.gethostname(), help="what people call it (default: %(default)s)"
    )
    trust = join.add_mutually_exclusive_group()
    trust.add_argument("--fingerprint", metavar="SHA256", help="that the server's certificate must have")
    trust.add_argument("--ca", type=Path, metavar="FILE", help="the authority that signs the server's certificate")
    run = add("run", _run, "Train when the server asks and the device may; until it is told to stop.")
    run.add_argument("--images", type=Path, required=True, metavar="DIR", help="where images arrive")
    run.add_argument("--config", type=Path, metavar="FILE", help="the device's settings (TOML)")
    status = add("status", _status, "Say what the device does, what it waits for, and what it has learned from.")
    status.add_argument("--json", action="store_true", help="for programs")
    add("pause", _pause, "Train no more until resume, after a restart neither.")
    add("resume", _resume, "Train again.")
    return parser


def _join(arguments: argparse.Namespace) -> int:
    from client.identity import fingerprint_of
    from client.joining import join

    folder = arguments.folder
    joined = join(
        folder,
        arguments.url,
        _read_token() if arguments.token == "-" else arguments.token,
        name=arguments.name,
        fingerprint=arguments.fingerprint,
        authority=arguments.ca,
        say=lambda line: print(f"lowssl-client join: {line}", file=sys.stderr, flush=True),
    )
    print(f"{joined.name} ({joined.device}) has joined {joined.url}")
    kind = "authority" if arguments.ca else "certificate"
    fingerprint = bytes.fromhex(fingerprint_of(folder / joined.certificate)).hex(":").upper()  # as servers show it
    print(f"trusted {kind}: sha256 {fingerprint}")
    if arguments.fingerprint is None and arguments.ca is None:
        print("compare it with what the server shows: lowssl federation status")
    return 0


def _read_token() -> str:
    token = sys.stdin.readline().strip()
    if not token:
        raise UserError("--token -: no token came on standard input; expected one line")
    return token


def _run(arguments: argparse.Namespace) -> int:
    folder, images = arguments.folder.absolute(), arguments.images
    joined = read_joined(folder)
    if joined is None:
        raise UserError(f"{folder}: {_NOT_JOINED}")
    if not images.is_dir():
        raise ImagesAwayError(f"--images {images}: there is no such folder")
    with locked(folder):
        from client.config import load_config

        for written in (folder, folder / REPLIES):
            remove_unfinished(written)

        config = load_config(arguments.config)

        from client.running import run

        run(images, folder, joined, config)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from client.showing import describe, look

    facts = look(_existing(arguments.folder))
    print(json.dumps(facts, indent=2) if arguments.json else describe(facts))
    return 0


def _pause(arguments: argparse.Namespace) -> int:
    write_atomically(_joined(arguments.folder) / PAUSED, lambda file: None)
    print("paused: the agent stops between two steps, and stays so until lowssl-client resume")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    (_joined(arguments.folder) / PAUSED).unlink(missing_ok=True)
    print("resumed")
    return 0


def _joined(folder: Path) -> Path:
    if read_joined(_existing(folder)) is None:
        raise UserError(f"{folder}: {_NOT_JOINED}")
    return folder


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; lowssl-client join makes it, --folder names another")
    return folder


if __name__ == "__main__":
    sys.exit(main())
