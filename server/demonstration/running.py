"""The demonstration from start to end: rounds of real processes, yardsticks beside them, and what it came to."""

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lowssl_core.files import write_atomically
from lowssl_core.interruption import Interruption
from lowssl_core.meter import Meter
from lowssl_core.recipe import recipe_from_dict
from server.demonstration.global_model import GlobalModel, accuracy
from server.demonstration.outcome import Figures
from server.demonstration.picture import draw
from server.demonstration.processes import Processes
from server.demonstration.scenes import CAMERAS, Scenes, make_scenes
from server.demonstration.settings import Settings
from server.demonstration.yardsticks import Yardsticks
from server.federation.history import History, Record
from server.federation.plan import Plan
from server.simulation.courses import World
from server.simulation.federations import FederationSettings
from server.simulation.judge import Judge

RESULTS = "results.json"
_SEED = 0
_VERSION_SECONDS = 240.0  # that an export and its judging may take on a machine that is busy
_LOOK_SECONDS = 0.2
_STATES = {
    "serving": "the gate let it pass, it serves",
    "retired": "the gate let it pass, it served until the next one",
    "refused": "the gate refused it, the version before it serves on",
}


def demonstrate(settings: Settings) -> None:
    """Run it, print how it goes, and write figures and picture.

    Raises:
        StoppedError: a signal asked it to stop; nothing of it runs any more.
        UserError: a program failed, or a setting that cannot be.
    """
    torch.set_num_threads(1)
    shutil.rmtree(settings.out, ignore_errors=True)
    with Interruption() as asked:
        Demonstration(settings, asked).run()


class Demonstration:
    """One run of it.

    Args:
        settings: what is asked.
        asked: heard between two steps.
    """

    def __init__(self, settings: Settings, asked: Interruption) -> None:
        self._settings, self._asked = settings, asked
        self._began = time.monotonic()
        self._folder = settings.server.absolute() / "federation"

    def run(self) -> None:
        """From start to end; raises as `demonstrate`."""
        settings = self._settings
        plan, config = settings.out / "plan.toml", settings.out / "device.toml"
        _write(plan, settings.plan_file(len(CAMERAS)))
        _write(config, settings.device_file())
        scenes = make_scenes(settings.images, _SEED)
        for camera in CAMERAS:
            self._deliver(scenes, camera.name, part=0)
        probe = settings.out / "probe"
        scenes.write_probe(probe)
        _say(_announcement(scenes, settings))
        with Processes(settings.server, settings.out, config, self._asked.check) as processes:
            processes.start_server(probe)
            # Its SuperLink takes a while, and so does reading the checkpoint.
            words = ("--from", str(settings.checkpoint), "--plan", str(plan), "--rounds", str(settings.half))
            processes.lowssl("start", *words)
            world, judge = self._world(scenes)
            start = accuracy(judge, world.start)
            token = processes.token(len(CAMERAS))
            for camera in CAMERAS:
                processes.start_device(camera.name, token)
            seconds = time.monotonic() - self._began
            _say(f"{processes.address} serves; {len(CAMERAS)} devices have joined it ({seconds:.0f} s)\n")
            _say(f"{'round':<7}{'devices':>8}{'seconds':>9}{'MB up':>8}{'k-NN':>8}\n{'start':<7}{100 * start:>33.1f}")
            model = self._follow(processes, scenes, judge)
            with Yardsticks(world, judge, settings.out / "yardsticks") as yardsticks:
                self._wait(model, yardsticks, processes)
            versions = self._versions(processes)
        shutil.rmtree(settings.out / "yardsticks")
        figures = Figures(
            start=start,
            shared=model.accuracies,
            alone=yardsticks.alone,
            pooled=yardsticks.pooled,
            asked=len(scenes.asked),
            half=settings.half,
        )
        self._finish(figures, scenes, versions)

    def _deliver(self, scenes: Scenes, camera: str, *, part: int) -> None:
        folder = self._settings.out / camera / "images"
        folder.mkdir(parents=True, exist_ok=True)
        scenes.deliver(camera, part, folder)

    def _world(self, scenes: Scenes) -> tuple[World, Judge]:
        """What the federation began with, for the yardsticks, and what judges them all alike."""
        recipe = recipe_from_dict(self._plan().recipe)
        history = History(self._folder)
        begun = history.load(0)
        assert begun is not None, "lowssl federation start has just written it"
        # All images of the two sources are taken.
        images = len(scenes.bank) * len(scenes.bank.classes or ())
        judge = Judge(recipe, scenes.bank, scenes.asked, images=images, device=torch.device("cpu"))
        world = World(
            recipe=recipe.as_dict(),
            seed=_SEED,
            federation=FederationSettings(plan=Plan(), learner=self._settings.learner()),
            manifest=history.manifest,
            start=begun.flat,
            source=scenes.seen,
            streams=scenes.streams,
            rounds=self._settings.rounds,
        )
        return world, judge

    def _plan(self) -> Plan:
        return Plan.from_json((self._folder / "plan.json").read_text())

    def _follow(self, processes: Processes, scenes: Scenes, judge: Judge) -> GlobalModel:
        """The global model; when half of the rounds are done the cameras are turned, and the others are ordered."""
        settings = self._settings

        def turn(number: int) -> None:
            if number == settings.half:
                for camera in CAMERAS:
                    self._deliver(scenes, camera.name, part=1)
                processes.order(settings.rounds - settings.half)

        def report(record: Record, accuracy: float) -> None:
            answered = f"{len(record.accepted)} of {len(record.asked)}"
            figures = f"{answered:>8}{record.seconds:>9.1f}{record.bytes_up / 1e6:>8.1f}{100 * accuracy:>8.1f}"
            turned = "  the cameras are turned" if record.version == settings.half else ""
            _say(f"{record.version:<7}{figures}{turned}")

        return GlobalModel(History(self._folder), judge, settings.rounds, on_round=turn, report=report)

    def _wait(self, model: GlobalModel, yardsticks: Yardsticks, processes: Processes) -> None:
        """Take in what comes until all is there; once the federation has ended, say how far the yardsticks are."""
        with ExitStack() as stack:
            meter: Meter | None = None
            while not (model.is_done and yardsticks.done == yardsticks.total):
                processes.check()
                model.look()
                yardsticks.look()
                if model.is_done:
                    meter = meter or stack.enter_context(Meter("devices alone, pooled", yardsticks.total, "rounds"))
                    meter.move_to(yardsticks.done)
                time.sleep(_LOOK_SECONDS)

    def _versions(self, processes: Processes) -> list[dict[str, Any]]:
        """The versions that rounds became, once the last one is judged."""
        end = time.monotonic() + _VERSION_SECONDS
        while True:
            rows = json.loads(processes.lowssl("history", "--json"))
            if rows[0]["state"] not in (None, "candidate") or time.monotonic() > end:
                return [row for row in reversed(rows) if row["version"] is not None]
            for _ in range(10):
                processes.check()
                time.sleep(_LOOK_SECONDS)

    def _finish(self, figures: Figures, scenes: Scenes, versions: list[dict[str, Any]]) -> None:
        """Print and write what it came to."""
        settings = self._settings
        _say(f"\n{figures.table()}\n\n{figures.sentence()}")
        for row in versions:
            _say(f"round {row['round']} is {row['version']}: {_STATES.get(row['state'], row['state'])}")
        draw(settings.picture, figures, scenes)
        seconds = round(time.monotonic() - self._began, 1)
        kept = [{name: row[name] for name in ("round", "version", "state")} for row in versions]
        figures.write(settings.out / RESULTS, versions=kept, seconds=seconds)


def _announcement(scenes: Scenes, settings: Settings) -> str:
    lines = [
        "Three cameras, whose lenses are dirty, train the encoder on, each on places of its own, half-way on others. A",
        "server and three clients run as programs and talk over TLS; no image leaves a camera.",
        "",
    ]
    for camera in CAMERAS:
        parts = zip(camera.places, scenes.streams[camera.name].parts, strict=True)
        seen = [f"{len(part)} of {', '.join(places)}" for places, part in parts]
        lines.append(f"  {camera.name}  {seen[0]:<26} then {seen[1]}")
    lines += [
        "",
        f"{settings.rounds} rounds of {settings.steps} steps. k-NN: of {len(scenes.asked)} images of all places,"
        " held out and dirty, the share",
        "whose photograph is named by the 20 nearest train tiles, in percent.",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
