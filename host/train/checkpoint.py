"""Checkpoints: one safetensors file holds weights, EMA weights, optimizer state and progress; never pickle."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from host.device import CpuDtype
from host.model.network import Denoiser, ModelConfig
from host.train.optim import Ema
from host.train.published import CONDITIONS, CONDITIONS_PART, WEIGHTS, Published, is_published, read_published
from shared.errors import DataError, DiffusionLLMError
from shared.schedule import ScheduleName

LAST = "last.safetensors"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands; stored in every checkpoint."""

    model: ModelConfig
    objectives: dict[str, float]  # share of the stories; see host.train.objectives
    schedule: ScheduleName
    step: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    compute_seconds: float = 0.0  # in steps: CPU time of all threads and processes, or time on each GPU
    best_nats: float | None = None
    tokenizer_sha256: str = ""
    data_source: str = ""
    data_licence: str = ""
    data_stories: int = 0
    cpu_dtype: CpuDtype | None = None  # in which CPUs train it; None: none has yet


def save_checkpoint(
    path: Path,
    progress: Progress,
    *,
    model: Denoiser,
    ema: Ema,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> None:
    """Write aside, flush to the disk, then rename: a reader finds the old file or the new one, whole.

    Raises DiffusionLLMError when the disk refuses; the old file stays.
    """
    tensors: dict[str, Tensor] = {f"model.{n}": t for n, t in model.state_dict().items()}
    tensors |= {f"ema.{n}": p for n, p in ema.shadow.items()}
    for i, optimizer in enumerate(optimizers):
        for slot, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{slot}.{key}": torch.as_tensor(value) for key, value in state.items()}
    metadata = {
        "progress": msgspec.json.encode(asdict(progress)).decode(),
        "scaler": msgspec.json.encode(scaler.state_dict()).decode(),
    }
    # In a folder: when killed, save_file leaves a temporary file, under another name each time.
    aside = path.with_suffix(".saving")
    shutil.rmtree(aside, ignore_errors=True)
    partial = aside / path.name
    try:
        aside.mkdir()
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
        partial.chmod(aside.stat().st_mode & 0o666)  # as any new file; save_file lets only its owner read
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise DiffusionLLMError(f"the checkpoint {path} cannot be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk it would be in the way


def find_checkpoint(run: Path, file: str = BEST) -> Path:
    """A run's checkpoint, the best or else the last, or the weights of a published folder; DataError without any."""
    for path in (run / file, run / LAST):
        if path.is_file():
            return path
    if is_published(run):
        if file != LAST:
            return run / WEIGHTS
        raise DataError(f"{run} is a published model, with no state to resume: start a run from it with --init {run}")
    raise DataError(f"{run} holds no checkpoint: train one with `python -m host.train --out {run}`")


def newest_run(runs: Path = Path("runs")) -> Path:
    """The diffusion run trained last; DataError names the command that makes one."""
    for path in sorted(runs.glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime, reverse=True):
        if "canvas" in read_progress(path).objectives:  # a damaged older run does not matter
            return path.parent
    raise DataError(f"no trained run in {runs}/: make one with `python -m host.train`, or name one with --run")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"checkpoint {path} cannot be read: {error}") from None


def read_progress(path: Path) -> Progress:
    """The progress stored in a checkpoint or beside published weights; DataError when it is damaged or not ours."""
    if path.name == WEIGHTS:
        return _published_progress(read_published(path.parent))
    stored = _metadata(path).get("progress")
    if stored is None:
        raise DataError(f"{path} is not a checkpoint of this project: its header has no progress")
    try:
        return msgspec.json.decode(stored, type=Progress)
    except msgspec.DecodeError as error:
        raise DataError(f"{path} is not a checkpoint of this project: {error}") from None


def _published_progress(published: Published) -> Progress:
    training = published.training
    return Progress(
        model=published.model,
        objectives=training.objectives,
        schedule=training.schedule,
        tokens_seen=training.tokens,
        compute_seconds=training.compute_seconds,
        tokenizer_sha256=training.tokenizer_sha256,
        data_source=training.data_source,
        data_licence=training.data_licence,
        data_stories=training.data_stories,
    )


def ema_tensors(path: Path) -> dict[str, Tensor]:
    """The EMA weights of a checkpoint in float32, or published weights; DataError when the file is damaged."""
    try:
        stored = _tensors(path, "" if path.name == WEIGHTS else "ema.")
        if path.name == WEIGHTS and read_published(path.parent).conditions:
            path = path.with_name(CONDITIONS)
            apart = _tensors(path, "")
            if not apart or not all(name.startswith(CONDITIONS_PART) for name in apart):
                raise DataError(f"{path} does not hold what reads words and pictures")
            stored |= apart
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118


def load_model(path: Path) -> tuple[Denoiser, Progress]:
    """The network of a checkpoint with its EMA weights, ready to score."""
    progress = read_progress(path)
    model = Denoiser(progress.model)
    _load_weights(model, path, ema_tensors(path))
    return model.eval(), progress


def _load_weights(model: Denoiser, path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise DataError(f"{path} does not hold the weights that its header describes") from None


def init_from(model: Denoiser, path: Path) -> None:
    """Start `model` from the EMA weights of another run, or from published ones.

    Raises DataError when a tensor is missing or shaped differently; a time input, a drafter or conditions that the
    other lacks start fresh.
    """
    theirs = ema_tensors(path)
    for name, ours in model.state_dict().items():
        if name not in theirs and name.startswith(("time_mlp.", "drafter.", "conditions.")):
            continue
        if name not in theirs or theirs[name].shape != ours.shape:
            raise DataError(f"{path} cannot start this model: {name} is missing or has another shape")
        ours.copy_(theirs[name])


def restore(
    path: Path, model: Denoiser, *, ema: Ema, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler
) -> Progress:
    """Load everything that `save_checkpoint` wrote into objects built from the same configuration."""
    progress = read_progress(path)
    if progress.model != model.config:
        raise DataError(f"{path} was trained as {progress.model}, not as {model.config}")
    _load_weights(model, path, _tensors(path, "model."))
    ema.shadow = {name: t.to(ema.shadow[name].device) for name, t in _tensors(path, "ema.").items()}
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _tensors(path, f"optimizer.{i}.").items():
            slot, key = name.split(".", 1)
            state.setdefault(int(slot), {})[key] = tensor
        params = [p for group in optimizer.param_groups for p in group["params"]]
        shapes = [{t.shape for t in state.get(slot, {}).values() if t.ndim} for slot in range(len(params))]
        if progress.step and any(stored != {p.shape} for stored, p in zip(shapes, params, strict=True)):
            kind = type(optimizer).__name__
            raise DataError(f"{path} does not hold the state of {kind}: it was trained with another optimizer")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    scale = msgspec.json.decode(_metadata(path)["scaler"])
    if scale:  # else it was saved where none is needed
        scaler.load_state_dict(scale)
    return progress
