"""`lowssl registry`: versions of the encoder, imported, judged, promoted, rolled back, compared and pruned."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowssl_core.command_line import Command

if TYPE_CHECKING:
    from server.registry.registry import Registry
    from server.settings import Settings

Action = Callable[[argparse.Namespace, "Settings", "Registry"], int]

SOURCE = (
    "a checkpoint of lowssl-pretrain, an encoder's file, an .onnx file, default (the encoder that comes with LowSSL), "
    "or timm:NAME (published weights)"
)
# What `promote` returns when the gate says no.
REFUSED = 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, run: Action, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run_action=run)
        _add_common(action)
        return action

    add("list", _list, "list the versions, the newest first")
    add("show", _show, "show all that is known of a version").add_argument("version", metavar="VERSION")
    _add_import(add("import", _import, "add an encoder as a candidate"))
    promote = add("promote", _promote, "judge a version, and let it serve if it passes; status 1 if it does not")
    promote.add_argument("version", metavar="VERSION", help="v1, v2 ...")
    promote.add_argument(
        "--force", action="store_true", help="let it serve whatever the gate says; its history says so"
    )
    _add_words(promote)
    _add_words(add("rollback", _rollback, "let the version serve that served before; again: the one before that"))
    diff = add("diff", _diff, "show two versions side by side")
    diff.add_argument("versions", metavar="VERSION", nargs=2)
    prune = add("prune", _prune, "remove the files of old versions; their history stays")
    prune.add_argument(
        "--keep",
        type=int,
        default=10,
        help="how many refused and retired versions keep their files, the newest ones (default 10), beside the one "
        "that serves, the one to roll back to, and all candidates",
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    _add_words(prune)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the registry's folder (default lowssl-data)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the server's settings, TOML")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("--branch", choices=("student", "teacher"), help="weights of a checkpoint (default student)")
    parser.add_argument("--name", metavar="TEXT", help="for people (default: the run's or the encoder's)")
    parser.add_argument("--licence", metavar="TEXT", help="of the weights (default: what the source says)")
    parser.add_argument("--parent", metavar="VERSION", help="the version that it was trained on from")
    _add_words(parser)


def _add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--why", default="", metavar="TEXT", help="kept in the history")
    parser.add_argument("--who", metavar="TEXT", help="kept in the history (default: you, USER@HOST)")


def _run(arguments: argparse.Namespace) -> int:
    from contextlib import closing

    from lowssl_core.errors import UserError
    from server.registry.registry import has_registry, open_registry
    from server.settings import load_settings

    settings = load_settings({"data_dir": arguments.data_dir}, arguments.config)
    if arguments.action != "import" and not has_registry(settings):  # a folder misspelled must not become a registry
        folder = settings.data_dir.expanduser()
        raise UserError(f"there is no registry in {folder}: lowssl registry import SOURCE --data-dir DIR makes one")
    run: Action = arguments.run_action
    with closing(open_registry(settings)) as registry:
        return run(arguments, settings, registry)


def _list(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.registry.display import console, versions_table
    from server.registry.trees import version_tree

    versions = registry.versions()
    if arguments.json:
        _print_json([version_tree(version) for version in versions])
    elif versions:
        console().print(versions_table(versions))
    else:
        print("no versions yet: lowssl registry import SOURCE adds one")
    return 0


def _show(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.registry.display import version_tables
    from server.registry.trees import event_tree, version_tree

    version = registry.version(arguments.version)
    events = registry.events(arguments.version)
    if arguments.json:
        _print_json(version_tree(version) | {"events": [event_tree(event) for event in events]})
    else:
        _print_tables(version_tables(version, events))
    return 0


def _import(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from lowssl_core.meter import Meter
    from server.registry.imports import ImportOptions, import_encoder
    from server.registry.trees import version_tree

    options = ImportOptions(
        branch=arguments.branch,
        name=arguments.name,
        licence=arguments.licence,
        parent=arguments.parent,
        who=_who(arguments),
        why=arguments.why,
    )
    with Meter("importing", total=4, unit="steps") as meter:
        imported = import_encoder(registry, arguments.source, options, on_step=lambda step: meter.advance(note=step))
    version = imported.version
    if arguments.json:
        _print_json({"is_new": imported.is_new, "version": version_tree(version)})
    elif imported.is_new:
        print(
            f"{version.name}: {version.description.name}, a candidate; lowssl registry promote {version.name} judges it"
        )
    else:
        print(f"{arguments.source} is in the registry already: {version.name} ({version.state})")
    return 0


def _promote(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    import sys

    from lowssl_core.meter import Meter
    from server.registry.display import failed_in_words, report_table
    from server.registry.gate import judge_and_promote
    from server.registry.trees import version_tree

    with Meter("judging", total=2, unit="steps") as meter:
        version, report = judge_and_promote(
            registry,
            arguments.version,
            settings,
            who=_who(arguments),
            why=arguments.why,
            force=arguments.force,
            on_step=lambda step: meter.advance(note=step),
        )
    promoted = version.state == "serving"
    if arguments.json:
        _print_json({"promoted": promoted, "version": version_tree(version), "report": report.as_dict()})
    else:
        _print_tables([report_table(report)])
        if promoted:
            print(f"{version.name} serves" + ("" if report.passed else ": the gate was overruled"))
    if not promoted:
        print(f"lowssl registry: {version.name} was refused: {failed_in_words(report.failed)}", file=sys.stderr)
    return 0 if promoted else REFUSED


def _rollback(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.registry.trees import version_tree

    version = registry.rollback(who=_who(arguments), why=arguments.why)
    if arguments.json:
        _print_json({"version": version_tree(version)})
    else:
        print(f"{version.name} serves again: {version.description.name}")
    return 0


def _diff(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from lowssl_core.meter import Meter
    from server.registry.comparison import compare
    from server.registry.display import comparison_tables

    with Meter("comparing", total=2, unit="steps") as meter:
        first, second = arguments.versions
        comparison = compare(registry, (first, second), settings, on_step=lambda step: meter.advance(note=step))
    if arguments.json:
        _print_json(comparison.as_dict())
    else:
        _print_tables(comparison_tables(comparison))
    return 0


def _prune(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from dataclasses import asdict

    done = registry.prune(keep=arguments.keep, who=_who(arguments), why=arguments.why, dry_run=arguments.dry_run)
    if arguments.json:
        _print_json(asdict(done))
    else:
        verb = "would remove" if arguments.dry_run else "removed"
        versions = f" of {', '.join(done.versions)}" if done.versions else ""
        print(f"{verb} {done.files} file{'' if done.files == 1 else 's'}{versions}, {done.bytes / 1e6:,.1f} MB")
    return 0


def _who(arguments: argparse.Namespace) -> str:
    import getpass
    import os
    import socket

    if arguments.who is not None:
        return str(arguments.who)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _print_json(tree: Any) -> None:
    import json

    print(json.dumps(tree, indent=2))


def _print_tables(tables: Sequence[Any]) -> None:
    from server.registry.display import console

    out = console()
    for table in tables:
        out.print(table)
        out.print()


command = Command(
    name="registry",
    help="versions of the encoder: import, judge, promote, roll back, compare",
    add_arguments=_add_arguments,
    run=_run,
)
