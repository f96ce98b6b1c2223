"""The demonstration as a program, which `lowssl demo` starts: the core imports neither server nor client."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lowssl_core.command_line import run_for_user


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns its exit status: 0, 2 for what the user can mend, 130 or 143 when told to stop."""
    parser = argparse.ArgumentParser(prog="python -m server.demonstration", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the run that is gone on with")
    parser.add_argument("--server", type=Path, required=True, help="the server's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of devices, logs and figures, made anew")
    parser.add_argument("--picture", type=Path, required=True, help="PNG of the curves")
    for name in ("rounds", "steps", "images"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args(argv)
    return run_for_user("lowssl demo", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from server.demonstration.running import demonstrate
    from server.demonstration.settings import Settings

    demonstrate(Settings(**vars(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
