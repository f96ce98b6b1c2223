"""Who a device is: its key, made once and never sent, the id that follows from it, and the server it trusts."""

import hashlib
import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

KEY = "device.key"
PINNED = "server.pem"


@dataclass(frozen=True)
class Identity:
    """A device's key: ECDSA on the curve P-384, as Flower signs with it.

    Attributes:
        path: the private key's file, in OpenSSH's format, readable by its owner alone.
        public: the public key, one line in OpenSSH's format: what a server registers.
        device: the device's id, 32 hexadecimal digits of the public key's sha256; servers derive the same one.
    """

    path: Path
    public: str
    device: str


def open_identity(folder: Path) -> Identity:
    """The device's identity, made at the first call.

    Raises:
        UserError: the key's file is readable by others, or holds no such key.
    """
    path = folder / KEY
    if not path.exists():
        _make_key(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path} can be read by others: make it private (chmod 600) or, if they may have, a new one")
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path} holds no private key in OpenSSH's format ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"{path} holds another kind of key; a device's is ECDSA on the curve P-384")
    public = key.public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Identity(path, line, hashlib.sha256(der).hexdigest()[:32])


def pin_server(folder: Path, host: str, port: int, *, fingerprint: str | None = None, seconds: float = 10.0) -> Path:
    """Keep the certificate that a server shows, to trust this one alone from now on.

    For servers whose certificate is self-signed; one by an authority is trusted through the authority's certificate.

    Args:
        folder: where the certificate is kept.
        host: the server's name or address.
        port: its port.
        fingerprint: sha256 of the certificate, 64 hexadecimal digits, colons allowed: what the server must show.
        seconds: how long it may take.

    Raises:
        UserError: the server cannot be reached, shows another certificate than `fingerprint` or, where none is given,
            than the one that was pinned before, or one that it did not sign itself.
    """
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is compared, not verified
            with context.wrap_socket(connection, server_hostname=host) as secured:
                certificate = secured.getpeercert(binary_form=True)
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port} cannot be reached over TLS: {reason}") from None
    assert certificate is not None, "a TLS server without a certificate"
    found = hashlib.sha256(certificate).hexdigest()
    if fingerprint is not None and found != fingerprint.replace(":", "").lower():
        raise UserError(f"{host}:{port} shows the certificate {found}, not {fingerprint}: this is another server")
    text = ssl.DER_cert_to_PEM_cert(certificate)
    path = folder / PINNED
    if fingerprint is None and path.exists() and path.read_text() != text:
        raise UserError(
            f"{host}:{port} shows the certificate {found}, not the one it showed before,"
            f" {fingerprint_of(path)}; if its operator confirms that, join again with --fingerprint {found}"
        )
    _check_anchor(certificate, f"{host}:{port}")
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def fingerprint_of(path: Path) -> str:
    """Sha256 of a certificate's file, 64 hexadecimal digits."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(path.read_text())).hexdigest()


def _check_anchor(certificate: bytes, server: str) -> None:
    from cryptography import x509

    parsed = x509.load_der_x509_certificate(certificate)
    if parsed.issuer != parsed.subject:
        authority = parsed.issuer.rfc4514_string()
        raise UserError(f"{server} shows a certificate by {authority}; give that authority's certificate instead")


def _make_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    before = os.umask(0o077)  # write_atomically makes files as readable as the umask allows
    try:
        write_atomically(path, lambda file: file.write(data))
    finally:
        os.umask(before)
