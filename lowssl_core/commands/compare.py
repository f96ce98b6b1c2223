"""`lowssl compare`: runs side by side, as tables in the terminal and as one page to look at and send on."""

import argparse
from pathlib import Path

from lowssl_core.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that lowssl-pretrain wrote")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page (default compare.html)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    parser.add_argument("--data", help="images to show the runs' views on, as lowssl-pretrain takes them")


def _run(arguments: argparse.Namespace) -> int:
    import json

    from lowssl_core.comparison.notes import notes
    from lowssl_core.comparison.page import page
    from lowssl_core.comparison.runs import as_dict, read_runs
    from lowssl_core.comparison.tables import report
    from lowssl_core.errors import UserError
    from lowssl_core.files import write_atomically
    from lowssl_core.sources import open_source

    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path is not None and path.is_dir():
            raise UserError(f"{option} {path} is a folder; give the file to write")
    comparison = read_runs(arguments.runs)
    found = notes(comparison)
    html = page(comparison, open_source(arguments.data) if arguments.data is not None else None)
    print(report(comparison, found))
    write_atomically(arguments.out, lambda file: file.write(html.encode()))
    print(f"\nwrote {arguments.out}")
    if arguments.json is not None:
        tree = as_dict(comparison) | {"notes": [{"level": note.level, "text": note.text} for note in found]}
        data = json.dumps(tree, indent=2) + "\n"
        write_atomically(arguments.json, lambda file: file.write(data.encode()))
        print(f"wrote {arguments.json}")
    return 0


command = Command(
    name="compare",
    help="show runs side by side, on a page and in the terminal: curves, results, views, recipe differences",
    add_arguments=_add_arguments,
    run=_run,
)
