"""Reference decoding in torch: slow, obvious, the definition that the edge is held to by golden tests. Texts are scored
in `host.evaluate`.
"""
