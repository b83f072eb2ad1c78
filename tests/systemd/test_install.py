"""deploy/install.sh on a booted systemd: first, again, newer, broken, on a Jetson."""

import re
from pathlib import Path

import pytest

from tests.systemd.device import INSTALL, OFFLINE, PYTHON, SHIPPED_MODEL, ask, served
from tests.systemd.machine import PATH, Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_install_starts_a_service_that_answers(device: Machine) -> None:
    assert device.show("ActiveState") == "active"
    assert device.run("systemctl", "is-enabled", "edgelm.service", "edgelm.socket").stdout == "enabled\nenabled\n"
    assert ask(device)["status"] == "ok"
    assert device.show("StatusText").startswith("serving tinystories@")
    assert any(line.startswith("ready in ") for line in device.journal())


def test_install_passes_systemd_analyze_verify_and_security(device: Machine) -> None:
    assert device.run("systemd-analyze", "verify", "edgelm.service", "edgelm.socket").stderr == ""
    assert device.run("systemd-analyze", "security", "--threshold=10", "edgelm.service").returncode == 0


def test_install_takes_the_pinned_packages_and_leaves_the_training_host_out(device: Machine) -> None:
    lines = Path("deploy/constraints.txt").read_text().splitlines()
    pinned = {line.partition(";")[0].replace("_", "-") for line in lines}
    listed = device.run(PYTHON, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check").stdout.split()
    packages = {line.lower().replace("_", "-") for line in listed}
    packages = {line for line in packages if line.split("==")[0] not in ("diffusion-llm", "pip", "setuptools")}
    assert "numpy" in {line.split("==")[0] for line in packages} and packages <= pinned
    assert device.run(PYTHON, "-c", "import edge, host", check=False).stderr.endswith("No module named 'host'\n")


def test_install_decodes_pictures_where_asked_and_keeps_it(device: Machine) -> None:
    pillow = (PYTHON, "-c", "import PIL; print(PIL.__version__)")
    assert device.run(*pillow, check=False).stderr.endswith("No module named 'PIL'\n")
    device.run(INSTALL, "--images", environment=OFFLINE)
    assert f"pillow=={device.run(*pillow).stdout.strip()};" in Path("deploy/constraints.txt").read_text()
    assert "is installed and runs already" in device.run(INSTALL, environment=OFFLINE).stdout
    device.write("/srv/checkout/edge/pictured.py", ["# another release"])
    device.run(INSTALL, environment=OFFLINE)
    assert device.run(*pillow).returncode == 0 and ask(device)["status"] == "ok"


def test_install_links_the_command_but_not_over_somebody_elses(device: Machine) -> None:
    command = device.root / "usr/local/bin/edgelm"
    assert str(command.readlink()) == "/opt/edgelm/current/bin/edgelm"
    assert device.run("/usr/local/bin/edgelm", "--version").stdout.startswith("edgelm 0.1.0")
    command.unlink()
    command.write_text("somebody else's")
    device.write("/srv/checkout/edge/relinked.py", ["# another release"])
    printed = device.run(INSTALL, environment=OFFLINE).stdout
    assert "/usr/local/bin/edgelm belongs to another program and is kept" in printed
    assert command.read_text() == "somebody else's"
    command.unlink()
    device.write("/srv/checkout/edge/relinked.py", ["# yet another release"])
    device.run(INSTALL, environment=OFFLINE)
    assert command.is_symlink()


def test_install_again_changes_nothing(device: Machine) -> None:
    process = device.show("MainPID")
    device.write("/srv/checkout/edge/native/_rows.checkout.so", ["what `make demo` builds there"])
    assert "runs already" in device.run(INSTALL, environment=OFFLINE).stdout
    assert device.show("MainPID") == process


def test_install_with_a_compiler_has_the_compiled_library(device: Machine) -> None:
    """It may appear later: the next run makes another release. `test_installation.py` has one made without."""
    if device.run("sh", "-c", "command -v c++", check=False).returncode:
        pytest.skip("no C++ compiler is installed (apt: g++)")
    libraries = list(device.root.glob("opt/edgelm/current/lib/python3*/site-packages/edge/native/*.so"))
    assert len(libraries) == 1 and libraries[0].name.startswith("_rows.cpython-")
    device.run(PYTHON, "-c", f"import ctypes; ctypes.CDLL('/{libraries[0].relative_to(device.root)}')")
    said = device.run(INSTALL, "--dry-run", environment={"CXX": "/nowhere/c++"}).stdout
    current = (device.root / "opt/edgelm/current").readlink().name
    useful = re.search("avx512_vnni|avx_vnni", Path("/proc/cpuinfo").read_text()) is not None
    assert (
        "without a C++ compiler ONNX Runtime decodes alone" in said
    ) == useful and f"releases/{current} " not in said
    assert "without a C++ compiler" not in device.run(INSTALL, "--dry-run").stdout


def test_install_finishes_an_interrupted_installation(device: Machine) -> None:
    """Killed with -9 before the service is restarted: everything is in place, and the program before still runs."""
    process, before = device.show("MainPID"), (device.root / "opt/edgelm/current").readlink()
    device.write("/srv/checkout/edge/interrupted.py", ["# another release"])
    device.write("/srv/bin/systemctl", ["#!/bin/sh", '[ "$1" != enable ] || kill -9 $PPID', 'exec /bin/systemctl "$@"'])
    device.run("chmod", "+x", "/srv/bin/systemctl")
    killed = device.run(INSTALL, environment=OFFLINE | {"PATH": f"/srv/bin:{PATH}"}, check=False)
    assert killed.returncode != 0 and (device.root / "opt/edgelm/current").readlink() != before
    assert device.show("MainPID") == process
    done = device.run(INSTALL, environment=OFFLINE).stdout
    assert "runs already" not in done and " runs; " in done and device.show("MainPID") != process
    assert before.name in {path.name for path in (device.root / "opt/edgelm/releases").iterdir()}
    assert "runs already" in device.run(INSTALL, environment=OFFLINE).stdout


def test_install_dry_run_changes_nothing(device: Machine) -> None:
    before = sorted(device.root.glob("opt/edgelm/**"))
    (device.root / "srv/checkout/edge/further.py").write_text("# another release\n")
    said = device.run(INSTALL, "--dry-run", "--lan").stdout
    (device.root / "srv/checkout/edge/further.py").unlink()
    assert "would run: systemctl restart edgelm.service" in said and "20-lan.conf" in said
    assert sorted(device.root.glob("opt/edgelm/**")) == before


def test_install_of_a_newer_release_keeps_the_previous_one(device: Machine) -> None:
    before, process = (device.root / "opt/edgelm/current").readlink(), device.show("MainPID")
    device.write("/srv/checkout/edge/newer.py", ["# another release"])
    device.run(INSTALL, environment=OFFLINE)
    after = (device.root / "opt/edgelm/current").readlink()
    assert after != before and device.show("MainPID") != process
    assert sorted(path.name for path in (device.root / "opt/edgelm/releases").iterdir()) == sorted(
        (before.name, after.name)
    )
    assert served(device) == SHIPPED_MODEL


def test_install_of_a_release_that_does_not_start_is_taken_back(device: Machine) -> None:
    before = (device.root / "opt/edgelm/current").readlink()
    daemon = device.root / "srv/checkout/edge/daemon.py"
    kept = daemon.read_text()
    daemon.write_text("import nothing_of_that_name\n" + kept)
    done = device.run(INSTALL, environment=OFFLINE, check=False)
    daemon.write_text(kept)
    assert done.returncode == 1 and f"{before.name} runs again" in done.stderr
    assert (device.root / "opt/edgelm/current").readlink() == before
    assert served(device) == SHIPPED_MODEL


def test_install_on_a_jetson_uses_its_devices_and_starts(device: Machine) -> None:
    device.write("/etc/nv_tegra_release", ["# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"])
    said = device.run(INSTALL, environment=OFFLINE).stdout
    assert "Jetson with JetPack 6" in said
    drop_in = (device.root / "etc/systemd/system/edgelm.service.d/10-jetson.conf").read_text()
    assert "\nSupplementaryGroups=video\n" in drop_in  # `render` does not exist here, and would be the end of the start
    assert served(device) == SHIPPED_MODEL and device.show("PrivateDevices") == "no"
    device.run("rm", "/etc/systemd/system/edgelm.service.d/10-jetson.conf")
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "restart", "edgelm.service")


def test_install_shows_the_systems_tensorrt_to_the_program(device: Machine) -> None:
    """A stand-in for apt's package: what counts is whether the environment is made to see it."""
    device.write("/etc/nv_tegra_release", ["# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"])
    without = device.run(INSTALL, "--dry-run").stdout
    device.write("/srv/apt/tensorrt.py", ["__version__ = '10.3.0'"])
    said = device.run(INSTALL, "--dry-run", environment={"PYTHONPATH": "/srv/apt"}).stdout
    (device.root / "etc/nv_tegra_release").unlink()
    assert "TensorRT not found" in without and "apt install python3-libnvinfer" in without
    assert "TensorRT found" in said and "apt install" not in said
    assert "-m venv --system-site-packages /opt/edgelm/releases/" in said
    assert "cuda12\\]" in said  # perhaps behind `images`, which an upgrade keeps


def test_install_on_a_jetson_that_is_too_old_is_refused(device: Machine) -> None:
    device.write("/etc/nv_tegra_release", ["# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref"])
    refused = device.run(INSTALL, environment=OFFLINE, check=False)
    (device.root / "etc/nv_tegra_release").unlink()
    assert refused.returncode == 1 and "L4T R35" in refused.stderr
