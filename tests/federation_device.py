"""A device of the federation's tests, run as a program: the real agent and SuperNode, and a learner without torch."""

import json
import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from client.agent import Agent
from client.identity import open_identity
from client.node import Node
from lowssl_core.protocol.codec import decode_flat, encode_flat
from lowssl_core.protocol.manifest import Entry, Manifest, delta_of
from lowssl_core.protocol.messages import Metrics, Task, Update

MANIFEST = Manifest(
    (
        Entry(name="layer.weight", shape=(500, 4), dtype="float32", offset=0, kind="parameter"),
        Entry(name="norm.running_mean", shape=(4,), dtype="float32", offset=2000, kind="batchnorm_mean"),
        Entry(name="norm.running_var", shape=(4,), dtype="float32", offset=2004, kind="batchnorm_variance"),
    )
)


class AddingLearner:
    """Training is adding a number to each parameter, in as many steps as the recipe says."""

    def __init__(self, folder: Path, device: str, number: float) -> None:
        self.device, self.number, self.journal = device, number, folder / "trained.jsonl"

    def learn(self, task: Task) -> Generator[object, None, Update]:
        base = decode_flat(task.payload, MANIFEST)
        local = base.copy()
        for step in range(task.recipe["steps"]):
            time.sleep(task.recipe.get("seconds", 0.0))
            local[: MANIFEST.trained_size] += self.number / task.recipe["steps"]
            yield step
        with self.journal.open("a") as file:
            file.write(json.dumps({"round": task.round, "version": task.version}) + "\n")
        return Update(
            round=task.round,
            base_version=task.version,
            device=self.device,
            update_id=f"{self.device}-{task.run}-{task.version}",
            manifest=MANIFEST.hash,
            weight=10.0,
            metrics=Metrics(steps=task.recipe["steps"], seconds=0.1, new_images=3, replayed_images=7, loss=1.0),
            payload=encode_flat(delta_of(local, base, MANIFEST), MANIFEST, task.codec, share=task.share),
        )

    def status(self) -> dict[str, Any]:
        return {"number": self.number}


def main(folder: Path, server: str, certificate: Path, number: float) -> None:
    identity = open_identity(folder)
    with (
        Agent(lambda: AddingLearner(folder, identity.device, number), folder) as agent,
        Node(server, identity, folder, certificate=certificate),
    ):
        signal.signal(signal.SIGTERM, lambda *_: agent.close())
        (folder / "pid").write_text(str(os.getpid()))
        agent.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
