"""The contract between the training host and the edge: nothing but the standard library and msgspec."""
