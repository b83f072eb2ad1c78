"""Reliable delivery: accepted requests are answered exactly once, also after a restart. Journal, outbox, publisher."""
