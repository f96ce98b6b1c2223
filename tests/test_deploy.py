"""What deploy/ promises: images that install, a compose file and units that fit the package, certificates that hold."""

import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import sysconfig
import threading
import tomllib
import urllib.parse
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from federation_device import AddingLearner

from client.agent import Agent
from client.folder import VARIABLE, ImagesAwayError
from server.settings import PREFIX, Settings, load_settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ("pretrain", "server", "client")
# What an image's system is told, not what it installs for us: takes root, and a Debian.
OF_THE_SYSTEM = ("apt-get ", "groupadd ")


@dataclass
class Stage:
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        return [rest for name, rest in self.steps if name == instruction][-1]


def read_dockerfile() -> dict[str, Stage]:
    """The stages of the Dockerfile, each with its instructions."""
    text = "\n".join(line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    stages: dict[str, Stage] = {}
    for line in text.replace("\\\n", "").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            stages[name] = stage = Stage(parent)
        elif instruction and stages:
            stage.steps.append((instruction, rest.strip()))
    return stages


def whole_chain(name: str) -> Stage:
    """A stage with all that it inherits."""
    stages = read_dockerfile()
    chain = [stages[name]]
    while chain[0].parent in stages:
        chain.insert(0, stages[chain[0].parent])
    return Stage(chain[0].parent, [step for stage in chain for step in stage.steps])


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a builder is sent: what .dockerignore lets through, as it says."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*", "only what is named is sent"
    named = [line[1:] for line in ignored if line.startswith("!")]
    hidden = [line.removeprefix("**/") for line in ignored if line.startswith("**/")]
    assert len(ignored) == 1 + len(named) + len(hidden), "another kind of line: teach it to this test"
    folder = tmp_path_factory.mktemp("context")
    for name in named:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*hidden))
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with its own pip and nothing else, as the images start from."""
    folder = tmp_path_factory.mktemp("image") / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


class Machine:
    """Stands for a builder: carries a Dockerfile's steps out below a folder, with real shells, venvs and pip.

    What the running environment has installed counts as installed, but for `hidden`; anything else comes from the
    index at `index` or nowhere.
    """

    def __init__(
        self,
        folder: Path,
        context: Path,
        python: Path,
        *,
        arguments: dict[str, str],
        hidden: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.context, self.python = folder, context, python
        self.arguments = arguments
        self.root = folder / "root"
        self.index = folder / "index"
        installed = folder / "installed"
        for path in (self.index, installed):
            path.mkdir(parents=True)
        for path in {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}:
            for entry in path.iterdir():
                if not re.match(rf"_*({'|'.join(('lowssl', 'pip', *hidden))})\b", entry.name):
                    (installed / entry.name).symlink_to(entry)
        self.environment = {
            "PATH": f"{python / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": str(installed),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": self.index.as_uri(),
            "LC_ALL": "C.UTF-8",
        }
        self.directory = self.root
        self.done: set[str] = set()

    def build(self, name: str) -> None:
        """Carry out a stage and what it stands on, each once."""
        stages = read_dockerfile()
        if name in self.done:
            return
        self.done.add(name)
        if stages[name].parent in stages:
            self.build(stages[name].parent)
        for instruction, rest in stages[name].steps:
            if instruction == "ARG":
                variable, _, default = rest.partition("=")
                self.environment[variable] = self.arguments.get(variable, default.strip('"'))
            elif instruction == "ENV":
                for variable, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                    placed = re.sub(r"(?<![\w/])/(opt|var)/", rf"{self.root}/\1/", value)
                    self.environment[variable] = placed.replace("$PATH", self.environment["PATH"])
            elif instruction == "WORKDIR":
                self.directory = self.root / rest.lstrip("/")
                self.directory.mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                self.copy(rest.split())
            elif instruction == "RUN":
                self.run(rest)

    def copy(self, words: list[str]) -> None:
        if words[0].startswith("--from="):
            assert words[1] == words[2], "an environment moves to the same place"
            directory = self.directory
            self.build(words[0].removeprefix("--from="))
            self.directory = directory
            return
        for source in words[:-1]:
            path = self.context / source
            assert path.exists(), f"COPY {source}: no such file, or .dockerignore hides it"
            if path.is_dir():
                shutil.copytree(path, self.directory / words[-1], dirs_exist_ok=True)
            else:
                shutil.copy(path, self.directory)

    def run(self, command: str) -> None:
        while command.startswith("--mount="):
            mount, command = command.split(maxsplit=1)
            options = dict(option.split("=", 1) for option in mount.removeprefix("--mount=").split(","))
            if options["type"] == "bind":
                source = self.beside(options["from"]) / options["source"].lstrip("/")
                (self.directory / options["target"]).symlink_to(source)
        if not command.startswith(OF_THE_SYSTEM):
            self.call("/bin/sh", "-c", command, cwd=self.directory)

    def beside(self, name: str) -> Path:
        """The root of a stage that others take something from, carried out once for all tests."""
        folder = self.context.with_name(f"stage-{name}")
        if not folder.exists():
            Machine(folder, self.context, self.python, arguments={}).build(name)
        return folder / "root"

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a program as in the image; its output, which is shown where it fails."""
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=self.environment, text=True, check=False, capture_output=True
        )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    def installed(self, *names: str) -> list[str]:
        """The versions of packages as the image's Python finds them."""
        program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        return self.call(self.root / "opt/lowssl/bin/python", "-c", program, *names).split()


def offer(index: Path, name: str, version: str, content: dict[str, str]) -> None:
    """Put a wheel into a package index of files."""
    wheel = f"{name}-{version}-py3-none-any.whl"
    (index / name).mkdir(parents=True)
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(index / name / wheel, "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    (index / name / "index.html").write_text(f'<a href="{urllib.parse.quote(wheel)}">{wheel}</a>')


def offer_torch(index: Path, torch: str, torchvision: str, *, cuda: str | None) -> None:
    """PyTorch's shell, without the 200 MB: which build it is."""
    offer(index, "torch", torch, {"torch/__init__.py": "from torch import version", "torch/version.py": f"{cuda=}"})
    offer(index, "torchvision", torchvision, {"torchvision/__init__.py": ""})


def constrained(name: str) -> str:
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert found
    return found.group(1)


def check_works(machine: Machine, target: str) -> None:
    """The image's program starts, and it is the wheel that was built."""
    place = machine.root / "opt/lowssl"
    program, *_ = yaml.safe_load(whole_chain(target).last("ENTRYPOINT"))
    assert "usage: lowssl-" in machine.call(place / "bin" / program, "--help")
    where = machine.call(place / "bin/python", "-c", "import client, lowssl_core, server; print(server.__file__)")
    assert Path(where.strip()).is_relative_to(place / "lib")


def test_pretrain_image_installs_with_the_tested_versions(tmp_path: Path, context: Path, python: Path) -> None:
    """What is not installed here at a version that constraints.txt allows could come from nowhere."""
    machine = Machine(tmp_path, context, python, arguments={})
    machine.build("pretrain")
    check_works(machine, "pretrain")


def test_server_image_takes_torch_from_the_index_of_cpu_builds_and_keeps_it(
    tmp_path: Path, context: Path, python: Path
) -> None:
    torch, torchvision = constrained("torch"), constrained("torchvision")
    cpu = tmp_path / "cpu"
    offer_torch(cpu, f"{torch}+cpu", f"{torchvision}+cpu", cuda=None)
    arguments = {"TORCH_INDEX_URL": cpu.as_uri(), "TARGETARCH": "amd64"}
    machine = Machine(tmp_path, context, python, arguments=arguments, hidden=("torch", "torchvision"))
    offer_torch(machine.index, torch, torchvision, cuda="13.0")  # as the ordinary index does
    machine.build("server")
    check_works(machine, "server")
    assert machine.installed("torch", "torchvision") == [f"{torch}+cpu", f"{torchvision}+cpu"]


def test_client_image_for_arm_takes_the_last_ordinary_torch_without_cuda(
    tmp_path: Path, context: Path, python: Path
) -> None:
    machine = Machine(tmp_path, context, python, arguments={"TARGETARCH": "arm64"}, hidden=("torch", "torchvision"))
    offer_torch(machine.index, "2.10.0", "0.25.0", cuda=None)
    machine.build("client")
    check_works(machine, "client")
    assert machine.installed("torch", "torchvision") == ["2.10.0", "0.25.0"]


def test_cpu_image_refuses_a_torch_with_cuda(tmp_path: Path, context: Path, python: Path) -> None:
    machine = Machine(tmp_path, context, python, arguments={"TARGETARCH": "amd64"}, hidden=("torch", "torchvision"))
    with pytest.raises(RuntimeError, match="exit status 2: give --build-arg TORCH_INDEX_URL"):
        machine.build("environment-cpu")
    machine.done.discard("environment-cpu")
    offer_torch(machine.index, constrained("torch"), constrained("torchvision"), cuda="13.0")
    machine.arguments["TORCH_INDEX_URL"] = machine.index.as_uri()
    with pytest.raises(RuntimeError, match="no CPU-only build"):
        machine.build("server-environment")


@pytest.mark.parametrize("target", TARGETS)
def test_image_runs_as_nobody_in_particular_and_stops_when_asked(target: str) -> None:
    stage = whole_chain(target)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage.last("USER"))  # numbers: Kubernetes' runAsNonRoot reads them
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    assert yaml.safe_load(stage.last("ENTRYPOINT"))[0] in PROJECT["scripts"]
    assert f'image.version="{PROJECT["version"]}"' in next(rest for name, rest in stage.steps if name == "LABEL")


@pytest.mark.parametrize("is_secured", [False, True], ids=["http", "https"])
def test_servers_health_check_tells_a_live_server_from_a_dead_one(
    is_secured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = whole_chain("server")
    for name, rest in stage.steps:
        for variable, value in (pair.split("=", 1) for pair in shlex.split(rest) if name == "ENV"):
            if variable.startswith(PREFIX):
                monkeypatch.setenv(variable, value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv(f"{PREFIX}PORT", str(port))
    monkeypatch.setenv(f"{PREFIX}DATA_DIR", str(tmp_path))
    if is_secured:
        assert make_certificates(tmp_path, "localhost").returncode == 0
        monkeypatch.setenv(f"{PREFIX}TLS_CERTIFICATE", str(tmp_path / "server.pem"))
        monkeypatch.setenv(f"{PREFIX}TLS_KEY", str(tmp_path / "server.key"))
    interpreter, script = yaml.safe_load(stage.last("HEALTHCHECK").partition("CMD ")[2])
    check = [sys.executable, DEPLOY / Path(script).name]
    assert interpreter == "python"
    assert ("COPY", f"deploy/{Path(script).name} ./") in stage.steps
    program = Path(sys.executable).with_name(yaml.safe_load(stage.last("ENTRYPOINT"))[0])
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("documentation" in line for line in process.stdout)
            alive = subprocess.run(check, check=False).returncode
            process.send_signal(getattr(signal, stage.last("STOPSIGNAL")))
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert (alive, process.returncode) == (0, 0)
    assert subprocess.run(check, check=False).returncode == 1


def test_clients_health_check_tells_whether_the_agent_answers(tmp_path: Path) -> None:
    interpreter, *arguments = yaml.safe_load(whole_chain("client").last("HEALTHCHECK").partition("CMD ")[2])
    assert interpreter == "python"
    check = [sys.executable, *arguments]
    environment = {**os.environ, VARIABLE: str(tmp_path)}
    with Agent(lambda: AddingLearner(tmp_path, "a", 1), tmp_path):
        assert subprocess.run(check, check=False, env=environment, cwd=ROOT).returncode == 0
    done = subprocess.run(check, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no agent listens" in done.stderr


COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if "build" in service}


def test_compose_file_builds_images_of_this_version() -> None:
    assert sorted(service["build"]["target"] for service in OURS.values()) == ["client"] * 3 + ["server"]
    for service in OURS.values():
        assert service["build"]["target"] in read_dockerfile()
        assert service["image"] == f"lowssl-{service['build']['target']}:{PROJECT['version']}"
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        arguments = {rest.partition("=")[0] for name, rest in whole_chain("environment-cpu").steps if name == "ARG"}
        assert set(service["build"]["args"]) <= arguments


def test_compose_file_keeps_what_must_last_in_a_volume_of_each_service() -> None:
    """A service's volume lies where its image keeps its state; no two share one, nor a folder of images."""
    volumes = [one.rsplit(":/", 1)[0] for service in COMPOSE["services"].values() for one in service["volumes"]]
    assert len(set(volumes)) == len(volumes)
    assert {name for name in volumes if "$" not in name} == set(COMPOSE["volumes"])
    for service in OURS.values():
        home = dict(whole_chain(service["build"]["target"]).steps)["WORKDIR"]
        assert any(one.endswith(f":{home}") for one in service["volumes"])


def test_compose_file_waits_only_for_services_that_have_a_health_check() -> None:
    waits = {name: service.get("depends_on", {}) for name, service in COMPOSE["services"].items()}
    assert [name for name, others in waits.items() if not others] == ["postgres"]
    for name in {name for others in waits.values() for name in others}:
        service = COMPOSE["services"][name]
        assert "healthcheck" in service or whole_chain(service["build"]["target"]).last("HEALTHCHECK") != "NONE"
    for service in COMPOSE["services"].values():  # a name is found only on a network that both are on
        for name in service.get("depends_on", {}):
            assert set(service["networks"]) & set(COMPOSE["services"][name]["networks"])


def test_settings_of_compose_file_and_server_toml_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in COMPOSE["services"]["server"]["environment"].items():
        monkeypatch.setenv(variable, re.sub(r"\$\{[^}]*\}", "secret", value))
    settings = load_settings({}, None)
    assert settings.database_url == "postgresql://lowssl:secret@postgres/lowssl"
    assert load_settings({}, DEPLOY / "server.toml").data_dir == Path("/var/lib/lowssl-server")


def deployed() -> list[Path]:
    return [path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_every_variable_exists_where_it_is_read() -> None:
    text = "\n".join(path.read_text() for path in deployed())
    assert {name.lower() for name in re.findall(rf"\b{PREFIX}([A-Z_]+)\b", text)} <= set(Settings.model_fields)
    offered = re.findall(r"^([A-Z0-9_]+)=", (DEPLOY / "env.example").read_text(), flags=re.MULTILINE)
    asked = re.findall(r"\$\{([A-Z0-9_]+)", (DEPLOY / "compose.yaml").read_text())
    assert set(asked) == set(offered)


def test_no_file_names_a_registry_or_a_machine() -> None:
    for path in [*deployed(), ROOT / ".dockerignore"]:
        text = path.read_text()
        hosts = set(re.findall(r"https?://([^/\s:\"']+)", text)) - {"127.0.0.1", "server", "server.example"}
        assert not hosts, f"{path.name}: {hosts}"
        assert not re.search(r"\b(pypi|pythonhosted|docker\.io|ghcr\.|quay\.|nvcr\.|latest\b)", text), path.name
        assert not re.search(r"(?<![\w.])/(work|home|root|Users)/(?!\.cache/pip)", text), path.name


def test_readme_names_files_and_services_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    for name in re.findall(r"`([\w./-]+\.(?:sh|sbatch|toml|yaml|example))`|\bdeploy/([\w./-]+\w)", text):
        assert (DEPLOY / "".join(name)).exists(), name
    assert set(re.findall(r"docker compose (?:exec|run --rm|up --detach --build) ([\w-]+)", text)) <= set(
        COMPOSE["services"]
    )
    assert set(re.findall(r"--target (\w+) .*lowssl-\1:" + re.escape(PROJECT["version"]), text)) == set(TARGETS)


def unit(name: str) -> dict[str, list[str]]:
    """A unit's settings, each with all its values in order; sections do not matter, as no two have a name in common."""
    settings: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / f"{name}.service").read_text().splitlines():
        if "=" in line and line[0] not in "#;":
            settings.setdefault(line.split("=")[0], []).append(line.split("=", 1)[1])
    return settings


@pytest.mark.parametrize("name", ["lowssl-server", "lowssl-client"])
def test_unit_starts_a_program_of_the_package_as_its_user(name: str) -> None:
    settings = unit(name)
    program, *arguments = shlex.split(settings["ExecStart"][0])
    assert Path(program).name == name
    assert name in PROJECT["scripts"]
    assert settings["StateDirectory"] == [name]
    assert settings["User"] == settings["Group"] == ["lowssl"]
    assert (DEPLOY / "systemd/lowssl.conf").read_text().splitlines()[-1].startswith("u lowssl ")
    assert settings["NoNewPrivileges"] == ["yes"]
    assert settings["ProtectSystem"] == ["strict"]
    assert arguments


def test_clients_unit_ends_all_its_processes_and_leaves_room_for_others() -> None:
    settings = unit("lowssl-client")
    assert settings["KillMode"] == ["control-group"]
    assert {"Nice", "CPUQuota", "MemoryHigh", "MemoryMax", "TasksMax"} <= set(settings)
    assert f"{VARIABLE}=%S/lowssl-client" in settings["Environment"][-1].split()
    assert f"{VARIABLE}=/var/lib/lowssl" in whole_chain("client").last("ENV").split()
    # What the conditions read must stay to be seen.
    assert "ProcSubset" not in settings


def test_clients_unit_waits_for_a_disk_with_images_however_long() -> None:
    """Starts 10 seconds apart would soon be too many in an interval, and systemd would give up."""
    settings = unit("lowssl-client")
    assert settings["Restart"] == ["always"]
    assert settings["StartLimitIntervalSec"] == ["0"]
    assert settings["RestartPreventExitStatus"] == ["2"]
    assert ImagesAwayError.status != 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine (Debian: systemd)")
@pytest.mark.parametrize("name", ["lowssl-server", "lowssl-client"])
def test_systemd_accepts_the_unit_and_finds_it_well_shut(name: str, tmp_path: Path) -> None:
    """Verified with the programs where they are here. Exposure: of 100, in systemd's own count; 96 without settings."""
    text = (DEPLOY / "systemd" / f"{name}.service").read_text()
    path = tmp_path / f"{name}.service"
    path.write_text(text.replace("/opt/lowssl/bin/lowssl-", f"{Path(sys.executable).parent}/lowssl-"))
    verify = ["systemd-analyze", "verify", "--recursive-errors=no", path]
    done = subprocess.run(verify, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", path]
    assert subprocess.run(security, check=False, capture_output=True).returncode == 0


def make_certificates(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", DEPLOY / "certs.sh", folder, *names], check=False, capture_output=True, text=True, umask=0o022
    )


def shake_hands(folder: Path, host: str) -> str:
    """A handshake on loopback with the server's certificate, as a device that knows ca.pem checks it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=folder / "ca.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                server.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname()) as connection,
                client.wrap_socket(connection, server_hostname=host) as secured,
            ):
                return str(secured.version())
        finally:
            thread.join()


def test_certificates_hold_for_the_names_given_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "made/here"
    done = make_certificates(folder, "server.example", "127.0.0.1", "::1")
    assert done.returncode == 0, done.stderr
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile"]
    subprocess.run([*verify, folder / "ca.pem", folder / "server.pem"], check=True, stdout=subprocess.DEVNULL)
    for host in ("server.example", "127.0.0.1", "::1"):
        assert shake_hands(folder, host) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(folder, "other.example")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "ca.key": 0o600,
        "ca.pem": 0o644,
        "server.key": 0o600,
        "server.names": 0o600,
        "server.pem": 0o644,
    }


def test_certificates_are_made_anew_only_where_needed(tmp_path: Path) -> None:
    assert make_certificates(tmp_path, "localhost").returncode == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert make_certificates(tmp_path, "localhost").returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    (tmp_path / "server.key").unlink()
    (tmp_path / "server.names").unlink()  # as when it was killed half-way
    assert make_certificates(tmp_path, "localhost").returncode == 0
    assert shake_hands(tmp_path, "localhost")
    assert make_certificates(tmp_path, "localhost", "other.example").returncode == 0
    assert shake_hands(tmp_path, "other.example")
    assert (tmp_path / "ca.pem").read_bytes() == first["ca.pem"]
    assert (tmp_path / "server.pem").read_bytes() != first["server.pem"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "expected a folder, then the server's names"),
        (["a b"], "'a b' is neither a DNS name nor an IP address"),
        (["$(id)"], "is neither a DNS name nor an IP address"),
        (["300.1.1.1"], "openssl x509: "),
    ],
)
def test_certificates_are_refused_for_what_is_no_name(names: list[str], said: str, tmp_path: Path) -> None:
    done = make_certificates(tmp_path, *names)
    assert done.returncode == 2
    assert done.stderr.startswith("certs.sh: ")
    assert said in done.stderr
    assert not list(tmp_path.glob("server.*"))


@pytest.mark.parametrize("path", sorted([*DEPLOY.glob("*.sh"), *DEPLOY.glob("*.sbatch")]), ids=lambda path: path.name)
def test_script_is_well_formed(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text()


def test_torchrun_example_trains(tmp_path: Path) -> None:
    """On one process, without GPUs."""
    environment = {**os.environ, "PROCESSES": "1", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    shorter = ["--set=epochs=1", "--set=data.batch_size=64", "--set=views.num_locals=1", "--set=method.outputs=16"]
    command = ["bash", DEPLOY / "torchrun.sh", "tiny-dino-matched", "--data=photos", f"--out={tmp_path}/run"]
    done = subprocess.run([*command, *shorter], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/encoder.safetensors").is_file()
