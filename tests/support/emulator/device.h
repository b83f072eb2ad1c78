// The CUDA that our kernels use, on a processor: a block's threads are fibers, one runs until the next barrier.
//
// Order is the caller's choice: what differs between forwards and backwards lacks a barrier. A thread that leaves while
// others wait, or waits while others leave, is an error here, as it can be on a device.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct Place { int x, y, z; };
static Place threadIdx, blockIdx;

enum { STACK = 64 * 1024 };
static ucontext_t scheduler, fiber[THREADS];         // to begin a fiber on its own stack
static jmp_buf scheduler_at, fiber_at[THREADS];      // to change between them from then on: no system call, 40 × faster
static char stacks[THREADS][STACK];
static bool begun[THREADS], finished[THREADS];

static void __attribute__((noinline)) __syncthreads() {
    if (!_setjmp(fiber_at[threadIdx.x])) _longjmp(scheduler_at, 1);
}
static inline int atomicAdd(int* at, int by) { const int old = *at; *at += by; return old; }
static inline int atomicMax(int* at, int to) { const int old = *at; if (to > old) *at = to; return old; }
static inline int atomicMin(int* at, int to) { const int old = *at; if (to < old) *at = to; return old; }

static void (*body)();
static void enter() {
    body();
    finished[threadIdx.x] = true;
    _longjmp(scheduler_at, 1);
}

static void __attribute__((noinline)) resume(int i) {
    threadIdx.x = i;
    if (_setjmp(scheduler_at)) return;
    if (begun[i]) _longjmp(fiber_at[i], 1);
    begun[i] = true;
    swapcontext(&scheduler, &fiber[i]);
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
        begun[i] = finished[i] = false;
    }
    for (int rounds = 0;; ++rounds) {
        int gone = 0;
        for (int n = 0; n < THREADS; ++n) {
            const int i = backwards ? THREADS - 1 - n : n;
            resume(i);
            gone += finished[i];
        }
        if (gone == THREADS) return rounds;
        if (gone) return -1;
    }
}
