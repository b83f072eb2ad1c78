"""A loaded bundle, which turns requests into text: tokenizer, backend and unmasking loop."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.backends import Chosen, choose_backend
from edge.decoding.canvas import advance, bucket
from edge.decoding.layout_text import Layout, Texts
from edge.decoding.types import LoopBackend, Row, Sampling
from shared.errors import BundleError, RequestError
from shared.manifest import TOKENIZER, Manifest, bundle_digest, read_manifest, verified_bytes
from shared.messages import GenerateRequest, Part
from shared.tokens import PAD


@dataclass(frozen=True)
class Plan:
    """A checked request: from here on only the device can fail."""

    layout: Layout
    sampling: Sampling

    @property
    def seed(self) -> int:
        """The seed that reproduces the text."""
        return self.sampling.seed

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the given text."""
        return self.layout.prompt_tokens


@dataclass(frozen=True)
class Snapshot:
    """The canvas between two steps; read text and parts before the next step changes them."""

    step: int  # steps so far
    steps: int  # the most there can be
    masked: int  # positions of the request still open
    text: Callable[[], str]
    parts: Callable[[], list[Part]]  # with what is drafted at the open positions


@dataclass(frozen=True)
class Completion:
    """The result of a plan. canvas (L,): the final ids."""

    text: str
    canvas: NDArray[np.int32]
    generated_tokens: int
    steps: int


class Run:
    """A plan in progress."""

    def __init__(self, plan: Plan, texts: Texts) -> None:
        self.plan = plan
        self.row = Row(plan.layout.canvas.copy(), plan.layout.fill, plan.sampling)
        self._texts = texts
        self._most = min(plan.sampling.steps, self.row.left)

    @property
    def done(self) -> bool:
        """Whether all positions are filled."""
        return self.row.left == 0

    def snapshot(self) -> Snapshot:
        """How far it is."""
        row = self.row
        return Snapshot(row.step, max(self._most, row.step), row.left, self._text, self._parts)

    def completion(self) -> Completion:
        """The result, once it is done."""
        generated = int(np.count_nonzero(self.plan.layout.fill & (self.row.canvas != PAD)))
        return Completion(self._text(), self.row.canvas, generated, self.row.step)

    def _text(self) -> str:
        return self._texts.read(self.plan.layout, self.row.canvas)

    def _parts(self) -> list[Part]:
        return self._texts.parts(self.plan.layout, self.row.canvas, self.row.draft)


class LoadedBundle:
    """One bundle on one backend. Thread-safe for `prepare`, and for `step` in as many threads as it has `lanes`.

    backend_name: "ort", "trt" or "fake". degraded: why the device computes with less than it has, or None.
    """

    def __init__(self, folder: Path, manifest: Manifest, chosen: Chosen, texts: Texts) -> None:
        self.manifest = manifest
        self.digest = bundle_digest(folder)
        self.backend, self.backend_name, self.degraded = chosen
        self._texts = texts

    @classmethod
    def load(cls, folder: Path, backend: str = "ort", threads: int = 0) -> "LoadedBundle":
        """Read, verify and warm up a bundle; raises BundleError or ConfigError in one sentence."""
        manifest = read_manifest(folder)
        raw = verified_bytes(folder, TOKENIZER, manifest.tokenizer_sha256)
        try:
            tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise BundleError(f"{folder / TOKENIZER} cannot be read: {error}") from None
        if tokenizer.get_vocab_size() != manifest.model.vocab_size:
            sizes = f"{tokenizer.get_vocab_size()} tokens, the model {manifest.model.vocab_size}"
            raise BundleError(f"{folder / TOKENIZER} has {sizes}")
        texts = Texts(tokenizer, manifest.model.canvas_len)
        return cls(folder, manifest, choose_backend(backend, folder, manifest, threads), texts)

    @property
    def model(self) -> str:
        """Name and digest, as answers and health state them."""
        return f"{self.manifest.name}@{self.digest[:12]}"

    def prepare(self, request: GenerateRequest) -> Plan:
        """Check a request against the bundle and fix its seed; raises RequestError."""
        layout = self._texts.lay_out(request)
        manifest, defaults = self.manifest, self.manifest.defaults
        if request.top_k is not None and request.top_k > manifest.top_k:
            raise RequestError("bad_request", f"`top_k` {request.top_k} is above the bundle's {manifest.top_k}")
        adaptive = request.threshold is not None or request.entropy_bound is not None
        sampling = Sampling(
            seed=secrets.randbits(53) if request.seed is None else request.seed,  # 53 bits: exact in any JSON reader
            steps=request.steps or (layout.canvas.size if adaptive else defaults.steps),
            selection=request.selection or defaults.selection,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_k=request.top_k or manifest.top_k,
            top_p=request.top_p or defaults.top_p,
            threshold=request.threshold,
            entropy_bound=request.entropy_bound,
        )
        return Plan(layout, sampling)

    @property
    def failure(self) -> str | None:
        """Why its device is out of service for good; None while it is healthy, and always on a CPU."""
        return self.backend.failure if isinstance(self.backend, LoopBackend) else None

    def begin(self, plan: Plan) -> "Run":
        """A plan's canvas, ready for its first step."""
        return Run(plan, self._texts)

    @property
    def lanes(self) -> int:
        """How many threads may be in `step` at once, with different runs."""
        lanes: int = getattr(self.backend, "lanes", 1)
        return lanes

    @property
    def batches(self) -> tuple[int, ...]:
        """How many runs of equal `positions` one step may take, ascending from 1."""
        batches: tuple[int, ...] = getattr(self.backend, "batches", (1,))
        return batches

    @property
    def deterministic(self) -> bool:
        """Whether a text depends on its plan alone: nothing is ever computed in one batch with it."""
        return self.batches == (1,)

    def positions(self, run: Run) -> int:
        """How many canvas positions its next step computes."""
        # Called for every request at every step: isinstance with a protocol would dominate it.
        lengths = getattr(self.backend, "lengths", None)
        return run.row.active if lengths is None else bucket(run.row.active, lengths)

    def step(self, runs: Sequence[Run], under_way: int = 1) -> None:
        """One denoising step of unfinished runs of equal `positions`; their number is one of `batches`.

        under_way: how many runs share the backend, these included; a CPU's threads are divided among them.
        """
        advance(self.backend, self.manifest.schedule, [run.row for run in runs], under_way)

    def run(self, plan: Plan, on_step: Callable[[Snapshot], None] | None = None) -> Completion:
        """Unmask a plan's canvas. An exception in on_step ends the run and propagates."""
        run = self.begin(plan)
        while not run.done:
            self.step([run])
            if on_step is not None:
                on_step(run.snapshot())
        return run.completion()

    def close(self) -> None:
        """Free the backend."""
        self.backend.close()
