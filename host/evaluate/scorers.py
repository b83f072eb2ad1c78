"""Scorers: the cross-entropy of each masked token, by the torch network or by a step graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from host.model.diffusion import Corrupted, canvas_logits, cross_entropy_at
from host.model.network import Denoiser
from shared.errors import BundleError
from shared.tokens import MASK

Canvases = Sequence[tuple[NDArray[np.int32], float]]
"""Canvases (L,), some of their positions masked, and the time t of each."""
Feed = dict[str, NDArray[np.float32] | NDArray[np.int32]]
HIDDEN_LOGITS = ("head.control", "head.text")  # inside a CPU graph: scores of the control tokens, then of text


def session_of(graph: onnx.ModelProto, outputs: Mapping[str, type] | None = None) -> ort.InferenceSession:
    """A session on as many threads as torch uses, which wait for each other asleep: spinning doubles the CPU time.

    outputs: names and types of inner values to return instead of the graph's outputs; the rest is not computed.
    """
    if outputs is not None:
        surgeon = gs.import_onnx(graph)
        values = surgeon.tensors()
        for name, dtype in outputs.items():
            values[name].dtype = dtype
        surgeon.outputs = [values[name] for name in outputs]
        graph = gs.export_onnx(surgeon.cleanup())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def step_feed(session: ort.InferenceSession, canvas: NDArray[np.int32], t: float) -> Feed:
    """Inputs of a step that scores all masked positions of one canvas (L,)."""
    feed: Feed = {
        "canvas": canvas[None].astype(np.int32),
        "t": np.array([t], np.float32),
        "wanted": np.flatnonzero(canvas == MASK).astype(np.int32),
    }
    return {value.name: feed[value.name] for value in session.get_inputs()}


class Scorer(Protocol):
    """A model under evaluation. batch_rows: canvases in a batch."""

    name: str
    batch_rows: int

    def losses(self, batch: Corrupted, x0: Tensor, t: list[float]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each scored position in nats, and the row it belongs to.  → (M,), (M,)"""


class TorchScorer:
    """The network itself, in float32."""

    name = "torch fp32"
    batch_rows = 16

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, canvas: NDArray[np.int32], t: float) -> NDArray[np.float32]:
        """Scores of the masked positions of one canvas (L,), in their order.  → (M, V)"""
        row = torch.from_numpy(canvas.astype(np.int64))
        at = (row == MASK).nonzero()[:, 0]
        scores: NDArray[np.float32] = canvas_logits(self.model, row[None], [t], at).cpu().numpy()
        return scores

    @torch.no_grad()
    def losses(self, batch: Corrupted, x0: Tensor, t: list[float]) -> tuple[Tensor, Tensor]:
        """See Scorer."""
        return cross_entropy_at(self.model, batch, x0, t)


class GraphScorer:
    """A step graph as it ships, run by ONNX Runtime one canvas at a time, with its inner logits as outputs."""

    batch_rows = 1

    def __init__(self, name: str, graph: onnx.ModelProto) -> None:
        self.name = name
        if any(output.name == "logits" for output in graph.graph.output):
            self._outputs: tuple[str, ...] = ("logits",)
            self._session = session_of(graph)
            return
        self._outputs = HIDDEN_LOGITS
        if not {name for node in graph.graph.node for name in node.output}.issuperset(HIDDEN_LOGITS):
            raise BundleError(f"the graph computes no {' and '.join(HIDDEN_LOGITS)}: it was not made by host.export")
        self._session = session_of(graph, dict.fromkeys(HIDDEN_LOGITS, np.float32))

    def logits(self, canvas: NDArray[np.int32], t: float) -> NDArray[np.float32]:
        """Scores of the masked positions of one canvas (L,), in their order.  → (M, V)"""
        parts = self._session.run(self._outputs, step_feed(self._session, canvas, t))
        scores = np.concatenate(parts, axis=-1).astype(np.float32)
        return scores if self._outputs == HIDDEN_LOGITS else scores[0, canvas == MASK]

    def losses(self, batch: Corrupted, x0: Tensor, t: list[float]) -> tuple[Tensor, Tensor]:
        """See Scorer."""
        losses, rows = [torch.zeros(0)], [torch.zeros(0, dtype=torch.long)]
        for row in range(x0.shape[0]):
            length = int(batch.active_len[row])
            canvas, scored = batch.xt[row, :length], batch.scored[row, :length]
            if not scored.any():
                continue
            logits = torch.from_numpy(self.logits(canvas.numpy(), t[row]))[scored[canvas == MASK]]
            losses.append(F.cross_entropy(logits, x0[row, :length][scored], reduction="none"))
            rows.append(torch.full((len(losses[-1]),), row))
        return torch.cat(losses), torch.cat(rows)


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file; BundleError when it is not one."""
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf raises its own DecodeError
        raise BundleError(f"{path} is not an ONNX graph: {error}") from None
