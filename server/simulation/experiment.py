"""Running a simulation: each course round by round, judged and written down as it goes, so that it can go on."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lowssl_core
from lowssl_core.compute import choose_device
from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import check_same_classes
from lowssl_core.files import write_atomically
from lowssl_core.interruption import Interruption, StoppedError
from lowssl_core.meter import Meter
from lowssl_core.recipe import flat_keys, load_recipe
from lowssl_core.sources import Source, open_source
from lowssl_core.sources.opening import open_held_out
from server.simulation.courses import CHECK_SETTINGS, COURSES, Course, CourseName, World, load
from server.simulation.curves import Curves, curves_of, simulation_figure
from server.simulation.federations import read_federation, separate
from server.simulation.judge import NEIGHBORS, Judge
from server.simulation.link import Watch
from server.simulation.outcome import CourseFigures, Rows, course_figures, table
from server.simulation.partition import Partition, parse_partition, partition_images
from server.simulation.stream import Stream, make_stream, part_ends

RESULTS, FIGURE, SETTINGS, JOURNAL = "results.json", "curves.png", "settings.json", "journal.json"


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """What is simulated, and where.

    Attributes:
        recipe: as `load_recipe` takes it.
        overrides: of the recipe and, with the prefix "federation.", of the federation.
        federation: as `read_federation` takes it.
        data: images with labels, as `open_source` takes them; labels judge and divide, no device sees them.
        eval_data: images to judge on; None: the test or validation split of `data`.
        devices: how many.
        partition: as `parse_partition` takes it.
        images: of each device; None: all there are.
        stream: parts in which a device's images come.
        rounds: how many.
        baselines: courses beside the federation.
        judged: held-out images to judge on at most.
        out: folder of everything.
        device: where models are judged, as `choose_device` takes it; devices train on the CPU.
    """

    recipe: str
    overrides: Sequence[str]
    federation: str
    data: str
    eval_data: str | None
    devices: int
    partition: str
    images: int | None
    stream: int
    rounds: int
    baselines: Sequence[CourseName]
    judged: int
    out: Path
    device: str


@dataclass(frozen=True)
class Simulation:
    """A simulation that is ready to run: what its courses share, what judges them, and their names."""

    options: SimulationOptions
    world: World
    judge: Judge
    courses: Sequence[CourseName]


def simulate(options: SimulationOptions) -> int:
    """Run what is not done yet, print the table; returns an exit status, of a signal if one stopped it.

    Raises:
        UserError: options that cannot be used, or a folder of another simulation.
    """
    simulation = prepare(options)
    print(_announcement(simulation), flush=True)
    journals: dict[str, list[dict[str, Any]]] = {}
    try:
        with Interruption() as asked:
            for name in simulation.courses:
                journals[name] = _run_course(simulation, name, asked, journals)
    except StoppedError as stop:
        print(f"\ninterrupted in {name}: the same command goes on from here")
        return stop.status
    figures = _write_results(simulation, journals)
    print(f"\n{table(figures)}\n\n{_notes(simulation)}\n")
    print(f"  {options.out / FIGURE}  curves\n  {options.out / RESULTS}  all figures")
    return 0


def prepare(options: SimulationOptions) -> Simulation:
    """Open and check everything that the user named; raises as `simulate`."""
    for name in ("devices", "stream", "rounds", "judged", "images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: wanted a whole number from 1")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; it is the folder of everything")
    if options.stream > options.rounds:
        raise UserError(f"--stream {options.stream}: a part takes a round at least, and --rounds is {options.rounds}")
    of_recipe, of_federation = separate(options.overrides)
    recipe, federation = load_recipe(options.recipe, of_recipe), read_federation(options.federation, of_federation)
    load(CHECK_SETTINGS)(federation.learner)
    partition, train = parse_partition(options.partition), open_source(options.data)
    held_out = open_source(options.eval_data) if options.eval_data else open_held_out(options.data)
    check_same_classes(train, held_out)
    streams = _streams(options, partition, train, recipe.seed)
    judge = Judge(recipe, train, held_out, images=options.judged, device=choose_device(options.device))
    world = World(
        recipe=recipe.as_dict(),
        seed=recipe.seed,
        federation=federation,
        manifest=judge.manifest,
        start=judge.start,
        source=train,
        streams=streams,
        rounds=options.rounds,
    )
    _claim(options, world, held_out)
    return Simulation(options, world, judge, ("federated", *options.baselines))


def _streams(options: SimulationOptions, partition: Partition, train: Source, seed: int) -> dict[str, Stream]:
    """Each device's stream, by its name."""
    labels = [label for index in range(len(train)) if (label := train.label(index)) is not None]
    given = partition_images(partition, labels, options.devices, images=options.images, seed=seed)
    if len(given[0]) < options.stream:
        raise UserError(f"--stream {options.stream}: a device has {len(given[0])} images, fewer than parts")
    digits = len(str(options.devices - 1))
    return {
        f"device-{index:0{digits}}": make_stream(images, labels, options.stream, np.random.default_rng([seed, index]))
        for index, images in enumerate(given)
    }


def _claim(options: SimulationOptions, world: World, held_out: Source) -> None:
    """Write down what decides the figures, or compare it with what a simulation that is gone on with wrote."""
    settings: dict[str, Any] = {
        "recipe": world.recipe,
        "federation": {**json.loads(world.federation.plan.to_json()), "learner": world.federation.learner},
        "data": world.source.description,
        "eval_data": held_out.description,
        **{name: getattr(options, name) for name in ("devices", "partition", "images", "stream", "rounds", "judged")},
    }
    path = options.out / SETTINGS
    if not path.exists():
        write_atomically(path, lambda file: file.write((json.dumps(settings, indent=2) + "\n").encode()))
        return
    there, here = flat_keys(json.loads(path.read_text())), flat_keys(json.loads(json.dumps(settings)))
    changed = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"--out {options.out} holds another simulation ({key} is {there.get(key)!r} there, {here.get(key)!r} here):"
            " give another folder or remove it"
        )


def _run_course(
    simulation: Simulation, name: CourseName, asked: Interruption, journals: Mapping[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Run what is not done of a course; returns its journal, one row for the start and each round.

    Raises:
        StoppedError: told to stop.
    """
    world, folder = simulation.world, simulation.options.out / name
    journal = folder / JOURNAL
    rows: list[dict[str, Any]] = json.loads(journal.read_text()) if journal.exists() else []
    if len(rows) > world.rounds:
        return rows
    workers = 1 if name == "pooled" else len(world.streams)
    done = max(0, len(rows) - 1) * workers
    with Meter(name, world.rounds * workers, "rounds of a device", done=done) as meter:
        watch = Watch(on_step=asked.check, on_device=meter.advance)
        with closing(COURSES[name](world, folder, watch)) as course:
            if not rows:
                start = simulation.judge.accuracies(world.start).tolist()
                rows.append({"round": 0, "start": start, "shared": start if course.has_shared else None, "own": None})
            while len(rows) <= world.rounds:
                asked.check()
                rows.append(_run_round(simulation, course, len(rows)))
                write_atomically(journal, lambda file: file.write(json.dumps(rows, indent=1).encode()))
                simulation_figure(simulation.options.out / FIGURE, _curves(simulation, {**journals, name: rows}))
    return rows


def _run_round(simulation: Simulation, course: Course, number: int) -> dict[str, Any]:
    """Run and judge a round; devices' own models are judged at the end of a part."""
    account = course.run_round(number)
    judge, options = simulation.judge, simulation.options
    is_end = number in part_ends(options.rounds, options.stream)
    own = None
    if course.has_own and is_end:
        own = {name: judge.accuracies(flat).tolist() for name, flat in course.own().items()}
    shared = judge.accuracies(course.shared()).tolist() if course.has_shared else None
    return {"round": number, "shared": shared, "own": own, **account}


def _curves(simulation: Simulation, journals: Mapping[str, Rows]) -> Curves:
    return curves_of(journals, simulation.world.streams, simulation.judge.shares, simulation.options.rounds)


def _write_results(simulation: Simulation, journals: Mapping[str, Rows]) -> dict[str, CourseFigures]:
    """Sum up and write down; returns the figures by course."""
    world, shares = simulation.world, simulation.judge.shares
    figures = {name: course_figures(rows, world.streams, shares, world.rounds) for name, rows in journals.items()}
    simulation_figure(simulation.options.out / FIGURE, _curves(simulation, journals))
    document = {
        "figures": {name: each.as_dict() for name, each in figures.items()},
        "journals": dict(journals),
        "classes": list(world.source.classes or ()),
        "devices": {name: stream.shares.tolist() for name, stream in world.streams.items()},
        "settings": json.loads((simulation.options.out / SETTINGS).read_text()),
        "version": lowssl_core.__version__,
    }
    text = json.dumps(document, indent=1) + "\n"
    write_atomically(simulation.options.out / RESULTS, lambda file: file.write(text.encode()))
    return figures


def _announcement(simulation: Simulation) -> str:
    options, world = simulation.options, simulation.world
    each = sum(len(part) for part in next(iter(world.streams.values())).parts)
    parts = "one part" if options.stream == 1 else f"{options.stream} parts"
    return "\n".join(
        [
            f"{options.recipe}, {options.federation}: {options.devices} devices of {each:,} images "
            f"({options.partition}), in {parts} over {options.rounds} rounds",
            f"images of {world.source.description}",
            f"courses: {', '.join(simulation.courses)}",
        ]
    )


def _notes(simulation: Simulation) -> str:
    lines = [
        f"k-NN accuracy (k = {NEIGHBORS}) in % of held-out images; own classes, ACC, forgetting and transfer are on"
        " each device's",
        "classes, mean over devices; ACC, BWT, FWT: Lopez-Paz and Ranzato 2017, forgetting: Chaudhry et al. 2018;"
        " differences in points",
    ]
    return "\n".join(lines)
