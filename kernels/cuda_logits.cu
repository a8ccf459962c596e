/* From logits to what the sampler needs: statistics of every part of the vocabulary, and the
 * largest candidates. One block per token (and part); sums in double; ties go to the lower id.
 * Definitions: core/sampler.h, core/candidates.h.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cuda_kernels.h"
#include "kernels/device.cuh"

enum { BLOCK = 256, N_WARPS = BLOCK / WARP };

/* A value and who has it; -1: nobody. */
struct best {
    float value;
    int32_t at;
};

static __device__ __forceinline__ bool is_better(float v, int32_t at, float than, int32_t than_at)
{
    return at >= 0 && (than_at < 0 || v > than || (v == than && at < than_at));
}

/* The best of a block in every thread. */
static __device__ struct best block_best(struct best b, shared_ptr_of(float) values,
                                         shared_ptr_of(int32_t) places)
{
    for (int d = WARP / 2; d > 0; d /= 2) {
        float v = __shfl_xor_sync(ALL_LANES, b.value, d);
        int32_t at = __shfl_xor_sync(ALL_LANES, b.at, d);
        if (is_better(v, at, b.value, b.at)) {
            b.value = v;
            b.at = at;
        }
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        values[(int)threadIdx.x / WARP] = b.value;
        places[(int)threadIdx.x / WARP] = b.at;
    }
    __syncthreads();
    for (int i = 0; i < N_WARPS; i++) {
        float v = values[i];
        int32_t at = places[i];
        if (is_better(v, at, b.value, b.at)) {
            b.value = v;
            b.at = at;
        }
    }
    return b;
}

/* The sum over a block, in every thread. */
static __device__ double block_total(double v, shared_ptr_of(double) parts)
{
    for (int d = WARP / 2; d > 0; d /= 2) {
        v += __shfl_xor_sync(ALL_LANES, v, d);
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        parts[(int)threadIdx.x / WARP] = v;
    }
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < N_WARPS; i++) {
        sum += parts[i];
    }
    return sum;
}

/* Gumbel noise of an id: Philox-4x32-10 and the formula of core/sampler.h, in double as there. */
static __device__ float gumbel_noise(const uint64_t key[2], int32_t id)
{
    uint32_t c0 = (uint32_t)id, c1 = 0, c2 = (uint32_t)key[1], c3 = (uint32_t)(key[1] >> 32);
    uint32_t k0 = (uint32_t)key[0], k1 = (uint32_t)(key[0] >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    double u = ((double)c0 + 0.5) * 2.3283064365386963e-10; /* 2^-32 */
    return (float)-log(-log(u));
}

__global__ void k_logit_stats(struct logit_stats *out, const float *logits, int n, int first_id,
                              struct cuda_cuts cuts, const struct logit_want *wants)
{
    SHARED(float, values, N_WARPS);
    SHARED(int32_t, places, N_WARPS);
    SHARED(double, parts, N_WARPS);
    int part = (int)blockIdx.x, tok = (int)blockIdx.y;
    int begin = cuts.at[part], end = cuts.at[part + 1];
    const float *l = logits + (size_t)tok * (size_t)n;
    const struct logit_want *want = wants + tok;
    struct best max = {-INFINITY, -1}, second = {-INFINITY, -1}, pick = {-INFINITY, -1};
    for (int i = begin + (int)threadIdx.x; i < end; i += BLOCK) {
        if (l[i] > max.value) { /* logits that are not numbers, and -inf, never win */
            max.value = l[i];
            max.at = i;
        }
    }
    max = block_best(max, values, places);
    bool sampled = want->temperature > 0 && !want->restricted;
    double sum = 0, sum_l = 0, sum_t = 0;
    float inverse_t = sampled ? 1.0f / want->temperature : 0.0f;
    for (int i = begin + (int)threadIdx.x; i < end; i += BLOCK) {
        double d = (double)l[i] - (double)max.value, e = exp(d);
        sum += e;
        sum_l += e > 0 ? e * d : 0.0;
        if (want->restricted) {
            sum_t += exp(d / (double)want->temperature);
        }
        if (i != max.at && l[i] > second.value) {
            second.value = l[i];
            second.at = i;
        }
        if (sampled) {
            float score = l[i] * inverse_t + gumbel_noise(want->key, first_id + i);
            if (score > pick.value) {
                pick.value = score;
                pick.at = i;
            }
        }
    }
    sum = block_total(sum, parts);
    sum_l = block_total(sum_l, parts);
    sum_t = block_total(sum_t, parts);
    second = block_best(second, values, places);
    pick = block_best(pick, values, places);
    if (threadIdx.x == 0) {
        struct logit_stats s;
        int target = want->target - first_id;
        s.max = max.value;
        s.second = second.value;
        s.argmax = max.at < 0 ? -1 : first_id + max.at;
        s.sum_exp = (float)sum;
        s.sum_exp_l = (float)sum_l;
        s.target = want->target >= 0 && target >= begin && target < end ? l[target] : -INFINITY;
        if (!sampled) {
            pick = max;
        }
        s.pick_score = pick.value;
        s.pick = pick.at < 0 ? -1 : first_id + pick.at;
        s.pick_logit = pick.at < 0 ? -INFINITY : l[pick.at];
        s.sum_exp_t = sum_t;
        out[(size_t)tok * (size_t)cuts.n + (size_t)part] = s;
    }
}

/* One block per token: k times the best of those behind the last one chosen. */
__global__ void k_top_k(struct logit_candidate *out, const float *logits, int n, int first_id,
                        int k)
{
    SHARED(float, values, N_WARPS);
    SHARED(int32_t, places, N_WARPS);
    const float *l = logits + (size_t)blockIdx.x * (size_t)n;
    struct best last = {INFINITY, -1};
    for (int j = 0; j < k; j++) {
        struct best b = {-INFINITY, -1};
        for (int i = (int)threadIdx.x; i < n; i += BLOCK) {
            bool behind = l[i] < last.value || (l[i] == last.value && i > last.at);
            if (behind && is_better(l[i], i, b.value, b.at)) {
                b.value = l[i];
                b.at = i;
            }
        }
        b = block_best(b, values, places);
        if (threadIdx.x == 0) {
            struct logit_candidate *to = out + (size_t)blockIdx.x * (size_t)k + j;
            to->logit = b.at < 0 ? -INFINITY : b.value;
            to->id = b.at < 0 ? -1 : first_id + b.at;
        }
        if (b.at < 0) { /* nothing is behind: the rest stays empty, too */
            last.value = -INFINITY;
            last.at = n;
        } else {
            last = b;
        }
    }
}

enum status cuda_logit_stats(struct gpu *g, struct logit_stats *out, const float *logits,
                             int32_t n_tok, int32_t n, int32_t first_id,
                             const struct cuda_cuts *cuts, const struct logit_want *want)
{
    dim3 grid((unsigned)cuts->n, (unsigned)n_tok);
    const struct cuda_cuts parts = *cuts;
    LAUNCH(k_logit_stats, grid, BLOCK, g, out, logits, n, first_id, parts, want);
    return gpu_launched(g, "k_logit_stats");
}

enum status cuda_top_k(struct gpu *g, struct logit_candidate *out, const float *logits,
                       int32_t n_tok, int32_t n, int32_t first_id, int32_t k)
{
    LAUNCH(k_top_k, (unsigned)n_tok, BLOCK, g, out, logits, n, first_id, k);
    return gpu_launched(g, "k_top_k");
}
