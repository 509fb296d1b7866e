// The inner loop of every matrix product, for one instruction set: a tile of sums in registers.
namespace realign_fast::REALIGN_ISA {
namespace {

// A tile is kTileRows x kTileRegisters registers of sums, as many as leave room for the operands.
#if defined(REALIGN_AVX512)
constexpr int kTileRows = 8, kTileRegisters = 2;
#elif defined(REALIGN_AVX2)
constexpr int kTileRows = 4, kTileRegisters = 3;
#else
constexpr int kTileRows = 4, kTileRegisters = 2;
#endif
template <class M>
constexpr int64_t kPanel = kTileRegisters * Vec<M>::width;  // columns of a panel

template <class M>
void panel_width(int64_t& width) {
  width = kPanel<M>;
}

// sums [kTileRows, kPanel] = a^T b, with a [depth, kTileRows] whose rows are a_stride apart and
// b [depth, kPanel]; only the registers of the panel from kFirst on.
template <int kFirst, class M>
void multiply_tile(const M* a, int64_t a_stride, const M* b, int64_t depth, M* sums) {
  constexpr int64_t W = Vec<M>::width;
  Vec<M> tile[kTileRows][kTileRegisters], right[kTileRegisters];
  for (auto& row : tile)
    for (auto& sum : row) sum = broadcast(M(0));
  for (int64_t k = 0; k < depth; ++k, a += a_stride, b += kPanel<M>) {
    for (int v = kFirst; v < kTileRegisters; ++v) load(b + v * W, right[v]);
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<M> left = broadcast(a[i]);
      for (int v = kFirst; v < kTileRegisters; ++v) tile[i][v] = fma(left, right[v], tile[i][v]);
    }
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int v = kFirst; v < kTileRegisters; ++v) store(sums + i * kPanel<M> + v * W, tile[i][v]);
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
