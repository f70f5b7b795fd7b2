// The log-sum-exp of blocks of queries over a range of the queue, and the mean of the rows weighted by the softmax (the
// gradient with respect to the query). The steps for each chunk and block: scores, pool, exponentials, second product.
//
// Exponents are in units of log 2, in which exp(x) = 2^t. Each query has its own shift, which is subtracted from its
// exponents. The shift changes only if the sum over a tile exceeds kMost, and then becomes the largest exponent. So no
// pass for the maximum is needed, and sums are rarely rescaled. The terms of a query and their order depend only on the
// range, and not on the other queries.
//
// Sums over a tile start from zero in registers and are then added to the running sums, so that no chain of additions
// is longer than a chunk.
#include "kernels/cpu/simd/tiles.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr float kMost = 4096.0f;                  // all chunks of a queue together are a sum without harm
constexpr float kPerUnit = 1.44269504088896341f;  // 1 / log 2
#if defined(NEGMINE_TILES)
constexpr int64_t kTileStride = kTilePanel;  // words of weights from one pair of rows to the next
#else
constexpr int64_t kTileStride = kLanes;
#endif

// The kinds of tiles: no pair is hidden, or some pairs may be hidden; in the latter case, columns may have a bias.
enum Pairs { kAllCount, kSomeHidden, kBiased };

// The contribution of a tile to one vector of queries.
struct Terms {
  V total, score_sum;
  VI num_kept;
};

// How weights are stored: not at all; as rows (count, kLanes); or as pairs of rows in a panel (count / 2 rounded up to
// 16, 32), for blocks that tiles multiply.
enum Weights { kNone, kRowsOf, kPacked };

// The weights exp(scale s + bias - shift) of one vector of queries, 0 outside the pool, and their sum; with kScoreSum
// also the sum of weights times scores.
template <Pairs kPairs, bool kScoreSum, Weights kWeights>
struct Column {
  const float* scores;                 // (rows, kLanes)
  [[maybe_unused]] const float* bias;  // (rows), if kBiased
  float scale;                         // in units of log 2, as the shift
  V shift;
  float* weights;
  Terms sum{all(0.0f), all(0.0f), all(0)};

  inline __attribute__((always_inline)) V exponent(int64_t j, V offset) const {
    if constexpr (kPairs == kBiased) offset += all(bias[j] * kPerUnit);
    return fma(load(scores + j * kLanes), all(scale), offset);
  }

  inline __attribute__((always_inline)) V one(int64_t j) {
    const V score = load(scores + j * kLanes);
    V p = exp2(exponent(j, -shift)), pulled = score;
    if constexpr (kPairs != kAllCount) {
      const VI outside = is_excluded(score);
      p = outside ? all(0.0f) : p;
      pulled = outside ? all(0.0f) : score;
      sum.num_kept += outside + 1;
    }
    sum.total += p;
    if constexpr (kScoreSum) sum.score_sum = fma(p, pulled, sum.score_sum);
    if constexpr (kWeights == kRowsOf) store(weights + j * kLanes, p);
    return p;
  }

  // Rows j and j + 1; j is even.
  inline __attribute__((always_inline)) void two(int64_t j) {
    [[maybe_unused]] const V first = one(j), second = one(j + 1);
#if defined(NEGMINE_TILES)
    if constexpr (kWeights == kPacked) store(weights + j / 2 * kTilePanel, pack_weights(first, second));
#endif
  }

  inline __attribute__((always_inline)) void rows(int64_t count) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) two(j), two(j + 2);
    if (j + 2 <= count) two(j), j += 2;
    [[maybe_unused]] V last = all(0.0f);
    if (j < count) last = one(j);
#if defined(NEGMINE_TILES)
    if constexpr (kWeights == kPacked) {
      if (j < count) store(weights + j / 2 * kTilePanel, pack_weights(last, all(0.0f))), j += 2;
      for (; j % 32 != 0; j += 2) store(weights + j / 2 * kTilePanel, all(0.0f));
    }
#endif
    end(count);
  }

  // After the last of `count` rows.
  inline __attribute__((always_inline)) void end(int64_t count) {
    if constexpr (kPairs == kAllCount) sum.num_kept += static_cast<int32_t>(count);
  }
};

// Two columns side by side.
template <class Column>
struct Pair {
  Column left, right;

  inline __attribute__((always_inline)) void two(int64_t j) { left.two(j), right.two(j); }
  inline __attribute__((always_inline)) void end(int64_t count) { left.end(count), right.end(count); }
};

// What weigh() needs to know of a tile of scores (count, kLanes). bias (count), if kBiased. score_sums (kLanes), if
// kScoreSum: the running sum of exp(..) s. correction (kLanes): the factor for the sums before this tile. Packed
// weights of a panel are `words` words.
struct Tile {
  const float* scores;
  const float* bias;
  int64_t count;
  float scale;
  float* weights;
  int64_t words;
  float* correction;
  float* score_sums;
  LogsumexpState state;
  int vectors;
};

// Adds a tile to the state and writes its weights. moved: the correction is not 1 everywhere.
template <Pairs kPairs, bool kScoreSum, Weights kWeights>
struct Weighing {
  const Tile& tile;
  bool moved = false;

  int vectors() const { return tile.vectors; }

  inline __attribute__((always_inline)) auto at_shift(int64_t lane, V shift) const {
#if defined(NEGMINE_TILES)
    float* weights = tile.weights + (kWeights == kPacked ? panel_at(lane, tile.words) : lane);
#else
    float* weights = tile.weights + lane;
#endif
    return Column<kPairs, kScoreSum, kWeights>{tile.scores + lane, tile.bias, tile.scale * kPerUnit, shift, weights};
  }

  inline __attribute__((always_inline)) auto column(int64_t lane) const {
    return at_shift(lane, load(tile.state.shift + lane));
  }

  inline __attribute__((always_inline)) auto pair(int64_t lane) const {
    return Pair<Column<kPairs, kScoreSum, kWeights>>{column(lane), column(lane + kWidth)};
  }

  void finish(int64_t lane, const Pair<Column<kPairs, kScoreSum, kWeights>>& pair) {
    finish(lane, pair.left);
    finish(lane + kWidth, pair.right);
  }

  void finish(int64_t lane, const Column<kPairs, kScoreSum, kWeights>& column) {
    Terms terms = column.sum;
    const V shift = load(tile.state.shift + lane), before = load(tile.state.sum + lane);
    V factor = all(1.0f);
    const VI passed = ~(terms.total <= kMost) & (before < __builtin_inff());
    if (any(passed)) {
      V most = all(-__builtin_inff());
      // excluded() is a NaN, which max passes over
      for (int64_t j = 0; j < tile.count; ++j) most = max(column.exponent(j, all(0.0f)), most);
      const VI moves = passed & (most < __builtin_inff());
      const V moved_shift = moves ? most : shift;
      factor = moves ? exp2(shift - most) : factor;
      auto again = at_shift(lane, moved_shift);
      again.rows(tile.count);
      terms = again.sum;
      store(tile.state.shift + lane, moved_shift);
      moved = true;
    }
    store(tile.correction + lane, factor);
    store(tile.state.sum + lane, fma(before, factor, terms.total));
    if constexpr (kScoreSum) {
      store(tile.score_sums + lane, fma(load(tile.score_sums + lane), factor, terms.score_sum));
    }
    add_to(tile.state.num_kept + lane, terms.num_kept);
  }

  void vector(int64_t lane) {
    auto alone = column(lane);
    alone.rows(tile.count);
    finish(lane, alone);
  }
};

// body(Weighing) of the kind that is known at run time.
template <Pairs kPairs, class Body>
void with_weighing(const Tile& tile, Weights kind, const Body& body) {
#if defined(NEGMINE_TILES)
  if (kind == kPacked) return body(Weighing<kPairs, true, kPacked>{tile});
#endif
#if defined(NEGMINE_PAIRS)
  if (tile.score_sums != nullptr) return body(Weighing<kPairs, true, kRowsOf>{tile});
#endif
  kind == kNone ? body(Weighing<kPairs, false, kNone>{tile}) : body(Weighing<kPairs, false, kRowsOf>{tile});
}

template <class Body>
void with_weighing(const Tile& tile, bool some_hidden, Weights kind, const Body& body) {
  tile.bias != nullptr ? with_weighing<kBiased>(tile, kind, body)
  : some_hidden        ? with_weighing<kSomeHidden>(tile, kind, body)
                       : with_weighing<kAllCount>(tile, kind, body);
}

// Returns true if the correction is not 1 everywhere.
bool weigh_tile(const Tile& tile, bool some_hidden, Weights kind) {
  bool moved = false;
  with_weighing(tile, some_hidden, kind, [&](auto weighing) {
    for (int v = 0; v < tile.vectors; ++v) weighing.vector(v * kWidth);
    moved = weighing.moved;
  });
  return moved;
}

// A tile of scores that is not in the sums yet: rows [first, first + rows) of the chunk, none if rows is 0.
struct Scored {
  int64_t block = 0, first = 0, rows = 0;
  bool some_hidden = false;
  const float* scores = nullptr;
};

void count_above(const Block& block, const Workspace& w, int64_t count, const float* pivot, int64_t* num_above) {
  for (int64_t lane = 0; lane < vectors_of(block) * kWidth; lane += kWidth) {
    V threshold = all(0.0f);
    for (int i = 0; i < kWidth && lane + i < block.lanes; ++i) threshold[i] = pivot[block.first_query + lane + i];
    VI total = all(0);
    for (int64_t j = 0; j < count; ++j) total -= load(w.tile + j * kLanes + lane) > threshold;
    add_to(num_above + lane, total);
  }
}

void clear(const Block& block, const LogsumexpState& state) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    state.shift[lane] = kNoShift;
    state.sum[lane] = 0.0f;
    state.num_kept[lane] = state.num_above[lane] = 0;
  }
  if (state.mean == nullptr) return;
  for (int64_t i = 0; i < room_for_mean(block.D) * kLanes; ++i) state.mean[i] = 0.0f;
}

}  // namespace

void logsumexp_range(const Block* blocks, const Workspace* workspaces, int64_t count, const float* scale,
                     int64_t scales, const float* pivot, const Selection* selections, const LogsumexpState* states) {
  const Tiles tiles;
  const bool with_mean = states[0].mean != nullptr, with_score_sums = with_mean && in_pairs(blocks[0]);
#if defined(NEGMINE_TILES)
  const bool packs = with_score_sums, overlaps = in_pairs(blocks[0]);
#else
  const bool packs = false, overlaps = false;
#endif
  const Weights kind = packs ? kPacked : with_mean ? kRowsOf : kNone;
  float score_sums[kMostTogether][2][kLanes] = {};
  for (int64_t b = 0; b < count; ++b) {
    begin_block(blocks[b], workspaces[b]);
    for (int64_t i = 0; i < scales; ++i) clear(blocks[b], states[b * scales + i]);
  }
#if defined(NEGMINE_TILES)
  const TilesOfChunk places(workspaces, count, overlaps);
#endif
  Scored last;  // the tile that was scored last, unless it is in the sums
  Chunk chunk;
  float biases[kChunk], correction[kLanes];
  const float* bias = nullptr;
  [[maybe_unused]] int64_t summed[2] = {};  // words of packed weights of a block that are in the mean
  const auto tile_of = [&](int64_t i) {
    const int64_t b = last.block;
    float* weights = packs ? workspaces[b].weights[i] + last.first / 2 * kTileStride : workspaces[b].scores;
    return Tile{.scores = last.scores,
                .bias = bias == nullptr ? nullptr : bias + last.first,
                .count = last.rows,
                .scale = scale[i],
                .weights = weights,
                .words = room_for_part(chunk.count),
                .correction = correction,
                .score_sums = with_score_sums ? score_sums[b][i] : nullptr,
                .state = states[b * scales + i],
                .vectors = vectors_of(blocks[b])};
  };
  // Adds the last tile to the sums. Its weights at the first scale may be there already.
  const auto add_last = [&](bool weighed, [[maybe_unused]] bool moved) {
    if (last.rows == 0) return;
    const Block& block = blocks[last.block];
    const Workspace& w = workspaces[last.block];
    [[maybe_unused]] const int64_t begin = last.first / 2, words = room_for_part(chunk.count);
    for (int64_t i = 0; i < scales; ++i) {
      const Tile tile = tile_of(i);
      if (i > 0 || !weighed) moved = weigh_tile(tile, last.some_hidden, kind);
      if (with_mean && !packs) add_mean(block, w, chunk, tile.weights, correction, tile.state.mean);
#if defined(NEGMINE_TILES)
      if (!packs) continue;
      if (begin == 0) summed[i] = 0;
      if (moved) {  // what was weighed by the old shift is added first
        if (summed[i] < begin) add_packed(block, w, chunk, summed[i], begin, w.weights[i], tile.state.mean);
        summed[i] = begin;
        scale_mean(block, correction, tile.state.mean);
      }
      if (last.first + last.rows == chunk.count) {
        add_packed(block, w, chunk, summed[i], words, w.weights[i], tile.state.mean);
      }
#endif
    }
    last.rows = 0;
  };
  for (int64_t k = blocks[0].k_begin; k < blocks[0].k_end;) {
    chunk = load_chunk(blocks[0], workspaces[0], &k, true);
    const Ahead ahead = ahead_of(blocks[0], workspaces[0], chunk);
    if (with_mean) begin_mean(blocks[0], workspaces[0], chunk);
    bias = bias_of(blocks[0], workspaces[0], chunk, biases);
    for (int64_t b = 0; b < count; ++b) {
      const Block& block = blocks[b];
      const Workspace& w = workspaces[b];
#if defined(NEGMINE_TILES)
      const Following next = following(chunk, ahead, b, count);
#endif
      for_each_tile(block, chunk, [&](int64_t first, int64_t rows) {
#if defined(NEGMINE_TILES)
        const Workspace& tile = places.at(b, first);
        if (overlaps && last.rows == kWholeTile && last.scores != tile.tile) {
          bool moved = false;
          with_weighing(tile_of(0), last.some_hidden, kind, [&](auto weighing) {
            score_and(block, tile, chunk, first, rows, next, weighing);
            moved = weighing.moved;
          });
          add_last(true, moved);
        } else
#else
        const Workspace& tile = w;
#endif
        {
          add_last(false, false);
          score_rows(block, tile, chunk, first, rows, share_of(ahead, first, rows, b, count));
        }
        Hidden hidden = apply_masks(block, tile, chunk, first, rows);
        if (pivot != nullptr) count_above(block, tile, rows, pivot, states[b * scales].num_above);
        if (block.pool.bounded()) {
          hidden.some = true;
          hidden.suspect |= apply_bounds(block, tile, rows).suspect;
        }
        if (with_mean && hidden.suspect) drop_rows(block, w, chunk, first, rows);
        if (selections != nullptr) offer_chunk(block, tile, rows, selections[b]);
        last = {.block = b, .first = first, .rows = rows, .some_hidden = hidden.some, .scores = tile.tile};
        if (!overlaps) add_last(false, false);
      });
    }
    if (with_mean || bias != nullptr) add_last(false, false);
  }
  add_last(false, false);
  for (int64_t b = 0; b < count && with_score_sums; ++b) {
    for (int64_t i = 0; i < scales; ++i)
      restore_score_sum(blocks[b], workspaces[b], score_sums[b][i], states[b * scales + i].mean);
  }
}

namespace {

// The elements of every row from `from` on.
Matrix columns_of(const Matrix& m, int64_t from) {
  Matrix part = m;
  part.data = static_cast<const char*>(m.data) + from * element_bytes(m.dtype);
  return part;
}

// Adds a tile (count, kLanes) to scores, but for excluded ones. True where a score that would go to one is not finite.
bool add_tile(const Block& block, int64_t count, const float* tile, bool some_hidden, float* scores) {
  VI suspect = all(0);
  for (int64_t lane = 0; lane < vectors_of(block) * kWidth; lane += kWidth) {
    for (int64_t i = lane; i < count * kLanes; i += kLanes) {
      const V before = load(scores + i), more = load(tile + i);
      if (some_hidden) {
        const VI outside = is_excluded(before);
        suspect |= outside & (more - more != 0.0f);
        store(scores + i, outside ? before : before + more);
      } else {
        store(scores + i, before + more);
      }
    }
  }
  return any(suspect);
}

}  // namespace

// The scores of a width are those of the previous width plus those of the segment between them, so that every element
// is multiplied once. The mean of each width is a separate product, because the normalisers by which the weights of the
// widths would be added up are known only at the end. A first pass for the normalisers would cost more than it saves:
// at the widths 32, 64, 128 and 256 three products of 256 elements and twice the exponentials, against 256 + 480
// elements.
void prefix_logsumexp_range(const Block& block, const Workspace* workspaces, const int64_t* widths, int64_t count,
                            float scale, const LogsumexpState* states) {
  const Tiles tiles;
  const bool with_mean = states[0].mean != nullptr, with_score_sums = with_mean && in_pairs(block);
#if defined(NEGMINE_TILES)
  const bool shifts = false;
#else
  const bool shifts = !in_pairs(block);  // rows of floats: a segment is the same row from another element on
#endif
  Block segments[kMostWidths], prefixes[kMostWidths];
  float score_sums[kMostWidths][kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = i == 0 ? 0 : widths[i - 1];
    prefixes[i] = segments[i] = block;
    prefixes[i].D = widths[i];
    prefixes[i].pool.guide_limit = nullptr;  // a guide's rows are loaded with those of the first segment
    if (i > 0) segments[i].pool.guide_limit = nullptr;
    segments[i].query = columns_of(block.query, from);
    segments[i].negative_keys = columns_of(block.negative_keys, from);
    segments[i].D = widths[i] - from;
    begin_block(segments[i], workspaces[i]);
    clear(prefixes[i], states[i]);
  }
  for (int64_t d = 0; d < (block.D > kLanes ? block.D : kLanes); ++d) workspaces[0].zeros[d] = 0.0f;
  alignas(64) float scores[kChunk * kLanes];  // (kChunk, kLanes) of the segments so far
  for (int64_t k = block.k_begin, next = k; k < block.k_end; k = next) {
    Chunk chunk = load_chunk(block, workspaces[0], &next, shifts);
    if (shifts) begin_mean(block, workspaces[0], chunk);
    float biases[kChunk];
    const float* bias = bias_of(block, workspaces[0], chunk, biases);
    const auto load_rows = [&](Block of, const Workspace& w) {  // the rows of this chunk
      int64_t at = k;
      of.k_end = next;
      return load_chunk(of, w, &at, true);
    };
    const int64_t rows = chunk.count;
    Hidden hidden;
    for (int64_t i = 0; i < count; ++i) {
      const Workspace& w = workspaces[i];
      Workspace sums = w;
      sums.tile = scores;
      if (!shifts) chunk = load_rows(segments[i], w);
      for (int64_t j = 0; j < rows + kRows && shifts && i > 0; ++j) w.rows[j] += segments[i - 1].D;
      score_rows(segments[i], i == 0 ? sums : w, chunk, 0, rows, ahead_of(segments[i], w, chunk));
      if (i == 0) {
        hidden = apply_masks(block, sums, chunk, 0, rows);
      } else {
        hidden.suspect |= add_tile(block, rows, w.tile, hidden.some, scores);
      }
      if (with_mean && !shifts) {
        if (i > 0) chunk = load_rows(prefixes[i], w);
        begin_mean(prefixes[i], w, chunk);
      }
      if (with_mean && hidden.suspect) drop_rows(prefixes[i], w, chunk, 0, rows);
      float correction[kLanes];
      const Tile tile{.scores = scores,
                      .bias = bias,
                      .count = rows,
                      .scale = scale,
                      .weights = w.scores,
                      .words = 0,
                      .correction = correction,
                      .score_sums = with_score_sums ? score_sums[i] : nullptr,
                      .state = states[i],
                      .vectors = vectors_of(block)};
      weigh_tile(tile, hidden.some, with_mean ? kRowsOf : kNone);
      if (with_mean) add_mean(prefixes[i], w, chunk, w.scores, correction, states[i].mean);
    }
  }
  for (int64_t i = 0; i < count && with_score_sums; ++i) {
    begin_block(prefixes[i], workspaces[0]);
    restore_score_sum(prefixes[i], workspaces[0], score_sums[i], states[i].mean);
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
