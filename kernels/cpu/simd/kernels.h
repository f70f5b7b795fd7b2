// The functions of an instruction set: a table of functions for one block of queries and one range of the queue.
//
// A block has up to kLanes queries, one per vector lane, so that every reduction over the queue is a vertical vector
// operation and queries do not affect each other. The queue is processed in chunks, whose scores are a (chunk, kLanes)
// tile. A score is a chain of fused multiply-adds over d, the same in every function, tile and split. If both sides are
// bf16 and the processor can multiply bf16, it is a chain over pairs of neighbours in d. If AMX multiplies other types,
// simd/parts.h describes the sum.
#pragma once
#include <cstdint>

#include "kernels/cpu/draws.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

constexpr int64_t kChunk = 128;  // most rows of the queue in one tile

constexpr float kNoShift = -3.40282347e38f;  // the lowest finite number

constexpr int64_t kMostWidths = 16;  // prefix widths that are summed in one pass

constexpr int64_t kRowChunk = 32;  // rows of one query's list that are scored at a time

// The number of floats in the buffer of mixing: (kRowChunk + 3, D), with rows rounded up to the widest vector.
inline int64_t mixing_room(int64_t D) { return (kRowChunk + 3) * (D + 15); }

// Floats that round_to_codes_row works in: a row in whole vectors, and its bytes.
inline int64_t room_for_codes(int64_t D) { return (D + 15) / 16 * 20; }

// Words of one part of a row (simd/parts.h): pairs of 32 elements of D fill a tile.
inline int64_t room_for_part(int64_t D) { return (D + 31) / 32 * 16; }

struct Block {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t D = 0;
  Pool pool;
  int64_t first_query = 0;  // lane i is query first_query + i
  int64_t lanes = 0;        // queries in this block, at most kLanes
  int64_t k_begin = 0, k_end = 0;
};

// Rows of Workspace::lane_words: an id or a label as two words, a bound as its score and its index, a guide's limit.
enum LaneWord {
  kIdLow,
  kIdHigh,
  kLabelLow,
  kLabelHigh,
  kLowerScore,
  kLowerIndex,
  kUpperScore,
  kUpperIndex,
  kGuideLimit,
  kLaneWords
};

constexpr int64_t kFilterWords = 64;  // 4096 bits: few ids that no query has pass the filter of 64 queries

// The data of a block that is kept between chunks.
struct BlockMemory {
  float* q_t;          // (kLanes / panel, D, panel) its queries, transposed; or (.., (D + 1) / 2, ..) pairs and, for
                       // tiles, zeros up to a multiple of 16 of those
  float* query_parts;  // (3, words, kLanes) the same as simd/parts.h splits them
  int32_t* lanes_in_parts;  // (kLanes) -1: the query may be multiplied in parts; 0: it may not
  int32_t* lane_words;      // (kLaneWords, kLanes) ids, labels and bounds of its queries
  uint64_t* id_filter;      // (kFilterWords) a bit for each remainder of the ids of its queries
  uint64_t* label_filter;   // (kFilterWords) likewise of labels
};

// The memory of one thread, allocated by Scratch (kernels/cpu/scratch.h): that of a block, and that of a chunk, which
// several blocks of a call share.
struct Workspace : BlockMemory {
  float* tile;              // (kChunk, kLanes) scores of rows of a chunk
  float* scores;            // (kChunk, kLanes) room for them, where the tile is needed as it is
  float* weights[2];        // (kChunk / 2, kLanes) pairs of weights, at each of two scales
  const float** rows;       // (kChunk + 6) the chunk's rows of the queue as they are scored, then rows of zeros
  const float** mean_rows;  // (kChunk) the rows that a mean adds: see drop_rows
  int64_t* index;           // (kChunk) their rows in the queue
  float* widened;           // (kChunk, D + 16) if the queue is not stored as fp32
  float* key_parts;  // (kChunk, 3, words) the chunk's rows as simd/parts.h splits them, of room_for_part(D or kLanes)
                     // words
  float* turned;     // (D rounded up to 32, 3, words) the chunk turned, of room_for_part(kChunk) words
  float* weight_parts;               // (3, words, kLanes) its weights, of as many words
  int32_t* rows_in_parts;            // (kChunk) as lanes_in_parts
  uint16_t* padded;                  // (kChunk, D rounded up to 32) if rows of bf16 cannot be read in place
  float* row;                        // (D) one query as fp32
  float* zeros;                      // (max(D, kLanes))
  const Workspace* guide = nullptr;  // for the guide's scores, if there is one, with the same index
};

// The number of rows of a sum (D, kLanes) of weighted keys, rounded up because AMX adds whole tiles.
inline int64_t room_for_mean(int64_t D) { return (D + 31) / 32 * 32; }

// The running log-sum-exp of a block over a range: sum_k exp(scale s_k) = 2^shift sum, and sum_k exp(scale s_k) n_k =
// 2^shift mean.
struct LogsumexpState {
  float* shift;  // (kLanes) no exponent, in units of log 2, exceeds it by much (simd/logsumexp.cpp); kNoShift before
                 // the first
  float* sum;    // (kLanes)
  float* mean;   // (room_for_mean(D), kLanes) or null: no mean wanted
  int64_t* num_kept;   // (kLanes)
  int64_t* num_above;  // (kLanes)
};

// Sums of a block over a range: of log(1 + exp(l_k)), of sigmoid(l_k) and of sigmoid(l_k) n_k, l = scale s + offset.
struct SoftplusState {
  float* total;         // (kLanes)
  float* sigmoid_sum;   // (kLanes)
  float* sigmoid_keys;  // (room_for_mean(D), kLanes) or null: not wanted
  int64_t* num_kept;    // (kLanes)
};

// The best `keep` columns of each lane whose scores are between a bound and a ceiling, in buffers that are pruned when
// full. Scores are negated if `lowest`.
struct Selection {
  int64_t* keys;            // (kLanes, capacity) sort keys; their complements where lowest
  int64_t* size;            // (kLanes)
  int64_t* num_candidates;  // (kLanes) columns in the pool whose score is not NaN
  int64_t* num_over;        // (kLanes) of these, above the ceiling
  float* bound;             // (kLanes) a score under it is not wanted; NaN: lane not in use
  float* ceiling;           // (kLanes) a score above it is counted and not kept
  int64_t keep;
  int64_t capacity;  // > keep, or all columns of the range
  bool lowest;       // select the lowest columns
  bool counted;      // num_candidates and num_over are wanted; else no score is compared with the ceiling
};

// Removes all but the best `keep` keys of a full lane and raises its bound. It is in kernels/cpu/selection.cpp and
// compiled once.
void prune(const Selection& selection, int64_t lane);

struct Kernels {
  const char* isa;
  bool splits;       // it may multiply in parts, for which workspaces need memory
  int64_t together;  // best number of blocks for one call of logsumexp_range
  // Processes blocks (count) with their common range, from empty states (count, scales), for each of the 1 or 2 scales;
  // num_kept and num_above are written to the states of the first scale. The workspaces (count) share the memory of the
  // chunk. pivot (B,) or null. If selections (count) are given, every column of the range is also offered to them.
  void (*logsumexp_range)(const Block* blocks, const Workspace* workspaces, int64_t count, const float* scale,
                          int64_t scales, const float* pivot, const Selection* selections,
                          const LogsumexpState* states);
  // Processes a block with its range, from empty states (count), for each of count <= kMostWidths ascending prefix
  // widths: state i uses the scores of the first widths[i] elements. The workspaces (count) share the memory of the
  // chunk.
  void (*prefix_logsumexp_range)(const Block&, const Workspace* workspaces, const int64_t* widths, int64_t count,
                                 float scale, const LogsumexpState* states);
  // Returns the sum of exp(scale s + bias - shift) over the columns of the sort keys keys (size), and adds their rows,
  // weighted by these terms, to mean (D), or null. bias (K,) or null. The rows of the `ahead` following keys are
  // prefetched.
  float (*logsumexp_window_row)(const Matrix& negative_keys, int64_t D, const int64_t* keys, int64_t size,
                                int64_t ahead, float scale, const float* bias, float shift, float* mean);
  // Adds the block's share to rows [k_begin, k_end) of out (K, D). lse, weight (B,); panel (64, D rounded up to 64),
  // and with parts behind it three halves of that.
  void (*logsumexp_grad_keys_range)(const Block&, const Workspace&, float scale, const float* lse, const float* weight,
                                    float* panel, float* out);
  // The same with sigmoid(scale s + bias - lse) instead of exp(scale s + bias - lse).
  void (*softplus_sum_grad_keys_range)(const Block&, const Workspace&, float scale, const float* lse,
                                       const float* weight, float* panel, float* out);
  // Adds the block's share to elements [k_begin, k_end) of out (K), the gradient of the bias; as the two before.
  void (*logsumexp_grad_bias_range)(const Block&, const Workspace&, float scale, const float* lse, const float* weight,
                                    float* out);
  void (*softplus_sum_grad_bias_range)(const Block&, const Workspace&, float scale, const float* lse,
                                       const float* weight, float* out);
  // The block against its range, from an empty state.
  void (*softplus_sum_range)(const Block&, const Workspace&, float scale, float offset, const SoftplusState&);
  // Offers every column of the common range of blocks (count) to the selection of each block, in the order of the
  // queue.
  void (*select_range)(const Block* blocks, const Workspace* workspaces, int64_t count, const Selection* selections);
  // Keeps the `keep` < size best of keys (size), in their order, and returns the worst of these. All keys are
  // different.
  int64_t (*keep_best)(int64_t* keys, int64_t size, int64_t keep);
  // count (kLanes): the number of columns in the pool.
  void (*count_range)(const Block&, const Workspace&, int64_t* count);
  // The tokens of a block of queries against documents of J tokens: range [k_begin, k_end) is whole documents. best
  // (documents, kLanes) their largest score, token (documents, kLanes) the first token that has it; -inf and -1 where
  // the pool has none.
  void (*maxsim_range)(const Block&, const Workspace&, int64_t J, float* best, int32_t* token);
  // vectors (S, D), parents (S, 2), coefficients (S) of query b. room (mixing_room(D)).
  void (*mix_negatives_row)(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws&, int64_t b,
                            float* room, void* vectors, int64_t* parents, float* coefficients);
  // lse (), mean (D) or null of query b. room (mixing_room(D)).
  void (*mix_logsumexp_row)(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws&, int64_t b,
                            float scale, float* room, float* lse, float* mean);
  // scores (M), lse (), mean (D) or null of query b over the listed rows. index (M), -1 = none; room (kRowChunk + 1,
  // D).
  void (*gathered_logsumexp_row)(const Matrix& query, const Matrix& negative_keys, int64_t D, const int64_t* index,
                                 int64_t M, int64_t b, float scale, float* room, float* scores, float* lse,
                                 float* mean);
  // out (D) = sum over i of weight_i query_{i / M}, for the `count` cells i of `cells`. room (D).
  void (*gathered_grad_keys_row)(const Matrix& query, int64_t D, const int64_t* cells, int64_t count, int64_t M,
                                 const float* weight, float* room, float* out);
  // codes (D rounded up to a multiple of 4), scale (), norm () and error () of a row. room (room_for_codes(D)).
  void (*round_to_codes_row)(const Matrix& vectors, int64_t row, int64_t D, float* room, uint8_t* codes, float* scale,
                             float* norm, float* error);
};

#if defined(__x86_64__)
namespace amxbf16 {
extern const Kernels kKernels;
// Tests a product of tiles, because a processor and a system may report support for tiles that does not work.
bool tiles_are_right();
}  // namespace amxbf16
namespace avx512bf16 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#elif defined(__aarch64__)
namespace neonbf16 {
extern const Kernels kKernels;
}
namespace neon {
extern const Kernels kKernels;
}
#endif
namespace portable {
extern const Kernels kKernels;
}

}  // namespace negmine::cpu
