"""Whatever a network, a disk or a stranger may send: `python -m tests.stress.fuzz --inputs N`.

Spoilt messages, and Hypothesis's own inventions, for the decoders, the manifest's reader, the daemon's live socket and
its live MQTT. Each has to end in an object or in a sentence with a known code; live, each gets its one reply.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import hypothesis
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes

from edge.config import default_bundle
from edge.transports.mqtt.properties import properties
from edge.transports.mqtt.topics import UNSENDABLE, Topics, decode_generate
from shared.errors import ERROR_CODES, BundleError, RequestError, run_main
from shared.manifest import MANIFEST, read_manifest
from shared.messages import (
    MAX_MESSAGE_BYTES,
    CancelRequest,
    HealthRequest,
    decode_cancel,
    decode_line,
    decode_request,
    encode,
    id_of,
)
from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Line, Listener
from tests.support.spoilt import ODD, VALID, wrong

WINDOW: Final = 20
"""Messages sent before their replies are read."""
SHARES: Final = {"decoders": 0.7, "hypothesis": 0.01, "manifest": 0.12, "socket": 0.155, "mqtt": 0.015}
"""What part of the inputs goes where: live ones take longer."""

Decode = Callable[[bytes], Any]
DECODERS: Final[tuple[Decode, ...]] = (decode_line, decode_request, decode_cancel, decode_generate)
Outcomes = Counter[str]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([k for v in VALID for k in v]) | st.text(), inner),
)
anything = st.binary() | json_values.map(lambda value: json.dumps(value).encode())


def decoded(line: bytes, decode: Decode) -> str:
    """What becomes of a line: "ok" or the refusal's code. What is read is what would be sent."""
    try:
        message = decode(line)
    except RequestError as error:
        assert error.code in ERROR_CODES and str(error) and "\n" not in str(error), (line, error)
        return error.code
    assert decode(encode(message)) == message, line
    return "ok"


def fuzz_decoders(inputs: int, luck: random.Random) -> Outcomes:
    """Every decoder in turn."""
    counts: Outcomes = Counter()
    for number in range(inputs):
        line = wrong(luck.choice(VALID), luck)
        id_of(line)
        counts[decoded(line, DECODERS[number % len(DECODERS)])] += 1
    return counts


def fuzz_with_hypothesis(inputs: int, luck: random.Random) -> Outcomes:
    """Bytes and JSON of all kinds for the decoders, text for the topics that answers may go to."""
    counts: Outcomes = Counter()
    topics = Topics("edgelm", "dev", ("edgelm/reply/",))

    @hypothesis.seed(luck.randrange(2**32))
    @hypothesis.settings(
        max_examples=inputs, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(anything, st.none() | st.text() | st.text().map("edgelm/{}".format), st.none() | st.text())
    def one(line: bytes, topic: str | None, id: str | None) -> None:
        counts[decoded(line, DECODERS[counts.total() % len(DECODERS)])] += 1
        address, _ = topics.address(topic, None if counts.total() % 2 else "alice", id)
        assert address.startswith("edgelm/") and not UNSENDABLE.search(address)

    one()
    return counts


def fuzz_manifest(bundle: Path, folder: Path, inputs: int, luck: random.Random) -> Outcomes:
    """Read, or refused by name."""
    counts: Outcomes = Counter()
    whole = json.loads((bundle / MANIFEST).read_bytes())
    for _ in range(inputs):
        (folder / MANIFEST).write_bytes(wrong(whole, luck))
        try:
            read_manifest(folder)
            counts["ok"] += 1
        except BundleError as error:
            assert str(folder) in str(error) and "\n" not in str(error), error
            counts["refused"] += 1
    return counts


def expected(line: bytes) -> list[tuple[str, str | None]]:
    """Kind and id of the replies that a line gets on the socket: one, but for blank lines and cancels."""
    try:
        message = decode_line(line)
    except RequestError:
        return [("response", id_of(line))] if line.strip() else []
    if isinstance(message, HealthRequest):
        return [("health", None)]
    topic_is_for_mqtt = message.response_topic is not None
    return [] if isinstance(message, CancelRequest) and not topic_is_for_mqtt else [("response", message.id)]


def outcome(reply: dict[str, Any]) -> str:
    """ "ok" or the code of a reply, which is a known one."""
    if reply["type"] == "health" or reply["error"] is None:
        return "ok"
    code: str = reply["error"]["code"]
    assert code in ERROR_CODES and reply["error"]["message"], reply
    return code


def fuzz_socket(daemon: Daemon, inputs: int, luck: random.Random) -> Outcomes:
    """Every line gets the reply that is its own; a line that is too long ends its connection."""
    counts: Outcomes = Counter()
    line = Line(daemon.socket)
    for _ in range(0, inputs, WINDOW):
        sent = [wrong(luck.choice(VALID), luck).replace(b"\n", b" ") for _ in range(WINDOW)]
        line.send(*sent)
        missing = Counter(reply for text in sent for reply in expected(text))
        counts["no reply is due"] += WINDOW - missing.total()
        while missing:
            reply = line.read()
            assert reply is not None, f"hung up on one of {sent}"
            if reply["type"] != "partial":
                missing -= Counter([(reply["type"], reply.get("id"))])
                counts[outcome(reply)] += 1
        if luck.random() < 0.001:
            reply = line.ask(b"[" * (MAX_MESSAGE_BYTES + 1))
            assert outcome(reply) == "too_large" and line.read() is None
            line.close()
            line = Line(daemon.socket)
    line.close()
    return counts


def fuzz_mqtt(broker: Broker, inputs: int, luck: random.Random) -> Outcomes:
    """Every message gets its answer, on the topic that it names."""
    counts: Outcomes = Counter()
    listener = Listener(broker.port, "edgelm/reply/#")
    for start in range(0, inputs, WINDOW):
        missing: set[str] = set()
        for number in range(start, start + WINDOW):
            topic = f"edgelm/reply/{number}"
            carried = properties(PacketTypes.PUBLISH, ResponseTopic=topic)
            listener.client.publish(
                "edgelm/dev/request/generate", wrong(luck.choice(VALID), luck), qos=1, properties=carried
            )
            missing.add(topic)
        while missing:
            message = listener.heard.get(timeout=TIMEOUT_S)
            missing.remove(message.topic)
            counts[outcome(json.loads(message.payload))] += 1
    listener.close()
    return counts


def run(inputs: int, bundle: Path, *, backend: str, seed: int, say: Callable[[str], None]) -> dict[str, Outcomes]:
    """All targets. Raises AssertionError with the input that was served wrongly."""
    luck = random.Random(seed)
    found: dict[str, Outcomes] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        broker = Broker(folder, "persistence false", "max_queued_messages 0").start()
        daemon = Daemon(folder, bundle, "--backend", backend, "--mqtt", broker.address, DEVICE="dev")
        targets: dict[str, Callable[[int], Outcomes]] = {
            "decoders": lambda share: fuzz_decoders(share, luck),
            "hypothesis": lambda share: fuzz_with_hypothesis(share, luck),
            "manifest": lambda share: fuzz_manifest(bundle, folder, share, luck),
            "socket": lambda share: fuzz_socket(daemon, share, luck),
            "mqtt": lambda share: fuzz_mqtt(broker, share, luck),
        }
        try:
            broker.tool("mosquitto_sub", "-t", "edgelm/dev/availability", "-C", "1", "-W", "20")
            for target, fuzz in targets.items():
                began_s = time.monotonic()
                found[target] = fuzz(max(WINDOW, round(inputs * SHARES[target])))
                seconds = time.monotonic() - began_s
                say(f"{target:10} {found[target].total():8} inputs in {seconds:5.0f} s: {dict(found[target])}")
            assert daemon.process.poll() is None, "the daemon ended"
            log = daemon.log.read_text()
            assert "Traceback" not in log and "ERROR" not in log, log
        finally:
            daemon.close()
            broker.stop()
    return found


def main() -> int:
    """Run and report; an input that was served wrongly ends it with that input."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--backend", default="fake")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    say = partial(print, flush=True)
    found = run(args.inputs, args.bundle, backend=args.backend, seed=args.seed, say=say)
    print(f"{sum(counts.total() for counts in found.values())} inputs, none served wrongly")
    return 0


if __name__ == "__main__":
    run_main(main)
