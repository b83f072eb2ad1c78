"""README, CONTRIBUTING and docs: what they link, name and tell people to run exists."""

import importlib.util
import re
from pathlib import Path
from typing import Final

import pytest

from shared.errors import ERROR_CODES
from shared.messages import GenerateRequest

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LIVE: Final = [page for page in PAGES if page.name != "log.md"]
"""The log says what was true on its dates."""


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_what_exists(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        file, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", LIVE, ids=lambda page: page.name)
def test_pages_name_files_and_commands_that_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    files = re.findall(r"`((?:host|edge|shared|tests|deploy|systemd|docs)/[\w./-]*)`", text)
    missing = [name for name in files if not (ROOT / name).exists()]
    modules = re.findall(r"python -m ((?:host|edge|tests)[\w.]*\w)", text)
    missing += [name for name in modules if importlib.util.find_spec(name) is None]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    missing += [
        f"make {name}" for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE) if name not in targets
    ]
    assert missing == []


def test_pages_name_tests_that_exist() -> None:
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in LIVE for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8"))}
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []


def test_pages_contributing_finds_twenty_changes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| .+ \| .*`[\w/.]+`.* \|$", text.partition("## Where is it?")[2], re.MULTILINE)
    assert len(rows) >= 20


def test_pages_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_pages_readme_installs_the_host_with_the_pinned_cpu_build() -> None:
    """Otherwise pip takes another torch than the tests, in its CUDA build of gigabytes."""
    text = "\n".join(page.read_text("utf-8") for page in LIVE)
    commands = re.findall(r"^pip install .*\[host.*$", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert "-c constraints.txt" in command and "https://download.pytorch.org/whl/cpu" in command


def test_pages_readme_names_every_package_that_ci_installs() -> None:
    wanted = re.findall(r"missing\+=\(([\w+-]+)\)", (ROOT / ".ci" / "run").read_text("utf-8"))
    assert "minisign" in wanted
    text = (ROOT / "README.md").read_text("utf-8")
    assert [package for package in wanted if package not in text] == []


def test_pages_protocol_has_every_field_and_every_error() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    assert [name for name in (*GenerateRequest.__struct_fields__, *ERROR_CODES) if f"`{name}`" not in text] == []
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \| (yes|no) \|", text, re.MULTILINE)
    assert {code: (int(status), again == "yes") for code, status, again in rows} == ERROR_CODES


def test_pages_paste_as_they_stand() -> None:
    """A placeholder that a shell takes literally asks a device of that name."""
    blocks = [block for page in LIVE for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    assert not [line for block in blocks for line in block.splitlines() if "/DEVICE/" in line]
