"""`lowssl compare` on real small runs: the page, the numbers on it, and folders in every state."""

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowssl_core.checkpoint import load_checkpoint
from lowssl_core.command_line import run_for_user
from lowssl_core.commands.compare import command
from lowssl_core.comparison.runs import unique_names
from lowssl_core.evaluation.results import Figures, Results
from lowssl_core.journal import read_metrics
from lowssl_core.pretrain import main as pretrain
from lowssl_core.recipe import differences

RECIPE = """
epochs = 2
alpha = 0.4
[backbone]
name = "resnet_tiny"
[method]
name = "dino"
hidden = 16
bottleneck = 8
outputs = 12
[views]
global_size = 16
num_locals = 2
[data]
batch_size = 4
[optim]
warmup_steps = 2
[monitor]
log_every_steps = 1
quality_every_epochs = 1
quality_images = 6
"""
BASELINE = ("views.global_scale=[0.14, 1.0]", "views.local_scale=[0.05, 0.14]", "views.local_size=9", "alpha=")
VOID = {"meta", "img", "br", "link", "input", "hr", "col"}


class Page(HTMLParser):
    """Reads a page: fails where tags do not balance, and keeps texts and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def compare(*argv: object) -> int:
    parser = argparse.ArgumentParser(prog="lowssl compare")
    command.add_arguments(parser)
    arguments = parser.parse_args([str(each) for each in argv])
    return run_for_user("lowssl compare", lambda: command.run(arguments))


def images(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for index in range(16):
        pixels = np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        path = folder / ("cats", "dogs")[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs matched, baseline and other (on other data); tests copy what they change."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "recipe.toml").write_text(RECIPE)
    for name, seed, overrides in (("matched", 0, ()), ("baseline", 0, BASELINE), ("other", 1, ("epochs=1",))):
        data = folder / f"images{seed}"
        if not data.exists():
            images(data, seed)
        argv = [str(folder / "recipe.toml"), "--data", str(data), "--out", str(folder / name)]
        argv += ["--device", "cpu", "--workers", "0", *(part for each in overrides for part in ("--set", each))]
        assert pretrain(argv) == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Copies a run under another name."""

    def copy(name: str, to: str) -> Path:
        shutil.copytree(made / name, tmp_path / to)
        return tmp_path / to

    return copy


def compared(folder: Path, *argv: object) -> tuple[Page, dict]:
    """The page and the JSON that the command makes of some runs."""
    out, tree = folder / "compare.html", folder / "compare.json"
    assert compare(*argv, "--out", out, "--json", tree) == 0
    return Page(out.read_text()), json.loads(tree.read_text(), parse_constant=pytest.fail)


def warnings_of(tree: dict) -> str:
    return " ".join(note["text"] for note in tree["notes"] if note["level"] == "warning")


def notes_of(tree: dict) -> str:
    return " ".join(note["text"] for note in tree["notes"] if note["level"] == "note")


def test_the_page_is_whole_and_needs_nothing_else(made: Path, tmp_path: Path) -> None:
    page, _ = compared(tmp_path, made / "matched", made / "baseline")
    html = (tmp_path / "compare.html").read_text()
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert name != "src" or str(value).startswith("data:")
        assert name != "href" or str(value).startswith("#")
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    # Three charts of quality, three of losses, one of scales, and boxes and views of each of two kinds of views.
    assert [name for name, _ in page.attributes].count("aria-label") >= 3 + 3 + 1 + 2 * 2


def test_results_are_those_of_the_metrics(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, tree = compared(tmp_path, made / "matched", made / "baseline")
    printed = capsys.readouterr().out
    for run, key in (("matched", "A"), ("baseline", "B")):
        first, *_, last = read_metrics(made / run, "quality")
        expected = [f"{read_metrics(made / run, 'end')[0]['images']:,}"]
        for measure in ("retrieval", "knn", "rankme"):
            form = ".1f" if measure == "rankme" else ".3f"
            figures = (first[measure], last[measure], last[f"teacher_{measure}"])
            expected += [f"{value:{form}}" for value in figures]
        row = next(row for row in page.rows if row[0] == f"{key}{run}" and len(row) == len(expected) + 1)
        assert [cell.removesuffix(" (best)") for cell in row[1:]] == expected
        line = next(line for line in printed.splitlines() if line.startswith(f"{key}  {expected[0]}"))
        assert expected[1] in line
    by_key = {run["key"]: run for run in tree["runs"]}
    assert by_key["A"]["training"] == read_metrics(made / "matched", "train")
    assert by_key["B"]["quality"] == read_metrics(made / "baseline", "quality")
    pixels = read_metrics(made / "matched", "quality")[0]
    assert (
        f"Raw pixels, the yardstick of what needs no learning: Retrieval {pixels['pixels_retrieval']:.3f}" in page.text
    )


def test_the_best_of_a_column_is_marked(tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    runs = [copied("matched", name) for name in ("low", "high", "same")]
    for run, retrieval in zip(runs, (0.25, 0.75, 0.7501), strict=True):
        path = run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        [row for row in rows if row["kind"] == "quality"][-1]["retrieval"] = retrieval
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = compared(tmp_path, *runs)
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 11}
    assert [rows[name][2] for name in ("Alow", "Bhigh", "Csame")] == ["0.250", "0.750 (best)", "0.750 (best)"]
    # Nothing is best where all are the same.
    assert not any(cell.endswith(" (best)") for row in rows.values() for place, cell in enumerate(row) if place != 2)


def test_recipe_differences_are_those_of_the_recipes(made: Path, tmp_path: Path) -> None:
    page, tree = compared(tmp_path, made / "matched", made / "baseline")
    one, other = (load_checkpoint(made / run / "checkpoint.safetensors").recipe for run in ("matched", "baseline"))
    told = [
        f"{key}: {values.get('A', 'absent')!r}, {values.get('B', 'absent')!r}"
        for key, values in tree["differences"].items()
    ]
    assert told == differences(one, other)
    assert ["alpha", "0.4", "absent (changed)"] in page.rows
    shown = [row[0] for row in page.rows if row[0] == "alpha" or row[0].startswith("views.")]
    assert shown == list(tree["differences"])


def test_runs_of_other_data_and_length_are_not_ranked(made: Path, tmp_path: Path) -> None:
    page, tree = compared(tmp_path, made / "matched", made / "other")
    assert "trained on different data" in warnings_of(tree)
    assert "may not be compared" in warnings_of(tree)
    assert "different numbers of images" in notes_of(tree)
    assert "Results after at most 16 images" in page.text
    assert not any(cell.endswith(" (best)") for row in page.rows for cell in row)


def test_one_run_is_enough(made: Path, tmp_path: Path) -> None:
    page, tree = compared(tmp_path, made / "matched")
    assert "Run matched" in page.texts
    assert tree["differences"] == {}
    assert not any(cell.endswith(" (best)") for row in page.rows for cell in row)


def test_a_run_given_twice_counts_once(made: Path, tmp_path: Path) -> None:
    _, tree = compared(tmp_path, made / "matched", made / "baseline" / ".." / "matched")
    assert [run["name"] for run in tree["runs"]] == ["matched"]


def test_a_seed_is_named_as_chance(made: Path, tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    _, tree = compared(tmp_path, made / "matched", copied("matched", "again"))
    assert "A and B have the same recipe and seed" in notes_of(tree)


def test_a_run_that_has_begun(tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    run = copied("matched", "begun")
    (run / "checkpoint.safetensors").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    page, tree = compared(tmp_path, run)
    assert tree["runs"][0]["state"] == "running"
    assert tree["runs"][0]["recipe"] is None
    assert "its recipe is known from its first checkpoint on" in notes_of(tree)
    assert "No quality has been measured yet." in page.texts
    assert "No step has been recorded yet." in page.texts


def test_a_run_stopped_long_ago_without_a_checkpoint(tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    run = copied("matched", "stopped")
    (run / "checkpoint.safetensors").unlink()
    path = run / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:4]))
    os.utime(path, (0, 0))
    _, tree = compared(tmp_path, run)
    assert tree["runs"][0]["status"] == f"stopped at step {read_metrics(run, 'train')[-1]['step']}"
    assert "checkpoint.safetensors is missing" in warnings_of(tree)


def test_damage_is_told_and_the_rest_is_shown(tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    run = copied("matched", "damaged")
    rows = read_metrics(run, "train")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"kind": "train", "step": 9, "loss": NaN}\n{"kind": "quality", "st')
    (run / "checkpoint.safetensors").write_bytes(b"half a file")
    (run / "knn.json").write_text("{")
    _, tree = compared(tmp_path, run)
    assert "metrics.jsonl has 3 damaged lines" in warnings_of(tree)
    assert "its checkpoint cannot be used: checkpoint.safetensors is damaged" in warnings_of(tree)
    assert "knn.json is damaged" in warnings_of(tree)
    assert str(tmp_path) not in warnings_of(tree)
    assert tree["runs"][0]["training"] == rows


def test_a_checkpoint_alone_is_a_run(tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    run = copied("matched", "alone")
    (run / "metrics.jsonl").unlink()
    _, tree = compared(tmp_path, run)
    assert (tree["runs"][0]["state"], tree["runs"][0]["images"]) == ("done", 32)
    assert "metrics.jsonl is missing" in warnings_of(tree)


def test_what_an_earlier_run_left_in_the_folder_is_not_shown(
    tmp_path: Path, copied: Callable[[str, str], Path]
) -> None:
    run = copied("matched", "again")
    whole = read_metrics(run, "quality")
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + path.read_text())
    _, tree = compared(tmp_path, run)
    assert tree["runs"][0]["quality"] == whole
    assert tree["runs"][0]["resumes"] == 0


def test_warnings_and_numbers_that_are_none_are_named(tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    run = copied("matched", "bad")
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()[:4]
    lines += [
        json.dumps({"kind": "warning", "step": step, "name": name, "message": "turn <a> knob"})
        for step, name in ((3, "few prototypes"), (4, "not a number"))
    ]
    path.write_text("\n".join(lines) + "\n")
    (run / "checkpoint.safetensors").unlink()
    page, tree = compared(tmp_path, run)
    assert tree["runs"][0]["status"] == "failed at step 4: not a number"
    assert "A warned at step 3 of few prototypes." in warnings_of(tree)
    assert ["Abad", "3", "few prototypes", "turn <a> knob"] in page.rows


def test_results_of_evaluate_are_a_table_for_each_task(
    tmp_path: Path, copied: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [copied("matched", "one"), copied("baseline", "two")]
    for run, (accuracy, error) in zip(runs, ((0.5, 0.5), (0.75, 0.25)), strict=True):
        figures = [Figures(subject="student", values={"accuracy": accuracy, "error": error, "alpha_req": error})]
        results = Results(task="knn", model="encoder", settings={"k": 20}, rows=figures, notes=["k = 20"])
        results.write_json(run / "knn.json")
        (run / "notes.json").write_text('{"mine": 1}')
    page, tree = compared(tmp_path, *runs)
    assert "Evaluation: knn" in page.texts
    assert ["Astudent", "0.500", "0.500", "0.500"] in page.rows
    assert ["Bstudent", "0.750 (best)", "0.250 (best)", "0.250"] in page.rows
    assert list(tree["runs"][0]["evaluations"]) == ["knn.json"]
    assert "B student  0.750*    0.250*" in capsys.readouterr().out


def test_what_files_say_is_escaped(tmp_path: Path, copied: Callable[[str, str], Path]) -> None:
    page, _ = compared(tmp_path, copied("matched", "<script>alert(1)&"))
    assert "script" not in page.tags
    assert "<script>alert(1)&" in page.texts


def test_views_are_drawn_on_an_image_when_data_is_given(made: Path, tmp_path: Path) -> None:
    page, _ = compared(tmp_path, made / "matched", made / "baseline", "--data", made / "images0")
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 2
    assert pictures[0] != pictures[1]
    assert all(str(value).startswith("data:image/png;base64,") for value in pictures)


def test_the_terminal_fits_100_columns(
    tmp_path: Path, copied: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [copied("matched", f"{index}-{'long-name-' * 12}") for index in range(7)]
    compared(tmp_path, *runs)
    lines = capsys.readouterr().out.splitlines()[:-2]  # the last two name the files written
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("status") for line in lines) == 2


def test_names_have_the_parents_that_tell_them_apart() -> None:
    folders = [Path(path) for path in ("/a/x/run", "/a/y/run", "/b/x/run", "/c/other")]
    assert unique_names(folders) == ["a/x/run", "y/run", "b/x/run", "other"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty is no run of lowssl-pretrain: it has neither metrics.jsonl nor checkpoint.safetensors"),
        (["above"], "it holds the runs matched: give those"),
        (["above/matched/metrics.jsonl"], "is a file; give the run's folder: above/matched"),
        (["above/matched", "--out", "empty"], "--out empty is a folder"),
        (["above/matched", "--json", "empty"], "--json empty is a folder"),
        (["above/matched", "--data", "nowhere"], "there is no data at 'nowhere'"),
        (["above/matched", "--data", ""], "the data path is empty"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    tmp_path: Path,
    copied: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    copied("matched", "above/matched")
    assert compare(*argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "compare.html").exists()
