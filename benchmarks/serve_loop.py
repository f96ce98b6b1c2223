"""The yardstick of benchmarks/serve.py: decode, preprocess, ONNX Runtime in a loop, without HTTP; figures as JSON."""

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import cv2

from server.serving.decoding import Decoder
from server.serving.limits import ServingLimits
from server.serving.session import EncoderSession


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="an .onnx file that lowssl export made")
    parser.add_argument("--files", nargs="+", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=8)
    options = parser.parse_args(argv)
    cv2.setNumThreads(0)
    session, decoder = EncoderSession(options.model), Decoder(ServingLimits())
    bodies = [path.read_bytes() for path in options.files]

    def embed(body: bytes) -> None:
        session.run(decoder.make_input(body, session.preprocess)[None])

    for body in bodies:
        embed(body)
    alone = []
    for number in range(60):
        start = time.perf_counter()
        embed(bodies[number % len(bodies)])
        alone.append(1000 * (time.perf_counter() - start))
    counts = [0] * len(os.sched_getaffinity(0))
    end = time.perf_counter() + options.seconds

    def work(place: int) -> None:
        while time.perf_counter() < end:
            embed(bodies[counts[place] % len(bodies)])
            counts[place] += 1

    start, cpu = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    images = sum(counts)
    memory = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
    one = statistics.median(alone)
    figures = {
        "images_per_second": images / wall,
        "images_per_cpu_second": images / cpu,
        "cpu_ms": 1000 * cpu / images,
        "p50": one,
        "p95": statistics.quantiles(alone, n=20)[-1],
        "p99": max(alone),
        "one_ms": one,
        "memory_mib": memory,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
