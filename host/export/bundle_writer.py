"""Write a bundle: graphs, tokenizer and manifest, in a temporary folder that takes its place when it is whole."""

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import onnx

from host.data.tokenizer import plain_tokenizer
from host.files import swapped_in
from host.model.network import Denoiser, ModelConfig, count_parameters
from host.train.checkpoint import Progress
from shared.conditions import Conditions
from shared.errors import ConfigError, DiffusionLLMError
from shared.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    ROLE_OF,
    TOKENIZER,
    BlocksDefaults,
    Evaluation,
    FileName,
    Graph,
    LawFigures,
    LawParity,
    Manifest,
    ModelSpec,
    Parity,
    Precision,
    Role,
    SamplingDefaults,
    SpecialIds,
    Target,
    Tensor,
    TrainingData,
    TrainingStage,
    read_manifest,
    sha256_of,
)

_DTYPES = {
    int(onnx.TensorProto.INT8): "int8",
    int(onnx.TensorProto.INT32): "int32",
    int(onnx.TensorProto.INT64): "int64",
    int(onnx.TensorProto.FLOAT): "float32",
    int(onnx.TensorProto.FLOAT16): "float16",
}


@dataclass(frozen=True)
class BundleGraph:
    """One graph to ship."""

    model: onnx.ModelProto
    role: Role
    precision: Precision
    target: Target

    @property
    def file(self) -> str:
        """Its name in the bundle."""
        return f"{self.role}.{self.target}.{self.precision}.onnx"


def model_spec(config: ModelConfig) -> ModelSpec:
    """A configuration as the manifest states it."""
    return ModelSpec(
        config=config.name,
        d_model=config.d_model,
        layers=config.layers,
        heads=config.heads,
        vocab_size=config.vocab_size,
        canvas_len=config.canvas_len,
        time_input=config.time_input,
        parameters=count_parameters(config),
    )


def check_replaceable(out: Path) -> None:
    """Fail early: ConfigError when `out` is something other than a bundle, or its name cannot be a bundle's;
    DiffusionLLMError when no folder can be made beside it.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and is not a bundle: choose another --out")
    try:
        msgspec.convert(out.name, FileName)
    except msgspec.ValidationError:
        raise ConfigError(f"--out {out}: a bundle's name is letters, digits, '.', '_' and '-', at most 100") from None
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".", dir=out.resolve().parent).cleanup()
    except OSError as error:
        raise DiffusionLLMError(f"{out} cannot be written: {error.strerror}") from None


def write_bundle(
    out: Path,
    model: Denoiser,
    *,
    progress: Progress,
    tokenizer: Path,
    graphs: Sequence[BundleGraph],
    top_k: int,
    stages: Sequence[TrainingStage] = (),
    evaluations: Sequence[Evaluation] = (),
    laws: Sequence[LawFigures] = (),
    parity: Sequence[Parity] = (),
    law_parity: Sequence[LawParity] = (),
    calibration: str = "none",
    defaults: SamplingDefaults | None = None,
    conditions: Conditions | None = None,
) -> Manifest:
    """Write everything beside `out`, then swap it in; an older bundle there is replaced only when the new one is whole.

    Its decoders are those that the graphs serve. stages: the runs that the weights went through, oldest first.

    Raises ConfigError when `out` exists and is no bundle, or has an unusable name; DiffusionLLMError when the
    disk refuses.
    """
    check_replaceable(out)
    roles = {graph.role for graph in graphs}
    defaults = defaults or SamplingDefaults()
    drafts = "draft" in roles or any((graph.target, graph.role) == ("cuda", "step") for graph in graphs)
    window = model.config.draft_depth if drafts else 0
    blocks = BlocksDefaults(window=window, temperature=defaults.temperature, top_p=defaults.top_p)
    with swapped_in(out) as folder:
        (folder / TOKENIZER).write_bytes(plain_tokenizer(tokenizer))
        for graph in graphs:
            onnx.save(graph.model, folder / graph.file)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=out.name,
            model=model_spec(model.config),
            special_ids=SpecialIds(),
            schedule=progress.schedule,
            reveal_grid="cosine",
            top_k=top_k,
            decoders=tuple(decoder for decoder, role in ROLE_OF.items() if role in roles),
            graphs=tuple(listed(folder, graph) for graph in graphs),
            tokenizer_sha256=sha256_of(folder / TOKENIZER),
            defaults=defaults,
            blocks=blocks if "step" in roles else None,
            evaluations=tuple(evaluations),
            laws=tuple(laws),
            parity=tuple(parity),
            law_parity=tuple(law_parity),
            calibration=calibration,
            data=TrainingData(
                name=progress.data_source,
                licence=progress.data_licence,
                stories=progress.data_stories,
                tokens_seen=sum(stage.tokens for stage in stages),
                stages=tuple(stages),
            ),
            made_with=made_with(),
            conditions=conditions,
        )
        write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, and read it as the edge does: BundleError where it contradicts itself."""
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    read_manifest(folder)


def made_with() -> dict[str, str]:
    """The versions of what makes a bundle."""
    names = ("diffusion-llm", "torch", "onnx", "onnxruntime", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def listed(folder: Path, graph: BundleGraph) -> Graph:
    """A graph's entry of the manifest, its file being in the folder."""
    return Graph(
        file=graph.file,
        role=graph.role,
        sha256=sha256_of(folder / graph.file),
        precision=graph.precision,
        target=graph.target,
        inputs=tuple(_tensor(value) for value in graph.model.graph.input),
        outputs=tuple(_tensor(value) for value in graph.model.graph.output),
    )


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    return msgspec.convert({"name": value.name, "dtype": _DTYPES[kind.elem_type], "shape": shape}, Tensor)
