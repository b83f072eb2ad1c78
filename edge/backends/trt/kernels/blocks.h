// The arithmetic of one pass of blocks, compiled for the device and by the system's compiler, as arithmetic.h is: what
// edge/decoding/blocks.py and philox.py compute, and the chain drafter of host/model/drafter.py in FP16 weights.
#pragma once
#include "arithmetic.h"

enum { BLOCK_DOMAIN = 2 };              // edge/decoding/philox.py
enum { MAX_WINDOW = 8 };                // shared/manifest.py
enum Layer { HIDDEN_LAYER = 0, STATE_LAYER = 1, SCORES_LAYER = 2 };  // what becomes of a linear layer's result

// A request in its slot. The host writes it when the request joins, and where a gap begins; the device carries it on.
struct Writing {
    u64 seed;
    float temperature;
    float top_p;
    float guidance;             // 0 for the law of rows that read the memory
    int top_k;
    int window;                 // the most drafts
    int last;                   // last position of the open gap
    int position;               // of the last committed token, whose row is not kept yet
    int token;                  // that token
    int cached;                 // rows kept in its slot
    int drafts;                 // for the positions after `position`
    int draft[MAX_WINDOW];
    int start, kept;            // rows that the last pass appended: the first of them, and how many
    int agreed;                 // drafts that it kept
    int fresh;                  // tokens that it committed
    int text[MAX_WINDOW + 1];   // those
    int broken;                 // set when a score was not a number: nothing is kept then
};

// Rows that a request reads in one pass, in mapped memory before the tokens and the positions.
struct Reading {
    int rows;
    int evidence;               // they all see each other; else they are causal
    int draws;                  // a prompt, whose last row draws
    int slot;                   // where they are kept
};

// The request of a place: its own, or, as −2 − request, that whose rows it repeats without the memory; −1 for none.
SHARED_FN int request_of(int place) { return place < -1 ? -2 - place : place; }

// The noise of (seed, position, token): token i is word i mod 4 of the counter i div 4.
SHARED_FN float block_gumbel(u64 seed, u32 position, u32 token) {
    const Words counter = {{token >> 2, position, 0, BLOCK_DOMAIN}};
    const u32 word = philox(counter, seed).w[token & 3];
    return -logf(-logf(((float)(word >> 9) + 0.5f) * (1.0f / 8388608.0f)));
}

// How many drafts are the tokens that the law draws, up to the first that is not.
SHARED_FN int longest_run(const int* draft, const int* drawn, int drafts) {
    int run = 0;
    while (run < drafts && draft[run] == drawn[run]) ++run;
    return run;
}

// Keep what a pass drew: rows of committed tokens and, behind them, of `agreed` drafts. pending: of the former.
SHARED_FN void commit_run(Writing* w, const int* drawn, int pending) {
    w->agreed = longest_run(w->draft, drawn, w->drafts);
    w->start = w->cached, w->kept = pending + w->agreed, w->cached += w->kept;
    w->fresh = w->agreed + 1;
    for (int i = 0; i < w->fresh; ++i) w->text[i] = drawn[i];
    w->position += w->fresh, w->token = drawn[w->agreed];
    const int room = w->last - w->position - 1;  // the law draws a gap's last position by itself
    w->drafts = w->token == EOS || room < 0 ? 0 : room < w->window ? room : w->window;
}

// --- the drafter ------------------------------------------------------------------------------------------------------

// The nearest FP16, ties to even; what is too large becomes an infinity.
SHARED_FN u16 half_of(float value) {
    union { float value; u32 bits; } as = {value};
    const u32 sign = as.bits >> 16 & 0x8000;
    u32 size = as.bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return (u16)(sign | 0x7E00);
    if (size >= 0x477FF000) return (u16)(sign | 0x7C00);
    if (size < 0x38800000) {  // below FP16's normal numbers: 1/2 in float32 has their last digit where FP16 has it
        union { u32 bits; float value; } shifted = {size};
        as.value = shifted.value + 0.5f;
        return (u16)(sign | (as.bits - 0x3F000000));
    }
    size += 0xC8000FFF + (size >> 13 & 1);
    return (u16)(sign | size >> 13);
}

SHARED_FN float float_of(u16 half) {
    union { u32 bits; float value; } as = {(half & 0x7FFFu) << 13};
    const float magnitude = as.value * 5.192296858534828e33f;  // 2^112
    return half & 0x8000 ? -magnitude : magnitude;
}

SHARED_FN float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
SHARED_FN float normalised(float x, float mean, float variance) { return (x - mean) * (1.0f / sqrtf(variance + 1e-5f)); }
