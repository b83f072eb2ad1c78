// The CUDA that our kernels use, on a processor: a block's threads are fibers, one runs until the next barrier.
//
// Order is the caller's choice: what differs between forwards and backwards lacks a barrier. A thread that leaves while
// others wait, or waits while others leave, is an error here, as it can be on a device.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct Place { int x, y; };
static Place threadIdx, blockIdx;

enum { STACK = 64 * 1024 };
static ucontext_t scheduler, fiber[THREADS];
static char stacks[THREADS][STACK];
static bool finished[THREADS];

static inline void __syncthreads() { swapcontext(&fiber[threadIdx.x], &scheduler); }
static inline int atomicAdd(int* at, int by) { const int old = *at; *at += by; return old; }
static inline int atomicMax(int* at, int to) { const int old = *at; if (to > old) *at = to; return old; }
static inline int atomicMin(int* at, int to) { const int old = *at; if (to < old) *at = to; return old; }

static void (*body)();
static void enter() {
    body();
    finished[threadIdx.x] = true;
    swapcontext(&fiber[threadIdx.x], &scheduler);
}

// Run `kernel` for every thread of one block. → barriers passed, −1 when the threads did not meet at one
static int run_block(void (*kernel)(), bool backwards) {
    body = kernel;
    for (int i = 0; i < THREADS; ++i) {
        getcontext(&fiber[i]);
        fiber[i].uc_stack.ss_sp = stacks[i];
        fiber[i].uc_stack.ss_size = STACK;
        fiber[i].uc_link = nullptr;
        makecontext(&fiber[i], enter, 0);
        finished[i] = false;
    }
    for (int rounds = 0;; ++rounds) {
        int gone = 0;
        for (int n = 0; n < THREADS; ++n) {
            const int i = backwards ? THREADS - 1 - n : n;
            threadIdx.x = i;
            swapcontext(&scheduler, &fiber[i]);
            gone += finished[i];
        }
        if (gone == THREADS) return rounds;
        if (gone) return -1;
    }
}
