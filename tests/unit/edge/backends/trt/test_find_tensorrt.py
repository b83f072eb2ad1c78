"""Where an installed TensorRT is looked for when Python does not find it, below a root of the test's own."""

import sys
from pathlib import Path

import pytest

from edge.backends.trt import find_tensorrt
from edge.backends.trt.find_tensorrt import SYSTEM_PACKAGES, import_tensorrt, why_absent
from shared.errors import DeviceError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty file system, with a home folder in it, of a machine that is no Jetson."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # not even where this machine has it
    monkeypatch.setenv("HOME", str(tmp_path / "home/user"))
    places = tuple(
        (base if base.startswith("~") else f"{tmp_path}{base}", pattern) for base, pattern in SYSTEM_PACKAGES
    )
    monkeypatch.setattr(find_tensorrt, "SYSTEM_PACKAGES", places)
    monkeypatch.setattr(find_tensorrt, "TEGRA", (tmp_path / "release", tmp_path / "model"))
    return tmp_path


@pytest.mark.parametrize(
    "folder",
    [
        "usr/lib/python3/dist-packages",  # apt, Debian's own packages
        "usr/lib/python3.10/dist-packages",  # apt, JetPack 6
        "usr/lib/python3.12/dist-packages",  # apt, JetPack 7
        "usr/local/lib/python3.10/dist-packages",  # pip as root
        "usr/local/lib/python3.12/dist-packages",
        "home/user/.local/lib/python3.12/site-packages",  # pip as this user
    ],
)
def test_tensorrt_that_the_environment_does_not_see_is_named(root: Path, folder: str) -> None:
    (root / folder / "tensorrt").mkdir(parents=True)
    with pytest.raises(DeviceError, match=f"TensorRT is in {root / folder / 'tensorrt'}, but .*--system-site-packages"):
        import_tensorrt()


def test_tensorrt_of_another_folder_is_not_taken_for_it(root: Path) -> None:
    for folder in ("usr/lib/python2.7/dist-packages", "usr/lib/python3/dist-packages/tensorrt_lean"):
        (root / folder).mkdir(parents=True)
    assert why_absent().startswith("TensorRT is not installed")
