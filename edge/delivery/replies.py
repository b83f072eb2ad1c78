"""Replies that are stored nowhere: refusals, health, answers that are asked for again. Their number is limited."""

from collections.abc import Callable

from edge.delivery.open_requests import Sender
from edge.delivery.publisher import Message
from edge.delivery.reply_limits import ReplyLimits
from edge.serving.scheduler import Scheduler
from shared.errors import RequestError
from shared.messages import encode, error_response


class Replies:
    """send: has a message published soon; called in any thread. redeliver: has the broker deliver again what was not
    acknowledged.
    """

    def __init__(
        self, scheduler: Scheduler, send: Callable[[Message], None], redeliver: Callable[[], None] = lambda: None
    ) -> None:
        self.limits = ReplyLimits(lambda: scheduler.requests.note_lost(dropped=1), on_room=redeliver)
        self.send = send
        self._scheduler = scheduler

    def refuse(self, sender: Sender, error: RequestError, id: str | None) -> None:
        """Answer with an error."""

        def refusal() -> bytes:
            self._scheduler.requests.note(code=error.code, id=id, client=sender.client)
            return encode(error_response(error, id))

        self.reply(sender, refusal)

    def reply(self, sender: Sender, payload: Callable[[], bytes], seq: int | None = None) -> None:
        """Send a reply, or the answer of number `seq` again, and acknowledge the request.

        payload: called only if ReplyLimits allow the reply. In a flood most to QoS 0 are dropped; a request of QoS 1
        then stays unacknowledged, and the broker delivers it again.
        """
        if not self.limits.take(sender.client, sender.reliable):
            if not sender.reliable:
                sender.acknowledge()
            return

        def done() -> None:
            self.limits.give_back()
            sender.acknowledge()

        self.send(Message(sender.address, sender.correlation, payload(), seq, done=done))
