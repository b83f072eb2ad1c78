"""What one person does with many devices: see them all, and give them all a bundle.

What a device says of itself is heard in `edge.transports.mqtt`; how it installs what it is given is `edge.system`.
"""
