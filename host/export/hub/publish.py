"""Write a run in the shape of the Hugging Face hub. Only whoever loads it needs transformers, and none of our code."""

import tempfile
from pathlib import Path
from typing import Final, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import host.export.hub
from host.data.tokenizer import plain_tokenizer, tokenizer_with_bos
from host.evaluate.laws import law_figures
from host.evaluate.likelihood import HeldOut, evaluate
from host.evaluate.scorers import TorchScorer
from host.export.hub.model_card import CARD, model_card
from host.files import swapped_in
from host.model.network import Denoiser
from host.sampling.reference import TOP_K
from host.train.checkpoint import Progress
from host.train.published import (
    CONDITIONS,
    CONDITIONS_PART,
    CONFIG,
    MODEL_TYPE,
    WEIGHTS,
    Published,
    Training,
    is_published,
    read_published,
)
from host.train.run_folder import training_stages, work_behind
from host.train.stages import CONDITION_STAGES
from shared.errors import ConfigError, DataError, DiffusionLLMError
from shared.manifest import TOKENIZER, Evaluation, LawFigures, SamplingDefaults, bundle_digest, read_manifest
from shared.tokens import BOS, EOS, PAD, SPECIAL_TOKENS

Dtype = Literal["float32", "float16"]
MODELING: Final = "modeling_diffusion_llm"


def check_publishable(out: Path) -> None:
    """Fail early: ConfigError when `out` is not such a folder; DiffusionLLMError when none can be made beside it."""
    if out.exists():
        try:
            assert is_published(out)
            read_published(out)
        except (AssertionError, DataError):
            raise ConfigError(f"{out} exists and is not what --hf writes: choose another folder") from None
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".", dir=out.resolve().parent).cleanup()
    except OSError as error:
        raise DiffusionLLMError(f"{out} cannot be written: {error.strerror}") from None


def training_of(run: Path, progress: Progress) -> Training:
    """What made a run's weights, nothing measured yet; ConfigError when they cannot write left to right."""
    if "ar" not in progress.objectives:
        raise ConfigError(f"{run} did not learn the objective ar, by which a published model writes")
    stages = training_stages(run)
    apart = tuple(stage for stage in stages if stage.objectives in CONDITION_STAGES)
    return Training(
        config=progress.model.name,
        objectives=progress.objectives,
        schedule=progress.schedule,
        stages=tuple(stage for stage in stages if stage not in apart),
        compute_seconds=work_behind(run).compute_seconds,
        tokenizer_sha256=progress.tokenizer_sha256,
        data_source=progress.data_source,
        data_licence=progress.data_licence,
        data_stories=progress.data_stories,
        condition_stages=apart,
    )


def figures_of_bundle(training: Training, bundle: Path) -> Training:
    """With what a bundle's manifest says of the same weights in float32; ConfigError when it is of other weights."""
    manifest = read_manifest(bundle)
    stages = tuple(stage for stage in manifest.data.stages if stage.objectives not in CONDITION_STAGES)
    if (manifest.tokenizer_sha256, stages) != (training.tokenizer_sha256, training.stages):
        raise ConfigError(f"{bundle} is not of this run: its tokenizer or its stages of training are others")
    return msgspec.structs.replace(
        training,
        laws=tuple(law for law in manifest.laws if law.graph == TorchScorer.name),
        evaluations=tuple(one for one in manifest.evaluations if one.graph == TorchScorer.name),
        bundle_sha256=bundle_digest(bundle),
    )


def measured_figures(training: Training, model: Denoiser, held_out: HeldOut) -> Training:
    """With what the weights measure on held-out text, as a bundle's manifest would say it."""
    laws: tuple[LawFigures, ...] = (law_figures(model, held_out, training.objectives),)
    evaluations: tuple[Evaluation, ...] = ()
    if "canvas" in training.objectives:
        evaluations = (evaluate(TorchScorer(model), held_out, training.schedule, draws=1),)
    return msgspec.structs.replace(training, laws=laws, evaluations=evaluations)


def publish(
    out: Path,
    model: Denoiser,
    *,
    training: Training,
    tokenizer: Path,
    dtype: Dtype = "float32",
    defaults: SamplingDefaults | None = None,
) -> None:
    """Write everything beside `out`, then swap it in; DiffusionLLMError when the disk refuses."""
    check_publishable(out)
    shape, defaults = model.config, defaults or SamplingDefaults()
    published = Published(
        model_type=MODEL_TYPE,
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        layers=shape.layers,
        heads=shape.heads,
        canvas_len=shape.canvas_len,
        time_input=shape.time_input,
        draft_depth=shape.draft_depth,
        training=training,
        conditions=shape.conditions,
    )
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    classes = {"AutoConfig": "DiffusionLLMConfig", "AutoModelForCausalLM": "DiffusionLLMForCausalLM"}
    config = {
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in classes.items()},
        "dtype": dtype,
        **ids,
        **msgspec.to_builtins(published),
    }
    generation = {
        "do_sample": True,
        "max_length": shape.canvas_len,
        "temperature": defaults.temperature,
        "top_k": min(TOP_K, shape.vocab_size),
        "top_p": defaults.top_p,
        **ids,
    }
    pad, bos, eos, mask = SPECIAL_TOKENS
    reading = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "mask_token": mask,
        "split_special_tokens": True,  # the text "<MASK>" is text
        "model_max_length": shape.canvas_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    card = model_card(out.name, published, dtype=dtype, temperature=defaults.temperature)
    with swapped_in(out) as folder:
        kind: torch.dtype = getattr(torch, dtype)
        values = model.state_dict().items()
        weights = {name: (v.to(kind) if v.is_floating_point() else v).contiguous() for name, v in values}
        apart = {name: weights.pop(name) for name in [*weights] if name.startswith(CONDITIONS_PART)}
        for file, tensors in ((WEIGHTS, weights), (CONDITIONS, apart)):
            if not tensors:
                continue
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise DiffusionLLMError(f"{out} cannot be written: {error}") from None
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # as any new file; save_file lets only its owner read
        for name, content in (
            (CONFIG, config),
            ("generation_config.json", generation),
            ("tokenizer_config.json", reading),
        ):
            (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
        (folder / TOKENIZER).write_bytes(tokenizer_with_bos(plain_tokenizer(tokenizer)))
        source = Path(host.export.hub.__file__).with_name(f"{MODELING}.py")
        (folder / source.name).write_bytes(source.read_bytes())
        (folder / CARD).write_text(card, "utf-8")
        read_published(folder)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB, weights in {dtype}; load it with trust_remote_code=True, see its {CARD}")
