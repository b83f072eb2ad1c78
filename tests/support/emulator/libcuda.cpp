// A libcuda.so.1 on the processor: NVIDIA's own Python bindings load it, convert our arguments for it, and call it.
//
// Streams are lazy: what is enqueued runs when somebody waits, so that a result read too early, or a buffer written too
// late, is wrong here as it would be on a GPU. Kernels are the emulator's. Whatever a GPU would refuse is refused.
#include <chrono>
#include <dlfcn.h>
#include <functional>
#include <set>
#include <string>
#include <vector>
#include "emulator.cpp"

struct Stream { std::vector<Work> queue, recorded; bool capturing = false; };
struct Event { double at_ms = 0; unsigned flags = 0; };
struct Graph { std::vector<Work> work; };

enum Result { OK = 0, INVALID_VALUE = 1, NOT_FOUND = 500, INVALID_HANDLE = 400, INVALID_CONTEXT = 201,
              CAPTURE_UNSUPPORTED = 900, ILLEGAL_STATE = 401 };
static thread_local void* current = nullptr;  // a context belongs to a thread
static int contexts = 0;
static std::set<void*> streams, events, modules, graphs, executables, device_memory, host_memory;
static char context_handle, function_handles[std::size(kernel_names)];

#define NEED(condition, code) if (!(condition)) return code
#define NEED_CONTEXT NEED(current, INVALID_CONTEXT)

static double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}
static void enqueue(Stream* s, Work work) { (s->capturing ? s->recorded : s->queue).push_back(work); }
static void drain(Stream* s) {
    std::vector<Work> queue;
    queue.swap(s->queue);
    for (auto& work : queue) work();
}

extern "C" {
int cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
int cuDriverGetVersion(int* version) { *version = 12060; return OK; }
int cuDeviceGetCount(int* count) { *count = 1; return OK; }
int cuDeviceGet(int* device, int ordinal) { NEED(ordinal == 0, 101); *device = 0; return OK; }
int cuDeviceGetName(char* name, int length, int) { snprintf(name, length, "emulated"); return OK; }
int cuDeviceGetAttribute(int* value, int which, int) {
    NEED(which == 16 || which == 75 || which == 76, INVALID_VALUE);
    *value = which == 76 ? 7 : 8;  // sm_87, eight multiprocessors
    return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &context_handle; ++contexts; return OK; }
int cuDevicePrimaryCtxRelease(int) { NEED(contexts > 0, INVALID_CONTEXT); --contexts; return OK; }
int cuCtxSetCurrent(void* context) { NEED(context == &context_handle && contexts, INVALID_CONTEXT); current = context; return OK; }
int cuMemGetInfo(size_t* unused, size_t* total) { NEED_CONTEXT; *unused = 1ull << 30; *total = 8ull << 30; return OK; }

int cuMemAlloc(unsigned long long* at, size_t size) {
    NEED_CONTEXT; NEED(size, INVALID_VALUE);
    void* memory = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(memory, 0xFF, size);  // a GPU's memory is not zeroed either; in float16 this is no number
    device_memory.insert(memory);
    *at = (unsigned long long)memory;
    return OK;
}
int cuMemFree(unsigned long long at) { NEED_CONTEXT; NEED(device_memory.erase((void*)at), INVALID_VALUE); free((void*)at); return OK; }
int cuMemHostAlloc(void** at, size_t size, unsigned flags) {
    NEED_CONTEXT; NEED(flags == 2, INVALID_VALUE);  // CU_MEMHOSTALLOC_DEVICEMAP
    *at = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    host_memory.insert(*at);
    return OK;
}
int cuMemFreeHost(void* at) { NEED_CONTEXT; NEED(host_memory.erase(at), INVALID_VALUE); free(at); return OK; }
int cuMemHostGetDevicePointer(unsigned long long* at, void* host, unsigned flags) {
    NEED(host_memory.count(host) && !flags, INVALID_VALUE);
    *at = (unsigned long long)host;
    return OK;
}
int cuStreamCreate(Stream** s, unsigned flags) { NEED_CONTEXT; NEED(flags == 1, INVALID_VALUE); streams.insert(*s = new Stream); return OK; }
int cuStreamDestroy(Stream* s) { NEED(streams.erase(s), INVALID_HANDLE); delete s; return OK; }
int cuStreamSynchronize(Stream* s) { NEED(streams.count(s), INVALID_HANDLE); NEED(!s->capturing, CAPTURE_UNSUPPORTED); drain(s); return OK; }
int cuEventCreate(Event** e, unsigned flags) { NEED_CONTEXT; *e = new Event; (*e)->flags = flags; events.insert(*e); return OK; }
int cuEventDestroy(Event* e) { NEED(events.erase(e), INVALID_HANDLE); delete e; return OK; }
int cuEventRecord(Event* e, Stream* s) {
    NEED(events.count(e) && streams.count(s), INVALID_HANDLE);
    enqueue(s, [e] { e->at_ms = now_ms(); });
    return OK;
}
int cuEventSynchronize(Event* e) {
    NEED(events.count(e), INVALID_HANDLE);
    for (void* s : streams) drain((Stream*)s);
    return OK;
}
int cuEventElapsedTime(float* ms, Event* from, Event* to) {
    NEED(!((from->flags | to->flags) & 2), INVALID_HANDLE);  // CU_EVENT_DISABLE_TIMING
    *ms = (float)(to->at_ms - from->at_ms);
    return OK;
}
int cuModuleLoadData(void** module, const void* image) {
    NEED_CONTEXT; NEED(!memcmp(image, "\177ELF", 4), INVALID_VALUE);
    modules.insert(*module = malloc(1));
    return OK;
}
int cuModuleUnload(void* module) { NEED(modules.erase(module), INVALID_HANDLE); free(module); return OK; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
    NEED(modules.count(module), INVALID_HANDLE);
    const auto known = std::find_if(std::begin(kernel_names), std::end(kernel_names),
                                    [name](const char* one) { return !strcmp(name, one); });
    NEED(known != std::end(kernel_names), NOT_FOUND);
    *function = &function_handles[known - std::begin(kernel_names)];
    return OK;
}
int cuMemsetD8Async(unsigned long long at, unsigned char value, size_t size, Stream* s) {
    NEED_CONTEXT; NEED(streams.count(s), INVALID_HANDLE); NEED(device_memory.count((void*)at) && size, INVALID_VALUE);
    enqueue(s, [at, value, size] { memset((void*)at, value, size); });
    return OK;
}
int cuMemcpyHtoD_v2(unsigned long long at, const void* host, size_t size) {
    NEED_CONTEXT; NEED(device_memory.count((void*)at) && size, INVALID_VALUE);
    for (void* s : streams) NEED(!((Stream*)s)->capturing, CAPTURE_UNSUPPORTED);
    memcpy((void*)at, host, size);
    return OK;
}
int cuMemcpyHtoD(unsigned long long at, const void* host, size_t size) { return cuMemcpyHtoD_v2(at, host, size); }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Stream* s, void** p, void** extra) {
    NEED_CONTEXT; NEED(streams.count(s), INVALID_HANDLE);
    NEED(bx == 256 && by == 1 && bz == 1 && !shared && !extra && gx && gy && gz, INVALID_VALUE);
    NEED(gy <= 65535 && gz <= 65535, INVALID_VALUE);
    const auto at = (char*)function - function_handles;
    NEED(at >= 0 && at < (long)std::size(kernel_names), INVALID_HANDLE);
    const Work work = kernel_named(kernel_names[at], p);  // parameters are copied now, as a GPU's driver does
    enqueue(s, [work, gx, gy, gz] { if (run_grid(work, gx, gy, gz, 0)) abort(); });
    return OK;
}
int cuLaunchHostFunc(Stream* s, void (*function)(void*), void* data) {
    NEED(streams.count(s), INVALID_HANDLE);
    enqueue(s, [function, data] { function(data); });
    return OK;
}
int cuStreamBeginCapture(Stream* s, int mode) {
    NEED(streams.count(s) && !s->capturing, INVALID_HANDLE); NEED(mode == 1, INVALID_VALUE);
    s->capturing = true;
    return OK;
}
int cuStreamEndCapture(Stream* s, Graph** graph) {
    NEED(streams.count(s), INVALID_HANDLE); NEED(s->capturing, ILLEGAL_STATE);
    graphs.insert(*graph = new Graph{s->recorded});
    s->recorded.clear(), s->capturing = false;
    return OK;
}
int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long flags) {
    NEED(graphs.count(graph), INVALID_HANDLE); NEED(!flags, INVALID_VALUE);
    executables.insert(*executable = new Graph{graph->work});
    return OK;
}
int cuGraphDestroy(Graph* graph) { NEED(graphs.erase(graph), INVALID_HANDLE); delete graph; return OK; }
int cuGraphExecDestroy(Graph* graph) { NEED(executables.erase(graph), INVALID_HANDLE); delete graph; return OK; }
int cuGraphLaunch(Graph* graph, Stream* s) {
    NEED(executables.count(graph) && streams.count(s), INVALID_HANDLE);
    for (auto& work : graph->work) enqueue(s, work);
    return OK;
}
// What was made and never freed; the primary context counts too.
int emulated_leaks() {
    return (int)(contexts + streams.size() + events.size() + modules.size() + graphs.size() + executables.size()
                 + device_memory.size() + host_memory.size());
}

int cuGetErrorName(int, const char** name) { *name = "emulated error"; return OK; }
int cuGetProcAddress_v2(const char* symbol, void** function, int, unsigned long long, int* status) {
    std::string name = symbol;
    if (name == "cuGetProcAddress") name = "cuGetProcAddress_v2";
    *function = dlsym(RTLD_DEFAULT, name.c_str());
    if (!*function) {
        static void* self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
        *function = self ? dlsym(self, name.c_str()) : nullptr;
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
}
