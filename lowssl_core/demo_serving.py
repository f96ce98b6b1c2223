"""The demonstration's server: it answers `/embed` on unseen tiles, from the encoder just trained."""

import base64
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lowssl_core.errors import UserError
from lowssl_core.neighbors import nearest
from lowssl_core.processes import free_port
from lowssl_core.sources import Source
from lowssl_core.sources.memory import load_images

# What `/embed` takes in one request unless it is configured otherwise.
IMAGES_A_REQUEST = 64
NEIGHBORS = 3
SECONDS_TO_START = 60

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server said.

    Attributes:
        version: of the encoder, as the server names it.
        images: the tiles that were sent, (H, W, 3) uint8 each.
        labels: of the tiles: which photograph each is from.
        embeddings: (N, D), L2-normalised.
        cosines: (N, k), of each tile's nearest other tiles.
        neighbors: (N, k), their indices, the nearest first.
    """

    version: str
    images: Sequence[Pixels]
    labels: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    cosines: NDArray[np.float32]
    neighbors: NDArray[np.int64]

    @property
    def agreement(self) -> float:
        """Share of tiles whose nearest other tile is of the same photograph."""
        return float((self.labels[self.neighbors[:, 0]] == self.labels).mean())

    @property
    def chance(self) -> float:
        """What `agreement` would be if neighbors were drawn at random."""
        others = np.bincount(self.labels)[self.labels] - 1
        return float((others / (len(self.labels) - 1)).mean())

    @property
    def examples(self) -> list[int]:
        """One tile of each photograph, from its middle: corners are often plain."""
        places = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        return [int(place[len(place) // 2]) for place in places]


def serve_and_ask(encoder: Path, data_dir: Path, tiles: Source) -> Answer:
    """Import an encoder into a new registry, promote it, start a server on it, and embed `tiles` through `/embed`.

    Args:
        encoder: the encoder's file.
        data_dir: the server's folder, made anew.
        tiles: what is sent, as PNGs; with labels.

    Raises:
        UserError: the server's part of LowSSL is not installed, or one of its commands failed; its words are in it.
    """
    shutil.rmtree(data_dir, ignore_errors=True)
    registry = ("-m", "lowssl_core.command_line", "registry")
    _command(*registry, "import", str(encoder), "--data-dir", str(data_dir), "--why", "trained by the demo")
    _command(*registry, "promote", "v1", "--data-dir", str(data_dir), "--why", "trained by the demo")
    images, labels, _ = load_images(tiles)
    with _server(data_dir) as address:
        version, embeddings = _embed(address, images)
    features = torch.from_numpy(embeddings)
    # The nearest of all is the tile itself.
    cosines, neighbors = nearest(features, features, NEIGHBORS + 1)
    return Answer(
        version=version,
        images=images,
        labels=np.array(labels),
        embeddings=embeddings,
        cosines=cosines[:, 1:].numpy(),
        neighbors=neighbors[:, 1:].numpy(),
    )


def _command(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise UserError(f"{' '.join(arguments[2:4])} failed: {said[-1]}")


@contextmanager
def _server(data_dir: Path) -> Iterator[str]:
    """A server on a free port of this machine, until the end of the block; its address."""
    port = free_port()
    command = [sys.executable, "-m", "server.main", "--data-dir", str(data_dir), "--port", str(port)]
    log = data_dir / "server.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, address, log)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=5):
                return
        except OSError:  # nobody listens yet, or no encoder is loaded yet
            time.sleep(0.1)
    raise UserError(f"the server did not start; its words are in {log}")


def _embed(address: str, images: Sequence[Pixels]) -> tuple[str, NDArray[np.float32]]:
    version, parts = "", []
    for start in range(0, len(images), IMAGES_A_REQUEST):
        body = {"images": [_png(image) for image in images[start : start + IMAGES_A_REQUEST]]}
        request = urllib.request.Request(
            f"{address}/embed",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/x-npy"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                version = answer.headers["X-Lowssl-Version"]
                parts.append(np.load(io.BytesIO(answer.read()), allow_pickle=False))
        except urllib.error.HTTPError as error:
            raise UserError(f"/embed answered {error.code}: {error.read().decode(errors='replace')}") from None
    return version, np.concatenate(parts)


def _png(image: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
