"""The contract between the training host and the edge: manifest, messages, errors, schedule, special tokens. Nothing
but the standard library and msgspec; what only one of the two needs is there.
"""
