// A pass of the INT8 network over rows, its drafts and its noise: what `edge.backends.native_rows` calls by ctypes.
//
// The same source is compiled for each set of instructions; the caller chooses one that `edgelm_sets` names. Results are
// the same to the bit with all of them.
#include "types.h"

#include <algorithm>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // in GCC 12's own header: its bug 105593
#include <immintrin.h>
#if __GNUC__ >= 11 // the first to know AVX-VNNI
#define FOR_EACH_SET(f) f(amx) f(vnni_512) f(vnni_256)
#else
#define FOR_EACH_SET(f) f(vnni_512)
#endif
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define VNNI_512
namespace vnni_512 {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "pass.h"
#include "noise.h"
}  // namespace vnni_512
#pragma GCC pop_options
#if __GNUC__ >= 11
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#define AMX
namespace amx {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "pass.h"
#include "noise.h"
}  // namespace amx
#undef AMX
#pragma GCC pop_options
#endif
#undef VNNI_512
#if __GNUC__ >= 11
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
namespace vnni_256 {
#include "vectors.h"
#include "products.h"
#include "attention.h"
#include "pass.h"
#include "noise.h"
}  // namespace vnni_256
#pragma GCC pop_options
#endif
#else
#define FOR_EACH_SET(f)
#endif

namespace {

// Parts of the caller's memory, each begun at a multiple of 64 bytes.
struct Carver {
    char *at;
    template <typename T> T *take(long count) {
        T *const taken = reinterpret_cast<T *>(at);
        at += (count * sizeof(T) + 63) / 64 * 64;
        return taken;
    }
};

template <typename Space> Space carve(char *memory, int rows, int width, int wide, int weights, char **end) {
    Carver c{memory};
    if (wide < width) wide = width;  // inputs of any product
    Space s;
    s.x = c.take<float>(static_cast<long>(rows) * width);
    s.normed = c.take<float>(static_cast<long>(rows) * width);
    s.wide = c.take<float>(static_cast<long>(rows) * wide);
    s.mixed = c.take<float>(static_cast<long>(rows) * wide);
    s.weights = c.take<float>(2l * weights);  // of two rows
    s.shares = c.take<uint8_t>(weights);
    s.quantized = {c.take<uint8_t>(static_cast<long>(rows) * wide), c.take<float>(rows), c.take<int32_t>(rows)};
    *end = c.at;
    return s;
}

#if defined(__x86_64__)
// Whether there is a matrix unit, and the kernel lets this process have its registers.
bool may_use_amx() {
#if __GNUC__ >= 11 && defined(__linux__)
    constexpr long ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: asm/prctl.h
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, ASK, TILES) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// `VERSION` of edge.native: of the structures in `types.h` and of the functions below.
API void edgelm_version_3() {}

// Names of the sets of instructions that this process may use, the fastest first. Asks the kernel for the registers of the
// matrix unit, which a signal stack of `sigaltstack` has to have room for from then on.
API const char *edgelm_sets() {
#if defined(__x86_64__)
#if __GNUC__ >= 11
    const bool vnni_256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avxvnni");
#else
    constexpr bool vnni_256 = false;
#endif
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")))
        return vnni_256 ? "vnni_256" : "";
    if (may_use_amx()) return vnni_256 ? "amx vnni_512 vnni_256" : "amx vnni_512";
    return vnni_256 ? "vnni_512 vnni_256" : "vnni_512";
#else
    return "";
#endif
}

// Bytes that a pass of so many rows needs; or a draft, with 1 row, the hidden width as `wide` and the likely tokens as
// `weights`.
API int64_t edgelm_space(int rows, int width, int wide, int weights) {
    struct Any { float *x, *normed, *wide, *mixed, *weights; uint8_t *shares; struct { uint8_t *a; float *b; int32_t *c; } quantized; };
    char *end;
    carve<Any>(nullptr, rows, width, wide, weights, &end);
    return end - static_cast<char *>(nullptr);
}

// pass: rows of requests; advance: the same, and what is drawn of them; draft: of one state (D,), with noise (depths, V).
#define FUNCTIONS(set)                                                                                              \
    API void edgelm_pass_##set(const Network *net, const Request *requests, int count, int weights, char *memory) { \
        int rows = 0;                                                                                               \
        for (int i = 0; i < count; i++) rows += requests[i].rows;                                                   \
        char *end;                                                                                                  \
        const auto space = carve<set::Space>(memory, rows, net->width, 4 * net->width, weights, &end);              \
        set::pass(*net, requests, count, space);                                                                    \
        for (int i = 0; i + 1 < count; i++)                                                                         \
            if (requests[i].guided) set::guide(requests[i], requests[i + 1], net->head.outputs, space.weights);     \
    }                                                                                                               \
    API void edgelm_advance_##set(const Network *net, const Drafter *drafter, Request *requests, int count,         \
                                  int weights, char *memory) {                                                      \
        edgelm_pass_##set(net, requests, count, weights, memory);                                                   \
        char *end;                                                                                                  \
        const auto space = carve<set::Space>(memory, 1, net->width, drafter ? drafter->hidden : 0,                  \
                                             drafter ? drafter->head.outputs : 0, &end);                            \
        for (int i = 0; i < count; i += 1 + requests[i].guided)                                                     \
            set::draw_and_draft(*net, drafter, requests[i], space);                                                 \
    }                                                                                                               \
    API void edgelm_draft_##set(const Drafter *net, const float *state, int token, const float *noise,              \
                                int vocabulary, float temperature, int32_t *drafts, char *memory) {                 \
        char *end;                                                                                                  \
        const auto space = carve<set::Space>(memory, 1, net->width, net->hidden, net->head.outputs, &end);          \
        memcpy(space.x, state, net->width * sizeof(float));                                                         \
        set::draft(*net, space.x, token, [=](int depth) { return noise + static_cast<long>(depth) * vocabulary; },  \
                   temperature, net->depths, drafts, space);                                                        \
    }                                                                                                               \
    API void edgelm_noise_##set(uint64_t seed, uint32_t position, int count, int vocabulary, float *noise) {        \
        for (int i = 0; i < count; i++, noise += vocabulary) set::make_noise(seed, position + i, vocabulary, noise); \
    }                                                                                                               \
    API void edgelm_draw_##set(const float *scores, const float *noise, int rows, int vocabulary,                   \
                               float temperature, int32_t *tokens, int32_t *ranks) {                                \
        for (int i = 0; i < rows; i++, scores += vocabulary, noise += vocabulary)                                   \
            set::draw(scores, noise, vocabulary, temperature, tokens + i, ranks + i);                               \
    }
FOR_EACH_SET(FUNCTIONS)
