"""One idea reads on one screen, and a file holds few of them."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 350
SUFFIXES = {".py", ".cu", ".sh"}


def source_files() -> list[Path]:
    """Tracked and new source files; without git, as in an unpacked archive, those in all folders but hidden ones."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return [path for path in files if path.suffix in SUFFIXES and path.is_file()]


def test_no_source_file_is_longer_than_the_limit() -> None:
    files = source_files()
    assert Path(__file__) in files
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
