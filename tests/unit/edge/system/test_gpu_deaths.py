"""The count of deaths on the GPU: what counts, and what clears it."""

import os
from pathlib import Path

import pytest

from edge.system import gpu_deaths
from edge.system.gpu_deaths import FILE, GpuDeaths
from shared.errors import DeviceError


def die(state: Path, pid: int) -> None:
    """What a process leaves that began and never came to its end."""
    deaths = GpuDeaths(state)
    deaths.begin()
    (state / FILE).write_text((state / FILE).read_text().replace(f'"pid":{os.getpid()}', f'"pid":{pid}'))


def test_gpu_deaths_are_too_many_at_two_within_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = GpuDeaths(tmp_path / "state")
    for pid in (1, 2):
        assert deaths.too_many() is None
        die(tmp_path / "state", pid)
    assert "died 2 times on the GPU within an hour" in str(deaths.too_many())
    later_s = gpu_deaths._uptime_s() + gpu_deaths.WITHIN_S
    monkeypatch.setattr(gpu_deaths, "_uptime_s", lambda: later_s)
    assert deaths.too_many() is None


@pytest.mark.parametrize("how", ["clean end", "reboot", "damaged file"])
def test_gpu_deaths_are_cleared_by_a_clean_end_a_reboot_or_a_damaged_file(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(tmp_path, 1)
    die(tmp_path, 2)
    if how == "clean end":
        GpuDeaths(tmp_path).end()
    elif how == "reboot":
        monkeypatch.setattr(gpu_deaths, "_boot", lambda: "another")
    else:
        (tmp_path / FILE).write_text("[{")
    assert GpuDeaths(tmp_path).too_many() is None


def test_gpu_deaths_count_a_process_once_and_not_for_itself(tmp_path: Path) -> None:
    die(tmp_path, 1)
    deaths = GpuDeaths(tmp_path)
    for _ in range(3):  # a start and two reloads
        deaths.begin()
    assert deaths.too_many() is None
    deaths.cancel()
    die(tmp_path, 2)
    assert "died 2 times" in str(deaths.too_many())


def test_gpu_deaths_name_a_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(DeviceError, match=f"{tmp_path}/state/{FILE} cannot be written"):
        GpuDeaths(tmp_path / "state").begin()
