"""What host.export --hf writes of a run, as training reads it: a folder that --init takes in place of a run.

The weights are model.safetensors, under the network's own names; config.json has the shape and what made the weights.
What a network with conditions reads words and pictures by is conditions.safetensors, which the libraries leave alone.
"""

from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from host.model.network import ModelConfig
from shared.errors import DataError
from shared.manifest import Evaluation, LawFigures, Sha256, TrainingStage
from shared.schedule import ScheduleName

MODEL_TYPE: Final = "diffusion_llm"
WEIGHTS: Final = "model.safetensors"
CONDITIONS: Final = "conditions.safetensors"
CONDITIONS_PART: Final = "conditions."
"""Prefix of the names in there."""
CONFIG: Final = "config.json"

Count = Annotated[int, Meta(ge=1, le=1 << 24)]


class Training(Struct, frozen=True, forbid_unknown_fields=True):
    """What made the weights, and what they measured. stages: of model.safetensors, oldest first; condition_stages: of
    conditions.safetensors alone; compute_seconds: of all.
    """

    config: str
    objectives: dict[str, float]
    schedule: ScheduleName
    stages: tuple[TrainingStage, ...]
    compute_seconds: float
    tokenizer_sha256: Sha256
    data_source: str
    data_licence: str
    data_stories: int
    laws: tuple[LawFigures, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    bundle_sha256: Sha256 | None = None  # of the manifest of the bundle that the figures were taken from
    condition_stages: tuple[TrainingStage, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the stages of model.safetensors."""
        return sum(stage.tokens for stage in self.stages)


class Published(Struct, frozen=True):
    """config.json: the part that is ours. What transformers adds to it is left alone."""

    model_type: str
    vocab_size: Count
    d_model: Count
    layers: Count
    heads: Count
    canvas_len: Count
    time_input: bool
    draft_depth: Annotated[int, Meta(ge=0, le=64)]
    training: Training
    conditions: bool = False

    @property
    def model(self) -> ModelConfig:
        """The network's shape."""
        return ModelConfig(
            name=self.training.config,
            d_model=self.d_model,
            layers=self.layers,
            heads=self.heads,
            vocab_size=self.vocab_size,
            canvas_len=self.canvas_len,
            time_input=self.time_input,
            draft_depth=self.draft_depth,
            conditions=self.conditions,
        )


def is_published(folder: Path) -> bool:
    """Whether a folder has weights in this shape, of whatever model."""
    return (folder / WEIGHTS).is_file()


def read_published(folder: Path) -> Published:
    """A published folder's config.json; DataError when it is of another kind of model, or damaged."""
    path = folder / CONFIG
    try:
        raw = path.read_bytes()
        kind = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("model_type")
        found = None if kind is None else msgspec.json.decode(kind)
        if found != MODEL_TYPE:
            raise DataError(f"{folder} holds a model of type {found!r}, none that host.export --hf wrote")
        return msgspec.json.decode(raw, type=Published)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not what host.export --hf wrote: {error}") from None
