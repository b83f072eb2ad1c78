"""Two implementations, one canvas: the torch reference and the edge's loop commit the same tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from edge.serving.loaded_bundle import LoadedBundle
from host.model.network import Denoiser
from host.sampling.reference import Sampled, Settings, sample
from shared.messages import Gap, GenerateRequest
from tests.conftest import Exported

TOLERANCE = 5e-5
"""Above the largest difference between the two runtimes' log-probabilities, which test_graph measures."""

REQUESTS = {
    "random": GenerateRequest(prompt="abc", selection="random", steps=12),
    "one token a pass": GenerateRequest(prompt="", selection="random", steps=1024, max_tokens=24),
    "confidence": GenerateRequest(prompt="abc", selection="confidence", steps=8, max_tokens=24),
    "margin": GenerateRequest(prompt="abc", selection="margin", steps=8, max_tokens=24),
    "entropy": GenerateRequest(prompt="abc", selection="entropy", steps=8, max_tokens=24),
    "argmax": GenerateRequest(prompt="abc", selection="random", temperature=0, steps=8, max_tokens=60),
    "cold": GenerateRequest(prompt="abc", temperature=0.7, steps=8, max_tokens=60),
    "nucleus": GenerateRequest(prompt="abc", top_p=0.8, temperature=1.3, steps=8, max_tokens=60),
    "few candidates": GenerateRequest(prompt="abc", top_k=5, steps=8, max_tokens=60),
    "one candidate": GenerateRequest(prompt="abc", top_k=1, selection="margin", steps=8, max_tokens=24),
    "threshold": GenerateRequest(prompt="abc", threshold=0.05, max_tokens=24),
    "entropy bound": GenerateRequest(prompt="abc", entropy_bound=9.0, max_tokens=24),
    "infill": GenerateRequest(segments=["the ", Gap(4), " and ", Gap(3), "."], steps=5),
}


@pytest.fixture(scope="module")
def loaded(exported: Exported) -> LoadedBundle:
    return LoadedBundle.load(exported.folder, threads=1)


def reference(model: Denoiser, loaded: LoadedBundle, request: GenerateRequest) -> Sampled:
    plan = loaded.prepare(request)
    canvas, fill = torch.from_numpy(plan.layout.canvas).long(), torch.from_numpy(plan.layout.fill)
    return sample(model, canvas, fill=fill, schedule="linear", settings=Settings(**dataclasses.asdict(plan.sampling)))


@pytest.mark.parametrize("name", REQUESTS)
def test_canvas_of_edge_and_torch_holds_the_same_tokens(exported: Exported, loaded: LoadedBundle, name: str) -> None:
    decided = 0
    for seed in range(30):
        request = replace(REQUESTS[name], seed=seed)
        expected = reference(exported.model, loaded, request)
        if expected.margin <= TOLERANCE:
            continue  # too close to call: either runtime is right
        decided += 1
        found = loaded.run(loaded.prepare(request))
        np.testing.assert_array_equal(found.canvas, expected.canvas.numpy(), err_msg=f"seed {seed}")
        assert found.steps == expected.steps
        if decided == 2:
            return
    pytest.fail(f"only {decided} of 30 seeds leave every decision a margin above {TOLERANCE}")
