// The table of functions of this instruction set, for the choice at run time in kernels/cpu/dispatch.cpp.
#include "kernels/cpu/simd/tiles.h"

#define NEGMINE_TEXT_OF(x) #x
#define NEGMINE_TEXT(x) NEGMINE_TEXT_OF(x)

namespace negmine::cpu::NEGMINE_SIMD {

void logsumexp_range(const Block*, const Workspace*, int64_t, const float*, int64_t, const float*, const Selection*,
                     const LogsumexpState*);
void prefix_logsumexp_range(const Block&, const Workspace*, const int64_t*, int64_t, float, const LogsumexpState*);
float logsumexp_window_row(const Matrix&, int64_t, const int64_t*, int64_t, int64_t, float, const float*, float,
                           float*);
void logsumexp_grad_keys_range(const Block&, const Workspace&, float, const float*, const float*, float*, float*);
void softplus_sum_grad_keys_range(const Block&, const Workspace&, float, const float*, const float*, float*, float*);
void logsumexp_grad_bias_range(const Block&, const Workspace&, float, const float*, const float*, float*);
void softplus_sum_grad_bias_range(const Block&, const Workspace&, float, const float*, const float*, float*);
void softplus_sum_range(const Block&, const Workspace&, float, float, const SoftplusState&);
void select_range(const Block*, const Workspace*, int64_t, const Selection*);
int64_t keep_best(int64_t*, int64_t, int64_t);
void count_range(const Block&, const Workspace&, int64_t*);
void maxsim_range(const Block&, const Workspace&, int64_t, float*, int32_t*);
void mix_negatives_row(const Matrix&, const Matrix&, int64_t, const Draws&, int64_t, float*, void*, int64_t*, float*);
void mix_logsumexp_row(const Matrix&, const Matrix&, int64_t, const Draws&, int64_t, float, float*, float*, float*);
void gathered_logsumexp_row(const Matrix&, const Matrix&, int64_t, const int64_t*, int64_t, int64_t, float, float*,
                            float*, float*, float*);
void gathered_grad_keys_row(const Matrix&, int64_t, const int64_t*, int64_t, int64_t, const float*, float*, float*);
void round_to_codes_row(const Matrix&, int64_t, int64_t, float*, uint8_t*, float*, float*, float*);

extern const Kernels kKernels = {
    NEGMINE_TEXT(NEGMINE_SIMD),
#if defined(NEGMINE_TILES)
    true,
    16,
#else
    false,
    1,
#endif
    logsumexp_range,
    prefix_logsumexp_range,
    logsumexp_window_row,
    logsumexp_grad_keys_range,
    softplus_sum_grad_keys_range,
    logsumexp_grad_bias_range,
    softplus_sum_grad_bias_range,
    softplus_sum_range,
    select_range,
    keep_best,
    count_range,
    maxsim_range,
    mix_negatives_row,
    mix_logsumexp_row,
    gathered_logsumexp_row,
    gathered_grad_keys_row,
    round_to_codes_row,
};

}  // namespace negmine::cpu::NEGMINE_SIMD
