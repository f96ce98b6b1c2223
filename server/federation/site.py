"""Where devices find a server: the certificate it shows, for which names, and its fingerprint, which devices pin."""

import contextlib
import fcntl
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from lowssl_core.errors import UserError
from server.federation.certificates import Certificate, open_certificate

_NAME = "server"
# Nothing is sent to it: it only lets the system choose the address that the outside knows this machine by.
_ELSEWHERE = ("192.0.2.1", 9)


def public_certificate(
    folder: Path, host: str, *, certificate: Path | None = None, key: Path | None = None
) -> Certificate:
    """The certificate of the public port: the one that was given, or a self-signed one below the federation's folder.

    Args:
        folder: of the federation.
        host: that the server listens at; a self-signed certificate, made once, is also for the machine's own names.
        certificate: that was given.
        key: of that.

    Raises:
        UserError: files that cannot be read, are no certificate and key, or do not go together.
    """
    if certificate is None or key is None:
        return open_certificate(folder, _NAME, machine_names(host))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for path in (certificate, key):
        if not path.is_file():
            raise UserError(f"there is no file {path}: tls_certificate and tls_key are PEM files")
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if "KEY_VALUES_MISMATCH" in str(error):
            reason = "the key is another certificate's"
        raise UserError(f"{certificate} and {key} cannot be used for TLS: {reason}") from None
    return Certificate(certificate, key)


def fingerprint(certificate: Path) -> str:
    """The sha256 of a certificate as openssl shows it: 32 pairs of hexadecimal digits.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        first = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{certificate} cannot be read: {error}") from None
    return first.fingerprint(hashes.SHA256()).hex(":").upper()


def kept_certificate(folder: Path, given: Path | None) -> Path | None:
    """The certificate that `public_certificate` gives, if there is one yet."""
    path = given or folder / f"{_NAME}.pem"
    return path if path.is_file() else None


def machine_names(host: str) -> list[str]:
    """The names and addresses that this machine's programs and its neighbors may call it by."""
    names = ["localhost", "127.0.0.1", "::1"]
    if host not in ("0.0.0.0", "::"):
        names.append(host.strip("[]"))
    own = socket.gethostname()
    names += [own, socket.getfqdn()]
    with contextlib.suppress(OSError):
        names += [str(entry[4][0]) for entry in socket.getaddrinfo(own, None)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_ELSEWHERE)
        names.append(str(probe.getsockname()[0]))
    return sorted({name for name in names if _is_name(name)})


@contextmanager
def hold_site(folder: Path) -> Iterator[None]:
    """Be the one server of a federation.

    Raises:
        UserError: another process is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another lowssl-server runs the federation in {folder}") from None
        yield


def _is_name(name: str) -> bool:
    """Whether a certificate can be for it: an address without a zone, or a DNS name in ASCII."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return "%" not in name
    return name.isascii() and bool(name) and all(sign.isalnum() or sign in "-." for sign in name)
