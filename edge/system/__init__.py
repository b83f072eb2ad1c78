"""The operating system around the daemon: systemd's protocol, and the store of installed bundles."""
