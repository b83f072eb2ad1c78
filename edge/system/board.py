"""What a board measures of itself: watts by rail, temperatures by zone. What it does not tell is left out.

Watts: a Jetson's INA3221 sensors (hwmon: millivolts times milliamperes); on a PC the energy counters of RAPL (powercap,
microjoules), where this user may read them. Temperatures: the kernel's thermal zones, in thousandths of a degree.
Formats: docs.kernel.org/hwmon/sysfs-interface, /power/powercap/powercap and /driver-api/thermal/sysfs-api.
"""

import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from edge.system.locked import Locked

SYS: Final = Path("/sys")
FRESH_S: Final = 1.0
"""Sensors on a slow bus are not read more often, however often somebody asks."""


class Readings(NamedTuple):
    """By the board's own names."""

    watts: dict[str, float]
    celsius: dict[str, float]


class Energy(NamedTuple):
    """A RAPL counter at a time. It starts again from 0 behind `range_uj`."""

    at_s: float
    uj: int
    range_uj: int


@dataclass
class _Last:
    """The readings so far, and the counters that the next watts are differences to."""

    at_s: float = float("-inf")
    readings: Readings = field(default_factory=lambda: Readings({}, {}))
    energy: dict[str, Energy] = field(default_factory=dict)


class Board:
    """Reads the sensors. Thread-safe. root: where sysfs is mounted. RAPL tells watts from the second reading on."""

    def __init__(self, root: Path = SYS) -> None:
        self._root = root
        self._last = Locked(_Last())

    def read(self) -> Readings:
        """The present readings, at most FRESH_S old."""
        with self._last as last:
            now_s = time.monotonic()
            if now_s - last.at_s >= FRESH_S:
                energy = read_energy(self._root, now_s)
                watts = read_rails(self._root) | _watts_between(last.energy, energy)
                last.at_s, last.energy = now_s, energy
                last.readings = Readings(watts, read_zones(self._root))
            return last.readings


def read_rails(root: Path = SYS) -> dict[str, float]:
    """Watts of each rail of INA3221 sensors, found by label: the order differs between boards."""
    watts = {}
    for label in sorted(root.glob("class/hwmon/hwmon*/in*_label")):
        with suppress(OSError, ValueError):  # a channel without a shunt has no current
            if _text(label.with_name("name")) == "ina3221":
                n = label.name.removeprefix("in").removesuffix("_label")
                mv, ma = (int(_text(label.with_name(f"{kind}{n}_input"))) for kind in ("in", "curr"))
                watts[_text(label)] = round(mv * ma / 1e6, 3)
    return watts


def read_zones(root: Path = SYS) -> dict[str, float]:
    """Degrees of each thermal zone that is on. Where several have one name, the zone's number is added."""
    found = []
    for zone in sorted(root.glob("class/thermal/thermal_zone*"), key=_number_of):
        with suppress(OSError, ValueError):  # a Jetson's zone of a unit that is off cannot be read
            found.append((_text(zone / "type"), _number_of(zone), int(_text(zone / "temp")) / 1e3))
    names = Counter(name for name, _, _ in found)
    return {name if names[name] == 1 else f"{name} {number}": celsius for name, number, celsius in found}


def read_energy(root: Path, now_s: float) -> dict[str, Energy]:
    """The counters of RAPL's packages and their parts, which the kernel shows to root alone as a rule."""
    found = {}
    for domain in sorted(root.glob("class/powercap/intel-rapl:*")):
        with suppress(OSError, ValueError):
            name = _text(domain / "name")
            package = domain.name.split(":")[1]
            uj, range_uj = (int(_text(domain / file)) for file in ("energy_uj", "max_energy_range_uj"))
            found[name if name.startswith("package") else f"{name} {package}"] = Energy(now_s, uj, range_uj)
    return found


def _watts_between(before: dict[str, Energy], after: dict[str, Energy]) -> dict[str, float]:
    """Mean watts of each counter between two readings."""
    return {
        name: round((now.uj - then.uj) % (now.range_uj + 1) / 1e6 / (now.at_s - then.at_s), 3)
        for name, now in after.items()
        if (then := before.get(name)) is not None
    }


def _number_of(zone: Path) -> int:
    digits = re.search(r"\d+$", zone.name)
    return int(digits[0]) if digits else 0


def _text(file: Path) -> str:
    return file.read_text("utf-8").strip()
