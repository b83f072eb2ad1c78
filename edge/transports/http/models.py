"""What this device has, in OpenAI's shape, with the settings that a request may choose."""

from typing import Literal

from msgspec import Struct

from edge.serving.loaded_bundle import LoadedBundle
from shared.manifest import BlocksDefaults, Decoder, SamplingDefaults
from shared.messages import Limits


class Model(Struct, frozen=True, kw_only=True):
    """The bundle. id: NAME@DIGEST. decoders: the default first. limits: what requests must keep within.

    blocks, canvas: what a request in that decoder gets that does not say; None where this device lacks it.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0  # a bundle does not say when it was made
    owned_by: str = "edgelm"
    decoders: list[Decoder]
    blocks: BlocksDefaults | None
    canvas: SamplingDefaults | None
    limits: Limits


class ModelList(Struct, frozen=True, kw_only=True):
    """All models: the one bundle."""

    object: Literal["list"] = "list"
    data: list[Model]


def model_list(loaded: LoadedBundle, queue_size: int) -> ModelList:
    """What `GET /v1/models` answers."""
    manifest = loaded.manifest
    model = Model(
        id=loaded.model,
        decoders=list(loaded.decoders),
        blocks=manifest.blocks if "blocks" in loaded.decoders else None,
        canvas=manifest.defaults if "canvas" in loaded.decoders else None,
        limits=loaded.limits(queue_size),
    )
    return ModelList(data=[model])
