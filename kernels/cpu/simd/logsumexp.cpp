// The log-sum-exp of blocks of queries over a range of the queue, and the mean of the rows weighted by the softmax (the
// gradient with respect to the query). The steps for each chunk and block: scores, pool, exponentials, second product.
//
// Each query has its own shift, which is subtracted from its exponents. The shift changes only if a score exceeds it by
// kFar, and then becomes the largest score. So no pass for the maximum is needed, and sums are rarely rescaled. The
// terms of a query and their order depend only on the range, and not on the other queries.
//
// Sums over a tile start from zero in registers and are then added to the running sums, so that no chain of additions
// is longer than a chunk.
#include "kernels/cpu/simd/tiles.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr float kFar = 8.0f;  // e^8 times a chunk of terms is a sum without harm
constexpr int64_t kMostTogether = 16;
#if defined(NEGMINE_TILES)
constexpr int64_t kTileStride = kTilePanel;  // words of weights from one pair of rows to the next
#else
constexpr int64_t kTileStride = kLanes;
#endif

// The kinds of tiles: no pair is hidden, or some pairs may be hidden; in the latter case, columns may have a bias.
enum Pairs { kAllCount, kSomeHidden, kBiased };

// The contribution of a tile to one vector of queries.
struct Terms {
  V total, score_sum, farthest;
  VI num_kept;
};

// How weights are stored: not at all; as rows (count, kLanes); or as pairs of rows in a panel (count / 2 rounded up to
// 16, 32), for blocks that tiles multiply.
enum Weights { kNone, kRowsOf, kPacked };

// The weights exp(scale s + bias - shift) of a column of scores (count, kLanes), 0 outside the pool, and their sum.
// With kScoreSum also the sum of weights times scores. bias (count), if kBiased.
template <Pairs kPairs, bool kScoreSum, Weights kWeights>
NEGMINE_INLINE Terms exponentials(const float* scores, [[maybe_unused]] const float* bias, int64_t count, float scale,
                                  V shift, float* weights) {
  Terms sum{all(0.0f), all(0.0f), all(-__builtin_inff()), all(0)};
  const auto one = [&](int64_t j) {
    const V score = load(scores + j * kLanes);
    V offset = -shift;
    if constexpr (kPairs == kBiased) offset += all(bias[j]);
    const V x = fma(score, all(scale), offset);
    V p = exp_near(x), pulled = score;
    sum.farthest = max(x, sum.farthest);  // excluded() is a NaN, which max passes over
    if constexpr (kPairs != kAllCount) {
      const VI outside = is_excluded(score);
      p = outside ? all(0.0f) : p;
      pulled = outside ? all(0.0f) : score;
      sum.num_kept += outside + 1;
    }
    sum.total += p;
    if constexpr (kScoreSum) sum.score_sum = fma(p, pulled, sum.score_sum);
    return p;
  };
  if constexpr (kWeights == kNone) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) one(j), one(j + 1), one(j + 2), one(j + 3);
    for (; j < count; ++j) one(j);
  }
  if constexpr (kWeights == kRowsOf) {
    for (int64_t j = 0; j < count; ++j) store(weights + j * kLanes, one(j));
  }
#if defined(NEGMINE_TILES)
  if constexpr (kWeights == kPacked) {
    int64_t j = 0;
    const auto two = [&](int64_t j) {
      const V first = one(j);
      store(weights + j / 2 * kTilePanel, pack_weights(first, one(j + 1)));
    };
    for (; j + 4 <= count; j += 4) two(j), two(j + 2);
    if (j + 2 <= count) two(j), j += 2;
    if (j < count) store(weights + j / 2 * kTilePanel, pack_weights(one(j), all(0.0f))), j += 2;
    for (; j % 32 != 0; j += 2) store(weights + j / 2 * kTilePanel, all(0.0f));
  }
#endif
  if constexpr (kPairs == kAllCount) sum.num_kept += static_cast<int32_t>(count);
  return sum;
}

// Adds a tile of scores (count, kLanes) to the state and writes its weights. correction (kLanes) is the factor for the
// sums before this tile; returns true if it is not 1 everywhere. score_sums (kLanes), if kScoreSum: the running sum of
// exp(..) s. Packed weights of a panel are `words` words.
template <Pairs kPairs, bool kScoreSum, Weights kWeights>
bool weigh(const Block& block, const float* scores, const float* bias, int64_t count, float scale, float* weights,
           [[maybe_unused]] int64_t words, float* correction, float* score_sums, const LogsumexpState& state) {
  bool moved = false;
  for (int64_t lane = 0; lane < vectors_of(block) * kWidth; lane += kWidth) {
#if defined(NEGMINE_TILES)
    float* column = weights + (kWeights == kPacked ? panel_at(lane, words) : lane);
#else
    float* column = weights + lane;
#endif
    const auto run = [&](V shift) {
      return exponentials<kPairs, kScoreSum, kWeights>(scores + lane, bias, count, scale, shift, column);
    };
    const V shift = load(state.shift + lane), before = load(state.sum + lane);
    V factor = all(1.0f);
    Terms terms = run(shift);
    const VI passed = (terms.farthest > kFar) & (before < __builtin_inff());
    if (any(passed)) {
      V most = all(-__builtin_inff());
      for (int64_t j = 0; j < count; ++j) {
        V x = load(scores + j * kLanes + lane) * scale;
        if constexpr (kPairs == kBiased) x += all(bias[j]);
        most = max(x, most);
      }
      const VI moves = passed & (most < __builtin_inff());
      const V moved_shift = moves ? most : shift;
      factor = moves ? exp_near(shift - most) : factor;
      terms = run(moved_shift);
      store(state.shift + lane, moved_shift);
      moved = true;
    }
    store(correction + lane, factor);
    store(state.sum + lane, fma(before, factor, terms.total));
    if constexpr (kScoreSum) store(score_sums + lane, fma(load(score_sums + lane), factor, terms.score_sum));
    add_to(state.num_kept + lane, terms.num_kept);
  }
  return moved;
}

// The same with arguments that are known at run time. score_sums are used for a mean of pairs of bf16. bias (count) or
// null.
template <Pairs kPairs>
bool weigh_pairs(const Block& block, const float* scores, const float* bias, int64_t count, Weights kind, float scale,
                 float* weights, int64_t words, float* correction, float* score_sums, const LogsumexpState& state) {
#define NEGMINE_WEIGH(sums, kind) \
  weigh<kPairs, sums, kind>(block, scores, bias, count, scale, weights, words, correction, score_sums, state)
#if defined(NEGMINE_TILES)
  if (kind == kPacked) return NEGMINE_WEIGH(true, kPacked);
#endif
#if defined(NEGMINE_PAIRS)
  if (score_sums != nullptr) return NEGMINE_WEIGH(true, kRowsOf);
#endif
  return kind == kNone ? (NEGMINE_WEIGH(false, kNone)) : (NEGMINE_WEIGH(false, kRowsOf));
#undef NEGMINE_WEIGH
}

bool weigh_tile(const Block& block, const float* scores, const float* bias, int64_t count, bool some_hidden,
                Weights kind, float scale, float* weights, int64_t words, float* correction, float* score_sums,
                const LogsumexpState& state) {
  const auto weigh = bias != nullptr ? weigh_pairs<kBiased>
                     : some_hidden   ? weigh_pairs<kSomeHidden>
                                     : weigh_pairs<kAllCount>;
  return weigh(block, scores, bias, count, kind, scale, weights, words, correction, score_sums, state);
}

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
  const bool packs = with_score_sums;
#else
  const bool packs = false;
#endif
  const Weights kind = packs ? kPacked : with_mean ? kRowsOf : kNone;
  float score_sums[kMostTogether][2][kLanes] = {};
  for (int64_t b = 0; b < count; ++b) {
    begin_block(blocks[b], workspaces[b]);
    for (int64_t i = 0; i < scales; ++i) clear(blocks[b], states[b * scales + i]);
  }
  for (int64_t k = blocks[0].k_begin; k < blocks[0].k_end;) {
    const Chunk chunk = load_chunk(blocks[0], workspaces[0], &k, true);
    const Ahead ahead = ahead_of(blocks[0], workspaces[0], chunk);
    if (with_mean) begin_mean(blocks[0], workspaces[0], chunk);
    float biases[kChunk];
    const float* bias = bias_of(blocks[0], workspaces[0], chunk, biases);
    for (int64_t b = 0; b < count; ++b) {
      const Block& block = blocks[b];
      const Workspace& w = workspaces[b];
      [[maybe_unused]] int64_t summed[2] = {};  // words of packed weights that are in the mean
      for_each_tile(block, chunk, [&](int64_t first, int64_t rows) {
        const Workspace tile = at_row(w, first);
        score_rows(block, tile, chunk, first, rows, share_of(ahead, first, rows, b, count));
        Hidden hidden = apply_masks(block, tile, chunk, first, rows);
        if (pivot != nullptr) count_above(block, tile, rows, pivot, states[b * scales].num_above);
        if (block.pool.bounded()) {
          hidden.some = true;
          hidden.suspect |= apply_bounds(block, tile, rows).suspect;
        }
        if (with_mean && hidden.suspect) drop_rows(block, w, chunk, first, rows);
        if (selections != nullptr) offer_chunk(block, tile, rows, selections[b]);
        for (int64_t i = 0; i < scales; ++i) {
          const LogsumexpState& state = states[b * scales + i];
          float correction[kLanes];
          float* weights = packs ? w.weights[i] + first / 2 * kTileStride : w.scores;
          [[maybe_unused]] const bool moved = weigh_tile(
              block, tile.tile, bias == nullptr ? nullptr : bias + first, rows, hidden.some, kind, scale[i], weights,
              room_for_part(chunk.count), correction, with_score_sums ? score_sums[b][i] : nullptr, state);
          if (with_mean && !packs) add_mean(block, w, chunk, weights, correction, state.mean);
#if defined(NEGMINE_TILES)
          if (packs && moved) {  // what was weighed by the old shift is added first
            if (summed[i] < first / 2) add_packed(block, w, chunk, summed[i], first / 2, w.weights[i], state.mean);
            summed[i] = first / 2;
            scale_mean(block, correction, state.mean);
          }
#endif
        }
      });
#if defined(NEGMINE_TILES)
      for (int64_t i = 0; i < scales && packs; ++i) {
        const int64_t words = room_for_part(chunk.count);
        if (summed[i] < words) add_packed(block, w, chunk, summed[i], words, w.weights[i], states[b * scales + i].mean);
      }
#endif
    }
  }
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
      weigh_tile(block, scores, bias, rows, hidden.some, with_mean ? kRowsOf : kNone, scale, w.scores, 0, correction,
                 with_score_sums ? score_sums[i] : nullptr, states[i]);
      if (with_mean) add_mean(prefixes[i], w, chunk, w.scores, correction, states[i].mean);
    }
  }
  for (int64_t i = 0; i < count && with_score_sums; ++i) {
    begin_block(prefixes[i], workspaces[0]);
    restore_score_sum(prefixes[i], workspaces[0], score_sums[i], states[i].mean);
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
