// Compiles the file that REALIGN_KERNEL names once for each instruction set, in a namespace of that
// name. One binary then holds all of them, and no file needs compiler flags of its own.
//
// Rules for a kernel file: it includes nothing but other .inl files (include headers before this
// one, outside the pragmas), and it uses no template of the standard library. Otherwise a function
// that was compiled for a newer instruction set could be linked into code that runs on an older
// one.
#define REALIGN_ISA baseline
#include "cpu/simd.inl"
#include REALIGN_KERNEL
#undef REALIGN_ISA

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics read undefined registers on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define REALIGN_ISA avx2
#define REALIGN_AVX2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "cpu/simd.inl"
#include REALIGN_KERNEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef REALIGN_AVX2
#undef REALIGN_ISA

#define REALIGN_ISA avx512
#define REALIGN_AVX512
#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "cpu/simd.inl"
#include REALIGN_KERNEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef REALIGN_AVX512
#undef REALIGN_ISA
#endif
