// A Selection (simd/kernels.h) with its memory, and two ways to fill it from a range of the queue.
//
// select() keeps the best sort keys seen so far. bracket() first scores a sample of the range, brackets each lane's
// wanted ranks with a bound and a ceiling so that few columns pass, scans once, and checks by counting that the bracket
// held: what it returns is exact or refused, never a guess.
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

// Offers every column of the range of blocks (count) to their selections, as Kernels::select_range does.
using Scan = std::function<void(const Block*, const Workspace*, int64_t count, const Selection*)>;
void scan_range(const Block* blocks, const Workspace* workspaces, int64_t count, const Selection* selections);

// The `keep` best columns of the block's range, or the lowest; columns are counted where asked for.
void select(const Block& block, const Workspace& w, OwnedSelection& selection, int64_t keep, bool lowest, bool counted);

// What a lane's wanted ranks lie between, by a sample of the range.
struct Bracket {
  float bound[kLanes], ceiling[kLanes];  // as in Selection
};

// Places between two ranks in three steps: bracket() scores the sample in the selection's memory, open() empties it for
// a scan within the bracket, held() tells whether what was found is what was wanted: 0-based descending ranks [first,
// last] (kLanes each) of the block's range, as far as the lane's pool goes; key i of a lane, once sorted, has the rank
// num_over + i. A lane with first > last wants nothing.
Bracket bracket(const Block& block, const Workspace& w, OwnedSelection& selection, const int64_t* first,
                const int64_t* last);
void open(OwnedSelection& selection, const Bracket& bracket, const Block& block);
bool held(const Selection& selection, const Block& block, const int64_t* first, const int64_t* last);

// The key at 0-based descending `rank` of keys (size); those up to it stay, in their order, the rest may go.
int64_t key_at(int64_t* keys, int64_t size, int64_t rank);

// Sorts keys (size), which come in the order of the queue, best first, and returns where: keys or spare (size). A radix
// sort of the scores alone is stable, so ties stay in the order of the index.
int64_t* sort_best_first(int64_t* keys, int64_t* spare, int64_t size);

// Whether a range of so many rows is worth sampling.
bool worth_sampling(int64_t rows);

// Keys of buffer space for one query that keeps `keep` of `columns` columns: pruning is rare, and never more than the
// columns.
int64_t capacity_for(int64_t keep, int64_t columns);

// The same for a bracket of ranks [first, last] out of `rows` rows.
int64_t capacity_between(int64_t first, int64_t last, int64_t rows);

// Blocks of queries that share chunks of the queue, where that leaves a group for each thread and their buffers stay
// within a few megabytes.
int64_t blocks_together(const Matrix& query, const Matrix& negative_keys, int64_t blocks, int64_t block_lanes,
                        int64_t capacity, const Parallel& parallel);

// Queries in flight so that their buffers stay within a few megabytes: at least `least`, at most kLanes, in sixteens
// from 16 up.
int64_t lanes_in_budget(int64_t capacity, int64_t least);

}  // namespace negmine::cpu
