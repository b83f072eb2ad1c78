"""The devices of a broker as a table."""

from edge.terminal_view import printable
from edge.transports.mqtt.fleet import MAX_DEVICES, Device, FleetView

HEADS = ("DEVICE", "STATE", "BUNDLE", "VERSION", "BACKEND", "QUEUE", "TOKENS/S", "WATTS", "LAST SEEN")
NUMBERS = ("QUEUE", "TOKENS/S", "WATTS")
MAX_CELL = 40


def table(fleet: FleetView) -> list[str]:
    """Lines: a head, a line a device, and a line for each that tells why it is not well."""
    rows = [HEADS, *map(_row, fleet.devices)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    lines = [
        "  ".join(
            cell.rjust(width) if head in NUMBERS else cell.ljust(width)
            for head, cell, width in zip(HEADS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    failures = [f"{d.device}: {printable(d.failure)}" for d in fleet.devices if d.failure]
    more = [f"more than {MAX_DEVICES} devices: the others are left out"] if fleet.left_out else []
    return [*lines, *failures, *more]


def _row(device: Device) -> tuple[str, ...]:
    cells = (
        device.device,
        device.state,
        device.bundle,
        device.version,
        device.backend,
        device.queued,
        None if device.tokens_per_s is None else f"{device.tokens_per_s:.1f}",
        None if device.watts is None else f"{device.watts:.1f}",
        None if device.seen_s_ago is None else ago(device.seen_s_ago),
    )
    return tuple("-" if cell is None else printable(str(cell))[:MAX_CELL] for cell in cells)


def ago(seconds: float) -> str:
    """A time since then in its largest unit."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"
