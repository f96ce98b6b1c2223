import argparse
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lowssl_core import command_line
from lowssl_core.command_line import Command, main, run_for_user
from lowssl_core.errors import UserError


def install(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr(command_line, "entry_points", lambda group: points if group == "lowssl.commands" else ())


def greet(arguments: argparse.Namespace) -> int:
    if arguments.word == "nothing":
        raise UserError("--word nothing: expected a word")
    if arguments.word == "stop":
        raise KeyboardInterrupt
    print(arguments.word)
    return 0


greeting = Command(
    name="greet",
    help="say a word",
    add_arguments=lambda parser: parser.add_argument("--word", required=True) and None,
    run=greet,
)


@pytest.fixture
def greeting_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        EntryPoint("greet", "test_command_line:greeting", command_line.GROUP),
        EntryPoint("absent", "a_package_that_is_not_there:command", command_line.GROUP),
    )
    monkeypatch.setitem(sys.modules, "test_command_line", sys.modules[__name__])


@pytest.mark.usefixtures("greeting_installed")
def test_a_command_of_another_package_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["greet", "--word", "hello"]) == 0
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.usefixtures("greeting_installed")
def test_an_error_of_the_user_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["greet", "--word", "nothing"]) == 2
    assert capsys.readouterr().err == "lowssl greet: --word nothing: expected a word\n"


@pytest.mark.usefixtures("greeting_installed")
def test_an_interrupted_command_has_status_130_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["greet", "--word", "stop"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("greeting_installed")
def test_a_command_whose_package_is_missing_leaves_the_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["absent", "--any", "thing"]) == 2
    assert "not available in this installation: No module named" in capsys.readouterr().err
    assert main(["greet", "--word", "hello"]) == 0


@pytest.mark.usefixtures("greeting_installed")
@pytest.mark.parametrize("argv", [[], ["dance"], ["greet"], ["greet", "--word"]])
def test_a_wrong_command_line_has_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 2
    assert "usage: lowssl" in capsys.readouterr().err


@pytest.mark.usefixtures("greeting_installed")
def test_help_lists_each_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    printed = capsys.readouterr().out
    assert "say a word" in printed
    assert "(not available" in printed


def test_the_core_brings_its_own_commands() -> None:
    assert {"demo", "recalibrate", "views"} <= {command.name for command in command_line.find_commands()}


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys; from lowssl_core.command_line import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'matplotlib', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = (
        "import sys; from lowssl_core.command_line import run_for_user\n"
        "def run():\n"
        "    for _ in range(100_000): print('line')\n"
        "    return 0\n"
        "sys.exit(run_for_user('lowssl test', run))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        (tmp_path / "missing" / "file").write_text("")
        return 0

    assert run_for_user("lowssl test", run) == 2
    printed = capsys.readouterr().err
    assert "missing/file" in printed
    assert printed.count("\n") == 1


def test_other_errors_are_not_hidden() -> None:
    def run() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_for_user("lowssl test", run)
