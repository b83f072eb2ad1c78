"""The operating system around the daemon: systemd, users, locks and files. Nothing here knows of requests."""
