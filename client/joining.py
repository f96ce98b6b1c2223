"""Joining a federation: the server's certificate is pinned, the device's key registered, the server remembered."""

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.calls import Server, parse_url, post
from client.folder import Joined, read_joined, write_joined
from client.identity import PINNED, open_identity, pin_server
from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

AUTHORITY = "authority.pem"
_PATH = "/v1/devices"
_SECONDS = 30.0
_PATIENCE_SECONDS = 60.0  # a server that has just started takes devices after some 15
_PAUSE_SECONDS, _LONGEST_PAUSE = 5.0, 30.0


def join(
    folder: Path,
    url: str,
    token: str,
    *,
    name: str,
    fingerprint: str | None = None,
    authority: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Joined:
    """Make this device one of a server's; joining again is harmless.

    A server that is not ready yet (503) is asked again for a minute, as often as it wants to be.

    Without fingerprint and authority the certificate that the server shows at the first time is trusted.

    Args:
        folder: the device's.
        url: "https://HOST:PORT".
        token: from the server's operator.
        name: what people call the device.
        fingerprint: sha256 that the server's certificate must have, hexadecimal, colons allowed.
        authority: certificate of the authority that signs the server's, to be trusted instead.
        say: is told, in a line, that it waits for the server.

    Raises:
        UserError: no such server, another certificate, a token that is not taken, a key that is already in use for
            another server.
    """
    server = parse_url(url)
    before = read_joined(folder)
    if before is not None and parse_url(before.url) != server:
        raise UserError(f"{folder} has joined {before.url}; for another server take another folder (--folder)")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    identity = open_identity(folder)
    if authority is not None:
        certificate = _take_authority(folder, authority)
    else:
        if before is None:  # what is pinned is of a server that was not joined in the end
            (folder / PINNED).unlink(missing_ok=True)
        certificate = pin_server(folder, server.host, server.port, fingerprint=_checked(fingerprint))
    answer = _register(server, certificate, {"token": token, "public_key": identity.public, "name": name}, say)
    if answer.get("device") != identity.device:
        raise UserError(f"{url} calls this device {answer.get('device')!r}, its key says {identity.device}")
    address = answer.get("address") or server.address
    if not isinstance(address, str):
        raise UserError(f"{url} gives {address!r} as its address")
    joined = Joined(
        url=url,
        address=address,
        certificate=certificate.name,
        device=identity.device,
        name=str(answer.get("name") or name),
    )
    write_joined(folder, joined)
    return joined


def _checked(fingerprint: str | None) -> str | None:
    """A fingerprint in lower case without colons."""
    if fingerprint is None:
        return None
    digits = fingerprint.replace(":", "").lower()
    if len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise UserError(f"--fingerprint {fingerprint}: a certificate's sha256 has 64 hexadecimal digits")
    return digits


def _take_authority(folder: Path, path: Path) -> Path:
    """Keep an authority's certificate in the device's folder."""
    try:
        ssl.create_default_context(cafile=str(path))
    except OSError as error:
        raise UserError(f"--ca {path}: no certificate in PEM format ({error.strerror or error})") from None
    data = path.read_bytes()
    write_atomically(folder / AUTHORITY, lambda file: file.write(data))
    return folder / AUTHORITY


def _register(server: Server, certificate: Path, body: dict[str, str], say: Callable[[str], None]) -> dict[str, Any]:
    """The server's answer to a device that wants to join."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    is_waiting = False
    while True:
        answer = post(server, certificate, _PATH, body, seconds=_SECONDS)
        pause = min(_PAUSE_SECONDS if answer.retry_after is None else max(1.0, answer.retry_after), _LONGEST_PAUSE)
        if answer.status != 503 or time.monotonic() + pause > deadline:
            break
        if not is_waiting:
            is_waiting = True
            say(f"{server.address} is not ready ({answer.said}): waiting for up to {_PATIENCE_SECONDS:.0f} seconds")
        time.sleep(pause)
    if answer.status in (201, 409) and "device" in answer.content:
        return answer.content  # 409: this key is registered already
    match answer.status:
        case 401:
            raise UserError(f"{server.address} does not take the token: it is wrong, expired or used up")
        case 404 | 405:
            raise UserError(f"{server.address} takes no devices: is it a lowssl-server with a federation?")
        case _:
            raise UserError(f"{server.address} answered {answer.said}")
