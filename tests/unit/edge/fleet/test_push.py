"""When a device that was given a bundle counts as well."""

import pytest

from edge.fleet.push import serves
from edge.transports.mqtt.fleet import Device


@pytest.mark.parametrize(
    ("before", "now", "well"),
    [
        (("idle", "ort"), ("busy", "ort"), True),
        (("idle", "ort"), ("degraded", "ort"), True),  # an engine was built meanwhile, but the GPU fails
        (("idle", "trt"), ("degraded", "ort"), False),  # the bundle has cost it its GPU
        (("degraded", "ort"), ("degraded", "ort"), True),
        (("idle", "ort"), ("error", "ort"), False),
        (("idle", "ort"), ("vanished", "ort"), False),
        ((None, None), ("degraded", "ort"), False),
    ],
)
def test_push_serves_where_the_device_computes_with_what_it_had(
    before: tuple[str | None, str | None], now: tuple[str, str], well: bool
) -> None:
    was, is_now = (Device(device="attic", state=state, backend=backend) for state, backend in (before, now))
    assert serves(is_now, was) is well
