"""A registry with small encoders, the application in process and as a process, and images: for tests of the API."""

import contextlib
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from serving_models import describe, write_model

from server.app import create_app
from server.registry.registry import Registry, open_registry
from server.settings import Settings

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    # Starlette 1.3 asks anyio for a name that anyio 4.16 calls deprecated.
    from starlette.testclient import TestClient

__all__ = [
    "WIDTH",
    "Server",
    "TestClient",
    "add_version",
    "command",
    "make_registry",
    "photo",
    "running",
    "serving",
    "settings_for",
]

WIDTH = 16


def photo(seed: int = 0, size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    """A smooth picture of chance colors as a file."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def settings_for(folder: Path, **changes: object) -> Settings:
    values: dict[str, object] = {"data_dir": folder, "workers": 1, "execution": "pool", "log_format": "json"}
    return Settings(**(values | changes))  # type: ignore[arg-type]


def add_version(registry: Registry, folder: Path, *, promote: bool = True) -> str:
    """A further version, which answers differently from all others."""
    number = len(registry.versions()) + 1
    description = describe(f"v{number}", width=WIDTH)
    file = write_model(folder / f"made{number}.onnx", description, seed=number)
    version = registry.add(kind="imported", description=description, files={"onnx": file}, who="test")
    if promote:
        registry.promote(version.name, who="test")
    return version.name


def make_registry(folder: Path, versions: int = 1) -> Settings:
    """A folder in which so many versions are; the last one serves."""
    settings = settings_for(folder)
    folder.mkdir(parents=True, exist_ok=True)
    registry = open_registry(settings)
    for _ in range(versions):
        add_version(registry, folder)
    registry.close()
    return settings


@contextmanager
def running(settings: Settings) -> Iterator[TestClient]:
    """A client of the application, which starts and stops around it; a fault of the server is an answer of 500."""
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    greeting: str
    log: Path

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def embed(self, body: bytes = photo(0), **headers: str) -> tuple[int, dict[str, object]]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", "/embed", body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def figures(self) -> dict[str, float]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return {name: float(value) for name, value in re.findall(r"^(lowssl\S+) (\S+)$", text, re.MULTILINE)}

    def wait_for(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 20
        while self.figures()[name] != value:
            assert time.monotonic() < deadline, self.figures()
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "server.main", "--data-dir", str(folder), "--port", "0", *flags]


@contextlib.contextmanager
def serving(folder: Path, *flags: str, **settings: object) -> Iterator[Server]:
    config = folder.parent / f"{folder.name}.toml"
    settings = {"workers": 1, "execution": "pool"} | settings
    config.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()))
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command(folder, "--config", str(config), *flags), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        greeting = ""
        assert process.stdout is not None
        while "API  " not in greeting:
            line = process.stdout.readline()
            assert line, log.read_text()
            greeting += line
        port = re.search(r"http://\S+:(\d+)/embed", greeting)
        assert port is not None
        yield Server(process, int(port[1]), greeting, log)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
