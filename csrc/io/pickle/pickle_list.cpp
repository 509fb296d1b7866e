#include "io/pickle/pickle_list.h"

#include <algorithm>

namespace realign_fast::io {
namespace {

constexpr uint32_t kMostColumns = 1 << 24;

// Takes the place of a row, if it is one of the same kind as those before.
bool add(PickledList& found, const Values& values, Value row) {
  int64_t at = 0, columns = 0;
  int bytes = 8;
  if (row.kind == Kind::array) {
    const auto& array = values.arrays[row.at];
    bytes = static_cast<int>(array.type.bytes);
    if (array.type.kind != 'f' || array.type.big_endian) return false;
    at = array.at, columns = array.columns;
  } else if (row.kind == Kind::list) {
    const auto& list = values.lists[row.at];
    if (list.holds != List::Holds::reals) return false;
    at = list.real.at, columns = list.count;
  }
  const bool lists = row.kind == Kind::list;
  if (found.rows.empty()) found.columns = columns, found.value_bytes = bytes, found.lists = lists;
  found.rows.push_back(static_cast<uint32_t>(at));
  return columns > 0 && columns < kMostColumns && found.columns == columns &&
         found.value_bytes == bytes && found.lists == lists;
}

// Whether the bytes of each row are its own: no other value is made of them, and a value that holds
// it stands in the list and nowhere else.
bool are_replaceable(const PickledList& found, Values& values, const List& list) {
  if (list.shared) return false;
  std::ranges::sort(values.shared_bytes);
  // (Lists of reals do not overlap: no real stands in two of them, or between those of another.)
  const auto bytes = found.lists ? 1 : found.columns * int64_t{found.value_bytes};
  int64_t end = 0;
  for (auto place = list.first; place != kNowhere; place = values.dicts[place].next) {
    const auto& dict = values.dicts[place];
    const auto row = dict.rows[found.name];
    const int64_t at = found.lists ? values.lists[row.at].real.at : values.arrays[row.at].at;
    const bool shared = found.lists ? values.lists[row.at].shared : values.arrays[row.at].shared;
    if (dict.shared || shared || at < end) return false;
    if (std::ranges::binary_search(values.shared_bytes, at)) return false;
    end = at + bytes;
  }
  const auto is_built = [](const Array& array) { return array.built; };
  return std::ranges::all_of(values.arrays, is_built);
}

}  // namespace

PickledList list_of(Values& values, Value root) {
  if (root.kind != Kind::list) throw NotPlain("it is no list");
  const auto& list = values.lists[root.at];
  if (list.holds != List::Holds::dicts) throw NotPlain("it is no list of dicts");
  PickledList found;
  const auto& first = values.dicts[list.first].rows;
  while (found.name < kNames && first[found.name].kind == Kind::absent) found.name++;
  if (found.name == kNames) throw NotPlain("row 0 has no such key");
  for (auto place = list.first; place != kNowhere; place = values.dicts[place].next) {
    const auto& dict = values.dicts[place];
    if (!add(found, values, dict.rows[found.name])) {
      throw NotPlain("its rows are not all arrays, or lists of floats, of one kind and length");
    }
    found.has_others |= dict.has_others || dict.rows[kNames - 1 - found.name].kind != Kind::absent;
  }
  found.replaceable = are_replaceable(found, values, list);
  return found;
}

}  // namespace realign_fast::io
