"""`lowssl federation`: begun, watched and steered; tokens for devices, and versions of its rounds."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowssl_core.command_line import Command

if TYPE_CHECKING:
    from rich.table import Table

    from server.federation.plans import PlanFile
    from server.registry.registry import Registry
    from server.settings import Settings

Action = Callable[[argparse.Namespace, "Settings", "Registry"], int]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, run: Action, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.set_defaults(run_action=run)
        action.add_argument("--data-dir", type=Path, metavar="DIR", help="the server's folder (default lowssl-data)")
        action.add_argument("--config", type=Path, metavar="FILE", help="the server's settings (TOML)")
        return action

    start = add("start", _start, "begin a federation, or change the plan of the one that was begun")
    start.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="the model to begin with: a version (v1), a checkpoint of lowssl-pretrain, an encoder's file, or default; "
        "without it, an untrained one",
    )
    start.add_argument(
        "--recipe", metavar="RECIPE", help="that devices train by: a name or a TOML file (default: SOURCE's)"
    )
    start.add_argument("--plan", type=Path, metavar="FILE", help="rounds, screening, aggregator, schedule ... (TOML)")
    start.add_argument("--rounds", type=_count, metavar="N", help="order so many rounds, too")
    _add_json(add("status", _status, "show how the federation stands"))
    add("round", _round, "order rounds; a federation that was stopped goes on").add_argument(
        "--count", type=_count, default=1, metavar="N", help="how many more (default 1)"
    )
    add("stop", _stop, "stop until rounds are ordered again; a round under way is done again then")
    _add_json(add("devices", _devices, "list the devices that have joined"))
    _add_json(add("history", _history, "list the last rounds, and the versions that they became"))
    token = add("token", _token, "make a token that devices join by, and show it this once")
    token.add_argument("--name", default="", metavar="TEXT", help="what it is for")
    token.add_argument("--uses", type=int, default=1, metavar="N", help="how many devices may join by it (default 1)")
    token.add_argument("--hours", type=float, default=24.0, metavar="H", help="until it expires (default 24)")
    release = add("release", _release, "take a device out of quarantine, with the next round")
    release.add_argument("device", metavar="DEVICE", help="its id or its beginning, as `devices` shows it")
    remove = add("remove", _remove, "never let a device connect again; the server must be running")
    remove.add_argument("device", metavar="DEVICE", help="its id or its beginning, as `devices` shows it")
    version = add("version", _version, "make a completed round a version, and judge it as the plan says")
    version.add_argument("round", type=_count, metavar="ROUND", help="its number")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 to 100,000")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from contextlib import closing

    from server.registry.registry import open_registry
    from server.settings import load_settings

    settings = load_settings({"data_dir": arguments.data_dir}, arguments.config)
    _check_folder(arguments, settings)
    run: Action = arguments.run_action
    with closing(open_registry(settings)) as registry:
        return run(arguments, settings, registry)


def _check_folder(arguments: argparse.Namespace, settings: "Settings") -> None:
    """A folder misspelled must not become a server's; what needs a federation must have one."""
    from lowssl_core.errors import UserError
    from server.federation.overview import has_begun

    folder = settings.data_dir.expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--data-dir {folder} is a file; it is the folder of lowssl-server")
    if arguments.action not in ("start", "token") and not folder.is_dir():
        raise UserError(f"there is no folder {folder}: --data-dir is that of lowssl-server")
    if arguments.action in ("round", "stop", "history", "version") and not has_begun(settings.federation_folder):
        raise UserError(f"no federation has begun in {folder}: lowssl federation start begins one")


def _start(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    import dataclasses

    from lowssl_core.recipe import load_recipe
    from server.federation import orders
    from server.federation.federation import begin, is_running
    from server.federation.operation import Operation
    from server.federation.overview import order_rounds
    from server.federation.plans import read_plan
    from server.registry.starts import open_start

    folder = settings.federation_folder
    has_plan = arguments.plan is not None
    read = read_plan(arguments.plan) if has_plan else _plan_so_far(folder)
    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe)
    begun = open_start(registry, arguments.source, recipe)
    plan = dataclasses.replace(read.plan, recipe=begun.recipe.as_dict())
    history = begin(folder, begun.manifest, begun.flat, plan)
    Operation(start=begun.start, schedule=read.schedule, versions=read.versions).save(folder)
    values = f"{begun.manifest.size:,} numbers of {begun.recipe.method.name}, {begun.recipe.backbone.name}"
    if history.newest() == 0:
        print(f"the federation begins with {begun.start.source}: {values}")
    else:
        print(f"the plan {'is changed' if has_plan else 'stays'}; {history.newest()} rounds are completed")
        if has_plan and is_running(folder):
            print("rounds that were ordered before go on by the plan they began with")
    if arguments.rounds:
        print(f"ordered: rounds up to {order_rounds(folder, arguments.rounds)}")
    elif not orders.ordered(folder):
        print("no round is ordered yet: lowssl federation round orders one")
    return 0


def _plan_so_far(folder: Path) -> "PlanFile":
    """The plan that a federation has; where none has begun, one of defaults."""
    from server.federation.operation import Operation
    from server.federation.plan import Plan
    from server.federation.plans import PlanFile

    operation, path = Operation.load(folder), folder / "plan.json"
    if operation is None or not path.exists():
        return PlanFile()
    plan = Plan.from_json(path.read_text())
    return PlanFile(plan=plan, schedule=operation.schedule, versions=operation.versions)


def _status(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.federation.joins import list_devices
    from server.federation.overview import status_of
    from server.federation.site import fingerprint, kept_certificate

    folder = settings.federation_folder
    status = status_of(folder, list_devices(registry.database))
    certificate = kept_certificate(folder, settings.tls_certificate)
    status["fingerprint"] = "" if certificate is None else fingerprint(certificate)
    if arguments.json:
        _print_json(status)
        return 0
    rows = [("phase", status["phase"])]
    if "round" in status:
        rows += [
            ("began with", status["source"]),
            ("rounds", f"{status['round']} completed, {status['ordered'] - status['round']} ordered beside them"),
        ]
    rows += [("devices", str(status["devices"]))]
    for device, why in status.get("quarantine", {}).items():
        rows.append(("in quarantine", f"{device}: {why}"))
    if current := status.get("current"):
        answered, asked = len(current.get("answered", [])), len(current.get("asked", []))
        rows.append(("this round", f"{answered} of {asked} devices have answered"))
    if trouble := status.get("trouble"):
        rows.append((f"round {trouble['round']}", f"no version yet: {trouble['reason']}"))
    rows.append(("certificate", status["fingerprint"] or "none yet: lowssl-server --federation makes one"))
    print("\n".join(f"{name:<14} {text}" for name, text in rows))
    return 0


def _round(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.federation.overview import order_rounds

    print(f"ordered: rounds up to {order_rounds(settings.federation_folder, arguments.count)}")
    return 0


def _stop(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.federation import orders

    orders.stop(settings.federation_folder)
    print("stopped: lowssl federation round goes on")
    return 0


def _devices(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.federation.joins import list_devices
    from server.federation.overview import device_rows
    from server.federation.superlink import SuperLinkError, registered_devices

    folder = settings.federation_folder
    devices = list_devices(registry.database)
    online = None
    if devices:
        try:
            online = {device.node: device.status for device in registered_devices(folder)}
        except SuperLinkError:  # no server runs
            online = None
    rows = device_rows(devices, online, folder)
    if arguments.json:
        _print_json(rows)
    elif not rows:
        print("no device has joined yet: lowssl federation token makes a token to join by")
    else:
        table = _table("device", "name", "status", "joined", "last round", "new images", "in quarantine")
        for row in rows:
            last = "-" if row["last_round"] is None else str(row["last_round"])
            told = "-" if row["told"] is None else f"{row['new_images']:,}"
            cells = (row["device"], row["name"], row["status"], row["joined"][:10], last, told, row["quarantine"] or "")
            table.add_row(*cells)
        _print_table(table)
        if online is None:
            print("whether they are online is not known: no server runs the federation")
    return 0


def _history(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.federation.overview import round_rows

    rows = round_rows(settings.federation_folder, registry.versions())
    if arguments.json:
        _print_json(rows)
        return 0
    if not rows:
        print("no round is completed yet")
        return 0
    table = _table("round", "started (UTC)", "minutes", "devices", "rejected, failed", "MB up", "epsilon", "version")
    for row in rows:
        said = [f"{one['device'][:8]}: {one['reason']}" for one in row["rejected"]]
        said += [f"{device[:8]}: {why}" for device, why in row["failed"].items()]
        table.add_row(
            str(row["round"]),
            row["started"][:16].replace("T", " "),
            f"{row['seconds'] / 60:.1f}",
            f"{row['accepted']} of {row['asked']}",
            "; ".join(said),
            f"{row['bytes_up'] / 1e6:.1f}",
            "-" if row["epsilon"] is None else f"{row['epsilon']:.2f}",
            "-" if row["version"] is None else f"{row['version']}, {row['state']}",
        )
    _print_table(table)
    return 0


def _token(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    import sys

    from server.federation.joins import create_token
    from server.federation.site import fingerprint, kept_certificate

    text = create_token(registry.database, name=arguments.name, uses=arguments.uses, hours=arguments.hours)
    print(text)
    certificate = kept_certificate(settings.federation_folder, settings.tls_certificate)
    shown = f" --fingerprint {fingerprint(certificate)}" if certificate is not None else ""
    print(
        f"\nIt is not shown again. On a device:\n  lowssl-client join https://HOST:PORT --token TOKEN{shown}",
        file=sys.stderr,
    )
    return 0


def _release(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.federation import orders

    device = _find(arguments.device, registry)
    orders.release(settings.federation_folder, device.id)
    print(f"{device.name} ({device.id}) is let in again from the next round on")
    return 0


def _remove(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from server.federation.joins import remove_device
    from server.federation.superlink import registered_devices, unregister_device

    device, folder = _find(arguments.device, registry), settings.federation_folder
    if device.node in {registered.node for registered in registered_devices(folder)}:
        unregister_device(folder, device.node)
    remove_device(registry.database, device.id)
    print(f"{device.name} ({device.id}) is removed: it cannot connect any more")
    print("from an empty folder, where it makes another key, it may join by a new token")
    return 0


def _version(arguments: argparse.Namespace, settings: "Settings", registry: "Registry") -> int:
    from lowssl_core.meter import Meter
    from server.registry.rounds import make_version

    with Meter("making a version", total=4, unit="steps") as meter:
        version = make_version(
            registry,
            settings.federation_folder,
            arguments.round,
            settings,
            who="federation",
            on_step=lambda step: meter.advance(note=step),
        )
    print(f"round {arguments.round} is {version.name}, {version.state}")
    return 0


def _find(beginning: str, registry: "Registry") -> Any:
    from lowssl_core.errors import UserError
    from server.federation.joins import list_devices

    found = [device for device in list_devices(registry.database) if device.id.startswith(beginning)]
    if len(found) != 1:
        many = f"{len(found)} devices have" if found else "no device has"
        raise UserError(f"{many} an id that begins with {beginning!r}; lowssl federation devices shows them")
    return found[0]


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in ("name", "rejected, failed", "in quarantine"))
    return table


def _print_table(table: "Table") -> None:
    from server.registry.display import console

    console().print(table)


def _print_json(tree: Any) -> None:
    import json

    print(json.dumps(tree, indent=2))


command = Command(
    name="federation",
    help="devices that train the encoder on: begin, rounds, devices, tokens",
    add_arguments=_add_arguments,
    run=_run,
)
