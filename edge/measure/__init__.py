"""What `edge.bench` measures: one step, many clients, and the roofline of a device."""
