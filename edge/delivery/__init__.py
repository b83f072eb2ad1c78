"""Reliable delivery: accepted requests are answered exactly once, also after a restart. Journal, outbox, publisher.
How a request came is known in `edge.transports`, how its text is made in `edge.serving`.
"""
