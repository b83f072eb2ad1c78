"""Stands for the engines of blocks where TensorRT is absent: their graphs' tensors, the network torch's own.

Every operation has one shape and waits for nothing, so that it can be recorded.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge.backends.trt.driver import Gpu
from host.export.cuda_memory import WORD_ROWS
from host.model.conditions import MERGED, PICTURE_ROWS, PICTURES
from host.model.network import BIAS_FLOOR, RELATIVE_UNIT, Denoiser
from shared import manifest
from shared.manifest import Graph
from shared.tokens import BOS, MASK, PAD
from tests.gpu.standin import Context, Network, StandIn

KINDS: dict[str, type[np.generic]] = {"int32": np.int32, "float16": np.float16}
Tensors = dict[str, Tensor]


class RowsStandIn(StandIn):
    """Whatever it is given to load, its engine is the network. graph: what the manifest says of the step graph."""

    def __init__(self, gpu: Gpu, model: Denoiser, graph: Graph) -> None:
        super().__init__(gpu, Network(model, gpu), model.config.vocab_size)
        self.model, self.graph = model, graph

    def compute(self, read: Tensors) -> Tensors:
        """What the engine makes of its inputs."""
        return step(self.model, read)

    def create_execution_context(self, strategy: str) -> "RowsContext":
        return RowsContext(self)


class RowsContext(Context):
    """One shape of rows."""

    def __init__(self, engine: RowsStandIn) -> None:
        super().__init__(engine)
        self._rows_engine = engine

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        graph, sizes = self._rows_engine.graph, dict[int | str, int]()
        for given in graph.inputs:
            sizes |= zip(given.shape, self._shape[given.name], strict=True)
        tensor = next(one for one in graph.outputs if one.name == name)
        return tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)

    def _view(self, tensor: manifest.Tensor, shape: tuple[int, ...]) -> Tensor:
        return self._rows_engine.network.at(self._at[tensor.name], shape, KINDS[tensor.dtype])

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._rows_engine
        read = {t.name: self._view(t, self._shape[t.name]) for t in engine.graph.inputs}
        made = {t.name: self._view(t, self.get_tensor_shape(t.name)) for t in engine.graph.outputs}

        def run() -> None:
            for name, value in engine.compute(read).items():
                made[name].copy_(value)

        self._enqueue(run, stream_handle)
        return True


@torch.no_grad()
def step(model: Denoiser, read: Tensors) -> Tensors:
    """What `host.export.cuda_step` says, in float32, rounded at the end."""
    tokens, positions, sees = (read[name].long() for name in ("tokens", "positions", "sees"))
    (r, n), c = tokens.shape, read["key_positions"].shape[1]
    device, config = tokens.device, model.config
    x = model.token_embedding(tokens) + model.position_embedding(positions)
    keys_at = torch.cat([read["key_positions"].long(), positions], 1)
    table = (RELATIVE_UNIT * model.relative_bias).clamp(min=BIAS_FLOOR)
    distance = keys_at[:, None, :] - positions[:, :, None] + config.canvas_len - 1
    old = torch.arange(c, device=device) < read["cached"].long()[:, None, None]
    new = torch.arange(n, device=device) < sees[:, :, None]
    visible = torch.cat([old.expand(r, n, c), new], 2)
    bias = table[:, distance].transpose(0, 1).masked_fill(~visible[:, None], -1e4)
    made: Tensors = {}
    width = config.d_model // config.heads
    for i, block in enumerate(model.blocks):
        b: Any = block
        normed = b.norm1(x)
        q, k, v = b.qkv(normed).view(r, n, 3, config.heads, width).permute(2, 0, 3, 1, 4)
        made[f"new_keys.{i}"], made[f"new_values.{i}"] = k, v
        k, v = (torch.cat([read[f"{kind}.{i}"].float(), t], 2) for kind, t in (("keys", k), ("values", v)))
        mixed = ((q * width**-0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        x = x + b.attention_out(mixed.transpose(1, 2).reshape(r, n, config.d_model))
        if "reads" in read:
            x = x + of_memory(model, i, normed, read)
        x = x + b.down(F.gelu(b.up(b.norm2(x))))
    states = model.norm(x).flatten(0, 1)[read["scored"].long()].half()
    token = torch.arange(config.vocab_size, device=device)
    never = -1e4 * ((token == PAD) | (token == BOS) | (token == MASK))
    made["states"], made["logits"] = states, (model.head(states.float()) + never).clamp(min=-1e4)
    return made


def of_memory(model: Denoiser, layer: int, normed: Tensor, read: Tensors) -> Tensor:
    """What rows read of their requests' memories.  normed (R, N, D) → (R, N, D)"""
    reader: Any = model.conditions.reads[layer]  # type: ignore[union-attr]
    keys, values = (read[f"memory_{kind}.{layer}"].float() for kind in ("keys", "values"))
    (r, n, d), heads, width = normed.shape, keys.shape[1], keys.shape[3]
    hidden, row = (read["reads"] < 1)[:, None, None], torch.arange(keys.shape[2], device=keys.device)
    of_pictures = (row >= WORD_ROWS) & (row < WORD_ROWS + PICTURES * PICTURE_ROWS)
    q = reader.q(normed).view(r, n, heads, width).transpose(1, 2) * width**-0.5
    scores = q @ keys.transpose(-1, -2) + math.log(MERGED) * of_pictures
    weights = scores.masked_fill(hidden, -1e4).softmax(-1)
    mixed = (weights @ values).transpose(1, 2).reshape(r, n, d)
    change: Tensor = reader.out(mixed) + reader.gain * mixed
    return change
