import ast
import threading
from pathlib import Path

from edge.system.locked import Locked

ROOT = Path(__file__).resolve().parents[4]


def test_locked_keeps_other_threads_from_the_value() -> None:
    numbers: Locked[list[int]] = Locked([])

    def add() -> None:
        with numbers as inside:
            inside.append(2)

    with numbers as inside:
        other = threading.Thread(target=add)
        other.start()
        other.join(0.05)
        assert other.is_alive()
        assert inside == []
        inside.append(1)
    other.join()
    with numbers as inside:
        assert inside == [1, 2]


def test_locked_lets_a_holder_wait_for_a_change() -> None:
    numbers: Locked[list[int]] = Locked([])

    def add() -> None:
        with numbers as inside:
            inside.append(1)
            numbers.changed.notify()

    with numbers as inside:
        threading.Thread(target=add).start()
        assert numbers.changed.wait(10)
        assert inside == [1]


def test_locked_is_the_only_lock_of_the_edge() -> None:
    """A lock beside the data that it guards is a convention; Locked is a type."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} makes a {node.attr}"
        for path in (ROOT / "edge").rglob("*.py")
        if path.name != "locked.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in {"Lock", "RLock", "Condition"}
    ]
    assert found == []
