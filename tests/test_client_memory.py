"""The replay memory: under its cap in bytes at every moment, whole after a kill, and rid of the redundant first."""

import hashlib
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from client.memory import MemoryConfig, MemorySource, ReplayMemory, Staged, compact
from client.redundancy import NearestPairs, nearest_similarity, normalized
from lowssl_core.errors import UserError
from lowssl_core.images import BadImage, decode
from lowssl_core.photos import PHOTOGRAPHS, open_photos, read_photograph

WIDTH = 48
CAP = 1_000_000


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Encoded tiles of photographs, as the memory keeps them."""
    photos = open_photos()
    encoded = (cv2.imencode(".png", photos.read(index)[..., ::-1])[1].tobytes() for index in range(0, 1800, 3))
    return [compact(data, 56) for data in encoded]


def staged(data: bytes, feature: np.ndarray) -> Staged:
    return Staged(hashlib.sha256(data).hexdigest(), data, feature.astype(np.float32))


def look(data: list[bytes]) -> np.ndarray:
    """A stand-in for an encoder: the picture in 4 x 4 pixels, (N, 48)."""
    small = [cv2.resize(decode(each), (4, 4), interpolation=cv2.INTER_AREA).reshape(-1) for each in data]
    return np.stack(small).astype(np.float32) - 120


def fill(memory: ReplayMemory, pictures: list[bytes], now: int = 0) -> int:
    return memory.stage([staged(data, look([data])[0]) for data in pictures], now)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# Nearest pairs


def oracle_pair(rows: dict[int, np.ndarray]) -> tuple[float, set[int]]:
    """The largest cosine of two different rows, and which they are, by looking at every pair."""
    best: tuple[float, set[int]] = (-2.0, set())
    places = sorted(rows)
    for i, one in enumerate(places):
        for other in places[:i]:
            a, b = rows[one].astype(np.float64), rows[other].astype(np.float64)
            cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
            best = max(best, (cosine, {one, other}), key=lambda pair: pair[0])
    return best


def test_the_closest_pair_is_that_of_all_pairs_whatever_came_and_went():
    rng = np.random.default_rng(0)
    rows = dict(enumerate(normalized(rng.normal(size=(12, 5)).astype(np.float32))))
    pairs = NearestPairs(np.stack(list(rows.values())))
    for _ in range(150):
        _, expected = oracle_pair(rows)
        assert set(pairs.closest()) == expected
        if len(rows) <= 3 or (len(rows) < 20 and rng.random() < 0.5):
            row = normalized(rng.normal(size=(1, 5)).astype(np.float32))[0]
            place = pairs.add(row)
            assert place not in rows
            rows[place] = row
        else:
            place = int(rng.choice(list(rows)))
            pairs.remove(place)
            del rows[place]
        assert len(pairs) == len(rows)


def test_of_the_closest_pair_the_one_with_other_images_near_goes():
    # 0 and 1 are the closest; 2 is near 1 alone.
    angles = np.array([0.0, 0.10, 0.35, 2.0])
    for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
        rows = np.stack([np.cos(angles[order]), np.sin(angles[order])], axis=1).astype(np.float32)
        assert order[NearestPairs(rows).most_redundant()] == 1


def test_nearest_similarity_is_the_largest_cosine():
    rng = np.random.default_rng(1)
    one, other = (normalized(rng.normal(size=(count, 7)).astype(np.float32)) for count in (300, 40))
    expected = [max(float(a @ b) for b in other) for a in one]
    np.testing.assert_allclose(nearest_similarity(one, other), expected, rtol=1e-5)


def test_features_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        normalized(np.array([[1.0, np.nan]], dtype=np.float32))


# What is stored


def test_an_image_is_shrunk_and_encoded_but_never_made_larger():
    photo = open_photos().read(3)
    original = cv2.imencode(".png", photo[..., ::-1])[1].tobytes()
    small = compact(original, 32)
    assert len(small) < len(original) / 4
    assert decode(small).shape == (32, 32, 3)
    difference = decode(small).astype(float) - cv2.resize(photo, (32, 32), interpolation=cv2.INTER_AREA)
    assert 10 * np.log10(255**2 / np.square(difference).mean()) > 28
    assert compact(small, 32) == small  # nothing to gain by encoding it again
    wide = cv2.imencode(".jpg", np.repeat(photo, 2, axis=1))[1].tobytes()
    assert decode(compact(wide, 32)).shape == (32, 64, 3)
    with pytest.raises(BadImage, match="unreadable"):
        compact(b"no image", 32)


def test_images_are_kept_once_in_their_order_and_come_back_whole(tmp_path, pictures):
    config = MemoryConfig(max_bytes=CAP)
    with ReplayMemory(tmp_path / "memory.sqlite3", config) as memory:
        assert fill(memory, pictures[:20]) == 20
        assert fill(memory, pictures[10:30]) == 20
        assert memory.stats().staged == 30
        assert memory.keys(staged=False) == []
        assert memory.admit() == 0
    with ReplayMemory(tmp_path / "memory.sqlite3", config) as memory:
        keys = [hashlib.sha256(data).hexdigest() for data in pictures[:30]]
        assert memory.keys(staged=False) == keys
        assert [memory.read(key) for key in keys] == pictures[:30]
        np.testing.assert_allclose(memory.features(staged=False), normalized(look(pictures[:30])), atol=1e-3)
        source = MemorySource(memory, keys[5:8])
        assert [source.read(index) for index in range(len(source))] == pictures[5:8]
        assert source.sizes(np.random.default_rng(0), 10).shape == (3, 2)
        assert memory.holds(keys[0])
        assert not memory.holds("00" * 32)
        with pytest.raises(BadImage, match="no longer"):
            memory.read("00" * 32)


@pytest.mark.parametrize("policy", ["minred", "fifo"])
def test_it_stays_under_its_cap_and_uses_most_of_it(tmp_path, pictures, policy):
    with ReplayMemory(tmp_path / "memory.sqlite3", MemoryConfig(policy=policy, max_bytes=CAP)) as memory:
        rest = pictures
        for _ in range(4):
            taken = fill(memory, rest)
            rest = rest[taken:]
            assert size_of(tmp_path) <= CAP
            assert memory.stats().bytes == size_of(tmp_path)
            memory.admit()
            assert size_of(tmp_path) <= CAP
            assert memory.stats().staged == 0
        content = sum(len(memory.read(key)) for key in memory.keys(staged=False))
        assert content > CAP / 3
        assert len(memory.keys(staged=False)) < len(pictures) - len(rest)


def test_its_files_stay_under_the_cap_within_every_transaction_too(tmp_path):
    """Large images, watched by a thread: what a journal holds for a moment counts as well."""
    rng = np.random.default_rng(0)
    photographs = [read_photograph(photograph) for photograph in PHOTOGRAPHS]
    pictures = []
    for photograph in photographs * 12:
        top, left = (int(rng.integers(0, side - 250)) for side in photograph.shape[:2])
        crop = photograph[top : top + 250, left : left + 250]
        pictures.append(cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    largest, ends = [0], threading.Event()

    def watch() -> None:
        while not ends.is_set():
            largest.append(size_of(tmp_path))

    watching = threading.Thread(target=watch)
    watching.start()
    with ReplayMemory(tmp_path / "memory.sqlite3", MemoryConfig(max_bytes=CAP)) as memory:
        fitting = [data for data in pictures if len(data) <= memory.largest_image]
        assert sum(map(len, fitting)) > 1.5 * CAP
        while fitting:
            fitting = fitting[fill(memory, fitting) :]
            memory.refresh(look, len(fitting) + 1, 1000, width=WIDTH)
            memory.admit()
    ends.set()
    watching.join()
    assert 0.8 * CAP < max(largest) <= CAP


def test_fifo_drops_the_oldest(tmp_path, pictures):
    with ReplayMemory(tmp_path / "memory.sqlite3", MemoryConfig(policy="fifo", max_bytes=CAP)) as memory:
        count = fill(memory, pictures)
        left = memory.admit()
        assert left > 0
        assert memory.keys(staged=False) == [hashlib.sha256(data).hexdigest() for data in pictures[left:count]]


def test_minred_drops_what_the_slow_rule_drops(tmp_path, pictures):
    with ReplayMemory(tmp_path / "memory.sqlite3", MemoryConfig(max_bytes=CAP)) as memory:
        count = fill(memory, pictures)
        keys, rows = memory.keys(staged=True), memory.features(staged=True).astype(np.float64)
        left = memory.admit()
        assert 0 < left < count
        present = list(range(count))
        for _ in range(left):
            cosines = rows[present] @ rows[present].T
            np.fill_diagonal(cosines, -2)
            pair = np.unravel_index(int(cosines.argmax()), cosines.shape)
            second = [np.delete(cosines[place], pair).max() for place in pair]
            del present[pair[int(np.argmax(second))]]
        assert memory.keys(staged=False) == [keys[place] for place in present]


def test_minred_keeps_scenes_that_fifo_forgets(tmp_path, pictures):
    """Ten scenes, then a long stay at one: a camera that stands still must not wipe out what it saw before."""
    rng = np.random.default_rng(0)
    scenes = rng.normal(size=(11, WIDTH))
    for policy, expected in (("minred", 10), ("fifo", 0)):
        path = tmp_path / policy / "memory.sqlite3"
        with ReplayMemory(path, MemoryConfig(policy=policy, max_bytes=CAP)) as memory:
            early = [staged(data, scenes[index % 10]) for index, data in enumerate(pictures[:10])]
            still = [staged(d, scenes[10] + 0.05 * rng.normal(size=WIDTH)) for d in pictures[10:]]
            memory.stage(early, 0)
            memory.admit()
            while still:
                taken = memory.stage(still, 0)
                still = still[taken:]
                memory.admit()
            kept = set(memory.keys(staged=False))
            assert sum(image.key in kept for image in early) == expected


def test_refreshing_takes_the_longest_waiting_first_and_every_foreign_width(tmp_path, pictures):
    with ReplayMemory(tmp_path / "memory.sqlite3", MemoryConfig(max_bytes=CAP)) as memory:
        for step in range(3):
            fill(memory, pictures[10 * step : 10 * step + 10], now=step)
        seen: list[bytes] = []

        def embed(data):
            seen.extend(data)
            return -look(data)

        assert memory.refresh(embed, now=5, limit=12, width=WIDTH) == 12
        assert seen == pictures[:12]
        np.testing.assert_allclose(
            memory.features(staged=True), normalized(look(pictures[:30])) * ([[-1]] * 12 + [[1]] * 18), atol=1e-3
        )
        assert memory.refresh(embed, now=5, limit=100, width=WIDTH) == 18
        assert memory.refresh(embed, now=5, limit=100, width=WIDTH) == 0
        assert memory.refresh(lambda data: look(data)[:, :20], now=6, limit=1, width=20) == 30
        assert memory.features(staged=True).shape == (30, 20)


@pytest.mark.parametrize("policy", ["fifo", "minred"])
def test_a_full_memory_makes_room_for_wider_features(tmp_path, pictures, policy):
    """Another backbone's: 1,280 numbers a feature in place of 48 are more than the images take."""
    with ReplayMemory(tmp_path / "memory.sqlite3", MemoryConfig(max_bytes=CAP, policy=policy)) as memory:
        fill(memory, pictures)
        memory.admit()
        fill(memory, pictures[::-1])
        before = memory.keys(staged=False) + memory.keys(staged=True)
        rng = np.random.default_rng(0)

        def embed(data):
            assert size_of(tmp_path) <= CAP
            return rng.normal(size=(len(data), 1280)).astype(np.float32)

        done = memory.refresh(embed, now=1, limit=1, width=1280)
        after = memory.keys(staged=False) + memory.keys(staged=True)
        assert memory.features(staged=False).shape[1] == 1280
        assert len(after) == done < len(before)
        assert size_of(tmp_path) <= CAP
        assert memory._used() > 0.6 * CAP  # no more left than had to
        if policy == "fifo":
            assert after == before[-done:]
        assert memory.refresh(embed, now=1, limit=1, width=1280) == 0


def test_killed_between_two_backbones_a_full_memory_drops_the_oldest(tmp_path, pictures):
    path = tmp_path / "memory.sqlite3"
    with ReplayMemory(path, MemoryConfig(max_bytes=3 * CAP)) as memory:
        fill(memory, pictures)
        memory.admit()
        keys = memory.keys(staged=False)
        memory._database.execute("UPDATE features SET vector = zeroblob(40) WHERE id = (SELECT max(id) FROM features)")
    with ReplayMemory(path, MemoryConfig(max_bytes=CAP)) as memory:
        left = memory.keys(staged=False)
        assert 50 < len(left) < len(keys)
        assert left == keys[-len(left) :]


def test_a_lowered_cap_is_kept_too(tmp_path, pictures):
    path = tmp_path / "memory.sqlite3"
    with ReplayMemory(path, MemoryConfig(max_bytes=3 * CAP)) as memory:
        fill(memory, pictures)
        memory.admit()
        assert size_of(tmp_path) > CAP
    with ReplayMemory(path, MemoryConfig(max_bytes=CAP)) as memory:
        assert size_of(tmp_path) <= CAP
        assert memory.stats().images > 50


def test_a_full_disk_is_an_os_error_and_leaves_what_was_there(tmp_path, pictures):
    path = tmp_path / "memory.sqlite3"
    with ReplayMemory(path, MemoryConfig(max_bytes=CAP)) as memory:
        fill(memory, pictures[:16])
        # SQLite's own limit stands for the disk's.
        memory._database.execute("PRAGMA max_page_count = 1")
        with pytest.raises(OSError, match="No space left"):
            fill(memory, pictures[16:60])
        assert memory.stats().staged == 16
        memory._database.execute("PRAGMA max_page_count = 100000")
        assert fill(memory, pictures[:60]) == 60


def test_wrong_values_are_named(tmp_path):
    with pytest.raises(ValueError, match="max_bytes is 1000"):
        MemoryConfig(max_bytes=1000)
    with pytest.raises(ValueError, match="policy is 'random'"):
        MemoryConfig(policy="random")  # type: ignore[arg-type]
    (tmp_path / "memory.sqlite3").write_bytes(b"no database at all, but long enough " * 100)
    with pytest.raises(UserError, match="cannot be used"):
        ReplayMemory(tmp_path / "memory.sqlite3", MemoryConfig())


# Kills

WORKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_client_memory import CAP, fill, look, WIDTH
from client.memory import MemoryConfig, ReplayMemory
import pickle
folder = Path(sys.argv[1])
pictures = pickle.loads((folder / "pictures").read_bytes())
with ReplayMemory(folder / "memory" / "memory.sqlite3", MemoryConfig(max_bytes=CAP)) as memory:
    print("ready", flush=True)
    step = 0
    while True:
        for start in range(0, len(pictures), 90):
            step += 1
            fill(memory, pictures[start : start + 90], step)
            memory.refresh(look, step, 40, width=WIDTH)
            memory.admit()
            print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_it_whole_and_under_its_cap(tmp_path, pictures):
    (tmp_path / "pictures").write_bytes(pickle.dumps(pictures))
    folder = tmp_path / "memory"
    rng = np.random.default_rng(0)
    largest = 0
    for _ in range(8):
        command = [sys.executable, "-c", WORKS, str(tmp_path), os.path.dirname(__file__)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            end = time.monotonic() + 0.05 + 0.7 * rng.random()
            while time.monotonic() < end:
                largest = max(largest, size_of(folder))
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        with ReplayMemory(folder / "memory.sqlite3", MemoryConfig(max_bytes=CAP)) as memory:
            keys = memory.keys(staged=False) + memory.keys(staged=True)
            assert len(set(keys)) == len(keys)
            for key in keys:
                assert hashlib.sha256(memory.read(key)).hexdigest() == key
            assert len(memory.features(staged=False)) == len(memory.keys(staged=False))
            assert len(memory.features(staged=True)) == len(memory.keys(staged=True))
        with sqlite3.connect(folder / "memory.sqlite3") as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.close()
    assert 0 < largest <= CAP
    with ReplayMemory(folder / "memory.sqlite3", MemoryConfig(max_bytes=CAP)) as memory:
        fill(memory, pictures)
        memory.admit()
        assert memory.stats().images > 50
