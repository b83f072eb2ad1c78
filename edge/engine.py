"""A loaded bundle that turns requests into text: tokenizer, backend and unmasking loop behind one door."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.backends import AnyBackend, load_backend
from edge.text import Layout, Texts
from edge.unmask import Sampling, unmask
from shared.errors import BundleError, RequestError
from shared.manifest import TOKENIZER, Manifest, bundle_digest, read_manifest, verified_bytes
from shared.messages import GenerateRequest
from shared.tokens import MASK, PAD


@dataclass(frozen=True)
class Plan:
    """A request that was checked and can no longer fail for its own fault."""

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
    """The canvas between two passes; read the text before the next pass changes it."""

    step: int  # passes so far
    steps: int  # the most there can be
    masked: int  # positions of the request still open
    text: Callable[[], str]


@dataclass(frozen=True)
class Completion:
    """What came of a plan. canvas (L,): the final ids."""

    text: str
    canvas: NDArray[np.int32]
    generated_tokens: int
    steps: int


class Engine:
    """One bundle on one backend. Not thread-safe, except for `prepare`."""

    def __init__(self, folder: Path, manifest: Manifest, backend: AnyBackend, texts: Texts) -> None:
        self.manifest = manifest
        self.digest = bundle_digest(folder)
        self.backend = backend
        self._texts = texts

    @classmethod
    def load(cls, folder: Path, backend: str = "ort", threads: int = 0) -> "Engine":
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
        return cls(folder, manifest, load_backend(backend, folder, manifest, threads), texts)

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

    def run(self, plan: Plan, on_step: Callable[[Snapshot], None] | None = None) -> Completion:
        """Unmask a plan's canvas; an exception raised by on_step ends the run and comes out here."""
        layout = plan.layout
        canvas = layout.canvas.copy()
        most = min(plan.sampling.steps, int(layout.fill.sum()))

        def after(step: int, now: NDArray[np.int32]) -> None:
            if on_step is not None:
                masked = int(np.count_nonzero(layout.fill & (now == MASK)))
                on_step(Snapshot(step, max(most, step), masked, lambda: self._texts.read(layout, now)))

        steps = unmask(self.backend, self.manifest.schedule, canvas, layout.fill, plan.sampling, after)
        generated = int(np.count_nonzero(layout.fill & (canvas != PAD)))
        return Completion(self._texts.read(layout, canvas), canvas, generated, steps)

    def close(self) -> None:
        """Free the backend."""
        self.backend.close()
