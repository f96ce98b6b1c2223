"""Results as a table that lines up and as JSON that holds everything."""

import json
from pathlib import Path

from lowssl_core.evaluation.results import Figures, Results

RESULTS = Results(
    task="knn",
    model="run/checkpoint.safetensors",
    settings={"ks": [1, 20]},
    rows=[
        Figures(subject="student", values={"k = 1": 0.5, "a long measure": 123.4567}, details={"width": 8}),
        Figures(subject="raw pixels", values={"k = 1": 0.25}),
    ],
    notes=["what it means"],
)


def test_columns_line_up_and_what_is_not_known_is_a_dash() -> None:
    head, student, pixels, blank, note = RESULTS.table().split("\n")
    assert len(head) == len(student) == len(pixels)
    assert student.split() == ["student", "0.500", "123.457"]
    assert pixels.split() == ["raw", "pixels", "0.250", "-"]
    for measure, value in (("k = 1", "0.500"), ("a long measure", "123.457")):
        assert head.index(measure) + len(measure) == student.index(value) + len(value)
    assert (blank, note) == ("", "what it means")


def test_json_holds_everything(tmp_path: Path) -> None:
    RESULTS.write_json(tmp_path / "new" / "results.json")
    read = json.loads((tmp_path / "new" / "results.json").read_text())
    assert read["rows"][0] == {
        "subject": "student",
        "values": {"k = 1": 0.5, "a long measure": 123.4567},
        "details": {"width": 8},
    }
    assert (read["task"], read["model"], read["settings"]) == ("knn", "run/checkpoint.safetensors", {"ks": [1, 20]})
