"""How requests come in and answers go out: Unix socket, MQTT. Transports validate and pass on; they compute nothing."""
