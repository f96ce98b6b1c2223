"""The engine under load, while versions change, when clients leave, when there is too much, and at the end."""

import asyncio
import gc
import io
import multiprocessing
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_models import describe, write_model

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.preprocess import Preprocess
from server.serving.admission import Admission
from server.serving.decoding import Decoder
from server.serving.engine import Engine
from server.serving.errors import NoModel, Overloaded, TimedOut, UnknownVersion
from server.serving.limits import ServingLimits
from server.serving.models import Model
from server.serving.session import EncoderSession

VERSIONS = [f"v{number}" for number in range(1, 6)]


def picture(seed: int, side: int = 40) -> bytes:
    rng, stream = np.random.default_rng(seed), io.BytesIO()
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((side, side)))
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


PICTURES = [picture(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        version: write_model(folder / f"{version}.onnx", describe(version), seed=number)
        for number, version in enumerate(VERSIONS)
    }


class Shelf:
    """Versions of which one serves; `current` may be set at any time, also to one whose file cannot be read."""

    def __init__(self, paths: dict[str, Path], current: str | None) -> None:
        self.paths, self.current = paths, current
        self.found: list[str] = []

    def serving(self) -> Model | None:
        return None if self.current is None else Model(self.current, self.paths[self.current])

    def find(self, version: str) -> Model:
        self.found.append(version)
        if version not in self.paths:
            raise UnknownVersion(f"no version {version}")
        return Model(version, self.paths[version])


@asynccontextmanager
async def running(
    shelf: Shelf, limits: ServingLimits | None = None, *, poll_seconds: float = 60.0, **options: Any
) -> AsyncIterator[Engine]:
    engine = Engine(shelf, limits, workers=options.pop("workers", 2), poll_seconds=poll_seconds, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def expected(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and embeddings of PICTURES, by running the file's session directly."""
    session, decoder = EncoderSession(path), Decoder(ServingLimits())
    return session.run(np.stack([decoder.make_input(image, session.preprocess) for image in PICTURES]))


@pytest.mark.parametrize("execution", ["pool", "batches", "auto"])
def test_answers_are_those_of_the_session_run_directly(paths: dict[str, Path], execution: Any) -> None:
    async def scenario() -> None:
        features, embeddings = expected(paths["v1"])
        async with running(Shelf(paths, "v1"), execution=execution) as engine:
            together = await engine.embed(PICTURES)
            raw = await engine.embed(PICTURES, normalize=False)
            single = await asyncio.gather(*(engine.embed([image]) for image in PICTURES))
        assert (together.version, together.description) == ("v1", describe("v1"))
        np.testing.assert_allclose(np.stack(together.results), embeddings, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.stack(raw.results), features, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.stack([one.results[0] for one in single]), embeddings, rtol=1e-5, atol=1e-6)

    asyncio.run(scenario())


def test_bad_images_stand_in_their_places(paths: dict[str, Path]) -> None:
    async def scenario() -> None:
        async with running(Shelf(paths, "v1")) as engine:
            answer = await engine.embed([PICTURES[0], b"", PICTURES[1], PICTURES[0][:300]])
            assert (await engine.embed([])).results == []
        assert [isinstance(result, BadImage) for result in answer.results] == [False, True, False, True]

    asyncio.run(scenario())


def test_before_any_version_serves_there_is_no_model_and_then_there_is(paths: dict[str, Path]) -> None:
    async def scenario() -> None:
        shelf = Shelf(paths, None)
        async with running(shelf) as engine:
            with pytest.raises(NoModel, match="import one"):
                await engine.embed(PICTURES)
            assert (engine.status.version, engine.status.execution, engine.status.problem) == (None, None, None)
            shelf.current = "v2"
            await engine.refresh()
            assert (await engine.embed(PICTURES)).version == engine.status.version == "v2"
            shelf.current = None
            await engine.refresh()
            with pytest.raises(NoModel):
                await engine.embed(PICTURES)

    asyncio.run(scenario())


@pytest.mark.parametrize("execution", ["pool", "batches"])
def test_versions_change_under_load_without_a_failed_or_mixed_answer(paths: dict[str, Path], execution: Any) -> None:
    async def scenario() -> None:
        embeddings = {version: expected(path)[1] for version, path in paths.items()}
        shelf = Shelf(paths, "v1")
        seen: set[str] = set()
        is_over = False

        async def client(number: int, engine: Engine) -> int:
            answered = 0
            while not is_over:
                places = [(number + answered + step) % len(PICTURES) for step in range(1 + number % 4)]
                with engine.admit():
                    answer = await engine.embed([PICTURES[place] for place in places])
                rows = embeddings[answer.version][places]
                np.testing.assert_allclose(np.stack(answer.results), rows, rtol=1e-5, atol=1e-6)
                seen.add(answer.version)
                answered += 1
            return answered

        async with running(shelf, ServingLimits(max_in_flight=100), execution=execution) as engine:
            clients = [asyncio.create_task(client(number, engine)) for number in range(40)]
            for change in range(20):
                shelf.current = VERSIONS[(change + 1) % len(VERSIONS)]
                await engine.refresh()
                assert engine.status.version == shelf.current
                await asyncio.sleep(0.01)
            is_over = True
            counts = await asyncio.gather(*clients)
            assert sum(counts) > 400
            assert seen == set(VERSIONS)
            assert engine.status.in_flight == engine.status.waiting == 0

    asyncio.run(scenario())


def test_another_version_is_noticed_by_polling(paths: dict[str, Path]) -> None:
    async def scenario() -> None:
        shelf = Shelf(paths, "v1")
        async with running(shelf, poll_seconds=0.01) as engine:
            shelf.current = "v3"
            while engine.status.version != "v3":
                await asyncio.sleep(0.01)
            assert (await engine.embed(PICTURES[:1])).version == "v3"

    asyncio.run(scenario())


def test_a_session_goes_with_its_last_lease(paths: dict[str, Path]) -> None:
    async def scenario() -> None:
        shelf = Shelf(paths, "v1")
        async with running(shelf) as engine:
            lease = engine._models.lease_serving()
            session = weakref.ref(lease.session)
            await engine.embed(PICTURES)
            shelf.current = "v2"
            await engine.refresh()
            assert session() is not None
            del lease
            while session() is not None:  # a worker may be about to let go
                await asyncio.sleep(0.01)
                gc.collect()
            assert engine.status.loaded == ("v2",)

    asyncio.run(scenario())


def test_a_version_that_cannot_be_loaded_does_not_stop_the_one_before(paths: dict[str, Path], tmp_path: Path) -> None:
    async def scenario() -> None:
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"no model")
        shelf = Shelf({**paths, "v9": broken}, "v1")
        async with running(shelf, poll_seconds=0.01) as engine:
            shelf.current = "v9"
            with pytest.raises(UserError, match="cannot be read as an ONNX model"):
                await engine.refresh()
            while engine.status.problem is None:
                await asyncio.sleep(0.01)
            assert "broken.onnx" in engine.status.problem
            assert (await engine.embed(PICTURES)).version == "v1"
            shelf.current = "v2"
            while engine.status.problem is not None:
                await asyncio.sleep(0.01)
            assert (await engine.embed(PICTURES)).version == "v2"

    asyncio.run(scenario())


def test_an_engine_starts_with_a_version_that_cannot_be_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(Shelf({"v1": tmp_path / "missing.onnx"}, "v1")) as engine:
            assert "no such file" in str(engine.status.problem)
            with pytest.raises(NoModel):
                await engine.embed(PICTURES)

    asyncio.run(scenario())


def test_other_versions_are_loaded_once_and_the_last_used_are_kept(paths: dict[str, Path]) -> None:
    async def scenario() -> None:
        shelf = Shelf(paths, "v1")
        async with running(shelf) as engine:
            answers = await asyncio.gather(*(engine.embed(PICTURES[:1], version="v2") for _ in range(30)))
            assert {answer.version for answer in answers} == {"v2"}
            assert shelf.found == ["v2"]
            assert (await engine.embed(PICTURES[:1], version="v1")).version == "v1"
            assert shelf.found == ["v2"]
            for version in ("v3", "v2", "v4"):
                features = (await engine.embed(PICTURES, version=version, normalize=False)).results
                np.testing.assert_allclose(np.stack(features), expected(paths[version])[0], rtol=1e-5, atol=1e-6)
            assert engine.status.loaded == ("v1", "v2", "v4")
            shelf.current = "v4"
            await engine.refresh()
            assert engine.status.loaded == ("v4", "v2")
            assert shelf.found == ["v2", "v3", "v4"]
            with pytest.raises(UnknownVersion, match="v77"):
                await engine.embed(PICTURES, version="v77")

    asyncio.run(scenario())


def blocked(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold every decoding until the event that comes back is set."""
    opened, decode = threading.Event(), Decoder.make_input

    def wait(self: Decoder, image: Any, preprocess: Preprocess) -> Any:
        assert opened.wait(60)
        return decode(self, image, preprocess)

    monkeypatch.setattr(Decoder, "make_input", wait)
    return opened


def test_a_client_that_leaves_frees_its_place(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        opened = blocked(monkeypatch)
        async with running(Shelf(paths, "v1"), ServingLimits(max_in_flight=10)) as engine:

            async def request() -> Any:
                with engine.admit():
                    return await engine.embed(PICTURES)

            leaving = [asyncio.create_task(request()) for _ in range(10)]
            while engine.status.waiting != 10 * len(PICTURES) - 2:  # each of two workers holds one
                await asyncio.sleep(0.001)
            with pytest.raises(Overloaded):
                await request()
            for task in leaving:
                task.cancel()
            for task in leaving:
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert engine.status.in_flight == engine.status.waiting == 0
            staying = asyncio.create_task(request())
            await asyncio.sleep(0)
            opened.set()
            answer = await staying
            np.testing.assert_allclose(np.stack(answer.results), expected(paths["v1"])[1], rtol=1e-5, atol=1e-6)

    asyncio.run(scenario())


def test_more_requests_than_there_are_places_are_refused_at_once_and_places_come_back(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        opened = blocked(monkeypatch)
        async with running(Shelf(paths, "v1"), ServingLimits(max_in_flight=5)) as engine:
            refusals: list[int] = []

            async def request() -> int:
                try:
                    with engine.admit():
                        return len((await engine.embed(PICTURES[:3])).results)
                except Overloaded as error:
                    refusals.append(error.retry_after)
                    return 0

            tasks = [asyncio.create_task(request()) for _ in range(40)]
            await asyncio.sleep(0)
            assert len(refusals) == 35  # before anything was answered
            assert engine.status.in_flight == 5
            assert all(1 <= seconds <= 60 for seconds in refusals)
            opened.set()
            assert sum(await asyncio.gather(*tasks)) == 15
            assert await request() == 3
            assert engine.status.in_flight == 0

    asyncio.run(scenario())


def test_a_place_is_free_again_after_an_error(paths: dict[str, Path]) -> None:
    async def scenario() -> None:
        async with running(Shelf(paths, None), ServingLimits(max_in_flight=1)) as engine:
            for _ in range(3):
                with suppress(NoModel), engine.admit():
                    await engine.embed(PICTURES)

    asyncio.run(scenario())


def test_when_to_come_back_follows_from_the_pace_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    admission = Admission(1)
    assert admission.retry_after(1000) == 1  # nothing is known yet
    for _ in range(50):
        now += 0.5
        admission.count(4)
    assert admission.retry_after(0) == 1
    assert admission.retry_after(80) == 10  # about 8 a second
    assert admission.retry_after(10**6) == 60


def test_an_answer_that_takes_too_long_is_given_up(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        opened = blocked(monkeypatch)
        async with running(Shelf(paths, "v1"), ServingLimits(request_seconds=0.05)) as engine:
            with pytest.raises(TimedOut, match=r"within 0\.05 s"):
                await engine.embed(PICTURES)
            assert engine.status.waiting == 0
            opened.set()

    asyncio.run(scenario())


def test_closing_answers_what_is_in_flight_and_admits_no_more(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        opened = blocked(monkeypatch)
        engine = Engine(Shelf(paths, "v1"), workers=2)
        await engine.start()

        async def request() -> int:
            with engine.admit():
                return len((await engine.embed(PICTURES)).results)

        tasks = [asyncio.create_task(request()) for _ in range(20)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await request()
        assert not closing.done()
        opened.set()
        assert await asyncio.gather(*tasks) == [len(PICTURES)] * 20
        await closing

    asyncio.run(scenario())


def embed_many(path: Path, answer: Any) -> None:
    """In a process of its own: resident memory in bytes after 600 images and after 3,600."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    async def scenario() -> list[int]:
        sizes = [picture(seed, side) for seed, side in enumerate((64, 100, 200, 427))]
        rng = np.random.default_rng(0)
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (100, 80, 4), np.uint8)).save(png, "PNG")
        images = [*sizes, png.getvalue(), b"no image", sizes[2][:900]]
        found = []
        async with running(Shelf({"v1": path}, "v1")) as engine:
            for count in (600, 3000):
                for _ in range(count // 60):
                    await asyncio.gather(*(engine.embed([images[n % len(images)]]) for n in range(60)))
                found.append(resident())
        return found

    answer(asyncio.run(scenario()))


def test_memory_stays_flat_over_thousands_of_images(paths: dict[str, Path]) -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=embed_many, args=(paths["v1"], send.send))
    process.start()
    early, late = receive.recv()
    process.join()
    assert late - early < 10_000_000


@pytest.mark.parametrize(
    "options", [{"max_body_bytes": 0}, {"max_images": -1}, {"max_in_flight": 0}, {"request_seconds": 0.0}]
)
def test_limits_that_admit_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        ServingLimits(**options)
    with pytest.raises(ValueError, match="no image"):
        ServingLimits(max_pixels=60)
