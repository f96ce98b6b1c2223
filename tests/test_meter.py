"""Progress goes to standard error: quick work is silent, long work tells how far it is and how long it takes."""

import pytest

from lowssl_core import meter as meter_module
from lowssl_core.meter import Meter


def test_lines_come_every_ten_seconds_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now)
    with Meter("embedding", 1000, "images", done=200) as meter:
        for seconds in range(1, 23):
            now = 100.0 + seconds
            meter.advance(10, note=f"loss {seconds}")
    said = capsys.readouterr()
    assert said.out == ""
    # At ten images a second: 690 are left after 11 seconds, 580 after 22.
    assert said.err.splitlines() == [
        "embedding  loss 11  310/1,000 images, 1:09 left",
        "embedding  loss 22  420/1,000 images, 0:58 left",
    ]


def test_quick_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("quick", 3, "things") as meter:
        meter.move_to(3)
    assert capsys.readouterr() == ("", "")
