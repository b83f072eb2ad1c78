"""Writes files as sysfs has them, for the sensors of a board that is not there."""

from pathlib import Path


def write_sensor(root: Path, label: str, channel: int, *, millivolts: int, milliamperes: int | None) -> None:
    """A channel of the INA3221 chip hwmon3. milliamperes: None for one that has no current."""
    chip = root / "class" / "hwmon" / "hwmon3"
    chip.mkdir(parents=True, exist_ok=True)
    (chip / "name").write_text("ina3221\n")
    (chip / f"in{channel}_label").write_text(f"{label}\n")
    (chip / f"in{channel}_input").write_text(f"{millivolts}\n")
    if milliamperes is not None:
        (chip / f"curr{channel}_input").write_text(f"{milliamperes}\n")


def write_zone(root: Path, number: int, kind: str, temp: str) -> None:
    """A thermal zone. temp: in thousandths of a degree, as text."""
    zone = root / "class" / "thermal" / f"thermal_zone{number}"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "type").write_text(f"{kind}\n")
    (zone / "temp").write_text(temp)


def write_rapl(root: Path, domain: str, name: str, *, energy_uj: int, range_uj: int = 262143328850) -> None:
    """An energy counter."""
    folder = root / "class" / "powercap" / domain
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
