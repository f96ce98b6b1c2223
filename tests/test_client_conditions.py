"""When a device may work: a fake machine's files, changed as a real one's would change."""

import datetime
import os
from pathlib import Path

import pytest

from client.conditions import Conditions, ConditionsConfig
from client.sensors import (
    DiskConfig,
    LoadConfig,
    MemoryPressureConfig,
    MeteredConfig,
    PowerConfig,
    QuietHoursConfig,
    TemperatureConfig,
)
from lowssl_core.errors import UserError
from lowssl_core.recipe import build_dataclass

PATHS = {
    "mains_type": "sys/class/power_supply/AC/type",
    "mains": "sys/class/power_supply/AC/online",
    "battery_type": "sys/class/power_supply/BAT0/type",
    "battery": "sys/class/power_supply/BAT0/capacity",
    "mouse_type": "sys/class/power_supply/hid-1/type",
    "mouse_scope": "sys/class/power_supply/hid-1/scope",
    "mouse": "sys/class/power_supply/hid-1/capacity",
    "cpu": "sys/class/thermal/thermal_zone0/temp",
    "gpu": "sys/class/thermal/thermal_zone1/temp",
    "load": "proc/loadavg",
    "memory": "proc/pressure/memory",
    "routes": "proc/net/route",
    "metered": "run/lowssl/metered",
}


class Machine:
    """A root folder with the files that the kernel of a small device would show."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = datetime.datetime(2026, 3, 1, 12, 0)

    def write(self, **files: str) -> None:
        for name, text in files.items():
            path = self.root / PATHS.get(name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    def conditions(self, config: ConditionsConfig | None = None) -> Conditions:
        return (config or ConditionsConfig()).build(self.root, root=self.root, clock=lambda: self.clock)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def psi(percent: float) -> str:
    return f"some avg10={percent:.2f} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"


def route(*interfaces: tuple[str, str, int]) -> str:
    head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"
    rows = (f"{name}\t{to}\t0101A8C0\t0003\t0\t0\t{metric}\t{to}\t0\t0\t0" for name, to, metric in interfaces)
    return "\n".join([head, *rows])


def test_a_machine_without_any_sensor_works(machine):
    assert machine.conditions().waiting() == []


def test_this_machine_can_be_asked(tmp_path):
    reasons = ConditionsConfig().build(tmp_path).waiting()
    assert all(isinstance(reason, str) and reason for reason in reasons)


def test_battery_waits_for_mains_or_charge_with_hysteresis(machine):
    machine.write(mains_type="Mains", mains="0", battery_type="Battery", battery="55")
    conditions = machine.conditions()
    assert conditions.waiting() == []
    machine.write(battery="49")
    assert conditions.waiting() == ["battery at 49 %: waiting for mains power or 60 %"]
    machine.write(battery="59")
    assert len(conditions.waiting()) == 1
    machine.write(battery="60")
    assert conditions.waiting() == []
    machine.write(battery="10", mains="1")
    assert conditions.waiting() == []


def test_mains_only_and_the_battery_of_a_mouse(machine):
    machine.write(mouse_type="Battery", mouse_scope="Device", mouse="3")
    conditions = machine.conditions(ConditionsConfig(power=PowerConfig(min_battery=100, resume_battery=100)))
    assert conditions.waiting() == []
    machine.write(battery_type="Battery", battery="100")
    assert conditions.waiting() == ["on battery (100 %), and mains power is asked for"]


def test_heat_waits_until_it_has_cooled_down(machine):
    machine.write(cpu="74000", gpu="60000")
    conditions = machine.conditions()
    assert conditions.waiting() == []
    machine.write(gpu="76000")
    assert conditions.waiting() == ["76 °C: waiting for 65 °C"]
    machine.write(cpu="66000", gpu="40000")
    assert conditions.waiting() == ["66 °C: waiting for 65 °C"]
    machine.write(cpu="65000")
    assert conditions.waiting() == []


def test_odd_sensors_are_passed_over(machine):
    machine.write(cpu="-273200", gpu="garbage", load="garbage", memory="garbage", routes="garbage")
    (machine.root / "sys/class/thermal/thermal_zone2/temp").mkdir(parents=True)
    conditions = machine.conditions()
    assert conditions.waiting() == []
    machine.write(gpu="90000")
    assert len(conditions.waiting()) == 1


def test_load_waits_until_others_are_done(machine):
    cores = os.cpu_count() or 1
    conditions = machine.conditions()
    for load, waits in ((1.4, False), (1.6, True), (1.0, True), (0.4, False), (1.0, False)):
        machine.write(load=f"{load * cores:.2f} 0.00 0.00 1/100 42")
        assert bool(conditions.waiting()) is waits
    machine.write(load=f"{3 * cores:.2f} 0.00 0.00 1/100 42")
    assert conditions.waiting() == ["load of 3.0 a core: other programs are busy; waiting for 0.5"]


def test_memory_pressure_waits(machine):
    conditions = machine.conditions()
    for percent, waits in ((9.0, False), (12.0, True), (3.0, True), (0.5, False)):
        machine.write(memory=psi(percent))
        assert bool(conditions.waiting()) is waits
    machine.write(memory=psi(40))
    assert conditions.waiting() == ["memory is short: programs wait 40 % of the time; waiting for 1 %"]


def test_a_metered_way_out_waits(machine):
    conditions = machine.conditions()
    machine.write(routes=route(("eth0", "00000000", 100), ("wwan0", "00000000", 700), ("wwan0", "0000FEA9", 0)))
    assert conditions.waiting() == []
    machine.write(routes=route(("wwan0", "00000000", 700)))
    assert conditions.waiting() == ["the network is metered (the way out is wwan0)"]
    machine.write(routes=route(("eth0", "00000000", 100)), metered="")
    assert conditions.waiting() == ["the network is metered (/run/lowssl/metered exists)"]
    unasked = ConditionsConfig(metered=MeteredConfig(interfaces="", file="/nowhere"))
    machine.write(routes=route(("wwan0", "00000000", 700)))
    assert machine.conditions(unasked).waiting() == []


@pytest.mark.parametrize(
    ("start", "end", "quiet", "loud"),
    [
        ("22:00", "07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("08:30", "17:00", ["08:30", "16:59"], ["08:29", "17:00", "00:00"]),
        ("12:00", "12:00", [], ["12:00", "00:00"]),
    ],
)
def test_quiet_hours_may_pass_midnight(machine, start, end, quiet, loud):
    conditions = machine.conditions(ConditionsConfig(quiet_hours=QuietHoursConfig(start=start, end=end)))
    for times, expected in ((quiet, [f"quiet hours until {end}"]), (loud, [])):
        for text in times:
            machine.clock = datetime.datetime.combine(datetime.date(2026, 3, 1), datetime.time.fromisoformat(text))
            assert conditions.waiting() == expected


def test_a_disk_that_fills_up_waits(machine):
    wanted = 10**18
    conditions = machine.conditions(ConditionsConfig(disk=DiskConfig(min_free_bytes=wanted)))
    (reason,) = conditions.waiting()
    assert reason.endswith("MB free on the disk; 1,000,000,000,000 MB are wanted")


def test_all_reasons_are_told_together(machine):
    machine.write(cpu="90000", memory=psi(50), battery_type="Battery", battery="5")
    assert len(machine.conditions().waiting()) == 3


def test_wrong_values_are_named():
    for build, name in (
        (lambda: PowerConfig(min_battery=50, resume_battery=40), "min_battery is 50"),
        (lambda: TemperatureConfig(max_celsius=float("nan")), "resume_celsius is 65"),
        (lambda: LoadConfig(max_load=0.1), "resume_load"),
        (lambda: MemoryPressureConfig(resume_percent=50), "resume_percent"),
        (lambda: QuietHoursConfig(start="25:00", end="07:00"), "start is '25:00'"),
        (lambda: DiskConfig(min_free_bytes=-1), "min_free_bytes"),
    ):
        with pytest.raises(ValueError, match=name):
            build()


def test_a_table_is_read_strictly():
    config = build_dataclass(
        ConditionsConfig, {"power": {"min_battery": 30}, "quiet_hours": {"start": "22:00", "end": "07:00"}}
    )
    assert config.power.min_battery == 30
    assert config.quiet_hours == QuietHoursConfig(start="22:00", end="07:00")
    with pytest.raises(UserError, match=r"unknown key power\.min_batery"):
        build_dataclass(ConditionsConfig, {"power": {"min_batery": 30}})
