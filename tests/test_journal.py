"""What a run records: rows that survive kills and resumes, plain lines or a live one."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowssl_core import journal as journal_module
from lowssl_core.journal import Journal, read_metrics
from lowssl_core.schedules import Progress


def at(step, total=20):
    return Progress(step=step, total_steps=total, steps_per_epoch=10)


def row(step, **more):
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 2.0 + step,
        "global_loss": 1.0,
        "local_loss": 3.0,
        "images_per_second": 40.0,
        "seconds_per_step": 0.5,
        "waiting": 0.25,
        **more,
    }


def steps_of(folder, kind="train"):
    return [each["step"] for each in read_metrics(folder, kind)]


def test_rows_come_back_as_they_were_written_by_kind(tmp_path):
    with Journal(tmp_path, at(0)) as journal:
        journal.write("start", {"step": 0, "data": {"images": 3}})
        journal.step(at(1), row(1))
        journal.quality(at(1), row(1, rankme=4.5))
        journal.warn(at(1), "loss at chance", "turn a knob")
        journal.step(at(2), row(2))
    assert read_metrics(tmp_path, "start") == [{"kind": "start", "step": 0, "data": {"images": 3}}]
    assert read_metrics(tmp_path, "train") == [{"kind": "train", **row(1)}, {"kind": "train", **row(2)}]
    assert read_metrics(tmp_path, "quality")[0]["rankme"] == 4.5
    assert read_metrics(tmp_path, "warning")[0]["message"] == "turn a knob"


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with Journal(tmp_path, at(0)) as journal:
        journal.step(at(1), row(1))
        assert steps_of(tmp_path) == [1]


def test_rows_after_the_resumed_step_and_of_an_end_are_dropped(tmp_path):
    with Journal(tmp_path, at(0)) as journal:
        journal.write("start", {"step": 0})
        for step in (5, 10, 15, 20):
            journal.step(at(step), row(step))
        journal.quality(at(20), row(20))
        journal.write("end", {"step": 10})
    with Journal(tmp_path, at(10)) as journal:
        journal.step(at(11), row(11))
    assert steps_of(tmp_path) == [5, 10, 11]
    assert steps_of(tmp_path, "start") == [0]
    assert steps_of(tmp_path, "quality") == []
    assert steps_of(tmp_path, "end") == []


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    with Journal(tmp_path, at(0)) as journal:
        journal.step(at(1), row(1))
        journal.step(at(2), row(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    with Journal(tmp_path, at(5)) as journal:
        journal.step(at(6), row(6))
    assert steps_of(tmp_path) == [1, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_tensorboard_forgets_the_steps_that_were_taken_in_vain(tmp_path):
    with Journal(tmp_path, at(0)) as journal:
        for step in (1, 2, 3):
            journal.step(at(step), row(step))
    with Journal(tmp_path, at(2)) as journal:
        journal.step(at(3), row(3, loss=9.0))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown[-1] == (3, 9.0)
    assert len(shown) <= 3
    assert "train/step" not in events.Tags()["scalars"]


def test_without_a_terminal_lines_come_seldom_and_the_last_step_always_has_one(tmp_path, capsys, monkeypatch):
    seconds = {1: 100.0, 2: 101.0, 3: 109.0, 4: 111.0, 20: 112.0}
    with Journal(tmp_path, at(0)) as journal:
        for step, now in seconds.items():
            monkeypatch.setattr(journal_module.time, "monotonic", lambda now=now: now)
            journal.step(at(step), row(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["step 1/20", "step 4/20", "step 20/20"]
    assert lines[1] == (
        "epoch 0.40  step 4/20  loss 6.0000 (global 1.0000, local 3.0000)  40 images/s  waiting 25%  0:08 left"
    )
    assert steps_of(tmp_path) == [1, 2, 3, 4, 20]


def test_the_time_left_is_told_in_hours_where_it_takes_hours(tmp_path, capsys):
    with Journal(tmp_path, at(0)) as journal:
        journal.step(at(10, total=10_010), row(10, seconds_per_step=1.5))
    assert capsys.readouterr().out.splitlines()[0].endswith("4:10:00 left")


def test_a_terminal_has_one_live_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with Journal(tmp_path, at(0)) as journal:
        for step in (5, 10, 15, 20):
            journal.step(at(step), row(step))
        journal.say("a line [of] its own")
    shown = capsys.readouterr().out
    assert "\x1b[" in shown
    assert "step 20/20" in shown
    assert "100%" in shown
    assert "a line [of] its own" in shown
    assert steps_of(tmp_path) == [5, 10, 15, 20]


def test_a_warning_is_shown_with_its_step_and_name(tmp_path, capsys):
    with Journal(tmp_path, at(0)) as journal:
        journal.warn(at(7), "few prototypes", "only [1%] used")
    assert capsys.readouterr().out == "WARNING at step 7: few prototypes: only [1%] used\n"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_journal_is_closed_however_its_run_ends(tmp_path, error):
    journal = Journal(tmp_path, at(0))
    try:
        with journal:
            journal.step(at(1), row(1))
            if error:
                raise error
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    with pytest.raises(ValueError, match="closed file"):
        journal.write("train", row(2))
    assert steps_of(tmp_path) == [1]
