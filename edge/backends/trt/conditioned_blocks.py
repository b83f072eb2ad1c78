"""TensorRT for blocks that take words and pictures: encoders are engines of their own, run once a request, and what
they make goes straight into the memory of its slot, which the step engine reads in place.

Each request has two slots. In the second one lie the rows of a guided request that read no memory: they run in the same
pass, and a kernel changes the scores by theirs before the draw. S: memory rows of a slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.backends.ort_conditions import as_input
from edge.backends.trt import kernels
from edge.backends.trt.block_pass import Pass, Tensors, aligned, number_of
from edge.backends.trt.blocks import TrtBlocks
from edge.backends.trt.captured import Program
from edge.backends.trt.driver import Memory
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.profiles import PAIRED
from edge.decoding.blocks import Writing
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.types import Ids
from shared.errors import BundleError
from shared.manifest import Graph


@dataclass(eq=False)
class Encoding:
    """The program of an encoder, whose rows go to the memory from `first` on."""

    name: str
    first: int
    rows: int
    context: Any = None
    graph: Any = None


class TrtConditionedBlocks(TrtBlocks):
    """A BlocksLoop that takes conditions. built: engines of the step graph, of words, of pictures."""

    requests = PAIRED

    def _fit(self, step: Graph) -> None:
        super()._fit(step)
        takes = self._manifest.conditions
        assert takes is not None
        self._takes, self._top_k = takes, min(self._manifest.top_k, self._model.vocab_size)
        self._word_rows = 1 + takes.words * takes.word_tokens
        self._picture_rows = takes.pictures * takes.picture_rows
        self._memory_rows = next(int(tensor.shape[1]) for tensor in step.inputs if tensor.name == "reads")
        if self._memory_rows <= self._word_rows + self._picture_rows:
            raise BundleError(f"{step.file} has no room for the words and pictures that the manifest promises")

    @property
    def fills_conditioned_gaps(self) -> bool:
        """See `edge.decoding.blocks.TakesConditions`."""
        return self.fills_gaps

    def load(self, condition: Condition) -> None:
        """See `edge.decoding.blocks.TakesConditions`: everything is loaded already."""

    def _kernel_names(self) -> tuple[str, ...]:
        return (*super()._kernel_names(), kernels.REMEMBER, kernels.GUIDE)

    def _load(self, memory: Memory, built: Sequence[Built], graph: bytes) -> None:
        super()._load(memory, built, graph)
        self._encodings = [
            Encoding("words", 0, self._word_rows),
            Encoding("pictures", self._word_rows, self._picture_rows),
        ]
        self._owned.callback(self._encodings.clear)
        for engine, one in enumerate(self._encodings, 1):
            inputs = self._pixel_inputs if engine == 2 else self._word_inputs
            stride, shape = aligned(one.rows * self._model.d_model), (1, self._model.heads, one.rows, self._width)
            outputs: Tensors = {
                f"memory_{name}": (self._encoded + 2 * i * stride, shape) for i, name in enumerate(self._arrays)
            }
            one.context = self._context(one.name, 0, inputs=inputs, outputs=outputs, engine=engine)
            self._warm_up(one, capture=memory.graphs)

    def _take_more(self, memory: Memory) -> None:
        m, takes, rows = self._model, self._takes, self._memory_rows
        self._arrays = [f"{kind}.{i}" for i in range(m.layers) for kind in ("keys", "values")]
        self._read_stride, self._remembered_stride = (aligned(n * rows * m.d_model) for n in (1, self.requests[-1]))
        sizes = [2 * len(self._arrays) * stride for stride in (self._read_stride, self._remembered_stride)]
        self._read_memory, self._remembered = (memory.device(size) for size in sizes)
        for address, size in zip((self._read_memory, self._remembered), sizes, strict=True):
            self._gpu.call("cuMemsetD8Async", address, 0, size, self._stream)  # no NaN, and nothing in the last row
        most = max(self._word_rows, self._picture_rows)
        self._encoded = memory.device(2 * len(self._arrays) * aligned(most * m.d_model))
        self._empty = np.arange(rows) == rows - 1  # what a request without a condition reads
        (self._reads, reads_at), (self._reads_given, given_at) = (
            self._mapped(memory, np.int32, (n, rows)) for n in (self.requests[-1], 1)
        )
        self._reads[:] = self._reads_given[:] = self._empty
        self._reads_at = {False: reads_at, True: given_at}
        tokens = (1, takes.words * takes.word_tokens)
        words = {name: self._mapped(memory, np.int32, tokens) for name in ("tokens", "places", "words")}
        words["count"] = self._mapped(memory, np.int32, (1,))
        self._words = {name: array for name, (array, _) in words.items()}
        self._word_inputs: Tensors = {name: (at, array.shape) for name, (array, at) in words.items()}
        side = takes.picture_size
        self._pixels, pixels_at = self._mapped(memory, np.float16, (takes.pictures, 3, side, side))
        self._pixel_inputs: Tensors = {"pixels": (pixels_at, self._pixels.shape)}

    @staticmethod
    def _mapped(memory: Memory, dtype: Any, shape: tuple[int, ...]) -> tuple[Any, int]:
        """Zeros that both sides see.  → array, device address"""
        array, address = memory.mapped(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        array[:] = 0
        return array.view(dtype).reshape(shape), address

    def _more_inputs(self, one: Pass) -> Tensors:
        m, rows = self._model, self._memory_rows
        start, stride = (
            (self._read_memory, self._read_stride) if one.reading else (self._remembered, self._remembered_stride)
        )
        shape = (one.requests, m.heads, rows, self._width)
        inputs: Tensors = {f"memory_{name}": (start + 2 * i * stride, shape) for i, name in enumerate(self._arrays)}
        return inputs | {"reads": (self._reads_at[one.reading], (one.requests, rows))}

    def _enqueue(self, program: Program) -> None:
        if not isinstance(program, Encoding):
            super()._enqueue(program)
            return
        self._execute(program)
        pointers = (self._at.reading, self._encoded, self._remembered, self._read_memory)
        numbers = (program.first, program.rows, self._memory_rows, self._model.heads, self._width)
        strides = (aligned(program.rows * self._model.d_model), self._remembered_stride, self._read_stride)
        self._launch(kernels.REMEMBER, (len(self._arrays), program.rows), pointers, numbers + strides)

    def _change_scores(self, program: Pass) -> None:
        if program.requests > 1:
            numbers = (self.depth + 1, self._model.vocab_size, self._top_k, program.requests)
            pointers = (self._at.logits, self._at.places, self._at.writings)
            self._launch(kernels.GUIDE, (self.depth + 1, program.requests), pointers, numbers)

    def _guided(self, number: int) -> bool:
        return bool(self._writings[number]["guidance"] != 0)

    def _put(self, w: Writing) -> int:
        number = number_of(w)
        place, guided = 2 * number, self._guided(number)
        self._places[place] = number
        if guided:
            self._places[place + 1] = -2 - number
        return place + guided

    def _remember(self, w: Writing) -> None:
        """Encode the condition of a new request; of one without, see to it that it reads none."""
        number, condition = number_of(w), w.condition
        reads = self._reads[2 * number : 2 * number + 2]
        reads[:] = self._empty
        if condition is None:
            return
        w.remaining = Remaining(condition)
        self._writings[number : number + 1]["guidance"] = condition.guidance
        self._reading["slot"] = 2 * number
        reads[0] = 0
        words, pictures = self._encodings
        if condition.words:
            rows = condition.word_rows()
            count = rows[0].size
            for name, row in zip(("tokens", "places", "words"), rows, strict=True):
                self._words[name][0, :count] = row
            self._words["count"][0] = count
            self._run(words)
            reads[0, : 1 + count] = 1
        if len(condition.pixels):
            self._pixels[: len(condition.pixels)] = as_input(condition.pixels)
            self._run(pictures)
            reads[0, pictures.first : pictures.first + len(condition.pixels) * self._takes.picture_rows] = 1

    def _narrow(self, w: Writing) -> None:
        number, remaining = number_of(w), w.remaining
        assert remaining is not None
        reads = self._reads[2 * number]
        if remaining.nothing:
            reads[:] = self._empty
            self._writings[number : number + 1]["guidance"] = 0
            w.remaining = None
        else:
            hidden = remaining.hidden
            reads[: hidden.size][hidden] = 0

    def _read_prompt(self, w: Writing) -> bool:
        """A guided one draws in a step, where both of its rows are: here all but its last token is read."""
        number = number_of(w)
        if not self._guided(number):
            return super()._read_prompt(w)
        if len(w.pending) > 1:
            tokens, first = np.array(w.pending[:-1], np.int32), w.position - len(w.pending) + 1
            positions = np.arange(first, w.position)
            self._read_in(number, tokens=tokens, positions=positions, evidence=False, draws=False)
            assert w.slot is not None
            w.slot.cached, w.pending = tokens.size, w.pending[-1:]
        return False

    def _read_in(self, number: int, *, tokens: Ids, positions: Any, evidence: bool, draws: bool) -> None:
        slot = 2 * number
        self._reads_given[0] = self._reads[slot]
        self._read_into(slot, number, tokens=tokens, positions=positions, evidence=evidence, draws=draws)
        if self._guided(number):
            self._reads_given[0] = self._empty
            self._writings[number : number + 1]["cached"] = 0
            self._read_into(slot + 1, number, tokens=tokens, positions=positions, evidence=evidence, draws=False)
