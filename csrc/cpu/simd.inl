// Vector registers: arithmetic on them, and their loads from and stores to rows of any element
// type. for_each_isa.h includes this file once for each instruction set.
//
// Vec<float> and Vec<double> are one register of the arithmetic type. `load` widens any element
// type of rows into it. `store` rounds it (to nearest, ties to even) to any element type. `stream`
// does the same past the caches; its address must be aligned to the bytes that it writes.
namespace realign_fast::REALIGN_ISA {
namespace {

template <class M>
struct Vec;

#if defined(REALIGN_AVX512)
template <>
struct Vec<float> {
  static constexpr int width = 16;
  __m512 v;
};
template <>
struct Vec<double> {
  static constexpr int width = 8;
  __m512d v;
};

inline Vec<float> broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec<double> broadcast(double x) { return {_mm512_set1_pd(x)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
inline double reduce(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
inline double reduce(Vec<double> a) { return _mm512_reduce_add_pd(a.v); }

inline __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
inline __m256 widen(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
inline __m256i load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m128i load_128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
inline void load(const Half* p, Vec<float>& a) { a.v = _mm512_cvtph_ps(load_256(p)); }
inline void load(const BFloat16* p, Vec<float>& a) { a.v = widen(load_256(p)); }
inline void load(const float* p, Vec<float>& a) { a.v = _mm512_loadu_ps(p); }
inline void load(const Half* p, Vec<double>& a) {
  a.v = _mm512_cvtps_pd(_mm256_cvtph_ps(load_128(p)));
}
inline void load(const BFloat16* p, Vec<double>& a) { a.v = _mm512_cvtps_pd(widen(load_128(p))); }
inline void load(const float* p, Vec<double>& a) { a.v = _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline void load(const double* p, Vec<double>& a) { a.v = _mm512_loadu_pd(p); }

inline __m256i to_half(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i to_half(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i to_bf16(__m256 v) {  // for finite values only: NaN rows never come here
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_add_epi32(bits, half), 16));
}
inline void store(Half* p, Vec<float> a) { _mm256_storeu_si256((__m256i*)p, to_half(a.v)); }
inline void store(BFloat16* p, Vec<float> a) {
  const __m128i low = to_bf16(_mm512_castps512_ps256(a.v));
  const __m128i high = to_bf16(_mm512_extractf32x8_ps(a.v, 1));
  _mm256_storeu_si256((__m256i*)p, _mm256_set_m128i(high, low));
}
inline void store(float* p, Vec<float> a) { _mm512_storeu_ps(p, a.v); }
inline void store(Half* p, Vec<double> a) {
  _mm_storeu_si128((__m128i*)p, to_half(_mm512_cvtpd_ps(a.v)));
}
inline void store(BFloat16* p, Vec<double> a) {
  _mm_storeu_si128((__m128i*)p, to_bf16(_mm512_cvtpd_ps(a.v)));
}
inline void store(float* p, Vec<double> a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }
inline void store(double* p, Vec<double> a) { _mm512_storeu_pd(p, a.v); }

inline void stream(Half* p, Vec<float> a) { _mm256_stream_si256((__m256i*)p, to_half(a.v)); }
inline void stream(float* p, Vec<float> a) { _mm512_stream_ps(p, a.v); }
inline void stream(Half* p, Vec<double> a) {
  _mm_stream_si128((__m128i*)p, to_half(_mm512_cvtpd_ps(a.v)));
}
inline void stream(BFloat16* p, Vec<double> a) {
  _mm_stream_si128((__m128i*)p, to_bf16(_mm512_cvtpd_ps(a.v)));
}
inline void stream(float* p, Vec<double> a) { _mm256_stream_ps(p, _mm512_cvtpd_ps(a.v)); }
inline void stream(double* p, Vec<double> a) { _mm512_stream_pd(p, a.v); }
inline void stream_fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

// For bfloat16 results of float arithmetic (see align_rows.inl): whether a lane of y lies within
// four units of its last place and `margin` of a tie, the middle between two bfloat16 numbers, or
// is not finite; and the rounding of two registers without such lanes, for which ties need no rule.
inline bool near_tie(Vec<float> y, Vec<float> margin) {
  const __m512i bits = _mm512_castps_si512(y.v);
  const __m512i lower = _mm512_max_epu16(bits, _mm512_set1_epi32(0x7ffc));
  const __m512i tie = _mm512_min_epu16(lower, _mm512_set1_epi32(-0x10000 + 0x8004));
  const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(y.v, _mm512_castsi512_ps(tie)));
  return _mm512_cmp_ps_mask(distance, margin.v, _CMP_NGT_UQ) != 0;
}
inline __m512i round_pair(Vec<float> low, Vec<float> high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low.v), half);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high.v), half);
  const __m512i odd_words =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, odd_words, b);
}
inline void store_pair(BFloat16* p, Vec<float> low, Vec<float> high) {
  _mm512_storeu_si512(p, round_pair(low, high));
}
inline void stream_pair(BFloat16* p, Vec<float> low, Vec<float> high) {
  _mm512_stream_si512((__m512i*)p, round_pair(low, high));
}

#elif defined(REALIGN_AVX2)
template <>
struct Vec<float> {
  static constexpr int width = 8;
  __m256 v;
};
template <>
struct Vec<double> {
  static constexpr int width = 4;
  __m256d v;
};

inline Vec<float> broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec<double> broadcast(double x) { return {_mm256_set1_pd(x)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
inline double reduce(Vec<float> a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline double reduce(Vec<double> a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

inline __m128i load_128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
inline __m128i load_64(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }
inline __m256 widen(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
inline __m128 widen_low(__m128i bf16) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bf16), 16));
}
inline void load(const Half* p, Vec<float>& a) { a.v = _mm256_cvtph_ps(load_128(p)); }
inline void load(const BFloat16* p, Vec<float>& a) { a.v = widen(load_128(p)); }
inline void load(const float* p, Vec<float>& a) { a.v = _mm256_loadu_ps(p); }
inline void load(const Half* p, Vec<double>& a) { a.v = _mm256_cvtps_pd(_mm_cvtph_ps(load_64(p))); }
inline void load(const BFloat16* p, Vec<double>& a) {
  a.v = _mm256_cvtps_pd(widen_low(load_64(p)));
}
inline void load(const float* p, Vec<double>& a) { a.v = _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline void load(const double* p, Vec<double>& a) { a.v = _mm256_loadu_pd(p); }

inline __m128i to_half(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i to_half(__m128 v) { return _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i round_bf16(__m256 v) {  // finite values only; the result in the low 16 bits of each
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
}
inline __m128i to_bf16(__m256 v) {
  const __m256i r = round_bf16(v);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline __m128i to_bf16(__m128 v) { return to_bf16(_mm256_castps128_ps256(v)); }
inline void store(Half* p, Vec<float> a) { _mm_storeu_si128((__m128i*)p, to_half(a.v)); }
inline void store(BFloat16* p, Vec<float> a) { _mm_storeu_si128((__m128i*)p, to_bf16(a.v)); }
inline void store(float* p, Vec<float> a) { _mm256_storeu_ps(p, a.v); }
inline void store(Half* p, Vec<double> a) {
  _mm_storel_epi64((__m128i*)p, to_half(_mm256_cvtpd_ps(a.v)));
}
inline void store(BFloat16* p, Vec<double> a) {
  _mm_storel_epi64((__m128i*)p, to_bf16(_mm256_cvtpd_ps(a.v)));
}
inline void store(float* p, Vec<double> a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v)); }
inline void store(double* p, Vec<double> a) { _mm256_storeu_pd(p, a.v); }

inline long long low_64(__m128i v) { return _mm_cvtsi128_si64(v); }
inline void stream(Half* p, Vec<float> a) { _mm_stream_si128((__m128i*)p, to_half(a.v)); }
inline void stream(float* p, Vec<float> a) { _mm256_stream_ps(p, a.v); }
inline void stream(Half* p, Vec<double> a) {
  _mm_stream_si64((long long*)p, low_64(to_half(_mm256_cvtpd_ps(a.v))));
}
inline void stream(BFloat16* p, Vec<double> a) {
  _mm_stream_si64((long long*)p, low_64(to_bf16(_mm256_cvtpd_ps(a.v))));
}
inline void stream(float* p, Vec<double> a) { _mm_stream_ps(p, _mm256_cvtpd_ps(a.v)); }
inline void stream(double* p, Vec<double> a) { _mm256_stream_pd(p, a.v); }
inline void stream_fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

inline bool near_tie(Vec<float> y, Vec<float> margin) {
  const __m256i bits = _mm256_castps_si256(y.v);
  const __m256i lower = _mm256_max_epu16(bits, _mm256_set1_epi32(0x7ffc));
  const __m256i tie = _mm256_min_epu16(lower, _mm256_set1_epi32(-0x10000 + 0x8004));
  const __m256 difference = _mm256_sub_ps(y.v, _mm256_castsi256_ps(tie));
  const __m256 distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), difference);
  return _mm256_movemask_ps(_mm256_cmp_ps(distance, margin.v, _CMP_NGT_UQ)) != 0;
}
inline __m256i round_pair(Vec<float> low, Vec<float> high) {
  const __m256i half = _mm256_set1_epi32(0x8000);
  const __m256i a = _mm256_add_epi32(_mm256_castps_si256(low.v), half);
  const __m256i b = _mm256_add_epi32(_mm256_castps_si256(high.v), half);
  const __m256i mixed = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  return _mm256_permute4x64_epi64(mixed, 0xd8);
}
inline void store_pair(BFloat16* p, Vec<float> low, Vec<float> high) {
  _mm256_storeu_si256((__m256i*)p, round_pair(low, high));
}
inline void stream_pair(BFloat16* p, Vec<float> low, Vec<float> high) {
  _mm256_stream_si256((__m256i*)p, round_pair(low, high));
}

#else
template <class M>
struct Vec {
  static constexpr int width = 16 / sizeof(M);
  M v[width];
};

template <class M>
inline Vec<M> broadcast(M x) {
  Vec<M> a;
  for (M& lane : a.v) lane = x;
  return a;
}
template <class M>
inline Vec<M> fma(Vec<M> a, Vec<M> b, Vec<M> c) {
  for (int i = 0; i < Vec<M>::width; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
template <class M>
inline double reduce(Vec<M> a) {
  M sum = 0;
  for (M lane : a.v) sum += lane;
  return sum;
}
template <class T, class M>
inline void load(const T* p, Vec<M>& a) {
  for (int i = 0; i < Vec<M>::width; ++i) a.v[i] = static_cast<M>(p[i]);
}
template <class O, class M>
inline void store(O* p, Vec<M> a) {
  for (int i = 0; i < Vec<M>::width; ++i) p[i] = static_cast<O>(a.v[i]);
}
template <class O, class M>
inline void stream(O* p, Vec<M> a) {
  store(p, a);
}
inline void stream_fence() {}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline bool near_tie(Vec<float> y, Vec<float> margin) {
  int near = 0;
  for (int i = 0; i < Vec<float>::width; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, y.v[i]), low = bits & 0xffffu;
    const uint32_t tie = low < 0x7ffcu ? 0x7ffcu : low > 0x8004u ? 0x8004u : low;
    const float distance = y.v[i] - __builtin_bit_cast(float, (bits & 0xffff0000u) | tie);
    near |= !(__builtin_fabsf(distance) > margin.v[i]);
  }
  return near;
}
inline void store_pair(BFloat16* p, Vec<float> low, Vec<float> high) {
  constexpr int W = Vec<float>::width;
  for (int i = 0; i < W; ++i) {
    p[i].x = (__builtin_bit_cast(uint32_t, low.v[i]) + 0x8000u) >> 16;
    p[W + i].x = (__builtin_bit_cast(uint32_t, high.v[i]) + 0x8000u) >> 16;
  }
}
inline void stream_pair(BFloat16* p, Vec<float> low, Vec<float> high) { store_pair(p, low, high); }
#endif

// Loads the last columns of a row, fewer than a register holds; the rest of the register is zero.
template <class T, class M>
inline void load_partial(const T* p, int64_t count, Vec<M>& a) {
  T lanes[Vec<M>::width] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  load(lanes, a);
}
template <class O, class M>
inline void store_partial(O* p, int64_t count, Vec<M> a) {
  O lanes[Vec<M>::width];
  store(lanes, a);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Prefetches the rows that come next, in the order of their addresses and evenly over a kernel's
// two sweeps over the columns of R rows, so that arithmetic hides the latency: a burst of
// prefetches would fill the queue of outstanding lines and be dropped. It prefetches two steps
// ahead and into L2, because the rows do not always fit into L1.
template <int R, class M, class T>
inline void prefetch_rows(const T* rows, int64_t stride, int64_t j, int sweep) {
  if constexpr (R > 1) {
    constexpr int64_t bytes = R / 2 * Vec<M>::width * sizeof(T);
    const T* next = rows + (3 * R + sweep * (R / 2)) * stride + j * (R / 2);
    for (int64_t line = 0; line < bytes; line += 64)
      prefetch(reinterpret_cast<const char*>(next) + line);
  }
}

// Computes the dot products of R rows with themselves (K = 1), with b (K = 2) and with h (K = 3).
// Each is summed in an order that depends on the row alone. A lane sums at most 64 products in M;
// those sums are added in float64.
template <int R, int K, class T, class M>
void dot_rows(const T* rows, int64_t stride, int64_t columns, const M* b, const M* h,
              double (&dots)[3][R]) {
  constexpr int64_t W = Vec<M>::width;
  for (auto& dot : dots)
    for (double& row : dot) row = 0;
  for (int64_t first = 0; first < columns; first += 64 * W) {
    const int64_t end = first + 64 * W < columns ? first + 64 * W : columns;
    Vec<M> sums[R][K], vb, vh;
    for (auto& row : sums)
      for (auto& sum : row) sum = broadcast(M(0));
    const auto add_products = [&](int64_t j, auto whole) __attribute__((always_inline)) {
      if constexpr (K >= 2) load(b + j, vb);
      if constexpr (K >= 3) load(h + j, vh);
      for (int r = 0; r < R; ++r) {
        Vec<M> x;
        if constexpr (whole) {
          load(rows + r * stride + j, x);
        } else {
          load_partial(rows + r * stride + j, end - j, x);
        }
        sums[r][0] = fma(x, x, sums[r][0]);
        if constexpr (K >= 2) sums[r][1] = fma(x, vb, sums[r][1]);
        if constexpr (K >= 3) sums[r][2] = fma(x, vh, sums[r][2]);
      }
    };
    int64_t j = first;
    for (; j + W <= end; j += W) {
      prefetch_rows<R, M>(rows, stride, j, 0);
      add_products(j, std::true_type());
    }
    if (j < end) add_products(j, std::false_type());
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) dots[k][r] += reduce(sums[r][k]);
  }
}

// Whether M can compute with the squared norms of all rows (see row_map_math.h).
template <class M, int R>
inline bool all_in_range(const double (&squared_norms)[R]) {
  int outside = 0;
  for (double squared_norm : squared_norms) outside |= !in_range<M>(squared_norm);
  return !outside;
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
