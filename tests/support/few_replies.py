"""`python -m tests.support.few_replies MOST …`: the daemon that holds so many unstored replies at most."""

import sys

import edge.delivery.reply_limits as reply_limits
from edge.daemon import main
from shared.errors import run_main

if __name__ == "__main__":
    most = int(sys.argv.pop(1))
    reply_limits.MAX_RELIABLE_REPLIES, reply_limits.MAX_REPLIES = most, most // 2  # type: ignore[misc]
    run_main(main)
