"""On a GPU, too, a word that was told is asked for no more, whatever was drafted behind it."""

from dataclasses import replace

import pytest

from shared.tokens import FIRST_TEXT_ID
from tests.unit.edge.backends.trt.test_blocks_backend import GAPS, LAWS, PROMPTS, Parts
from tests.unit.edge.backends.trt.test_conditioned_backend import Bench, bench, bundle, condition_of, on_cpu, written

__all__ = ["bench", "bundle"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("asked", [PROMPTS[1], GAPS[0]], ids=["prompt", "gaps"])
def test_told_words_on_gpu_leave_the_texts_of_the_cpu(
    bench: Bench, asked: tuple[Parts, bool], pictures: int, guidance: float
) -> None:
    """Two words, which the text before told: some tell one, or both, again. Drafts on the GPU, none on the CPU."""
    backend, found, same = bench.open(), 0, 0
    slot = backend.open_slot()
    words = [(FIRST_TEXT_ID,), (FIRST_TEXT_ID + 1,)]
    for seed in range(16):
        condition, law = condition_of(words, pictures, guidance), replace(LAWS[0], seed=seed)
        made = written(backend, slot, asked, law, condition)
        text = [token for token in made.canvas[made.fill].tolist() if token >= FIRST_TEXT_ID]
        words = [(text[1],), (text[3],)]
        if any(word[0] in text[:-2] for word in condition.words):
            found += 1
            same += bool((made.canvas == on_cpu(bench.graphs, asked, law, condition).canvas).all())
    print(f"{found} of 16 tell a word, {same} of them are the same")
    assert same == found >= 2
    backend.close()
