"""Which room may import which. Rooms stand on floors and import from the floors below, never sideways or up."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("shared", "edge", "host")

FLOORS: Final[dict[str, tuple[str, ...]]] = {
    # Lowest first. A room is a folder, or a file at the top of `edge/` or `host/`.
    "shared": ("shared",),
    "edge 0": ("edge.native",),
    "edge 1": ("edge.client", "edge.decoding", "edge.system", "edge.terminal_view"),
    "edge 2": ("edge.backends", "edge.config"),
    "edge 3": ("edge.serving",),
    "edge 4": ("edge.delivery",),
    "edge 5": ("edge.measure", "edge.transports"),
    "edge 6": ("edge.bench", "edge.build", "edge.bundle", "edge.daemon", "edge.doctor", "edge.fleet", "edge.generate"),
    "edge 7": ("edge.__main__", "edge.cli", "edge.demo"),
    "host 0": ("host.device", "host.files", "host.progress"),
    "host 1": ("host.data", "host.model"),
    "host 2": ("host.sampling", "host.train"),
    "host 3": ("host.evaluate", "host.join"),
    "host 4": ("host.export",),
    "host 5": ("host.experiments", "host.generate"),
    "host 6": ("host.baseline", "host.bench", "host.compare"),
}
EDGE_ROOMS_OF_THE_HOST: Final = frozenset({"edge.decoding", "edge.backends"})
"""All that the training host may import of the edge: the layout of texts and the loop, which both read and write; its
backends, for the figures of a bundle as it ships."""

HEAVY: Final[dict[str, str]] = {
    # Packages that a function may import by itself, with the reason; all others belong at a module's top.
    "PIL": "optional extra, and a daemon that is sent no picture pays nothing for it",
    "cuda": "a device has one runtime: only the backend in use loads its own",
    "datasets": "seconds to load, and an unchanged rerun of host.data does without",
    "gguf": "optional extra",
    "huggingface_hub": "only a download needs it",
    "llama_cpp": "optional extra",
    "matplotlib": "most commands draw nothing",
    "onnxruntime": "a device has one runtime: only the backend in use loads its own",
    "pyarrow": "only parquet files need it",
    "pycuda": "optional extra",
    "tomli": "Python 3.10 alone",
    "wandb": "optional extra",
}
LATE: Final[dict[tuple[str, str], str]] = {
    # Rooms of our own that a function may import, with the reason. A circle is none: they are found anyway.
    ("edge.backends", "edge.backends"): "the table of backends loads the one that is asked for",
    ("edge.bundle", "edge.backends"): "the self-test loads the runtime before root is given up, listing does not",
    ("edge.bundle", "edge.serving"): "listing and rolling back need no runtime",
    ("edge.cli", "*"): "a sub-command loads what it needs itself, so that `edgelm --version` answers at once",
    ("edge.daemon", "edge.transports"): "60 ms and 12 MB saved without a broker, 20 ms and 4 MB without HTTP",
    ("edge.generate", "edge.serving"): "a client of the daemon needs no runtime",
    ("edge.measure", "edge.backends"): "other backends are measured without ONNX Runtime",
}


class Arrow(NamedTuple):
    """One module imports another. late: inside a function, when it is called."""

    importer: str
    imported: str
    late: bool
    where: str


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """`edge.backends.ort` → `edge.backends`, `shared.tokens` → `shared`."""
    return "shared" if module.startswith("shared") else ".".join(module.split(".")[:2])


def arrows(root: Path) -> list[Arrow]:
    """Every import in the packages, by statement; of our own modules by their full names."""
    files = {module_name(path, root): path for package in PACKAGES for path in (root / package).rglob("*.py")}
    found = []
    for module, path in sorted(files.items()):
        for node, late in import_statements(ast.parse(path.read_text("utf-8"))):
            package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (package + alias.name for alias in node.names):
                target = name if name in files or not package else package[:-1]
                found.append(Arrow(module, target, late, f"{path.relative_to(root)}:{node.lineno}"))
    return found


def import_statements(tree: ast.AST, late: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, late
        else:
            yield from import_statements(node, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def own(found: list[Arrow]) -> list[Arrow]:
    """The arrows between modules of this project."""
    return [arrow for arrow in found if arrow.imported.split(".")[0] in PACKAGES and arrow.importer != arrow.imported]


def forbidden(found: list[Arrow]) -> list[str]:
    """A line for each arrow that does not run down."""
    level = {room: number for number, rooms in enumerate(FLOORS.values()) for room in rooms}
    lines = []
    for importer, imported, _, where in own(found):
        above, below = room_of(importer), room_of(imported)
        if above in PACKAGES[1:]:  # the docstring of edge/__init__.py
            continue
        if missing := [room for room in (above, below) if room not in level]:
            lines.append(f"{where}: {missing[0]} stands on no floor: give it one in FLOORS")
        elif above.startswith("host") and below.startswith("edge"):
            if below not in EDGE_ROOMS_OF_THE_HOST:
                lines.append(f"{where}: the host imports {below}; of the edge it may import the loop and its backends")
        elif above != below and level[above] <= level[below]:
            lines.append(f"{where}: {above} imports {below}, which is not below it")
    return lines


def circle(found: list[Arrow]) -> list[str]:
    """Modules that import each other in a circle, late imports counted; empty when there is none."""
    graph: dict[str, set[str]] = {}
    for importer, imported, _, _ in own(found):
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def needlessly_late(found: list[Arrow]) -> list[str]:
    """A line for each import inside a function that has no reason in HEAVY or LATE."""
    lines = []
    for importer, imported, late, where in found:
        package = imported.split(".")[0]
        if not late:
            continue
        if package in PACKAGES:
            room = room_of(importer)
            if not {(room, room_of(imported)), (room, "*")} & LATE.keys():
                lines.append(f"{where}: imports {imported} inside a function, for no reason in LATE")
        elif package not in HEAVY and package not in sys.stdlib_module_names:
            lines.append(f"{where}: imports {package} inside a function, for no reason in HEAVY")
    return lines


def table() -> str:
    """The floors, for a failing test's message."""
    return "\n".join(f"  {floor:8} {', '.join(rooms)}" for floor, rooms in reversed(FLOORS.items()))


def test_floors_rooms_import_downwards_only() -> None:
    found = arrows(ROOT)
    assert len(found) > 500
    broken = forbidden(found)
    assert not broken, "\n".join([*broken, "the floors, highest first:", table()])


def test_floors_no_module_imports_itself_in_a_circle() -> None:
    found = circle(arrows(ROOT))
    assert not found, " → ".join(found)


def test_floors_a_late_import_has_a_reason() -> None:
    assert needlessly_late(arrows(ROOT)) == []


def test_floors_tables_name_nothing_that_is_gone() -> None:
    found = arrows(ROOT)
    rooms = {room_of(arrow.importer) for arrow in found} | {room_of(arrow.imported) for arrow in own(found)}
    late = [arrow for arrow in found if arrow.late]
    used = {(room_of(arrow.importer), room_of(arrow.imported)) for arrow in late}
    used |= {(room, "*") for room, _ in used}
    assert {room for floor in FLOORS.values() for room in floor} - rooms == set()
    assert LATE.keys() - used == set()
    assert HEAVY.keys() - {arrow.imported.split(".")[0] for arrow in late} == set()


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house, in order."""
    for file, text in {
        "shared/tokens.py": "",
        "edge/decoding/__init__.py": "from shared.tokens import MASK",
        "edge/decoding/philox.py": "import edge.decoding.canvas",
        "edge/decoding/canvas.py": "",
        "edge/backends/__init__.py": "def load():\n    from edge.backends import ort",
        "edge/backends/ort.py": "def load():\n    import onnxruntime",
        "host/train/__init__.py": "import torch\nfrom edge.decoding import Row",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def faults(root: Path) -> list[str]:
    found = arrows(root)
    return forbidden(found) + circle(found) + needlessly_late(found)


def test_floors_a_house_in_order_has_no_faults(house: Path) -> None:
    assert faults(house) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("edge/decoding/up.py", "from edge import backends", "edge.decoding imports edge.backends"),
        ("edge/decoding/up.py", "def f():\n    import edge.backends.ort", "edge.decoding imports edge.backends"),
        ("edge/client.py", "from edge.system import x", "edge.client imports edge.system"),
        ("edge/attic/__init__.py", "import shared", "edge.attic stands on no floor"),
        ("host/train/loop.py", "from edge.config import Config", "the host imports edge.config"),
        ("edge/decoding/canvas.py", "from edge.decoding import philox", "edge.decoding.philox"),
        ("edge/decoding/canvas.py", "def f():\n    import edge.decoding.philox", "edge.decoding.philox"),
        ("edge/config.py", "def f():\n    from edge import decoding", "inside a function, for no reason in LATE"),
        ("edge/config.py", "def f():\n    import numpy", "inside a function, for no reason in HEAVY"),
    ],
)
def test_floors_a_fault_is_named(house: Path, file: str, text: str, said: str) -> None:
    (house / file).parent.mkdir(exist_ok=True)
    (house / file).write_text(text)
    assert any(said in line for line in faults(house)), faults(house)
