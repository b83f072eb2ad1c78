"""How fast a bundle writes by canvas here: what a step costs, and whole texts by their number of steps."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from edge.decoding.canvas import wanted
from edge.decoding.types import AnyBackend, LoopBackend, Positions, Row, Sampling
from edge.serving.loaded_bundle import LoadedBundle
from shared.errors import ConfigError
from shared.messages import GenerateRequest
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

REPEATS: Final = 3


class Generation(Struct):
    """Whole texts at one number of steps; medians over seeds. loop_ms: a step's time outside the backend."""

    steps: int
    tokens_per_s: float
    first_token_ms: float
    last_token_ms: float
    loop_ms: float


class Canvas(Struct):
    """A step is of one canvas of full length with every second position masked, and scores these; default_step_ms: it
    scores only the positions that the bundle's default sampling is about to commit.
    """

    step_ms: float
    bare_step_ms: float | None  # without the reduction to top-K; None for backends without a profile
    reduction_ms: float | None
    default_step_ms: float | None  # None for a LoopBackend, which scores everything
    default_scored: int  # positions
    generations: list[Generation]


class Stopwatch:
    """Adds up the time spent in a backend's own method, `score` or `advance`, while it is attached."""

    def __init__(self, backend: AnyBackend) -> None:
        self._backend, self._name = backend, "advance" if isinstance(backend, LoopBackend) else "score"
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        inner: Callable[..., object] = getattr(self._backend, self._name)

        def timed(*arguments: object) -> object:
            started = time.perf_counter()
            result = inner(*arguments)
            self.seconds += time.perf_counter() - started
            return result

        setattr(self._backend, self._name, timed)  # hides the class's method
        return self

    def __exit__(self, *_: object) -> None:
        delattr(self._backend, self._name)


def canvas_backend(loaded: LoadedBundle) -> AnyBackend:
    """Raises ConfigError when the bundle does not decode by canvas."""
    if loaded.backend is None:
        raise ConfigError(f"{loaded.model} does not decode by canvas, which `edge.bench --steps` measures")
    return loaded.backend


def half_masked(loaded: LoadedBundle) -> Row:
    """A canvas with every second position masked, as after two thirds of the steps of default sampling."""
    model, defaults = loaded.manifest.model, loaded.manifest.defaults
    canvas = np.arange(model.canvas_len, dtype=np.int32) % (model.vocab_size - FIRST_TEXT_ID) + FIRST_TEXT_ID
    canvas[::2], canvas[0] = MASK, BOS
    sampling = Sampling(0, defaults.steps, defaults.selection, defaults.temperature, loaded.manifest.top_k, 1.0)
    return Row(canvas, canvas == MASK, sampling, step=defaults.steps * 2 // 3)


def median_step_ms(loaded: LoadedBundle, positions: Positions, repeats: int = 40) -> float:
    """Median time of a step of half_masked() that scores these positions."""
    row, backend, times = half_masked(loaded), canvas_backend(loaded), []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        if isinstance(backend, LoopBackend):
            backend.advance([replace(row, canvas=row.canvas.copy())], row.canvas.size)
        else:
            backend.score(row.canvas, 0.5, positions)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[5:])


def reduction_share(bundle: Path, threads: int) -> float | None:
    """Share of a step's time in the reduction to top-K, from ONNX Runtime's profile."""
    from edge.backends.ort import OrtBackend

    with tempfile.TemporaryDirectory() as folder:
        loaded = LoadedBundle.load(bundle, "ort", threads)
        assert isinstance(loaded.backend, OrtBackend)
        loaded.backend = OrtBackend(bundle, loaded.manifest, threads=threads, profile=Path(folder) / "step")
        median_step_ms(loaded, np.flatnonzero(half_masked(loaded).fill), repeats=10)
        events = msgspec.json.decode(loaded.backend.end_profile().read_bytes())
    spent = {True: 0.0, False: 0.0}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent["reduce." in event["name"]] += event["dur"]
    return spent[True] / (spent[True] + spent[False])


def generation(loaded: LoadedBundle, steps: int) -> Generation:
    """Three whole texts from a short prompt, at full length."""
    rows = []
    for seed in range(REPEATS):
        plan = loaded.prepare(GenerateRequest(prompt="Once upon a time", seed=seed, steps=steps))
        first_s = 0.0
        started = time.perf_counter()

        def on_step(snapshot: object, started: float = started) -> None:
            nonlocal first_s
            first_s = first_s or time.perf_counter() - started

        with Stopwatch(canvas_backend(loaded)) as inside:
            completion = loaded.run(plan, on_step)
        total_s = time.perf_counter() - started
        loop_ms = (total_s - inside.seconds) / completion.steps * 1e3
        rows.append((completion.generated_tokens / total_s, first_s * 1e3, total_s * 1e3, loop_ms))
    return Generation(steps, *(statistics.median(column) for column in zip(*rows, strict=True)))


def measure_canvas(loaded: LoadedBundle, bundle: Path, threads: int, steps: Sequence[int]) -> Canvas | None:
    """None where the bundle, or the device, does not decode by canvas."""
    if loaded.backend is None:
        return None
    row = half_masked(loaded)
    step_ms = median_step_ms(loaded, np.flatnonzero(row.fill))
    share = reduction_share(bundle, threads) if loaded.backend_name == "ort" else None
    return Canvas(
        step_ms=step_ms,
        bare_step_ms=None if share is None else step_ms * (1 - share),
        reduction_ms=None if share is None else step_ms * share,
        default_step_ms=None if isinstance(loaded.backend, LoopBackend) else median_step_ms(loaded, wanted(row)),
        default_scored=wanted(row).size,
        generations=[generation(loaded, n) for n in steps],
    )


def print_canvas(c: Canvas, reference: dict[str, float] | None) -> None:
    """The tables. reference: of torch on the same step."""
    print(f"{'step, all that is masked scored':36} {c.step_ms:8.2f} ms")
    if c.bare_step_ms is not None:
        print(f"{'  the network':36} {c.bare_step_ms:8.2f} ms\n{'  reduction to top-K':36} {c.reduction_ms:8.2f} ms")
    if c.default_step_ms is not None:
        print(f"{f'step, the {c.default_scored} to commit scored':36} {c.default_step_ms:8.2f} ms")
    if reference is not None:
        print(f"{'torch float32, eager, same step':36} {reference['torch_ms']:8.2f} ms")
        print(f"{'  times our step':36} {reference['torch_ms'] / c.step_ms:8.2f}")
        if c.bare_step_ms is not None:
            reached = reference["gflop"] / c.bare_step_ms
            print(f"{'  times our network':36} {reference['torch_ms'] / c.bare_step_ms:8.2f}")
            print(f"{'  our network':36} {reached * 1e3:8.0f} GOP/s")
    print(f"\n{'steps':>6} {'tokens/s':>9} {'first token, ms':>16} {'last token, ms':>15} {'loop, ms a step':>16}")
    for g in c.generations:
        print(f"{g.steps:6} {g.tokens_per_s:9.0f} {g.first_token_ms:16.1f} {g.last_token_ms:15.1f} {g.loop_ms:16.2f}")
