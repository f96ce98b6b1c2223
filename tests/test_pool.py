"""Sessions, and the two ways to execute them: they answer alike, whatever happens to single jobs."""

import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving_models import build_model, describe, write_model

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.preprocess import Preprocess
from server.serving.batches import Batches
from server.serving.cores import count_cores
from server.serving.decoding import Decoder
from server.serving.jobs import Execution, Job
from server.serving.limits import ServingLimits
from server.serving.measure import Plan, choose_plan, fastest, measure
from server.serving.pool import Pool
from server.serving.session import MAX_BATCH, EncoderSession, available_gpus

WORKERS = 3


def files(count: int, *, side: int = 40) -> list[bytes]:
    rng, made = np.random.default_rng(count), []
    for _ in range(count):
        pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((side, side)))
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small.onnx")


@pytest.fixture(scope="module")
def session(model: Path) -> EncoderSession:
    return EncoderSession(model)


@pytest.fixture(params=[Pool, Batches])
def execution(request: pytest.FixtureRequest) -> Iterator[Execution]:
    made = request.param(WORKERS, Decoder(ServingLimits()))
    yield made
    made.close()


class Submitted:
    """A job that was given to an execution, to be waited for."""

    def __init__(self, execution: Execution, session: Any, images: list[Any], *, normalize: bool = True) -> None:
        self.done = threading.Event()
        self.job = Job(session, images, normalize=normalize, done=self.done.set)
        execution.submit(self.job)

    def results(self) -> list[Any]:
        assert self.done.wait(60)
        if self.job.error is not None:
            raise self.job.error
        return self.job.results


def loop(session: EncoderSession, images: list[bytes]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    decoder = Decoder(ServingLimits())
    rows = [session.run(decoder.make_input(image, session.preprocess)[None]) for image in images]
    return np.concatenate([features for features, _ in rows]), np.concatenate([embedding for _, embedding in rows])


class Gate:
    """A session whose answers wait until `opened`; it stands for an encoder that is slow, or that fails."""

    preprocess = Preprocess(size=32)

    def __init__(self, error: Exception | None = None) -> None:
        self.entered, self.opened = threading.Semaphore(0), threading.Event()
        self._error = error

    def run(self, inputs: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.entered.release()
        assert self.opened.wait(60)
        if self._error is not None:
            raise self._error
        return np.ones((len(inputs), 4), np.float32), np.full((len(inputs), 4), 0.5, np.float32)


@pytest.mark.parametrize("normalize", [True, False])
def test_pool_and_batches_answer_as_a_plain_loop(
    execution: Execution, session: EncoderSession, normalize: bool
) -> None:
    images = files(150)
    jobs = [Submitted(execution, session, images[:90], normalize=normalize)]
    jobs += [Submitted(execution, session, [image], normalize=normalize) for image in images[90:]]
    results = [result for job in jobs for result in job.results()]
    expected = loop(session, images)[normalize]
    np.testing.assert_allclose(np.stack(results), expected, rtol=1e-5, atol=1e-6)


def test_a_bad_image_is_told_in_its_place_and_harms_no_other(execution: Execution, session: EncoderSession) -> None:
    images: list[Any] = files(9)
    images[4] = b"no image"
    images[7] = np.zeros((2, 2, 3), np.uint8)
    results = Submitted(execution, session, images).results()
    assert [isinstance(result, BadImage) for result in results] == [place in (4, 7) for place in range(9)]
    np.testing.assert_allclose(results[8], loop(session, images[8:])[1][0], rtol=1e-5)


def test_an_encoder_that_fails_fails_its_job_and_no_worker(execution: Execution, session: EncoderSession) -> None:
    failing = Gate(RuntimeError("out of memory"))
    failing.opened.set()
    jobs = [Submitted(execution, failing, files(2)) for _ in range(2 * WORKERS)]
    for job in jobs:
        with pytest.raises(RuntimeError, match="out of memory"):
            job.results()
    assert len(Submitted(execution, session, files(20)).results()) == 20


def test_an_answer_that_is_not_finite_is_told(execution: Execution) -> None:
    class Broken(Gate):
        def run(self, inputs: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            return (np.full((len(inputs), 4), np.nan, np.float32),) * 2

    (result,) = Submitted(execution, Broken(), files(1)).results()
    assert "not finite" in result.reason


def test_a_job_whose_waiter_is_gone_harms_no_worker(execution: Execution, session: EncoderSession) -> None:
    def gone() -> None:
        raise RuntimeError("Event loop is closed")

    for _ in range(2 * WORKERS):
        execution.submit(Job(session, files(1), normalize=True, done=gone))
    assert len(Submitted(execution, session, files(20)).results()) == 20


def test_one_image_does_not_wait_for_all_images_of_the_job_before() -> None:
    order: list[str] = []

    class Named(Gate):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def run(self, inputs: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            order.append(self.name)
            return super().run(inputs)

    large, small, pool = Named("large"), Named("small"), Pool(1, Decoder(ServingLimits()))
    before = Submitted(pool, large, files(50))
    large.entered.acquire()
    after = Submitted(pool, small, files(1))
    large.opened.set()
    small.opened.set()
    before.results()
    after.results()
    pool.close()
    # The worker has one of the large job's images; that job's next turn stood before the small job's.
    assert order.index("small") <= 2
    assert order.count("large") == 50


def test_a_stuck_image_holds_up_only_its_worker(session: EncoderSession) -> None:
    gate, pool = Gate(), Pool(2, Decoder(ServingLimits()))
    stuck = Submitted(pool, gate, files(1))
    gate.entered.acquire()
    assert len(Submitted(pool, session, files(30)).results()) == 30
    assert not stuck.done.is_set()
    gate.opened.set()
    assert len(stuck.results()) == 1
    pool.close()


def test_what_is_cancelled_before_it_starts_is_never_worked_on() -> None:
    gate, pool = Gate(), Pool(1, Decoder(ServingLimits()))
    first = Submitted(pool, gate, files(5))
    gate.entered.acquire()
    others = [Submitted(pool, gate, files(5)) for _ in range(10)]
    for other in others:
        other.job.cancel()
        assert other.job.waiting == 0
    gate.opened.set()
    first.results()
    pool.close()
    for _ in range(4):
        gate.entered.acquire()
    assert not gate.entered.acquire(blocking=False)  # five images ran, all of the first job
    assert not any(other.done.is_set() for other in others)


def test_batches_hold_several_images_and_never_more_than_the_limit() -> None:
    sizes = []

    class Counting(Gate):
        def run(self, inputs: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            sizes.append(len(inputs))
            return super().run(inputs)

    counting, batches = Counting(), Batches(2, Decoder(ServingLimits()))
    first = Submitted(batches, counting, files(1))
    counting.entered.acquire()  # while it is held, the others gather
    rest = Submitted(batches, counting, files(100))
    while rest.job.waiting > 100 - 2 * MAX_BATCH:
        counting.opened.wait(0.01)
    counting.opened.set()
    first.results()
    rest.results()
    batches.close()
    assert sum(sizes) == 101
    assert max(sizes) == MAX_BATCH


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_a_session_gives_what_the_graph_says(tmp_path: Path, layout: Any) -> None:
    description = describe(layout=layout)
    session = EncoderSession(write_model(tmp_path / "model.onnx", description))
    inputs = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    reference = onnx.reference.ReferenceEvaluator(build_model(description))
    fed = inputs if layout == "nhwc" else inputs.transpose(0, 3, 1, 2)
    expected = reference.run(None, {"images": fed})
    for mine, theirs in zip(session.run(inputs), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert session.description == description
    assert session.preprocess == Preprocess(size=32, resize=37)


def test_one_session_may_be_run_from_many_threads(session: EncoderSession) -> None:
    inputs = np.random.default_rng(0).integers(0, 256, (8, 4, 32, 32, 3), np.uint8)
    expected = [session.run(one) for one in inputs]
    wrong: list[int] = []

    def check(number: int) -> None:
        for _ in range(50):
            if not all(map(np.array_equal, session.run(inputs[number]), expected[number])):
                wrong.append(number)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_files_that_are_no_encoder_are_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "model.onnx", build_model(describe())
    cases = [(None, "no such file"), (b"not onnx", "cannot be read as an ONNX model")]
    fixed = build_model(describe())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    cases.append((fixed.SerializeToString(), "batches of 1 images alone"))
    other = build_model(describe())
    del other.metadata_props[:]
    cases.append((other.SerializeToString(), "was not exported by LowSSL"))
    wide = build_model(describe())
    onnx.helper.set_model_props(wide, describe(width=17).to_properties())
    cases.append((wide.SerializeToString(), "width is 17"))
    larger = build_model(describe())
    onnx.helper.set_model_props(larger, describe(size=48).to_properties())
    cases.append((larger.SerializeToString(), "its inputs are"))
    nameless = build_model(describe())
    del nameless.graph.output[1]
    cases.append((nameless.SerializeToString(), "its outputs are"))
    infinite = build_model(describe())
    kernel = next(value for value in infinite.graph.initializer if value.name == "kernel")
    kernel.CopyFrom(onnx.numpy_helper.from_array(np.full((16, 3, 4, 4), np.nan, np.float32), "kernel"))
    cases.append((infinite.SerializeToString(), "not finite"))
    cases.append((whole.SerializeToString()[:-2000], "cannot be read as an ONNX model"))
    for content, message in cases:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            EncoderSession(path)
        assert "\n" not in str(raised.value)


@pytest.mark.skipif(bool(available_gpus()), reason="there is a GPU provider")
@pytest.mark.filterwarnings("ignore:Specified provider")  # ONNX Runtime's own word for it
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_there_is_told_and_left_out(model: Path, provider: Any) -> None:
    with pytest.raises(UserError, match="cannot be used on this machine"):
        EncoderSession(model, provider=provider)
    plans = [Plan("batches", provider), Plan("pool", "cpu")]
    assert fastest(plans, model, 1, Decoder(ServingLimits())) == Plan("pool", "cpu")
    with pytest.raises(UserError, match="no way to execute"):
        fastest([Plan("batches", provider)] * 2, model, 1, Decoder(ServingLimits()))


@pytest.mark.skipif(bool(available_gpus()), reason="there is a GPU provider")
def test_without_a_gpu_the_plan_is_the_pool_or_what_was_asked_for(model: Path) -> None:
    decoder = Decoder(ServingLimits())
    assert choose_plan("auto", model, 1, decoder) == choose_plan("pool", model, 1, decoder) == Plan("pool", "cpu")
    assert choose_plan("batches", model, 1, decoder) == Plan("batches", "cpu")


@pytest.mark.parametrize("kind", ["pool", "batches"])
def test_measuring_embeds_images_and_leaves_no_thread(model: Path, kind: Any) -> None:
    before = threading.active_count()
    assert measure(Plan(kind, "cpu"), model, 2, Decoder(ServingLimits()), seconds=0.1) > 1
    assert threading.active_count() == before


def test_cores_are_those_that_affinity_and_quotas_leave(tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0))
    assert count_cores(tmp_path) == affinity  # neither /proc nor /sys
    groups = tmp_path / "proc/self/cgroup"
    groups.parent.mkdir(parents=True)
    groups.write_text("0::/service/lowssl\n")
    folder = tmp_path / "sys/fs/cgroup/service/lowssl"
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("max 100000\n")
    assert count_cores(tmp_path) == affinity
    for quota, cores in (("1000", 1), ("100000", 1), ("150000", min(affinity, 2)), ("9900000", affinity)):
        (folder.parent / "cpu.max").write_text(f"{quota} 100000\n")  # the group above counts as well
        assert count_cores(tmp_path) == cores
    (folder.parent / "cpu.max").unlink()
    groups.write_text("4:memory:/a\n3:cpu,cpuacct:/a\n")
    old = tmp_path / "sys/fs/cgroup/cpu"
    old.mkdir()
    (old / "cpu.cfs_quota_us").write_text("50000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert count_cores(tmp_path) == 1
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert count_cores(tmp_path) == affinity
