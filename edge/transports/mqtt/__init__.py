"""The MQTT transport: connection, topics, attachments, retained status messages, discovery by Home Assistant. Retries
and what is owed after a restart are in `edge.delivery`.
"""
