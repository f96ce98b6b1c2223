"""Messages say what was meant, and whatever else arrives is refused with a reason, without cost."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from aggregation_data import MANIFEST

from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.messages import MAX_HEADER, Metrics, Task, Update, read_message, write_message
from lowssl_core.recipe import load_recipe, recipe_from_dict, recipe_names

TASK = Task(
    round=3,
    run="run-1",
    version=12,
    manifest=MANIFEST.hash,
    recipe={"method": {"name": "moco"}, "views": {"scale": [0.2, 1.0]}, "seed": 0},
    codec="top-k",
    share=0.05,
    seconds=120.0,
    proximal=0.01,
    payload=b"weights",
)
UPDATE = Update(
    round=3,
    base_version=12,
    device="camera.7",
    update_id="5f0c",
    manifest=MANIFEST.hash,
    weight=320.0,
    metrics=Metrics(steps=10, seconds=4.5, new_images=80, replayed_images=240, loss=3.25, drift=None),
    payload=b"delta",
)


def read(data, kind=Update, max_payload=100):
    return read_message(kind, data, max_payload=max_payload)


def framed(header, payload=b"delta"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return b"LSSL\x01" + len(text).to_bytes(4, "big") + text + payload


def header_of(message):
    data = write_message(message)
    return json.loads(data[9 : 9 + int.from_bytes(data[5:9], "big")])


@pytest.mark.parametrize("message", [TASK, UPDATE])
def test_what_is_written_is_read(message):
    assert read(write_message(message), type(message)) == message


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_travels_whole(name):
    recipe = load_recipe(name)
    task = dataclasses.replace(TASK, recipe=recipe.as_dict())
    assert recipe_from_dict(read(write_message(task), Task).recipe) == recipe


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": "1"}, "weight"),
        ({"weight": True}, "weight"),
        ({"weight": None}, "weight"),
        ({"weight": 10**400}, "weight"),
        ({"round": 1.0}, "round"),
        ({"round": -1}, "round"),
        ({"round": 10**30}, "round"),
        ({"base_version": None}, "base_version"),
        ({"device": ""}, "device"),
        ({"device": "../x y"}, "device"),
        ({"device": "\n"}, "device"),
        ({"device": "x" * 129}, "device"),
        ({"update_id": "\ud800"}, "update_id"),
        ({"manifest": "ab"}, "manifest"),
        ({"metrics": [1]}, "metrics"),
        ({"metrics": {"steps": 1, "images": 2}}, "images"),
        ({"metrics": {"steps": -1}}, "steps"),
        ({"metrics": {"loss": "low"}}, "loss"),
        ({"payload": "abc"}, "payload"),
        ({"boost": 1000}, "boost"),
        ({"kind": "task"}, "not update"),
        ({"kind": ["update"]}, "not update"),
    ],
)
def test_a_header_with_anything_else_is_refused(change, reason):
    with pytest.raises(BadUpdate, match=reason):
        read(framed(header_of(UPDATE) | change))


@pytest.mark.parametrize("missing", ["round", "device", "weight", "manifest", "update_id"])
def test_what_is_missing_is_named(missing):
    header = header_of(UPDATE)
    del header[missing]
    with pytest.raises(BadUpdate, match=f"{missing} is missing"):
        read(framed(header))


@pytest.mark.parametrize(
    "change", [{"codec": "int4"}, {"codec": {}}, {"share": 0}, {"seconds": 0}, {"proximal": -1}, {"recipe": []}]
)
def test_a_task_that_cannot_be_is_refused(change):
    with pytest.raises(BadUpdate, match=next(iter(change))):
        read(framed(header_of(TASK) | change), Task)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"weight": NaN}', "NaN"),
        (b'{"weight": -Infinity}', "Infinity"),
        (b'{"weight": 1e999}', "1e999"),
        (b'{"weight": 1, "weight": 2}', "twice"),
        (b"[" * 100_000, "JSON"),
        (b'{"a":' * 30_000, "JSON"),
        (b'{"weight": ' + b"9" * 10_000 + b"}", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "table"),
        (b"", "JSON"),
    ],
)
def test_a_header_that_is_no_strict_json_is_refused(text, reason):
    with pytest.raises(BadUpdate, match=reason):
        read(framed(text))


def test_sizes_are_checked_before_anything_is_made_of_them():
    data = write_message(UPDATE)
    long = data[:5] + (2**32 - 1).to_bytes(4, "big") + data[9:]
    body = framed(b" " * (MAX_HEADER + 1))
    huge = data + bytes(10_000_000)
    tracemalloc.start()
    heavy = data + bytes(100)
    for bad, reason in ((long, "cut"), (body, "header above"), (huge, "at most"), (heavy, "payload of 105")):
        with pytest.raises(BadUpdate, match=reason):
            read(bad)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b"LSSL", b"PNG\r\n", b"LSSL\x02" + bytes(4), b"LSSL\x01\x00\x00\x00\x09"])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(BadUpdate, match="message: "):
        read(data)


def test_whatever_arrives_is_a_message_or_refused():
    rng = np.random.default_rng(0)
    whole, reasons = write_message(UPDATE), []
    for turn in range(5000):
        data = bytearray(whole)
        kind = turn % 4
        if kind == 0:
            data = bytearray(rng.bytes(int(rng.integers(200))))
        elif kind == 1:
            del data[rng.integers(len(data)) :]
        elif kind == 2:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        else:
            start = int(rng.integers(9, len(data)))
            data[start : start + int(rng.integers(20))] = rng.bytes(int(rng.integers(20)))
        try:
            update = read(bytes(data))
        except BadUpdate as error:
            reasons.append(str(error))
        else:
            assert read(write_message(update)) == update
    assert len(reasons) > 3000
    assert all("\n" not in reason and len(reason) < 300 for reason in reasons)


def test_what_cannot_travel_is_not_written():
    with pytest.raises(BadUpdate, match="cannot be written"):
        write_message(dataclasses.replace(UPDATE, weight=float("nan")))
    with pytest.raises(BadUpdate, match="header of"):
        write_message(dataclasses.replace(TASK, recipe={"note": "x" * MAX_HEADER}))
