"""What `edge.bench` measures: a step and whole texts by each decoder, conditions, many clients, llama.cpp beside it,
and the roofline of a device; and the self-test of an installation. Nothing here serves.
"""
