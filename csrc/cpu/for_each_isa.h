// Compiles the file named by REALIGN_KERNEL once for each instruction set, in a namespace of that
// name, so that one binary carries all of them and needs no per-file compiler flags.
//
// Rules for a kernel file: include nothing but another .inl (what else it needs comes before this
// header, outside the pragmas) and use no template of the standard library, or a function that was
// compiled for a newer instruction set could be linked into code that runs on an older one.
#define REALIGN_ISA baseline
#include "simd.inl"
#include REALIGN_KERNEL
#undef REALIGN_ISA

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics read "undefined" registers on purpose (GCC bug 105593).
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
#include "simd.inl"
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
#include "simd.inl"
#include REALIGN_KERNEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef REALIGN_AVX512
#undef REALIGN_ISA
#endif
