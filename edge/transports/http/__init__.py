"""HTTP/1.1: completions in OpenAI's shape, health, models, metrics and one page.

h11 parses, an event loop in a thread of its own serves; nothing of it is imported while HTTP is off.
"""
