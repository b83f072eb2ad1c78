"""A real Home Assistant against a real broker and the real daemon: its entities, a prompt, a story, and their removal.

    python3.13 -m venv ha && ha/bin/pip install homeassistant==2025.1.4 paho-mqtt==1.6.1
    python -m tests.stress.home_assistant --python ha/bin/python

Home Assistant needs a newer Python than the daemon, and an environment of its own. paho-mqtt is what its MQTT
integration asks for, which it would install by itself.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from tests.integration.harness import ROOT, Broker, Daemon

CORE = Path(__file__).with_name("home_assistant_core.py")


def run(python: Path, bundle: Path, backend: str, prompt: str) -> None:
    """Print what Home Assistant says, line by line. Raises RuntimeError when it does not come to an end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ha").mkdir()
        (folder / "ha" / "configuration.yaml").touch()
        broker = Broker(folder).start()
        options = ("--backend", backend, "--mqtt", broker.address)
        daemon = Daemon(folder, bundle, *options, DEVICE="kitchen", HOMEASSISTANT_DISCOVERY="true")
        command = [str(python), str(CORE), str(folder / "ha"), str(broker.port), prompt]
        core = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert core.stdin is not None and core.stdout is not None
            for line in core.stdout:
                print(line, end="", flush=True)
                if json.loads(line)["what"] == "story":
                    daemon.close()
                    daemon = Daemon(folder, bundle, *options, DEVICE="kitchen")
                    core.stdin.write("\n")
                    core.stdin.flush()
            if core.wait(30):
                raise RuntimeError(f"Home Assistant ended with {core.returncode}")
        finally:
            core.kill()
            core.wait()
            daemon.close()
            broker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter that has homeassistant")
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundle" / "tinystories", help="bundle to serve")
    parser.add_argument("--backend", default="ort", help="what runs it (default: ort)")
    parser.add_argument("--prompt", default='Lily said "{ hello }" and', help="what the text entity sends")
    args = parser.parse_args()
    run(args.python, args.bundle, args.backend, args.prompt)


if __name__ == "__main__":
    main()
