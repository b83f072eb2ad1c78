// A driver library in which waiting for the GPU takes half a second, and nothing else works.
#include <stdint.h>
#include <string.h>
#include <unistd.h>

int cuEventSynchronize(void *event) {
    (void)event;
    usleep(500000);
    return 0;
}

static int unsupported(void) { return 801; }

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    *function = strcmp(symbol, "cuEventSynchronize") == 0 ? (void *)cuEventSynchronize : (void *)unsupported;
    if (status) *status = 0;
    return 0;
}

int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}
