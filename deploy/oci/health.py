"""Whether the daemon of this container answers and is in service: exit status 0, or 1 and why."""

from edge.client import connect, health
from edge.config import load_config
from shared.errors import run_main


def main() -> int:
    """Ask for the health. Raises ConfigError."""
    connection = connect(load_config().socket)
    if connection is None:
        print("the daemon does not listen")
        return 1
    with connection:
        answer = health(connection)
    print("the daemon does not answer" if answer is None else answer.state)
    return int(answer is None or answer.state in ("draining", "error"))


if __name__ == "__main__":
    run_main(main)
