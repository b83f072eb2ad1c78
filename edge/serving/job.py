"""An accepted request on its way to its one terminal reply."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge.serving.counters import Served
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Run
from shared.errors import RequestError
from shared.messages import GenerateRequest, Partial, Reply, Response, Timing, Usage

EARLY_SNAPSHOTS: Final = 8
"""Of a request, after its first passes: a short text is over before a second one is due."""


@dataclass(eq=False, kw_only=True)
class Job:
    """Times are seconds of the monotonic clock; compute_s: its share of the time of its steps.

    number: in the order of acceptance. gone: whether the answer is no longer wanted. tag: its name for the scheduler's
    `watch`. alone: a batch with it failed or ended the process, so it shares none. partial_every_s: the least time
    between two snapshots after the early ones.
    """

    request: GenerateRequest
    reply: Callable[[Reply], None]
    gone: Callable[[], bool]
    client: str
    number: int
    tag: int
    loaded: LoadedBundle
    run: Run
    accepted_s: float
    deadline_s: float
    partial_every_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    compute_s: float = 0.0
    alone: bool = False
    served: Served | None = None
    """For the counters, once `answer` was called."""
    partials: int = 0
    last_partial_s: float = float("-inf")

    def obstacle(self) -> RequestError | None:
        """Why it must stop; None while it may go on."""
        if self.gone():
            return RequestError("cancelled", "its client cancelled it, or hung up")
        if time.monotonic() >= self.deadline_s:
            return RequestError("timeout", "not finished within its deadline")
        return None

    def positions(self) -> int:
        """How many positions its next pass computes."""
        return self.run.positions()

    def partial(self) -> Partial | None:
        """A snapshot, if one is due."""
        now = time.monotonic()
        wait_s = 0.0 if self.partials < EARLY_SNAPSHOTS else self.partial_every_s
        if not self.request.stream or now - self.last_partial_s < wait_s:
            return None
        self.last_partial_s = now
        self.partials += 1
        snapshot = self.run.snapshot()
        return Partial(
            id=self.request.id,
            seq=self.partials,
            step=snapshot.step,
            steps=snapshot.steps,
            text=snapshot.text(),
            masked=snapshot.masked,
            parts=snapshot.parts(),
            appended=snapshot.appended(),
        )

    def answer(self) -> Response:
        """The reply to a finished request."""
        completion, plan, now = self.run.completion(), self.run.plan, time.monotonic()
        times = (self.started_s or now, self.first_token_s or now, now)
        self.served = Served(
            decoder=plan.decoder,
            prompt_tokens=plan.prompt_tokens,
            tokens=completion.generated_tokens,
            passes=completion.steps,
            first_token_s=times[1] - self.accepted_s,
            total_s=now - self.accepted_s,
            tried=completion.tried,
            kept=completion.kept,
        )
        return Response(
            id=self.request.id,
            status="ok",
            text=completion.text,
            finish_reason="length" if completion.full else "stop",
            seed=plan.seed,
            usage=Usage(plan.prompt_tokens, completion.generated_tokens, completion.steps),
            timing=Timing(*(round((t - self.accepted_s) * 1e3, 3) for t in times)),
            model=self.loaded.model,
        )
