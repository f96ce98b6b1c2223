"""The watched folder: what is new is told by content, what is broken has a reason, and a kill forgets nothing."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

import client.arrivals
from client.arrivals import Arrivals, ArrivalsConfig
from client.folder import ImagesAwayError
from lowssl_core.errors import UserError
from lowssl_core.images import BadImage, ImageLimits
from lowssl_core.photos import open_photos

AT_ONCE = ArrivalsConfig(settle_seconds=0)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    photos = open_photos()
    return [cv2.imencode(".png", photos.read(index))[1].tobytes() for index in range(0, 400, 10)]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def opened(tmp_path: Path, config: ArrivalsConfig = AT_ONCE, **options) -> Arrivals:
    (tmp_path / "images").mkdir(exist_ok=True)
    return Arrivals(tmp_path / "images", tmp_path / "state", config, **options)


def key_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_images_are_found_at_any_depth_in_the_order_they_came(tmp_path, pictures):
    arrivals = opened(tmp_path)
    write(tmp_path / "images/z.png", pictures[0])
    assert arrivals.rescan().new == 1
    write(tmp_path / "images/a/b/c/d/first.PNG", pictures[1])
    write(tmp_path / "images/a/second.png", pictures[2])
    write(tmp_path / "images/notes.txt", b"no image")
    write(tmp_path / "images/.hidden/x.png", pictures[3])
    report = arrivals.rescan()
    assert (report.files, report.new) == (3, 2)
    assert arrivals.new(10)[0] == key_of(pictures[0])
    assert set(arrivals.new(10)) == {key_of(picture) for picture in pictures[:3]}
    assert arrivals.new(1) == [key_of(pictures[0])]
    assert all(arrivals.read(key_of(picture)) == picture for picture in pictures[:3])


def test_an_image_is_its_content_whatever_its_names(tmp_path, pictures):
    arrivals = opened(tmp_path)
    path = write(tmp_path / "images/one.png", pictures[0])
    write(tmp_path / "images/copy.png", pictures[0])
    first = arrivals.rescan()
    assert (first.new, first.duplicates) == (1, 1)
    arrivals.mark_learned([key_of(pictures[0])])
    (tmp_path / "images/copy.png").unlink()
    path.rename(tmp_path / "images/renamed.png")
    second = arrivals.rescan()
    assert (second.new, second.duplicates, second.vanished) == (0, 1, 2)
    assert arrivals.new(10) == []
    assert arrivals.read(key_of(pictures[0])) == pictures[0]


def test_what_did_not_change_is_not_opened_again(tmp_path, pictures):
    arrivals = opened(tmp_path)
    path = write(tmp_path / "images/one.png", pictures[0])
    arrivals.rescan()
    before = path.stat()
    # Other content under the same size and time would be seen only by opening the file.
    path.write_bytes(bytes(len(pictures[0])))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    report = arrivals.rescan()
    assert (report.new, report.duplicates, report.set_aside) == (0, 0, 0)
    with pytest.raises(BadImage, match="changed"):
        arrivals.read(key_of(pictures[0]))
    os.utime(path)
    assert arrivals.rescan().set_aside == 1


def test_a_file_that_is_being_written_waits_until_it_is_whole(tmp_path, pictures):
    arrivals = opened(tmp_path, ArrivalsConfig(settle_seconds=0.2))
    path = write(tmp_path / "images/slow.png", pictures[0][:100])
    assert (arrivals.rescan().settling, arrivals.counts().files) == (1, 0)
    with path.open("ab") as file:
        file.write(pictures[0][100:])
    assert arrivals.rescan().settling == 1
    time.sleep(0.25)
    assert arrivals.rescan().new == 1


def test_a_file_from_the_future_is_taken_once_it_stays_the_same(tmp_path, pictures):
    arrivals = opened(tmp_path, ArrivalsConfig(settle_seconds=0.1))
    path = write(tmp_path / "images/clock.png", pictures[0])
    ahead = time.time() + 86_400
    os.utime(path, (ahead, ahead))
    assert arrivals.rescan().settling == 1
    time.sleep(0.15)
    assert arrivals.rescan().new == 1


def test_bad_files_are_set_aside_with_their_reasons_and_mended_ones_come_back(tmp_path, pictures):
    config = ArrivalsConfig(settle_seconds=0, max_file_bytes=200_000)
    arrivals = opened(tmp_path, config, limits=ImageLimits(max_pixels=5000))
    tile = open_photos().read(0)
    images = tmp_path / "images"
    write(images / "cut.jpg", cv2.imencode(".jpg", tile)[1].tobytes()[:-400])
    write(images / "empty.png", b"")
    write(images / "text.png", b"this is no image")
    write(images / "tiny.png", cv2.imencode(".png", tile[:5, :5])[1].tobytes())
    write(images / "huge.png", cv2.imencode(".png", cv2.resize(tile, (100, 100)))[1].tobytes())
    write(images / "large.png", bytes(200_001))
    write(images / "good.png", pictures[0])
    (images / "folder.png").mkdir()
    os.mkfifo(images / "pipe.png")  # opening it would wait for ever
    report = arrivals.rescan()
    assert (report.new, report.set_aside) == (1, 6)
    reasons = arrivals.set_aside()
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "cut.jpg": "truncated",
        "empty.png": "empty file",
        "text.png": "unreadable",
        "tiny.png": "tiny",
        "huge.png": "huge",
        "large.png": "huge",
    }
    assert "200,001 bytes" in reasons["large.png"]
    assert arrivals.rescan().set_aside == 0
    write(images / "cut.jpg", cv2.imencode(".jpg", tile)[1].tobytes())
    assert arrivals.rescan().new == 1
    assert "cut.jpg" not in arrivals.set_aside()


def test_what_the_learner_sets_aside_is_not_offered_again(tmp_path, pictures):
    arrivals = opened(tmp_path)
    write(tmp_path / "images/one.png", pictures[0])
    arrivals.rescan()
    arrivals.put_aside(key_of(pictures[0]), "cannot be encoded")
    assert arrivals.new(10) == []
    assert arrivals.set_aside() == {"one.png": "cannot be encoded"}


def test_links_and_odd_names_do_no_harm(tmp_path, pictures):
    arrivals = opened(tmp_path)
    images = tmp_path / "images"
    write(images / "a/one.png", pictures[0])
    (images / "a/loop").symlink_to(images, target_is_directory=True)
    (images / "dangling.png").symlink_to(images / "nowhere.png")
    Path(os.fsdecode(os.fsencode(images) + b"/n\xff\nme.png")).write_bytes(pictures[1])
    report = arrivals.rescan()
    assert (report.files, report.new) == (2, 2)
    assert arrivals.rescan().new == 0
    assert arrivals.read(key_of(pictures[1])) == pictures[1]


def test_a_large_folder_can_be_looked_at_in_parts(tmp_path, pictures):
    arrivals = opened(tmp_path)
    for index, picture in enumerate(pictures[:30]):
        write(tmp_path / f"images/{index:02d}.png", picture)
    found = []
    while True:
        report = arrivals.rescan(examine=7)
        found.append((report.new, report.unexamined))
        if not report.unexamined:
            break
    assert found == [(7, 23), (7, 16), (7, 9), (7, 2), (2, 0)]


def test_memory_does_not_grow_with_the_number_of_files(tmp_path, pictures):
    """A thousand more files in as many folders cost a scan some bits, not their names."""

    def peak_of_scan(arrivals: Arrivals) -> int:
        arrivals.rescan()
        tracemalloc.start()
        arrivals.rescan()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    arrivals = opened(tmp_path)
    for index in range(20):
        write(tmp_path / f"images/{index % 2}/{index}.png", pictures[0])
    few = peak_of_scan(arrivals)
    for index in range(1000):
        os.makedirs(tmp_path / f"images/{index % 100}", exist_ok=True)
        os.link(tmp_path / "images/0/0.png", tmp_path / f"images/{index % 100}/{index}-{'x' * 200}.png")
    assert peak_of_scan(arrivals) < few + 60_000  # their names alone are 200,000 bytes


CRAMPED = """
import resource, sys
from pathlib import Path
from client.arrivals import Arrivals, ArrivalsConfig
from lowssl_core.images import BadImage, decode
folder = Path(sys.argv[1])
with Arrivals(folder / "images", folder / "state", ArrivalsConfig(settle_seconds=0)) as arrivals:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    taken = 1024 * int(status["VmData"].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (taken + 20_000_000, taken + 20_000_000))
    arrivals.rescan()
    try:
        decode((folder / "images/b.jpg").read_bytes())
    except BadImage as error:
        print(type(error).__name__)
"""


def test_an_image_that_there_is_no_memory_for_is_looked_at_again(tmp_path):
    """Where memory is capped, Pillow cannot decode a good PNG, nor OpenCV a good JPEG at its full size.

    Of a progressive JPEG OpenCV says the same as of a damaged one; of a large file there is no room for the bytes.
    """
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    large = cv2.resize(noise, (6000, 4000), interpolation=cv2.INTER_NEAREST)
    for name in ("a.png", "b.jpg"):
        write(tmp_path / "images" / name, cv2.imencode(name[1:], large)[1].tobytes())
    progressive = cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    write(tmp_path / "images/c.jpg", progressive)
    write(tmp_path / "images/d.png", cv2.imencode(".png", noise)[1].tobytes() + bytes(30_000_000))
    said = subprocess.run([sys.executable, "-c", CRAMPED, str(tmp_path)], check=True, capture_output=True, text=True)
    assert said.stdout == "NotEnoughMemory\n"
    with opened(tmp_path) as arrivals:
        reason = "cannot be read: not enough memory to decode it"
        assert arrivals.set_aside() == dict.fromkeys(("a.png", "c.jpg", "d.png"), reason)
        assert arrivals.rescan().new == 3
        assert arrivals.set_aside() == {}


def test_files_that_cannot_be_read_do_not_keep_others_from_their_turn(tmp_path, pictures, monkeypatch):
    for index in range(6):
        write(tmp_path / f"images/a{index}.png", pictures[index])
    write(tmp_path / "images/b.png", pictures[6])
    refuse(monkeypatch, "hash_file", lambda path: path.name.startswith("a"))  # root may read everything
    with opened(tmp_path) as arrivals:
        assert [arrivals.rescan(examine=3).new for _ in range(3)] == [0, 0, 1]
        assert arrivals.new(9) == [key_of(pictures[6])]


def test_an_image_that_cannot_be_read_any_more_is_not_new_for_ever(tmp_path, pictures, monkeypatch):
    write(tmp_path / "images/a.png", pictures[0])
    path = write(tmp_path / "images/b.png", pictures[1])
    with opened(tmp_path) as arrivals:
        arrivals.rescan()
        # Broken in place: neither its size nor its time tells.
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert arrivals.rescan().set_aside == 0
        with pytest.raises(BadImage, match="changed"):
            arrivals.read(key_of(pictures[1]))
        assert arrivals.rescan().set_aside == 1
        assert arrivals.new(9) == [key_of(pictures[0])]
        assert list(arrivals.set_aside()) == ["b.png"]


def test_a_folder_that_may_not_be_looked_into_keeps_its_index(tmp_path, pictures, monkeypatch):
    write(tmp_path / "images/a/1.png", pictures[0])
    write(tmp_path / "images/b/2.png", pictures[1])
    with opened(tmp_path) as arrivals:
        arrivals.rescan()
        shutil.rmtree(tmp_path / "images/b")
        listdir = os.listdir

        def refused(path):
            if Path(path).name == "a":
                raise PermissionError(errno.EACCES, "Permission denied")
            return listdir(path)

        monkeypatch.setattr(os, "listdir", refused)
        assert arrivals.rescan().vanished == 1
        assert arrivals.counts().files == 1
        monkeypatch.undo()
        report = arrivals.rescan()
        assert (report.files, report.duplicates, report.vanished) == (1, 0, 0)
        monkeypatch.setattr(os, "scandir", lambda path: refused(Path("a")))
        with pytest.raises(ImagesAwayError, match="Permission denied"):
            arrivals.rescan()


def refuse(monkeypatch, name, condition):
    """Let a function of client.arrivals that opens a file fail for some, as it does for who has no right to them."""
    function = getattr(client.arrivals, name)

    def refusing(path):
        if condition(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return function(path)

    monkeypatch.setattr(client.arrivals, name, refusing)


def test_a_missing_folder_and_a_damaged_index_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Arrivals(tmp_path / "nowhere", tmp_path / "state")
    write(tmp_path / "state/arrivals.sqlite3", b"this is no database, and long enough to be looked at" * 40)
    with pytest.raises(UserError, match=r"arrivals\.sqlite3 cannot be used"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "state")
    arrivals = opened(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match="no such folder any more"):
        arrivals.rescan()


SCANS = """
import sys
from pathlib import Path
from client.arrivals import Arrivals, ArrivalsConfig
folder = Path(sys.argv[1])
with Arrivals(folder / "images", folder / "state", ArrivalsConfig(settle_seconds=0)) as arrivals:
    print("ready", flush=True)
    while True:
        arrivals.rescan()
        for key in arrivals.new(5):
            arrivals.mark_learned([key])
            print(key, flush=True)
"""


def test_a_killed_process_forgets_nothing_it_told_of(tmp_path, pictures):
    told: list[str] = []
    for round_number in range(4):
        for index in range(10 * round_number, 10 * round_number + 10):
            write(tmp_path / f"images/{index}.png", pictures[index])
        with subprocess.Popen(
            [sys.executable, "-c", SCANS, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for _ in range(3 + 2 * round_number):
                told.append(process.stdout.readline().strip())
            process.send_signal(signal.SIGKILL)
            told += process.stdout.read().split()
    with opened(tmp_path) as arrivals:
        arrivals.rescan()
        counts = arrivals.counts()
        assert len(told) == len(set(told))  # nothing was learned twice
        assert not set(told) & set(arrivals.new(1000))
        assert counts.learned in (len(told), len(told) + 1, len(told) + 2, len(told) + 3, len(told) + 4)
        assert counts.learned + counts.new == len(pictures) == counts.files
