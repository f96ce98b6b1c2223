"""Self-signed certificates: for a SuperLink that only this machine reaches, and for servers that devices pin."""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

_VALID = timedelta(days=3650)
_MARGIN = timedelta(days=30)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, as PEM files.

    Attributes:
        path: the certificate; it is its own authority.
        key: the private key, readable by its owner alone.
    """

    path: Path
    key: Path


def open_certificate(folder: Path, name: str, hosts: Sequence[str]) -> Certificate:
    """The certificate `NAME.pem` of a folder, made at the first call and when it is about to expire.

    Args:
        folder: where it is kept.
        name: of its files.
        hosts: names and addresses that it is for.

    Raises:
        UserError: the file there is no certificate.
    """
    certificate = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    if certificate.path.exists() and certificate.key.exists():
        try:
            expires = x509.load_pem_x509_certificate(certificate.path.read_bytes()).not_valid_after_utc
        except ValueError:
            raise UserError(f"{certificate.path} is no certificate; remove it, and a new one is made") from None
        if expires > datetime.now(UTC) + _MARGIN:
            return certificate
    _make(certificate, hosts)
    return certificate


def _make(certificate: Certificate, hosts: Sequence[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "LowSSL")])
    start = datetime.now(UTC) - timedelta(hours=1)  # devices' clocks differ a little
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + _VALID)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    before = os.umask(0o077)  # write_atomically makes files as readable as the umask allows
    try:
        write_atomically(certificate.key, lambda file: file.write(data))
    finally:
        os.umask(before)
    write_atomically(certificate.path, lambda file: file.write(signed.public_bytes(serialization.Encoding.PEM)))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
