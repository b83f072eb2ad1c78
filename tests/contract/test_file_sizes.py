"""One idea reads on one screen, a file holds few of them, and the product's lines are a budget."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES: Final = {".py", ".cpp", ".cu", ".h", ".sh"}
MAX_LINES: Final = 350
"""Of a file, tests included."""
PRODUCT: Final = ("host", "edge", "shared")
PRODUCT_LINES: Final = 33_200
"""Of all files of the product. Who needs more deletes something first, or raises this number and says why."""


def source_files() -> list[Path]:
    """Tracked and new source files; without git, as in an unpacked archive, those in all folders but hidden ones."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return [path for path in files if path.suffix in SUFFIXES and path.is_file()]


def lines_by_file() -> dict[str, int]:
    return {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in source_files()}


def test_file_sizes_no_file_is_longer_than_the_limit() -> None:
    lines = lines_by_file()
    assert str(Path(__file__).relative_to(ROOT)) in lines
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_file_sizes_the_product_stays_within_its_budget() -> None:
    lines = {name: count for name, count in lines_by_file().items() if name.startswith(PRODUCT)}
    assert len(lines) > 100
    total = sum(lines.values())
    assert total <= PRODUCT_LINES, f"{total} lines in {', '.join(PRODUCT)}: the budget is {PRODUCT_LINES}"
