"""The units mean what systemd reads in them, and open no more than they must."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
STAND_IN = "/bin/true"  # for the program, which is not installed here


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def systemd_version() -> int:
    """0 where there is none."""
    if shutil.which("systemd-analyze") is None:
        return 0
    found = re.match(r"systemd (\d+)", analyze("--version").stdout)
    assert found is not None
    return int(found[1])


VERSION = systemd_version()
verifies = pytest.mark.skipif(VERSION < 247, reason=f"systemd-analyze of systemd 247 or newer is needed, not {VERSION}")
measures = pytest.mark.skipif(VERSION < 250, reason=f"only systemd 250 and newer measure offline, not {VERSION}")


def installed(folder: Path, *drop_ins: str) -> Path:
    """The units as install.sh lays them out, the program aside."""
    place = folder / "etc" / "systemd" / "system"
    (place / "edgelm.service.d").mkdir(parents=True)
    text = (UNITS / "edgelm.service").read_text()
    (place / "edgelm.service").write_text(text.replace("/opt/edgelm/current/bin/python", STAND_IN))
    for socket in ("edgelm.socket", "edgelm-http.socket"):
        shutil.copy(UNITS / socket, place)
    for name in drop_ins:
        shutil.copy(UNITS / f"{name}.conf", place / "edgelm.service.d")
    return place


@verifies
@pytest.mark.parametrize("drop_ins", [(), ("lan",), ("jetson",), ("jetson", "lan")], ids=lambda names: "+".join(names))
def test_units_pass_systemd_analyze_verify(drop_ins: tuple[str, ...], tmp_path: Path) -> None:
    place = installed(tmp_path, *drop_ins)
    found = analyze("verify", place / "edgelm.service", place / "edgelm.socket", place / "edgelm-http.socket")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@verifies
def test_units_with_a_misspelt_line_fail_verification(tmp_path: Path) -> None:
    place = installed(tmp_path, "lan")
    (place / "edgelm.service.d" / "lan.conf").write_text("[Service]\nIPAdressAllow=any\n")
    assert "IPAdressAllow" in analyze("verify", place / "edgelm.service").stderr


@measures
@pytest.mark.parametrize(
    ("drop_ins", "at_most"),
    [((), 1.0), (("lan",), 1.0), (("jetson",), 1.2), (("jetson", "lan"), 1.2)],
    ids=["CPU", "CPU, LAN broker", "Jetson", "Jetson, LAN broker"],
)
def test_units_exposure_stays_below_its_limit(drop_ins: tuple[str, ...], at_most: float, tmp_path: Path) -> None:
    installed(tmp_path, *drop_ins)
    measured = analyze("security", "--offline=yes", f"--root={tmp_path}", "edgelm.service")
    found = re.search(r"Overall exposure level for edgelm.service: ([0-9.]+)", measured.stdout)
    assert found is not None, measured.stderr
    print(found[0])
    assert float(found[1]) <= at_most
    threshold = f"--threshold={round(at_most * 10)}"  # systemd's own verdict, in tenths
    assert analyze("security", "--offline=yes", f"--root={tmp_path}", threshold, "edgelm.service").returncode == 0
