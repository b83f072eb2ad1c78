"""TensorRT for blocks, with the whole loop on the GPU: the engine scores rows over slots that never leave the device;
kernels lay the rows out, draw with the common noise, keep the longest run of drafts, append its rows, and draft again.

Each pass is one CUDA graph launch for up to eight requests. The host writes a request's record once, and where one of
its gaps begins; it reads what was committed from mapped memory. R: places of a pass, N: rows of each, C: rows that a
slot holds, M: scored rows, V: vocabulary, D: width.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

import numpy as np

from edge.backends.trt import kernels
from edge.backends.trt.block_pass import Addresses, Pass, Tensors, aligned, number_of
from edge.backends.trt.captured import Captured, Program
from edge.backends.trt.drafter import Drafter
from edge.backends.trt.driver import Gpu, Memory
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.profiles import REQUESTS, check_servable, reads_memory, step_profiles
from edge.decoding.blocks import Slot, Writing, commit
from edge.decoding.types import Ids
from shared.errors import BundleError, DeviceError
from shared.manifest import Graph, Manifest

SLOTS: Final = REQUESTS[-1]


class TrtBlocks(Captured):
    """A BlocksLoop. Allocates all memory at the start; a pass allocates nothing and waits on one event only."""

    lanes = 1
    requests: tuple[int, ...] = REQUESTS
    """Slots of each kind of step."""

    def __init__(
        self,
        trt: ModuleType,
        gpu: Gpu,
        *,
        memory: Memory,
        manifest: Manifest,
        step: Graph,
        graph: bytes,
        built: Sequence[Built],
    ) -> None:
        """Load engines, the first built for `step_profiles`, and warm every profile up. graph: the step graph's bytes.

        Raises EngineRejected, BundleError, or DeviceError for any other failure.
        """
        super().__init__(trt, gpu)
        assert manifest.blocks is not None
        self.depth = manifest.blocks.window
        self.batches = tuple(range(1, SLOTS + 1))
        parity = (one for one in manifest.law_parity if one.graph == step.file)
        self.fills_gaps = any(one.infilling_ratio is not None for one in parity) or any(
            one.role == "prefill" for one in manifest.graphs
        )
        self._model, self._manifest, self._slots = manifest.model, manifest, 0
        self._placed: list[Writing | None] = [None] * SLOTS
        try:
            check_servable(manifest)
            self._fit(step)
            self._load(memory, built, graph)
        except BaseException:
            self.close()
            raise

    def _fit(self, step: Graph) -> None:
        """Sizes that the step graph has. Raises BundleError when they are not the manifest's."""
        self.capacity = _capacity(step, self._manifest, self.depth + 1)

    def _kernel_names(self) -> tuple[str, ...]:
        drafting = (kernels.DRAFT_INPUT, kernels.DRAFT_LINEAR, kernels.DRAFT_TOKEN)
        return (kernels.PREPARE, kernels.DRAW_ROWS, kernels.KEEP, kernels.APPEND, *drafting * (self.depth > 0))

    def _load(self, memory: Memory, built: Sequence[Built], graph: bytes) -> None:
        m, slots = self._model, self.requests[-1]
        self._begin(memory, built, self._kernel_names())
        self._width = m.d_model // m.heads
        self._kept_stride = aligned(slots * self.capacity * m.d_model)
        profiles = step_profiles(m.canvas_len, self.depth, self.requests is not REQUESTS)
        most_rows, scored = max(requests * rows for requests, rows in profiles), slots * (self.depth + 1)
        arrays = 2 * m.layers
        places, writings, reading = (
            memory.mapped(size)
            for size in (4 * slots, SLOTS * kernels.WRITING.itemsize, kernels.READING.itemsize + 8 * m.canvas_len)
        )
        kept_bytes, positions_bytes = 2 * arrays * self._kept_stride, 4 * slots * self.capacity
        tokens, row_positions, sees = (memory.device(4 * most_rows) for _ in range(3))
        self._at = at = Addresses(
            places[1],
            writings[1],
            reading[1],
            tokens,
            row_positions,
            sees,
            cached=memory.device(4 * slots),
            scored=memory.device(4 * scored),
            key_positions=memory.device(positions_bytes),
            kept=memory.device(kept_bytes),
            fresh=memory.device(2 * arrays * aligned(most_rows * m.d_model)),
            logits=memory.device(2 * scored * m.vocab_size),
            states=memory.device(2 * scored * m.d_model),
            drawn=memory.device(4 * scored),
        )
        for address, size in ((at.kept, kept_bytes), (at.key_positions, positions_bytes)):
            self._gpu.call("cuMemsetD8Async", address, 0, size, self._stream)  # no NaN may be there
        self._places = places[0].view(np.int32)
        self._writings = writings[0].view(kernels.WRITING)
        self._reading = reading[0][: kernels.READING.itemsize].view(kernels.READING)
        self._read_rows = reading[0][kernels.READING.itemsize :].view(np.int32).reshape(2, m.canvas_len)
        self._places[:] = -1
        self._drafter = None
        if self.depth:
            self._drafter = Drafter(self._gpu, memory, graph=graph, model=m, depth=self.depth, places=slots)
        self._take_more(memory)
        self._passes: list[Pass] = []
        self._owned.callback(self._passes.clear)
        for profile, (requests, count) in enumerate(profiles):
            reads = profile >= len(self.requests)
            made = Pass(requests, count, reads, aligned(requests * count * m.d_model))
            self._passes.append(made)
            made.context = self._context_of(profile, made)
        for one in self._passes:
            self._warm_up(one, capture=memory.graphs)

    def _take_more(self, memory: Memory) -> None:
        """Memory of what `_more_inputs` gives."""

    def _more_inputs(self, one: Pass) -> Tensors:
        """Of the step graph, beside those of its rows."""
        return {}

    def _context_of(self, profile: int, one: Pass) -> Any:
        m, at, r, n = self._model, self._at, one.requests, one.rows
        rows, scored = (r, n), (r, self.depth + 1)
        inputs: Tensors = {
            "tokens": (at.tokens, rows),
            "positions": (at.positions, rows),
            "sees": (at.sees, rows),
            "cached": (at.cached, rows[:1]),
            "key_positions": (at.key_positions, (r, self.capacity)),
            "scored": (at.scored, scored),
        }
        outputs: Tensors = {
            "logits": (at.logits, (*scored, m.vocab_size)),
            "states": (at.states, (*scored, m.d_model)),
        }
        for i in range(m.layers):
            for j, kind in enumerate(("keys", "values")):
                kept, fresh = (
                    at.kept + 2 * (2 * i + j) * self._kept_stride,
                    at.fresh + 2 * (2 * i + j) * one.fresh_stride,
                )
                inputs[f"{kind}.{i}"] = (kept, (r, m.heads, self.capacity, self._width))
                outputs[f"new_{kind}.{i}"] = (fresh, (r, m.heads, n, self._width))
        return self._context(one.name, profile, inputs=inputs | self._more_inputs(one), outputs=outputs)

    def _enqueue(self, program: Program) -> None:
        """Lay out, score, draw, keep, append, draft, in the stream's order."""
        assert isinstance(program, Pass)
        m, at, r, n = self._model, self._at, program.requests, program.rows
        scored, reads, who = self.depth + 1, int(program.reading), (self._at.places, self._at.writings)
        laid_out = (*who, at.reading, at.tokens, at.positions, at.sees, at.cached, at.scored)
        self._launch(kernels.PREPARE, (r,), laid_out, (n, scored, m.canvas_len, reads))
        self._execute(program)
        self._change_scores(program)
        drawn = (at.logits, *who, at.reading, at.drawn)
        self._launch(kernels.DRAW_ROWS, (scored, r), drawn, (scored, m.vocab_size, reads))
        self._launch(kernels.KEEP, (r,), (*who, at.reading, at.drawn), (scored, reads))
        kept = (*who, at.reading, at.positions, at.key_positions, at.fresh, at.kept)
        numbers = (n, self.capacity, m.heads, self._width, program.fresh_stride, self._kept_stride, reads)
        self._launch(kernels.APPEND, (2 * m.layers, n, r), kept, numbers)
        if self._drafter is not None:
            self._drafter.launch(self._launch, r, places=at.places, writings=at.writings, states=at.states)

    def _change_scores(self, program: Pass) -> None:
        """Launches before the draw."""

    def open_slot(self) -> Slot:
        """See `edge.decoding.blocks.BlocksLoop`. Its memory is its number, from 0 on."""
        self._slots += 1
        assert self._slots <= SLOTS
        return Slot(np.zeros(0, np.int32), self._slots - 1)

    def advance(self, writings: Sequence[Writing]) -> None:
        """See `edge.decoding.blocks.BlocksLoop`."""
        self._check_healthy()
        try:
            self._gpu.use()
        except DeviceError as error:
            self._fail(error)
            raise
        together = [w for w in writings if not self._read(w)]
        if together:
            self._places[:] = -1
            last = max(self._put(w) for w in together)
            self._run(next(one for one in self._passes if one.requests > last))
        broken = [w for w in writings if not self._collected(w)]
        if broken:
            raise DeviceError("the engine's scores are not all numbers: FP16 overflows in this network")

    def _put(self, w: Writing) -> int:
        """Give a request its place in a step.  → the last that it has"""
        number = number_of(w)
        self._places[number] = number
        return number

    def _read(self, w: Writing) -> bool:
        """Write the record of a new request, and read its given text.  → whether that was its pass"""
        number = number_of(w)
        if self._placed[number] is w:
            return False
        self._placed[number] = w
        law, record = w.law, self._writings[number : number + 1]
        record[:] = 0
        record["seed"], record["temperature"], record["top_p"] = law.seed, law.temperature, law.top_p
        record["top_k"], record["window"] = law.top_k, min(law.window, self.depth)
        self._remember(w)
        self._begin_gap(w)
        if w.evidence is None:
            return self._read_prompt(w)
        tokens, positions = w.evidence
        self._read_in(number, tokens=tokens, positions=positions, evidence=True, draws=False)
        assert w.slot is not None
        w.slot.cached, w.evidence = tokens.size, None
        return False

    def _remember(self, w: Writing) -> None:
        """Encode the condition of a new request."""

    def _narrow(self, w: Writing) -> None:
        """From now on its rows read what remains of the condition."""

    def _read_prompt(self, w: Writing) -> bool:
        """→ whether that was its pass"""
        tokens, first = np.array(w.pending, np.int32), w.position - len(w.pending) + 1
        positions = np.arange(first, w.position + 1)
        self._read_in(number_of(w), tokens=tokens, positions=positions, evidence=False, draws=True)
        return True

    def _read_in(self, number: int, *, tokens: Ids, positions: Any, evidence: bool, draws: bool) -> None:
        self._read_into(number, number, tokens=tokens, positions=positions, evidence=evidence, draws=draws)

    def _read_into(self, slot: int, number: int, *, tokens: Ids, positions: Any, evidence: bool, draws: bool) -> None:
        count = tokens.size
        for name, value in (("rows", count), ("evidence", evidence), ("draws", draws), ("slot", slot)):
            self._reading[name] = value
        self._read_rows[:, :count] = tokens, positions
        self._places[:] = -1
        self._places[0] = number
        self._run(next(one for one in self._passes if one.reading and one.rows >= count))

    def _begin_gap(self, w: Writing) -> None:
        """Nothing is drafted yet; the row of the gap's left neighbour is the next."""
        record = self._writings[number_of(w) : number_of(w) + 1]
        record["position"], record["token"], record["last"] = w.position, w.pending[-1], w.gaps[0][1]
        record["drafts"] = 0

    def _collected(self, w: Writing) -> bool:
        """Take over what the pass committed.  → False when a score was not a number: then nothing has changed"""
        record = self._writings[number_of(w)]  # a view
        assert w.slot is not None
        if record["broken"]:
            record["broken"] = 0
            if w.slot.cached == 0:  # its text is to be read again
                self._placed[number_of(w)] = None
            return False
        new: list[int] = record["text"][: record["fresh"]].tolist()
        told = w.tell(new)
        back = 0 if told is None else len(new) - 1 - told  # tokens to take back, drawn while the word was asked for
        record["cached"] -= back
        w.slot.cached += int(record["kept"]) - back
        w.passes += 1
        w.tried[len(w.drafts)] += 1
        w.kept[int(record["agreed"]) - back] += 1
        if told is not None:
            self._narrow(w)
        if commit(w, new[: len(new) - back]) and not back:
            w.drafts = record["draft"][: record["drafts"]].tolist()
        elif not w.done:
            self._begin_gap(w)
        return True


def _capacity(step: Graph, manifest: Manifest, scored: int) -> int:
    """Rows that a slot holds, as the graph says. Raises BundleError when it contradicts the manifest."""
    model, shapes = manifest.model, {tensor.name: tensor.shape for tensor in step.inputs}
    capacity = (shapes.get("key_positions") or (0, 0))[1]
    width = model.d_model // model.heads
    wanted: dict[str, tuple[int | str, ...]] = {
        f"{kind}.{i}": ("requests", model.heads, capacity, width)
        for i in range(model.layers)
        for kind in ("keys", "values")
    }
    wanted |= dict.fromkeys(("tokens", "positions", "sees"), ("requests", "rows"))
    wanted |= {"cached": ("requests",), "key_positions": ("requests", capacity), "scored": ("requests", scored)}
    if reads_memory(step):
        rows = (shapes["reads"] or (0, 0))[-1]
        wanted |= {f"memory_{name}": ("requests", model.heads, rows, width) for name in wanted if "." in name}
        wanted["reads"] = ("requests", rows)
    if not isinstance(capacity, int) or capacity < model.canvas_len or shapes != wanted:
        raise BundleError(f"{step.file} has other inputs than the kernels of blocks: {shapes}, not {wanted}")
    return capacity
