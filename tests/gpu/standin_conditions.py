"""Stands for the engines of blocks that take conditions: rows that read a memory, and the encoders that make it."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from edge.backends.trt.driver import Gpu
from host.model.conditions import MERGED, PICTURE_ROWS
from host.model.network import Denoiser
from shared.manifest import Graph, Role
from tests.gpu.standin_rows import RowsStandIn, Tensors


class ConditionsStandIn(RowsStandIn):
    """What it is given to load is the role of an engine. graphs: what the manifest says of them."""

    def __init__(self, gpu: Gpu, model: Denoiser, graphs: Mapping[Role, Graph]) -> None:
        super().__init__(gpu, model, graphs["step"])
        self._engines = {
            b"step": self,
            b"encode.text": WordsStandIn(gpu, model, graphs["encode.text"]),
            b"encode.image": PicturesStandIn(gpu, model, graphs["encode.image"]),
        }

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._engines.__getitem__)


class WordsStandIn(RowsStandIn):
    """What `host.export.cuda_memory.cuda_encode_text_graph` says, in float32, rounded at the end."""

    @torch.no_grad()
    def compute(self, read: Tensors) -> Tensors:
        tokens, places, words = (read[name].long() for name in ("tokens", "places", "words"))
        rows = torch.cat([self.model.token_embedding(tokens), self.model.head.weight[tokens]], -1)
        there = torch.arange(1 + tokens.shape[1], device=tokens.device) <= read["count"]
        bias = torch.zeros_like(there, dtype=torch.float32).masked_fill(~there, -1e4)
        conditions: Any = self.model.conditions
        return remembered(self.model, conditions.words(rows, places, words, bias[None, None, None]))


class PicturesStandIn(RowsStandIn):
    """The same of `cuda_encode_image_graph`."""

    @torch.no_grad()
    def compute(self, read: Tensors) -> Tensors:
        conditions: Any = self.model.conditions
        grids = conditions.pictures(read["pixels"].float())
        shown = grids.unflatten(1, (PICTURE_ROWS, MERGED)).mean(2)
        return remembered(self.model, shown.reshape(1, -1, shown.shape[2]))


def remembered(model: Denoiser, memory: torch.Tensor) -> Tensors:
    """Keys and values of each layer of memory (1, S, D)."""
    conditions: Any = model.conditions
    made: Tensors = {}
    for i, reader in enumerate(conditions.reads):
        made[f"memory_keys.{i}"], made[f"memory_values.{i}"] = reader.remembered(memory)
    return made
