"""deploy/install.sh --uninstall. The last of the tests that need the service, by its name."""

import pytest

from tests.systemd.device import INSTALL
from tests.systemd.machine import Machine

pytestmark = pytest.mark.timeout(300)


def test_uninstalling_leaves_settings_and_nothing_else(device: Machine) -> None:
    device.run(INSTALL, "--uninstall")
    left = [path for name in ("opt", "etc", "run", "var/cache") for path in (device.root / name).rglob("edgelm*")]
    assert [str(path.relative_to(device.root)) for path in left] == ["etc/edgelm", "etc/edgelm/edgelm.toml"]
    assert device.show("LoadState") == "not-found"
    assert device.run("getent", "group", "edgelm", check=False).returncode == 2
    assert device.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")
    device.run(INSTALL, "--uninstall")  # once more does no harm
