"""How requests arrive and answers leave: Unix socket, MQTT. Transports validate and forward; they compute nothing."""
