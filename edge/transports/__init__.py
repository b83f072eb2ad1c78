"""How requests arrive and answers leave: Unix socket, MQTT, HTTP. Transports validate and forward; they compute
nothing, and what must outlive the process they hand to `edge.delivery`.
"""
