"""The model card: what the model is, how to use it, what it was trained on, what it measured."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from host.data.sources import UNKNOWN_LICENCE
from host.evaluate.laws import DRAFTED_STORIES
from host.model.network import count_parameters
from host.train.published import CONDITIONS, Published
from shared.figures import Figure

CARD: Final = "README.md"
USE: Final = """```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
text = model.generate(**tokenizer("Once upon a time", return_tensors="pt"))
print(tokenizer.decode(text[0], skip_special_tokens=True))
```
"""
CANVAS: Final = """
A canvas with masked tokens, of which each pass fills in the surest:

```python
left = tokenizer("Tom was sad.", return_tensors="pt").input_ids
right = tokenizer(" Tom was happy again.", return_tensors="pt").input_ids[:, 1:]
gap, end = torch.full((1, 20), tokenizer.mask_token_id), torch.tensor([[tokenizer.eos_token_id]])
canvas = torch.cat([left, gap, right, end], 1)
while (masked := canvas == tokenizer.mask_token_id).any():
    score, token = model.canvas_logits(canvas).softmax(-1).max(-1)
    surest = score.masked_fill(~masked, -1).argmax()
    canvas[0, surest] = token[0, surest]
print(tokenizer.decode(canvas[0], skip_special_tokens=True))
```
"""

READING: Final = f"""
`{CONDITIONS}` is what the network reads words and pictures by, beside the model: `host.train` goes on from it,
transformers leaves it alone. Trained by: """


def model_card(name: str, published: Published, *, dtype: str, temperature: float) -> str:
    """The text of README.md."""
    training, shape = published.training, published.model
    learned, parameters = training.objectives, count_parameters(replace(shape, conditions=False))
    has = [
        "`generate` writes left to right",
        *(["`canvas_logits` scores masked tokens anywhere"] * ("canvas" in learned)),
        *([f"`drafts` names the {shape.draft_depth} likeliest tokens ahead"] * bool(shape.draft_depth)),
    ]
    return "".join(
        [
            "---\n",
            f"license: {'other' if training.data_licence == UNKNOWN_LICENCE else training.data_licence.lower()}\n",
            "library_name: transformers\npipeline_tag: text-generation\ntags: [masked-diffusion, infilling]\n---\n\n",
            f"# {name}\n\n",
            f"A language model of {parameters / 1e6:.2f} M parameters over {shape.vocab_size:,} tokens "
            f"(byte-level BPE), for texts of at most {shape.canvas_len} tokens: {', '.join(has)}. ",
            f"Made by diffusion-llm. It samples at temperature {temperature:g} unless told otherwise.\n\n",
            USE,
            CANVAS * ("canvas" in learned),
            "\n## Training\n\n",
            f"Data: {training.data_source}, {training.data_stories:,} texts; licence: {training.data_licence}. "
            "The modeling file is MIT-licensed. Weights: exponential moving average.\n\n",
            "| stage | objectives | tokens |\n| --- | --- | --- |\n",
            *(
                f"| {stage.name} | {', '.join(stage.objectives) or 'not recorded'} | {stage.tokens:,} |\n"
                for stage in training.stages
            ),
            f"| all | | {training.tokens:,} |\n",
            READING * shape.conditions,
            "; ".join(
                f"{stage.name} ({', '.join(stage.objectives)}, {stage.tokens:,} tokens or pictures)"
                for stage in training.condition_stages
            ),
            ".\n" * shape.conditions,
            "\n## Figures\n\n",
            "Value ± standard error, of the weights in float32",
            f" (here they are rounded to {dtype})" * (dtype != "float32"),
            f"; the same as in the bundle of digest `{training.bundle_sha256[:12]}`" if training.bundle_sha256 else "",
            ".\n\n| text | texts | what | |\n| --- | --- | --- | --- |\n",
            *_figures(published),
            "\n`host.train --init FOLDER` of diffusion-llm goes on from here.\n",
        ]
    )


def _figures(published: Published) -> Iterator[str]:
    for law in published.training.laws:
        where = f"| {law.source} | {law.stories:,} |"
        yield f"{where} left to right, bits per byte | {_spoken(law.left_to_right_bits_per_byte)} |\n"
        yield f"{where} left to right, nats per token | {_spoken(law.left_to_right_nats_per_token)} |\n"
        if law.infilling_nats_per_gap_token:
            yield f"{where} infilling, nats per gap token | {_spoken(law.infilling_nats_per_gap_token)} |\n"
        for temperature, tokens in (law.tokens_per_pass or {}).items():
            few = f"| {law.source} | {min(law.stories, DRAFTED_STORIES)} |"
            yield f"{few} tokens per pass with drafts, at temperature {temperature} | {tokens:.2f} |\n"
    for one in published.training.evaluations:
        where = f"| {one.source} | {one.stories:,} |"
        yield f"{where} canvas, bits per byte, an upper bound | {_spoken(one.bits_per_byte)} |\n"


def _spoken(figure: Figure) -> str:
    return f"{figure.value:.4f} ± {figure.stderr:.4f}"
