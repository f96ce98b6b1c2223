"""`lowssl keys`: create, list and revoke the keys of the server's API."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowssl_core.command_line import Command

if TYPE_CHECKING:
    from server.access.keys import ApiKey


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key and show it, this once")
    create.add_argument(
        "--role",
        choices=("embed", "operate", "admin"),
        required=True,
        help="embed: embeddings, and looking at versions; operate: also promoting and rolling back; admin: all",
    )
    create.add_argument("--name", default="", help="whose it is or what for: it stands in the log")
    create.add_argument(
        "--requests-per-minute", type=int, metavar="N", help="how many the key may send (default: the server's setting)"
    )
    listing = actions.add_parser("list", help="all keys, without their secrets")
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("id", metavar="ID", help="as `lowssl keys list` shows it")
    for action in (create, listing, revoke):
        action.add_argument("--data-dir", type=Path, metavar="DIR", help="the server's folder (default lowssl-data)")
        action.add_argument("--config", type=Path, metavar="FILE", help="the server's settings (TOML)")


def _run(arguments: argparse.Namespace) -> int:
    from contextlib import closing

    from lowssl_core.errors import UserError
    from server.access.keys import create_key, list_keys, revoke_key
    from server.registry.registry import has_registry, open_registry
    from server.settings import load_settings

    settings = load_settings({"data_dir": arguments.data_dir}, arguments.config)
    if arguments.action != "create" and not has_registry(settings):
        raise UserError(f"there is no registry in {settings.data_dir}: --data-dir is that of lowssl-server")
    with closing(open_registry(settings)) as registry:
        if arguments.action == "create":
            key, text = create_key(
                registry.database,
                role=arguments.role,
                name=arguments.name,
                requests_per_minute=arguments.requests_per_minute,
            )
            print(f"key {key.id} ({key.role}, {key.name}); it is not shown again:\n\n{text}\n")
            print("Send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")
        elif arguments.action == "list":
            print(_table(list_keys(registry.database)))
        else:
            key = revoke_key(registry.database, arguments.id)
            print(f"key {key.id} ({key.name}) is revoked: running servers refuse it within a second or two")
    return 0


def _table(keys: "list[ApiKey]") -> str:
    if not keys:
        return "there are no keys; `lowssl keys create --role embed` makes one"
    rows = [("ID", "NAME", "ROLE", "CREATED (UTC)", "LAST USED (UTC)", "A MINUTE", "")]
    for key in keys:
        used = f"{key.last_used:%Y-%m-%d %H:%M}" if key.last_used else "never"
        limit = str(key.requests_per_minute) if key.requests_per_minute else "-"
        state = f"revoked {key.revoked:%Y-%m-%d %H:%M}" if key.revoked else ""
        rows.append((key.id, key.name, key.role, f"{key.created:%Y-%m-%d %H:%M}", used, limit, state))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


command = Command(
    name="keys",
    help="create, list and revoke the keys of the server's API",
    add_arguments=_add_arguments,
    run=_run,
)
