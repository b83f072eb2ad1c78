"""The MQTT transport: client, topics, and the retained status messages."""
