#include "io/pickle/pickle_list.h"

#include <algorithm>

namespace realign_fast::io {
namespace {

constexpr uint32_t kMaxColumns = 1 << 24;

// Adds a row; returns false if its type or length differs from those before.
bool add(PickledList& list, const Values& values, Value row) {
  int64_t at = 0, columns = 0;
  int bytes = 8;
  if (row.type == ValueType::array) {
    const auto& array = values.arrays[row.at];
    bytes = static_cast<int>(array.type.bytes);
    if (array.type.kind != 'f' || array.type.big_endian) return false;
    at = array.at, columns = array.columns;
  } else if (row.type == ValueType::list) {
    const auto& reals = values.lists[row.at];
    if (reals.holds != List::Holds::reals) return false;
    at = reals.real.at, columns = reals.count;
  }
  const bool is_list = row.type == ValueType::list;
  if (at < 0) return false;  // its bytes are not in the file as they are
  if (list.rows.empty()) list.columns = columns, list.value_bytes = bytes, list.lists = is_list;
  list.rows.push_back(static_cast<uint32_t>(at));
  return columns > 0 && columns < kMaxColumns && list.columns == columns &&
         list.value_bytes == bytes && list.lists == is_list;
}

// Whether each row can be replaced without changing another value: no other value uses its bytes,
// and the values that hold it occur once, in this list.
bool are_replaceable(const PickledList& rows, Values& values, const List& list) {
  if (list.shared) return false;
  std::ranges::sort(values.shared_bytes);
  // Lists of reals do not overlap: no real is in two of them or between those of another.
  const auto bytes = rows.lists ? 1 : rows.columns * int64_t{rows.value_bytes};
  int64_t end = 0;
  for (auto index = list.first; index != kNowhere; index = values.dicts[index].next) {
    const auto& dict = values.dicts[index];
    const auto row = dict.rows[rows.name];
    const int64_t at = rows.lists ? values.lists[row.at].real.at : values.arrays[row.at].at;
    const bool shared = rows.lists ? values.lists[row.at].shared : values.arrays[row.at].shared;
    if (dict.shared || shared || at < end) return false;
    if (std::ranges::binary_search(values.shared_bytes, at)) return false;
    end = at + bytes;
  }
  const auto is_built = [](const Array& array) { return array.built; };
  return std::ranges::all_of(values.arrays, is_built);
}

}  // namespace

std::optional<PickledList> list_of(Values& values, Value root) {
  if (root.type != ValueType::list) return {};
  const auto& list = values.lists[root.at];
  if (list.holds != List::Holds::dicts) return {};
  PickledList pickled;
  const auto& first = values.dicts[list.first].rows;
  while (pickled.name < kNames && first[pickled.name].type == ValueType::absent) pickled.name++;
  if (pickled.name == kNames) return {};
  for (auto index = list.first; index != kNowhere; index = values.dicts[index].next) {
    const auto& dict = values.dicts[index];
    if (!add(pickled, values, dict.rows[pickled.name])) return {};
    pickled.has_others |=
        dict.has_others || dict.rows[kNames - 1 - pickled.name].type != ValueType::absent;
  }
  pickled.replaceable = are_replaceable(pickled, values, list);
  return pickled;
}

}  // namespace realign_fast::io
