"""Joining a federation: the server's certificate is pinned, the device's key registered, the server remembered."""

import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from client.folder import Joined, read_joined, write_joined
from client.identity import PINNED, open_identity, pin_server
from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

AUTHORITY = "authority.pem"
_PATH = "/v1/devices"
_PORT = 443
_SECONDS = 30.0
_MAX_ANSWER = 65_536


@dataclass(frozen=True)
class Server:
    """A server's place in the network.

    Attributes:
        host: name or address, without brackets.
        port: of its public port.
    """

    host: str
    port: int

    @property
    def address(self) -> str:
        """HOST:PORT, as Flower takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_url(url: str) -> Server:
    """A server's place from "https://HOST:PORT"; UserError says what is wrong with it."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORT
    except ValueError as error:
        raise UserError(f"{url}: {error}; a server's URL is https://HOST:PORT") from None
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.path.strip("/") or parts.query:
        raise UserError(f"{url}: a server's URL is https://HOST:PORT")
    return Server(parts.hostname, port)


def join(
    folder: Path, url: str, token: str, *, name: str, fingerprint: str | None = None, authority: Path | None = None
) -> Joined:
    """Make this device one of a server's; joining again is harmless.

    Without fingerprint and authority the certificate that the server shows at the first time is trusted.

    Args:
        folder: the device's.
        url: "https://HOST:PORT".
        token: from the server's operator.
        name: what people call the device.
        fingerprint: sha256 that the server's certificate must have, hexadecimal, colons allowed.
        authority: certificate of the authority that signs the server's, to be trusted instead.

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
    answer = _register(server, certificate, {"token": token, "public_key": identity.public, "name": name})
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


def _register(server: Server, certificate: Path, body: dict[str, str]) -> dict[str, Any]:
    """The server's answer to a device that wants to join."""
    context = ssl.create_default_context(cafile=str(certificate))
    connection = http.client.HTTPSConnection(server.host, server.port, timeout=_SECONDS, context=context)
    try:
        connection.request("POST", _PATH, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, data = response.status, response.read(_MAX_ANSWER)
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"{server.address}: its certificate is not trusted: {error.verify_message}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{server.address} cannot be reached: {reason}") from None
    finally:
        connection.close()
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if status in (201, 409) and isinstance(answer, dict) and "device" in answer:
        return answer  # 409: this key is registered already
    match status:
        case 401:
            raise UserError(f"{server.address} does not take the token: it is wrong, expired or used up")
        case 404 | 405:
            raise UserError(f"{server.address} takes no devices: is it a lowssl-server with a federation?")
        case _:
            said = answer.get("detail", "") if isinstance(answer, dict) else ""
            raise UserError(f"{server.address} answered {status} {said}".rstrip())
