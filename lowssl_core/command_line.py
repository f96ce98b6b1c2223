"""`lowssl`: one front door to commands that are found by entry points, so that other packages add theirs."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from lowssl_core import __version__
from lowssl_core.errors import UserError
from lowssl_core.interruption import StoppedError

GROUP = "lowssl.commands"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: what the object named by an entry point of the group `lowssl.commands` must be.

    Its module is imported for every call of `lowssl`, also for --help: heavy imports belong inside `run`.

    Attributes:
        name: what the user types; the entry point's name.
        help: one line.
        add_arguments: adds the command's own arguments to its parser.
        run: does the work; returns the exit status, raises UserError for what the user can mend.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: 0, 2 for what the user can mend, 130 or 143 when told to stop."""
    commands = find_commands()
    parser = argparse.ArgumentParser(
        prog="lowssl",
        description="Self-supervised pre-training of small vision backbones. To train: lowssl-pretrain.",
    )
    parser.add_argument("--version", action="version", version=f"lowssl {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in commands:
        command.add_arguments(subparsers.add_parser(command.name, help=command.help, description=command.help))
    arguments = parser.parse_args(argv)
    chosen = next(command for command in commands if command.name == arguments.command)
    return run_for_user(f"lowssl {chosen.name}", lambda: chosen.run(arguments))


def run_for_user(program: str, run: Callable[[], int]) -> int:
    """Call `run` and return its exit status; an error is one line on stderr, without a traceback.

    Its status is 2 where a person must mend it, and 1 where it may pass by itself, as a full disk: services that are
    started again go by that.
    """
    try:
        return run()
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.status
    except StoppedError as stop:
        print(f"{program}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left; what Python flushes at its end has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a file or folder that cannot be read or written: its name is in the message
        print(f"{program}: {error}", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2


def find_commands() -> list[Command]:
    """Every installed command, by name; one whose package is not fully installed only says so when called."""
    return [_load(point) for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)]


def _load(point: EntryPoint) -> Command:
    try:
        command = point.load()
    except ImportError as error:
        return _unavailable(point.name, str(error))
    assert isinstance(command, Command), f"{point.value} is no Command"
    return command


def _unavailable(name: str, reason: str) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # whatever follows is swallowed: it is not known which options there would be
        parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)

    def run(arguments: argparse.Namespace) -> int:
        raise UserError(f"not available in this installation: {reason}")

    return Command(name=name, help=f"(not available: {reason})", add_arguments=add_arguments, run=run)


if __name__ == "__main__":
    # Run by -m, this module exists a second time under its own name, and commands are made of that one.
    from lowssl_core.command_line import main as imported_main

    sys.exit(imported_main())
