// Passes of the INT8 network on a processor, as plain C functions for ctypes.

extern "C" __attribute__((visibility("default"))) int edgelm_processor(void) { return 0; }
