"""HTTP load from a process of its own: so many connections without pause, or requests at a fixed rate; figures as JSON.

    python benchmarks/load.py URL --files IMAGE ... [--connections 16 | --rate 400] [--seconds 8] [--multipart]

One line of JSON: how many answers of each status, latencies of the answered ones in milliseconds, and how many
requests found no connection. A plain client on asyncio streams: httpx would cost more CPU time than the server.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BOUNDARY = "lowssl-load"
SECONDS_FOR_AN_ANSWER = 60


@dataclass
class Tally:
    """What came back.

    Attributes:
        statuses: answers by status.
        milliseconds: of each answer with status 200.
        refusals: milliseconds of each other answer.
        broken: requests whose connection failed.
        without_retry_after: refusals (429, 503) that do not say when to come back.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    broken: int = 0
    without_retry_after: int = 0

    def as_dict(self, seconds: float) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "milliseconds": percentiles(self.milliseconds),
            "refusals": percentiles(self.refusals),
            "broken": self.broken,
            "without_retry_after": self.without_retry_after,
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest; nothing of nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    named = {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}
    return named | {"max": ordered[-1]}


class Client:
    """Requests of the same kind to one address.

    Args:
        url: where to.
        bodies: the images, sent in turn.
        multipart: as a form's file instead of the bare body.
    """

    def __init__(self, url: str, bodies: Sequence[bytes], multipart: bool) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        self.requests: Iterator[bytes] = cycle(
            [_request(target, self.host, body, multipart) for body in bodies],
        )
        self.tally = Tally()

    async def keep_busy(self, end: float) -> None:
        """One connection, the next request as soon as the last was answered, until `end`."""
        connection = None
        while time.perf_counter() < end:
            connection = await self.ask(connection)

    async def ask(
        self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """One request; returns the connection if it can be used again."""
        start = time.perf_counter()
        try:
            reader, writer = connection or await asyncio.open_connection(self.host, self.port)
            writer.write(next(self.requests))
            async with asyncio.timeout(SECONDS_FOR_AN_ANSWER):
                status, headers = await _read_answer(reader)
        except (OSError, EOFError, ValueError):  # TimeoutError is an OSError
            self.tally.broken += 1
            return None
        milliseconds = 1000 * (time.perf_counter() - start)
        self.tally.statuses[status] += 1
        (self.tally.milliseconds if status == 200 else self.tally.refusals).append(milliseconds)
        if status in (429, 503) and b"retry-after" not in headers:
            self.tally.without_retry_after += 1
        if headers.get(b"connection") == b"close":
            writer.close()
            return None
        return reader, writer


async def run(client: Client, *, connections: int, rate: float | None, seconds: float) -> dict[str, Any]:
    """Put on the load; returns the tally as JSON."""
    start = time.perf_counter()
    if rate is None:
        await asyncio.gather(*(client.keep_busy(start + seconds) for _ in range(connections)))
        return client.tally.as_dict(time.perf_counter() - start)
    asked = set()

    async def once() -> None:
        connection = await client.ask()
        if connection is not None:
            connection[1].close()

    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        asked.add(task := asyncio.create_task(once()))
        task.add_done_callback(asked.discard)
    await asyncio.gather(*asked)
    return client.tally.as_dict(time.perf_counter() - start)


def _request(target: str, host: str, body: bytes, multipart: bool) -> bytes:
    kind = "image/jpeg"
    if multipart:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="image.jpg"\r\n'
        body = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + body + f"\r\n--{BOUNDARY}--\r\n".encode()
    head = f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    await reader.readexactly(int(headers.get(b"content-length", b"0")))
    return int(first.split()[1]), headers


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--files", nargs="+", type=Path, required=True, help="images to send in turn")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rate", type=float, help="requests a second, each on a new connection, answered or not")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--multipart", action="store_true")
    options = parser.parse_args(argv)
    client = Client(options.url, [path.read_bytes() for path in options.files], options.multipart)
    tally = asyncio.run(run(client, connections=options.connections, rate=options.rate, seconds=options.seconds))
    print(json.dumps(tally))


if __name__ == "__main__":
    main()
