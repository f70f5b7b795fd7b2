// A Selection (simd/kernels.h) with its memory, and two ways to fill it from a range of the queue.
//
// select() keeps the best sort keys seen so far. bracket() scores a sample of the range and brackets the wanted ranks
// of each lane by a bound and a ceiling, so that few columns pass. After one scan of the range, held() checks by
// counting that the bracket contains the wanted ranks. A result that passes the check is exact.
#pragma once
#include <functional>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/simd/kernels.h"

namespace negmine::cpu {

class OwnedSelection {
 public:
  OwnedSelection(int64_t lanes, int64_t capacity);

  // Empties it for a block of `lanes` queries.
  void begin(int64_t lanes, int64_t keep, bool lowest);

  int64_t* keys(int64_t lane) const { return view.keys + lane * view.capacity; }  // (capacity)

  Selection view;

 private:
  Buffer<int64_t> keys_, counts_;
  Buffer<float> bounds_;
};

// Adds all columns of the range to the selections of blocks (count), like Kernels::select_range.
using Scan = std::function<void(const Block*, const Workspace*, int64_t count, const Selection*)>;
void scan_range(const Block* blocks, const Workspace* workspaces, int64_t count, const Selection* selections);

// Selects the `keep` best or lowest columns of the block's range, and counts the columns if wanted.
void select(const Block& block, const Workspace& w, OwnedSelection& selection, int64_t keep, bool lowest, bool counted);

// The scores between which the wanted ranks of each lane are expected, from a sample of the range.
struct Bracket {
  float bound[kLanes], ceiling[kLanes];  // as in Selection
};

// Finds the columns at ranks [first, last] (kLanes each; 0 = highest score) of the block's range in three steps.
// bracket() scores the sample in the memory of the selection, open() empties it for a scan within the bracket, and
// held() returns whether all ranks that are inside the lane's pool were found. After sorting, key i of a lane has the
// rank num_over + i. A lane with first > last needs no columns.
Bracket bracket(const Block& block, const Workspace& w, OwnedSelection& selection, const int64_t* first,
                const int64_t* last);
void open(OwnedSelection& selection, const Bracket& bracket, const Block& block);
bool held(const Selection& selection, const Block& block, const int64_t* first, const int64_t* last);

// The key at `rank` (0 = largest) of keys (size). The keys up to this rank are kept in their order; the others may be
// overwritten.
int64_t key_at(int64_t* keys, int64_t size, int64_t rank);

// Sorts keys (size), which are in the order of the queue, best first. Returns where the result is: keys or spare
// (size). A radix sort by scores alone is sufficient, because it is stable and so leaves ties in the order of the
// index.
int64_t* sort_best_first(int64_t* keys, int64_t* spare, int64_t size);

// Whether a range with this number of rows is long enough for a sample to save time.
bool worth_sampling(int64_t rows);

// The size of the buffer for one query that keeps `keep` of `columns` columns: large enough that pruning is rare, and
// at most `columns`.
int64_t capacity_for(int64_t keep, int64_t columns);

// The same for a bracket of ranks [first, last] out of `rows` rows.
int64_t capacity_between(int64_t first, int64_t last, int64_t rows);

// The number of blocks of queries that share chunks of the queue, such that each thread has a group and the buffers of
// a group need at most a few megabytes.
int64_t blocks_together(const Matrix& query, const Matrix& negative_keys, int64_t blocks, int64_t block_lanes,
                        int64_t capacity, const Parallel& parallel);

// The number of queries that are processed together so that their buffers need at most a few megabytes: at least
// `least`, at most kLanes, and a multiple of 16 from 16 on.
int64_t lanes_in_budget(int64_t capacity, int64_t least);

}  // namespace negmine::cpu
