"""`lowssl-server`: a folder in, a running service out; says where it is, and ends when told to."""

import argparse
import contextlib
import errno
import json
import math
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lowssl_core import __version__
from lowssl_core.command_line import run_for_user
from lowssl_core.errors import UserError
from lowssl_core.processes import programs_path
from server.access.keys import list_keys
from server.api.children import child_environment, last_line, registry_command
from server.api.protocol import BoundedProtocol
from server.api.service import Service, import_command, promote_command
from server.app import create_app
from server.registry.registry import open_registry
from server.settings import Settings, load_settings
from server.telemetry.logs import capture_logging, default_format

# Where `make demo` leaves its encoder.
DEMO_ENCODER = Path("demo/run/encoder.safetensors")
# Longer than load balancers keep an idle connection, so that it is always they who close it.
_KEEP_ALIVE_SECONDS = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; returns its exit status: 0 after a signal asked it to stop, 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    return run_for_user("lowssl-server", lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowssl-server",
        description="Serve the current encoder over REST. With an empty folder it starts, and says how to import one.",
        epilog="All settings may stand in the file, or in the environment as LOWSSL_SERVER_NAME; flags come first.",
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the registry's folder (default lowssl-data)")
    parser.add_argument("--host", help="address to listen at (default 127.0.0.1; any other needs API keys)")
    parser.add_argument("--port", type=int, help="port to listen at (default 8080; 0 takes a free one)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings (TOML)")
    parser.add_argument(
        "--federation",
        action="store_true",
        default=None,
        help="let devices join and train the encoder on; the port then speaks TLS",
    )
    parser.add_argument("--demo", action="store_true", help=f"serve the encoder that `make demo` made ({DEMO_ENCODER})")
    parser.add_argument("--version", action="version", version=f"lowssl-server {__version__}")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    flags = {name: getattr(arguments, name) for name in ("data_dir", "host", "port", "federation")}
    settings = load_settings(flags, arguments.config)
    with contextlib.closing(_listen(settings)) as listener, contextlib.ExitStack() as stack:
        tls = _open_tls(settings, stack)
        with contextlib.closing(open_registry(settings)) as registry:
            is_empty, has_keys = registry.serving() is None, bool(list_keys(registry.database))
        if arguments.demo and is_empty:
            _import_demo(settings)
        address = _address(settings, listener, "http" if tls is None else "https")

        def announce(service: Service) -> None:
            print(_greeting(service, address, tls, has_keys=has_keys), flush=True)

        capture_logging(settings.log_format or default_format())
        _allow_many_connections()
        config = uvicorn.Config(
            create_app(settings, announce=announce),
            loop="uvloop",
            http=BoundedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else tls.key,
            timeout_graceful_shutdown=math.ceil(settings.request_seconds) + 1,
        )
        # uvicorn stops at a signal and then raises it again, for whoever listened before: that is us, and we are done.
        heard: list[int] = []
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, lambda number, _: heard.append(number))
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
    return 0 if server.started or heard else 1


def _listen(settings: Settings) -> socket.socket:
    """A socket at the settings' address: opened before anything else, as a port in use is the commonest mistake."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = "something listens there already; --port takes another one"
        raise UserError(f"cannot listen at {settings.host}, port {settings.port}: {reason}") from None


@dataclass(frozen=True)
class _Tls:
    """Files of the certificate that the port shows, and its sha256."""

    certificate: Path
    key: Path
    fingerprint: str


def _open_tls(settings: Settings, stack: contextlib.ExitStack) -> _Tls | None:
    """The certificate to speak TLS with, if TLS is to be spoken; with a federation, its one server from now on."""
    if not settings.federation and settings.tls_certificate is None:
        return None
    from server.federation.site import fingerprint, hold_site, public_certificate

    if settings.federation:
        if shutil.which("flower-superlink", path=programs_path()) is None:
            raise UserError("the federation takes Flower, which is not installed: pip install 'lowssl[server]'")
        stack.enter_context(hold_site(settings.federation_folder))
    found = public_certificate(
        settings.federation_folder, settings.host, certificate=settings.tls_certificate, key=settings.tls_key
    )
    return _Tls(found.path, found.key, fingerprint(found.path))


def _address(settings: Settings, listener: socket.socket, scheme: str) -> str:
    """What a person on this machine types into a browser."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _greeting(service: Service, address: str, tls: _Tls | None, *, has_keys: bool) -> str:
    settings, status = service.settings, service.engine.status
    lines = [f"LowSSL {__version__}", ""]
    if status.version is not None and (described := status.description) is not None:
        lines.append(f"  {status.version} serves: {described.name} ({described.backbone}, {described.width} numbers)")
    elif status.problem is not None:
        lines.append(f"  no encoder serves: {status.problem}")
    else:
        lines += [
            "  no encoder serves yet; this imports the one that comes with LowSSL, at any time:",
            f"    {import_command(settings.data_dir)}",
            f"    {promote_command(settings.data_dir)}",
            "  in the place of default: a checkpoint, an .onnx file, or timm:NAME",
        ]
    if settings.needs_keys and not has_keys:
        lines += [
            "",
            "  Calls need an API key, and there is none yet:",
            f"    lowssl keys create --role embed --data-dir {shlex.quote(str(settings.data_dir))}",
        ]
    if tls is not None:
        lines += ["", "  certificate's sha256, which devices and browsers show, too:", f"    {tls.fingerprint}"]
    if settings.federation:
        folder = shlex.quote(str(settings.data_dir))
        lines += ["", "  devices join with a token of", f"    lowssl federation token --data-dir {folder}"]
    lines += [
        "",
        f"  page           {address}/",
        f"  documentation  {address}/docs",
        f"  API            {address}/embed",
    ]
    return "\n".join([*lines, ""])


def _import_demo(settings: Settings) -> None:
    """Import the demonstration's encoder in a process of its own: reading it takes torch, and serving does without."""
    if not DEMO_ENCODER.is_file():
        raise UserError(f"--demo: there is no {DEMO_ENCODER} here; `make demo` makes it")
    print(f"importing {DEMO_ENCODER} ...", flush=True)
    imported = json.loads(_run_registry(settings, "import", str(DEMO_ENCODER), "--json"))
    _run_registry(settings, "promote", imported["version"]["name"], "--why=lowssl-server --demo")


def _run_registry(settings: Settings, *arguments: str) -> bytes:
    command = registry_command(*arguments)
    done = subprocess.run(command, env=child_environment(settings), capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"--demo: {last_line(done.stderr)}")
    return done.stdout


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
