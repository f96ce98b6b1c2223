"""A device's calls to its server's own API: JSON over TLS, checked by the certificate that the device trusts."""

import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowssl_core.errors import UserError

_PORT = 443
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


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        status: of HTTP.
        content: the JSON object; empty where it was none.
        retry_after: seconds after which the server wants to be asked again; None if it did not say so.
    """

    status: int
    content: dict[str, Any]
    retry_after: float | None

    @property
    def said(self) -> str:
        """The status and the server's words, for people."""
        return f"{self.status} {self.content.get('detail', '')}".rstrip()


def parse_url(url: str) -> Server:
    """A server's place from "https://HOST:PORT"; UserError says what is wrong with it."""
    try:
        parts = urlsplit(url)
        port = _PORT if parts.port is None else parts.port
    except ValueError as error:
        raise UserError(f"{url}: {error}; a server's URL is https://HOST:PORT") from None
    more = parts.username or parts.path.strip("/") or parts.query
    if parts.scheme != "https" or not parts.hostname or port == 0 or more:
        raise UserError(f"{url}: a server's URL is https://HOST:PORT")
    return Server(parts.hostname, port)


def post(server: Server, certificate: Path, path: str, content: dict[str, Any], *, seconds: float) -> Answer:
    """Send a JSON object, by no proxy.

    Args:
        server: where to.
        certificate: that the server's is checked by: its own, or its authority's.
        path: "/v1/...".
        content: what to send.
        seconds: how long connecting, and each piece of the answer, may take.

    Raises:
        UserError: the server cannot be reached, or shows another certificate.
    """
    try:
        context = ssl.create_default_context(cafile=str(certificate))
    except OSError as error:
        raise UserError(f"{certificate}: no certificate in PEM format ({error.strerror or error})") from None
    connection = http.client.HTTPSConnection(server.host, server.port, timeout=seconds, context=context)
    try:
        connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read(_MAX_ANSWER)
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"{server.address}: its certificate is not trusted: {error.verify_message}") from None
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{server.address} cannot be reached: {reason}") from None
    finally:
        connection.close()
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    return Answer(
        response.status, answer if isinstance(answer, dict) else {}, _seconds(response.headers["Retry-After"])
    )


def _seconds(text: str | None) -> float | None:
    """What a header says in seconds; None for nothing, or a date."""
    return float(text) if text is not None and text.isascii() and text.isdigit() else None
