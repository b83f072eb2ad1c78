"""Sensors of a board, from files as sysfs has them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from edge.system.board import FRESH_S, Board, read_rails, read_zones
from tests.support.board import write_rapl, write_sensor, write_zone


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a board reads, in its one item."""
    now = [100.0]
    monkeypatch.setattr("edge.system.board.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_board_without_sensors_tells_nothing(tmp_path: Path) -> None:
    assert Board(tmp_path).read() == ({}, {})


def test_board_of_this_machine_can_be_read() -> None:
    watts, celsius = Board().read()
    assert all(value >= 0 for value in watts.values()) and all(-60 < value < 150 for value in celsius.values())


def test_board_watts_of_a_jetson_are_found_by_label(tmp_path: Path) -> None:
    write_sensor(tmp_path, "VDD_IN", 1, millivolts=5000, milliamperes=900)
    write_sensor(tmp_path, "VDD_CPU_GPU_CV", 2, millivolts=5000, milliamperes=200)
    write_sensor(tmp_path, "sum of shunt voltages", 7, millivolts=12, milliamperes=None)
    assert read_rails(tmp_path) == {"VDD_IN": 4.5, "VDD_CPU_GPU_CV": 1.0}


def test_board_other_chips_are_no_rails(tmp_path: Path) -> None:
    write_sensor(tmp_path, "Vcore", 0, millivolts=1100, milliamperes=10)
    (tmp_path / "class/hwmon/hwmon3/name").write_text("nct6775\n")
    assert read_rails(tmp_path) == {}


def test_board_zones_that_are_off_are_left_out(tmp_path: Path) -> None:
    write_zone(tmp_path, 0, "cpu-thermal", "48500\n")
    write_zone(tmp_path, 1, "cv0-thermal", "")  # a Jetson's kernel gives an error here: nothing can be read
    assert read_zones(tmp_path) == {"cpu-thermal": 48.5}


def test_board_zones_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for number, temp in ((2, "30000"), (10, "40000"), (0, "-5000")):
        write_zone(tmp_path, number, "acpitz" if number else "x86_pkg_temp", temp)
    assert read_zones(tmp_path) == {"x86_pkg_temp": -5.0, "acpitz 2": 30.0, "acpitz 10": 40.0}


def test_board_watts_of_a_pc_are_energy_over_time(tmp_path: Path, clock: list[float]) -> None:
    write_rapl(tmp_path, "intel-rapl:0", "package-0", energy_uj=1_000_000)
    write_rapl(tmp_path, "intel-rapl:0:0", "core", energy_uj=5_000_000, range_uj=8_999_999)
    pc = Board(tmp_path)
    assert pc.read().watts == {}  # one reading is no difference
    clock[0] += 10
    write_rapl(tmp_path, "intel-rapl:0", "package-0", energy_uj=126_000_000)
    write_rapl(tmp_path, "intel-rapl:0:0", "core", energy_uj=1_000_000, range_uj=8_999_999)  # began again
    assert pc.read().watts == {"package-0": 12.5, "core 0": 0.5}


def test_board_is_not_read_more_often_than_its_sensors_bear(tmp_path: Path, clock: list[float]) -> None:
    write_zone(tmp_path, 0, "cpu", "40000")
    one = Board(tmp_path)
    assert one.read().celsius == {"cpu": 40.0}
    write_zone(tmp_path, 0, "cpu", "50000")
    clock[0] += FRESH_S / 2
    assert one.read().celsius == {"cpu": 40.0}
    clock[0] += FRESH_S / 2
    assert one.read().celsius == {"cpu": 50.0}
