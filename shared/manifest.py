"""The bundle's manifest: everything the edge must know, and nothing in file names.

A bundle is a folder: manifest.json, tokenizer.json and the graphs the manifest lists, each with its sha256.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from shared import tokens
from shared.conditions import Conditions
from shared.errors import BundleError
from shared.figures import Figure, Frozen, Positive
from shared.schedule import ScheduleName

FORMAT_VERSION: Final = 2
MANIFEST: Final = "manifest.json"
TOKENIZER: Final = "tokenizer.json"
MAX_MANIFEST_BYTES: Final = 1 << 20

MAX_STEPS: Final = 1024
MAX_WINDOW: Final = 8
"""Drafts in a pass of blocks."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]
Precision = Literal["fp32", "fp16", "int8"]
Target = Literal["cpu", "cuda"]
Role = Literal[
    "canvas",
    "step",
    "step.shared",
    "prefill",
    "draft",
    "encode.text",
    "encode.image",
    "encode.memory",
    "step.conditioned",
    "prefill.conditioned",
    "step.guided",
    "weights",
]
"""What a graph computes: scores of a canvas; scores of causal rows over cached ones; of several requests, in bundles
of earlier releases, which nothing runs any more; keys and values of rows that all see each other; drafts of
the chain drafter. For conditions: the memory of words, and of pictures; what blocks read of it; step and prefill of
rows that read the memory; step of rows that do and of rows that do not, guided (docs/training.md). For CUDA the rows of
the one step graph read it, if a bundle has conditions. Of weights: nothing, it holds what the graphs of its target and
precision have in common; see `graph_bytes`."""
Decoder = Literal["blocks", "canvas"]
ROLE_OF: Final[dict[Decoder, Role]] = {"blocks": "step", "canvas": "canvas"}
"""The graph that a decoder cannot do without."""
CONDITIONED_ROLES: Final[dict[Target, tuple[Role, ...]]] = {
    "cpu": ("encode.text", "encode.image", "encode.memory", "step.conditioned", "step.guided"),
    "cuda": ("encode.text", "encode.image"),
}
"""The graphs that conditions cannot do without; for CUDA beside a step graph whose rows read a memory."""
Selection = Literal["confidence", "random", "margin", "entropy"]


class ModelSpec(Frozen, frozen=True):
    """The network's shape."""

    config: str
    d_model: Positive
    layers: Positive
    heads: Positive
    vocab_size: Positive
    canvas_len: Annotated[int, Meta(ge=16)]
    time_input: bool
    parameters: Positive


class SpecialIds(Frozen, frozen=True):
    """Ids of the control tokens, as `shared.tokens` fixes them."""

    pad: int = tokens.PAD
    bos: int = tokens.BOS
    eos: int = tokens.EOS
    mask: int = tokens.MASK


class Tensor(Frozen, frozen=True):
    """One graph input or output; a shape entry is a number or a dimension's name ("batch", "length")."""

    name: str
    dtype: Literal["int8", "int32", "int64", "float32", "float16"]
    shape: tuple[int | str, ...]


class Graph(Frozen, frozen=True):
    """A file for one role, one precision and one target."""

    file: FileName
    role: Role
    sha256: Sha256
    precision: Precision
    target: Target
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Evaluation(Frozen, frozen=True):
    """What `host.evaluate` measured on held-out text."""

    graph: str  # "torch fp32", or the file of the graph that was measured
    source: str
    stories: Positive
    text_tokens: Positive
    text_bytes: Positive
    nelbo_nats_per_token: Figure
    bits_per_byte: Figure
    masked_cross_entropy: Figure


class LawFigures(Frozen, frozen=True):
    """What `host.evaluate` measured of the laws that blocks are written by, on held-out text.

    tokens_per_pass: by temperature, as "0.8"; None without a drafter. The others are None without the objective infill.
    """

    graph: str  # "torch fp32", or the file of the graph that was measured
    source: str
    stories: Positive
    left_to_right_nats_per_token: Figure
    left_to_right_bits_per_byte: Figure
    infilling_nats_per_gap_token: Figure | None = None
    infilling_blind_nats_per_gap_token: Figure | None = None
    tokens_per_pass: dict[str, float] | None = None


class Parity(Frozen, frozen=True):
    """How closely a quantized canvas graph follows float32: the gate that a bundle must pass.

    kept_float: linear layers left in float, because the gate was missed with them.
    """

    graph: str
    scheme: str
    nelbo_ratio: float
    top1_agreement: float
    kept_float: tuple[str, ...] = ()


class LawParity(Frozen, frozen=True):
    """How closely a quantized step graph follows float32, the gate likewise: nats per token, graph / float32.

    infilling_ratio: None without the objective infill. texts_agreeing: share of whole greedy texts that are equal. Of a
    step graph for CUDA with conditions also conditioned_ratio: given a condition; memory_error: of what the encoders
    make, ‖graph − float32‖ / ‖float32‖.
    """

    graph: str
    scheme: str
    law_ratio: float
    infilling_ratio: float | None
    texts_agreeing: float
    kept_float: tuple[str, ...] = ()
    conditioned_ratio: float | None = None
    memory_error: float | None = None


class TrainingStage(Frozen, frozen=True):
    """One run of training. objectives: () where the run is no longer there to tell."""

    name: str
    objectives: tuple[str, ...]
    tokens: int


class TrainingData(Frozen, frozen=True):
    """What the model learned from. tokens_seen: in all stages together; stages: oldest first."""

    name: str
    licence: str
    stories: int
    tokens_seen: int
    stages: tuple[TrainingStage, ...]


class SamplingDefaults(Frozen, frozen=True):
    """What a canvas request gets when it does not say; chosen by the sweep of docs/quality.md."""

    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] = 64
    selection: Selection = "random"
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.8
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0


class BlocksDefaults(Frozen, frozen=True):
    """What a request in blocks gets when it does not say. window: drafts that the draft graph makes, 0 without one."""

    window: Annotated[int, Meta(ge=0, le=MAX_WINDOW)]
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.8
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0


class Manifest(Frozen, frozen=True):
    """The whole of manifest.json. decoders: the first is the default."""

    format_version: int
    name: FileName
    model: ModelSpec
    special_ids: SpecialIds
    schedule: ScheduleName
    reveal_grid: Literal["cosine"]
    top_k: Annotated[int, Meta(ge=2)]  # `margin` looks at the best two
    decoders: Annotated[tuple[Decoder, ...], Meta(min_length=1)]
    graphs: tuple[Graph, ...]
    tokenizer_sha256: Sha256
    defaults: SamplingDefaults
    blocks: BlocksDefaults | None
    evaluations: tuple[Evaluation, ...]
    laws: tuple[LawFigures, ...]
    parity: tuple[Parity, ...]
    law_parity: tuple[LawParity, ...]
    calibration: str
    data: TrainingData
    made_with: dict[str, str]
    conditions: Conditions | None = None


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json.

    Raises BundleError, in one sentence, when it is missing, damaged, of another version, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{folder} is not a bundle: cannot read {MANIFEST} ({error.strerror})") from None
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has {len(raw)} bytes; at most {MAX_MANIFEST_BYTES} are read")
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format_version")
        found = None if version is None else msgspec.json.decode(version)
        if found != FORMAT_VERSION:
            read = "none" if version is None else bytes(version)[:40].decode(errors="replace")
            remedy = "; export its run again, with python -m host.export --run" if found == 1 else ""
            raise BundleError(f"{path} has format_version {read}; this release reads {FORMAT_VERSION}{remedy}")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}") from None
    if contradiction := _contradiction(manifest):
        raise BundleError(f"{path} has {contradiction}")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """The first part of a manifest that does not go with another, in words."""
    roles = {graph.role for graph in manifest.graphs}
    if manifest.special_ids != SpecialIds():
        return "special_ids other than PAD 0, BOS 1, EOS 2, MASK 3"
    if manifest.top_k > manifest.model.vocab_size:
        return f"top_k {manifest.top_k} above vocab_size {manifest.model.vocab_size}"
    for decoder in manifest.decoders:
        if manifest.decoders.count(decoder) > 1:
            return f"the decoder {decoder} twice"
        if ROLE_OF[decoder] not in roles:
            return f"the decoder {decoder}, but no graph of the role {ROLE_OF[decoder]}"
    if manifest.blocks is None and "blocks" in manifest.decoders:
        return "the decoder blocks, but no defaults of `blocks`"
    if manifest.blocks is not None and "blocks" not in manifest.decoders:
        return "defaults of `blocks`, but not that decoder"
    drafts = "draft" in roles or has_role(manifest, "cuda", "step")  # which has the drafter among its constants
    if manifest.blocks is not None and manifest.blocks.window and not drafts:
        return f"the window {manifest.blocks.window}, but no graph of the role draft"
    given = {(graph.target, graph.role) for graph in manifest.graphs if graph.role in CONDITIONED_ROLES["cpu"]}
    if manifest.conditions is None:
        return "graphs that take conditions, but no `conditions`" if given else None
    targets = {target for target, _ in given}
    if not targets or has_role(manifest, "cpu", "step"):  # a GPU serves blocks without conditions, the CPU does not
        targets.add("cpu")
    needed = [(target, role) for target in sorted(targets) for role in CONDITIONED_ROLES[target]]
    missing = [f"{role} for the target {target}" for target, role in needed if (target, role) not in given]
    return f"conditions, but no graph of the role {missing[0]}" if missing else None


def has_role(manifest: Manifest, target: Target, role: Role) -> bool:
    """Whether there is a graph of that role for a target."""
    return any((graph.target, graph.role) == (target, role) for graph in manifest.graphs)


def find_graph(folder: Path, manifest: Manifest, target: Target, role: Role = "canvas") -> Graph:
    """The first graph listed for a target and a role; raises BundleError when there is none."""
    for graph in manifest.graphs:
        if (graph.target, graph.role) == (target, role):
            return graph
    listed = ", ".join(f"{g.file} ({g.role}, {g.target})" for g in manifest.graphs) or "none"
    served = any(graph.target == target for graph in manifest.graphs)
    what = f"{role} graph for target" if served else "graph for this device, whose target is"
    raise BundleError(f"bundle {folder} has no {what} {target!r}; it lists {listed}")


def verified_bytes(folder: Path, file: str, sha256: str) -> bytes:
    """The content of a bundle's file, hash checked on the very bytes returned (no gap between check and use)."""
    path = folder / file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"bundle file {path} cannot be read ({error.strerror})") from None
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        hashes = f"sha256 {actual[:12]}… instead of {sha256[:12]}…"
        raise BundleError(f"bundle file {path} does not match its manifest: {hashes}")
    return content


def weights_of(manifest: Manifest, graph: Graph) -> Graph | None:
    """The file of constants that a graph shares with others, if its target and precision have one."""
    kind = (graph.target, graph.precision)
    return next((g for g in manifest.graphs if g.role == "weights" and (g.target, g.precision) == kind), None)


def graph_bytes(folder: Path, manifest: Manifest, graph: Graph) -> bytes:
    """A graph as a runtime takes it: its own file and its shared constants, hashes checked. Raises BundleError.

    Both are messages of ONNX's Protocol Buffers, whose encodings merge by concatenation: what a message repeats, such
    as a graph's constants, is appended.
    """
    weights = weights_of(manifest, graph)
    parts = (graph,) if weights is None else (graph, weights)
    return b"".join(verified_bytes(folder, part.file, part.sha256) for part in parts)


def graph_digest(manifest: Manifest, graph: Graph) -> str:
    """Identifies what `graph_bytes` gives: the sha256 of its one file, or of both files' hashes."""
    weights = weights_of(manifest, graph)
    return graph.sha256 if weights is None else hashlib.sha256((graph.sha256 + weights.sha256).encode()).hexdigest()


def model_name(folder: Path) -> str:
    """NAME@DIGEST of a bundle, as answers and health state it."""
    return f"{read_manifest(folder).name}@{bundle_digest(folder)[:12]}"


def bundle_digest(folder: Path) -> str:
    """The bundle's identity: sha256 of its manifest, which holds the hash of every other file."""
    return sha256_of(folder / MANIFEST)
