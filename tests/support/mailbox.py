"""Takes the replies of a scheduler."""

import threading
from collections.abc import Callable
from typing import Any

from edge.serving.scheduler import Scheduler
from shared.messages import GenerateRequest, Reply, Response


class Mailbox:
    """Takes the replies to one request."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self._done = threading.Event()

    def __call__(self, reply: Reply) -> None:
        self.replies.append(reply)
        if isinstance(reply, Response):
            self._done.set()

    @property
    def answered(self) -> bool:
        return self._done.is_set()

    def response(self) -> Response:
        assert self._done.wait(20)
        (response,) = (reply for reply in self.replies if isinstance(reply, Response))
        return response

    def error_code(self) -> str:
        error = self.response().error
        assert error is not None
        return error.code


def submit(scheduler: Scheduler, gone: Callable[[], bool] = lambda: False, client: str = "", **fields: Any) -> Mailbox:
    mailbox = Mailbox()
    asked: dict[str, Any] = {"prompt": "Once", "max_tokens": 8} | fields
    scheduler.submit(GenerateRequest(**asked), mailbox, gone=gone, client=client)
    return mailbox
