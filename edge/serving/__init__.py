"""Many requests at once: a loaded bundle, jobs, the fair queue and the scheduler. How requests arrive is in
`edge.transports`, how they survive a restart in `edge.delivery`.
"""
