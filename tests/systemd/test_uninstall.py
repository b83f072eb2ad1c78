"""deploy/install.sh --uninstall. The last of the tests that need the service, by its name."""

from pathlib import Path

import pytest

from tests.systemd.device import INSTALL, OFFLINE, SHIPPED_MODEL, current, served
from tests.systemd.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def left(device: Machine) -> set[str]:
    """Everything of ours outside of the checkout."""
    found = [
        path for name in ("opt", "etc", "run", "usr/local", "var") for path in (device.root / name).rglob("edgelm*")
    ]
    return {str(path.relative_to(device.root)) for path in found if "log" not in path.parts}


def test_uninstall_dry_run_lists_files_and_removes_nothing(device: Machine) -> None:
    before = left(device)
    said = device.run(INSTALL, "--uninstall", "--purge", "--dry-run").stdout
    assert "would run: rm -rf /opt/edgelm" in said and "would run: groupdel edgelm" in said
    assert left(device) == before and served(device) == SHIPPED_MODEL


def test_uninstall_removes_the_device_from_home_assistant(device: Machine, on_mqtt: Path) -> None:
    on_mqtt.write_text(on_mqtt.read_text().replace("# discovery = false", "discovery = true"))
    device.run("systemctl", "restart", "edgelm.service")
    told = device.root / "var/lib/private/edgelm/homeassistant"
    device.until(told.exists, "the announcement")
    heard = ["mosquitto_sub", "-t", "homeassistant/#", "-W", "2", "-F", "%t %l"]
    config = "homeassistant/device/edgelm_edge01/config"
    assert device.run(*heard, check=False).stdout.startswith(f"{config} ")
    said = device.run(INSTALL, "--uninstall").stdout
    assert "removing this device from Home Assistant" in said and "was not reached" not in said
    assert device.run(*heard, check=False).stdout == "" and not told.exists()
    device.run(INSTALL, environment=OFFLINE)


def test_uninstall_keeps_settings_and_state_for_the_next_installation(device: Machine) -> None:
    settings = device.root / "etc/edgelm/edgelm.toml"
    settings.write_text(settings.read_text() + "\n# mine\n")
    bundle = current(device)
    device.write("/opt/edgelm/engines/key/step.engine", ["built by root"])
    said = device.run(INSTALL, "--uninstall").stdout
    assert "removing /opt/edgelm/releases" in said
    assert not (device.root / "opt/edgelm/engines").exists()
    kept = "/etc/edgelm /var/lib/private/edgelm /var/lib/edgelm /opt/edgelm/bundles, the group edgelm"
    assert f"kept for the next installation: {kept}; --uninstall --purge removes them" in said
    assert left(device) == {
        *("opt/edgelm", "etc/edgelm", "etc/edgelm/edgelm.toml"),
        *("var/lib/edgelm", "var/lib/private/edgelm"),
    }
    assert device.show("LoadState") == "not-found" and current(device) == bundle
    assert device.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")
    assert "kept" in device.run(INSTALL, "--uninstall").stdout  # once more does no harm

    device.run(INSTALL, environment=OFFLINE)
    assert settings.read_text().endswith("# mine\n") and served(device) == SHIPPED_MODEL


def test_uninstall_purge_leaves_nothing(device: Machine) -> None:
    device.run(INSTALL, "--uninstall", "--purge")
    assert left(device) == set()
    assert device.show("LoadState") == "not-found"
    assert device.run("getent", "group", "edgelm", check=False).returncode == 2
    assert device.run(INSTALL, "--uninstall", "--purge").stdout == "install: edgelm is uninstalled\n"
