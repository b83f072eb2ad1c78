"""Many requests at once: a loaded bundle, jobs, the fair queue and the scheduler. Where requests come from is in
`edge.transports`, how long they are kept in `edge.delivery`.
"""
