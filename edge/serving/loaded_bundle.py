"""A loaded bundle that turns requests into text: tokenizer, backends and decoders behind one interface."""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from edge.backends import Chosen, choose_backend
from edge.decoding.blocks import AnyRows, BlocksLoop, Law, RowsBackend, TakesConditions
from edge.decoding.conditions import Condition
from edge.decoding.layout_text import GAP_OF_BLOCKS, GAP_OF_CANVAS, Texts
from edge.decoding.pictures import MAX_PICTURE_BYTES
from edge.decoding.together import SharedRows
from edge.decoding.types import AnyBackend, LoopBackend, Sampling
from edge.serving.conditions import read_condition
from edge.serving.runs import BlocksRun, CanvasRun, Completion, Plan, Run, Snapshot, step
from edge.serving.slots import Slots
from edge.serving.window import best_window
from shared.errors import BundleError, RequestError
from shared.manifest import MAX_STEPS, TOKENIZER, Decoder, Manifest, bundle_digest, read_manifest, verified_bytes
from shared.messages import MAX_MESSAGE_BYTES, GenerateRequest, Limits

LEAST_TOP_P: Final = 1e-30
"""Keeps the likeliest token alone; much below it a float32 is 0, and would keep none."""


class LoadedBundle:
    """One bundle on one backend. Thread-safe for `prepare`, and for `step` in as many threads as it has `lanes`.

    backend, rows: what runs the decoders canvas and blocks; None where the bundle or the device lacks it.
    backend_name: "ort", "trt" or "fake". degraded: why the CPU serves in place of the GPU, or None. window: the drafts
    in a pass of requests that name no number, as many as pay on this device.
    """

    def __init__(self, folder: Path, manifest: Manifest, chosen: Chosen, texts: Texts) -> None:
        self.manifest = manifest
        self.digest = bundle_digest(folder)
        self.backend, self.backend_name, self.degraded, self.rows = chosen
        # Once, not at every pass: isinstance with a protocol takes 15 µs.
        self._loop = self.rows if isinstance(self.rows, BlocksLoop) else None
        self._shared_rows = self.rows if isinstance(self.rows, SharedRows) else None
        self._host_rows = self.rows if isinstance(self.rows, RowsBackend) else None
        self._slots = None if self.rows is None else Slots(self.rows)
        self.window = 0 if manifest.blocks is None else manifest.blocks.window
        if self.backend_name == "ort" and self._host_rows is not None:
            self.window = best_window(self._host_rows, manifest)
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
        """Check a request against the bundle and fix its seed; raises RequestError.

        Where it has a condition this may take a while: pictures are decoded, and the first ones load graphs.
        """
        rows = self._conditioned_rows(request)
        decoder = self._decoder(request)
        layout = self._texts.lay_out(request, GAP_OF_BLOCKS if decoder == "blocks" else GAP_OF_CANVAS)
        manifest, defaults = self.manifest, self.manifest.defaults
        if request.top_k is not None and request.top_k > manifest.top_k:
            raise RequestError("bad_request", f"`top_k` {request.top_k} is above the bundle's {manifest.top_k}")
        seed = secrets.randbits(53) if request.seed is None else request.seed  # 53 bits: exact in any JSON reader
        top_k = request.top_k or manifest.top_k
        default_p = manifest.blocks.top_p if decoder == "blocks" and manifest.blocks is not None else defaults.top_p
        top_p = max(request.top_p or default_p, LEAST_TOP_P)
        if decoder == "blocks":
            assert manifest.blocks is not None
            return Plan(
                layout,
                Law(
                    seed=seed,
                    temperature=manifest.blocks.temperature if request.temperature is None else request.temperature,
                    top_k=top_k,
                    top_p=top_p,
                    window=self.window if request.window is None else request.window,
                ),
                self._condition(request, rows),
            )
        adaptive = request.threshold is not None or request.entropy_bound is not None
        sampling = Sampling(
            seed=seed,
            steps=request.steps or (layout.canvas.size if adaptive else defaults.steps),
            selection=request.selection or defaults.selection,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_k=top_k,
            top_p=top_p,
            threshold=request.threshold,
            entropy_bound=request.entropy_bound,
        )
        return Plan(layout, sampling)

    def limits(self, queue_size: int) -> Limits:
        """What requests must keep within. queue_size: of the daemon."""
        blocks, takes = self.manifest.blocks, self.manifest.conditions if self.takes_conditions else None
        return Limits(
            message_bytes=MAX_MESSAGE_BYTES,
            canvas_tokens=self.manifest.model.canvas_len,
            steps=MAX_STEPS,
            window=0 if self.rows is None or blocks is None else blocks.window,
            top_k=self.manifest.top_k,
            queue_size=queue_size,
            words=0 if takes is None else takes.words,
            images=0 if takes is None else takes.pictures,
            image_bytes=0 if takes is None else MAX_PICTURE_BYTES,
            guidance=0.0 if takes is None else takes.guidance,
        )

    @property
    def takes_conditions(self) -> bool:
        """Whether this bundle on this device takes words and pictures."""
        return self.manifest.conditions is not None and isinstance(self.rows, TakesConditions)

    def _conditioned_rows(self, request: GenerateRequest) -> TakesConditions | None:
        """What runs a request with a condition; None for one without. Raises RequestError where nothing does."""
        if not request.conditioned:
            return None
        rows, name = self.rows, "`words`" if request.words is not None else "`images`"
        if self.manifest.conditions is None:
            raise RequestError("bad_request", f"{name}: this bundle takes neither words nor pictures")
        if not isinstance(rows, TakesConditions):
            why = f"this device serves from the backend {self.backend_name}, for which the bundle takes none"
            raise RequestError("bad_request", f"{name}: {why}")
        if request.segments is not None and not rows.fills_conditioned_gaps:
            raise RequestError("bad_request", f"{name}: this bundle fills gaps without conditions: give a `prompt`")
        return rows

    def _condition(self, request: GenerateRequest, rows: TakesConditions | None) -> Condition | None:
        if rows is None or self.manifest.conditions is None:
            return None
        condition = read_condition(request, self.manifest.conditions, self._texts)
        rows.load(condition)
        return condition

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """What this device writes by, the default first."""
        return tuple(d for d in self.manifest.decoders if (self.rows if d == "blocks" else self.backend))

    def _decoder(self, request: GenerateRequest) -> Decoder:
        """What a request asks for, by name or by a field that only one has; else the default. Raises RequestError."""
        fills_gaps = self.rows is not None and self.rows.fills_gaps
        able = [d for d in self.decoders if d == "canvas" or request.prompt is not None or fills_gaps]
        if not able:
            raise RequestError("bad_request", "`segments`: this bundle on this device continues prompts alone")
        wanted = request.decoder or able[0]
        if wanted not in able:
            has = " and ".join(able) + " for gaps" * (able != list(self.decoders))
            named = "`decode`" if request.decode else "a field of its own"
            raise RequestError("bad_request", f"{named} asks for {wanted}; this bundle on this device has {has} alone")
        if request.window is not None and self.manifest.blocks is not None:
            most = self.manifest.blocks.window
            if request.window > most:
                raise RequestError("bad_request", f"`window` {request.window} is above the bundle's {most}")
        return wanted

    @property
    def failure(self) -> str | None:
        """Why its device is out of service for good; None while it is healthy, and always on a CPU."""
        on_gpu = (one for one in (self.backend, self.rows) if isinstance(one, LoopBackend | BlocksLoop))
        return next((one.failure for one in on_gpu if one.failure is not None), None)

    def begin(self, plan: Plan) -> Run:
        """A plan's canvas, ready for its first pass."""
        if isinstance(plan.sampling, Law):
            assert self._slots is not None
            rows = None if self._loop is None else self._loop.depth + 1
            vocab_size = self.manifest.model.vocab_size
            return BlocksRun(plan, self._texts, slots=self._slots, vocab_size=vocab_size, step_rows=rows)
        assert self.backend is not None
        return CanvasRun(plan, self._texts, self.backend)

    @property
    def lanes(self) -> int:
        """How many threads may be in `step` at once, with different runs."""
        lanes: int = getattr(self.backend or self.rows, "lanes", 1)
        return lanes

    def batches(self, run: Run | None = None) -> tuple[int, ...]:
        """How many runs like this one (by canvas without one), of equal `positions`, a step takes, ascending from 1."""
        backend: AnyBackend | AnyRows | None = self.backend
        if isinstance(run, BlocksRun):
            if run.writing.reads or (run.writing.conditioned and self._loop is None):
                return (1,)
            backend = self.rows
        batches: tuple[int, ...] = getattr(backend, "batches", (1,))
        return batches

    @property
    def deterministic(self) -> bool:
        """Whether a text depends on its plan alone: what shares a step with it changes no bit of its scores."""
        return self.batches() == (1,) and self._loop is None

    def step(self, runs: Sequence[Run], under_way: int = 1) -> None:
        """One pass of unfinished runs that are ready, of one decoder and equal `positions`, one of `batches` in number.

        under_way: how many runs share the backend, these included; a CPU's threads are divided among them.
        """
        step(
            runs,
            self.manifest,
            backend=self.backend,
            rows=self._host_rows,
            shared=self._shared_rows,
            loop=self._loop,
            under_way=under_way,
        )

    def run(self, plan: Plan, on_step: Callable[[Snapshot], None] | None = None) -> Completion:
        """A plan's text; an exception raised by on_step ends the run and comes out here."""
        run = self.begin(plan)
        try:
            while not run.done:
                run.ready()
                self.step([run])
                if on_step is not None:
                    on_step(run.snapshot())
            return run.completion()
        finally:
            run.close()

    def close(self) -> None:
        """Free the backends."""
        for backend in (self.backend, self.rows):
            if backend is not None:
                backend.close()
