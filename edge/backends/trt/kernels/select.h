// Selection of the K best logits of a row by one block of THREADS, for every kernel that draws.
#pragma once
#include "arithmetic.h"

#ifndef THREADS
#define THREADS 256
#endif

// The `keep` greatest keys of a row of logits (V,), best first.
//
// The K-th greatest of the threads' own maxima is a lower bound of the K-th key of all: few keys are left for the four
// rounds of radix selection, which find it exactly. keep ≤ THREADS, keep ≤ V.
__device__ void select_best(const u16* __restrict__ logits, int vocab, int keep, u32 own_best, u32* best) {
    __shared__ u32 pool[THREADS];
    __shared__ int histogram[256];
    __shared__ u32 least;
    __shared__ int wanted, taken;
    const int tid = threadIdx.x;
    pool[tid] = own_best;
    if (tid == 0) least = 0, wanted = keep, taken = 0;
    __syncthreads();
    int above = 0;
    for (int i = 0; i < THREADS; ++i) above += pool[i] > own_best;
    if (above == keep - 1) least = own_best;  // unique, but for threads without a logit: then 0 stays, below every key
    __syncthreads();
    const u32 floor = least;
    u32 prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = tid; i < 256; i += THREADS) histogram[i] = 0;
        __syncthreads();
        const int needed = wanted;
        for (int id = tid; id < vocab; id += THREADS) {
            const u32 key = sort_key(logits[id], id);
            if (key >= floor && (shift == 24 || key >> (shift + 8) == prefix)) atomicAdd(&histogram[key >> shift & 255], 1);
        }
        __syncthreads();
        for (int digit = tid; digit < 256; digit += THREADS) {
            int greater = 0;
            for (int i = digit + 1; i < 256; ++i) greater += histogram[i];
            if (greater < needed && needed <= greater + histogram[digit]) least = digit, wanted = needed - greater;
        }
        __syncthreads();
        prefix = prefix << 8 | least;
    }
    for (int id = tid; id < vocab; id += THREADS) {
        const u32 key = sort_key(logits[id], id);
        if (key >= prefix) pool[atomicAdd(&taken, 1)] = key;  // `keep` keys in any order
    }
    __syncthreads();
    if (tid < keep) {
        int rank = 0;
        for (int i = 0; i < keep; ++i) rank += pool[i] > pool[tid];
        best[rank] = pool[tid];
    }
    __syncthreads();
}
