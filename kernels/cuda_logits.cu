/* From logits to what the sampler needs: statistics of every part of the vocabulary, and the
 * largest candidates. One block per token (and part); sums in double; ties go to the lower id.
 * Definitions: core/sampler.h, core/candidates.h.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cuda_kernels.h"
#include "kernels/device.cuh"

enum { BLOCK = 256, N_WARPS = BLOCK / WARP };

/* A value and who has it in one word that orders as they do: larger values first, then lower
 * places. 0: nobody. */
typedef unsigned long long best_t;

static __device__ __forceinline__ best_t best_of(float v, int32_t at)
{
    uint32_t bits = __float_as_uint(v + 0.0f); /* -0 is 0 */
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (best_t)bits << 32 | (0x7fffffffu - (uint32_t)at);
}

static __device__ __forceinline__ int32_t place_of(best_t b)
{
    return b ? (int32_t)(0x7fffffffu - (uint32_t)b) : -1;
}

static __device__ __forceinline__ best_t better(best_t a, best_t b)
{
    return a > b ? a : b;
}

/* The best of a block in every thread. */
static __device__ best_t block_best(best_t b, shared_ptr_of(best_t) parts)
{
    for (int d = WARP / 2; d > 0; d /= 2) {
        b = better(b, __shfl_xor_sync(ALL_LANES, b, d));
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        parts[(int)threadIdx.x / WARP] = b;
    }
    __syncthreads();
    for (int i = 0; i < N_WARPS; i++) {
        b = better(b, parts[i]);
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

/* Logits that are not numbers, and -inf, never win. */
__global__ void k_logit_stats(struct logit_stats *out, const float *logits, int n, int first_id,
                              struct cuda_cuts cuts, const struct logit_want *wants)
{
    SHARED(best_t, bests, N_WARPS);
    SHARED(double, parts, N_WARPS);
    int part = (int)blockIdx.x, tok = (int)blockIdx.y;
    int begin = cuts.at[part], end = cuts.at[part + 1];
    const float *l = logits + (size_t)tok * (size_t)n;
    const struct logit_want *want = wants + tok;
    best_t first = 0, second = 0, pick = 0;
    for (int i = begin + (int)threadIdx.x; i < end; i += BLOCK) {
        first = l[i] > -INFINITY ? better(first, best_of(l[i], i)) : first;
    }
    first = block_best(first, bests);
    int at = place_of(first);
    float max = at < 0 ? -INFINITY : l[at];
    bool sampled = want->temperature > 0 && !want->restricted;
    double sum = 0, sum_l = 0, sum_t = 0;
    float inverse_t = sampled ? 1.0f / want->temperature : 0.0f;
    for (int i = begin + (int)threadIdx.x; i < end; i += BLOCK) {
        double d = (double)l[i] - (double)max, e = exp(d);
        sum += e;
        sum_l += e > 0 ? e * d : 0.0;
        if (want->restricted) {
            sum_t += exp(d / (double)want->temperature);
        }
        if (i != at && l[i] > -INFINITY) {
            second = better(second, best_of(l[i], i));
        }
        if (sampled) {
            float score = l[i] * inverse_t + gumbel_noise(want->key, first_id + i);
            pick = score > -INFINITY ? better(pick, best_of(score, i)) : pick;
        }
    }
    sum = block_total(sum, parts);
    sum_l = block_total(sum_l, parts);
    sum_t = block_total(sum_t, parts);
    int second_at = place_of(block_best(second, bests));
    int pick_at = sampled ? place_of(block_best(pick, bests)) : at;
    if (threadIdx.x == 0) {
        struct logit_stats s;
        int target = want->target - first_id;
        s.max = max;
        s.second = second_at < 0 ? -INFINITY : l[second_at];
        s.argmax = at < 0 ? -1 : first_id + at;
        s.sum_exp = (float)sum;
        s.sum_exp_l = (float)sum_l;
        s.target = want->target >= 0 && target >= begin && target < end ? l[target] : -INFINITY;
        s.pick = pick_at < 0 ? -1 : first_id + pick_at;
        s.pick_logit = pick_at < 0 ? -INFINITY : l[pick_at];
        s.pick_score = s.pick_logit;
        if (sampled && pick_at >= 0) {
            s.pick_score = l[pick_at] * inverse_t + gumbel_noise(want->key, s.pick);
        }
        s.sum_exp_t = sum_t;
        out[(size_t)tok * (size_t)cuts.n + (size_t)part] = s;
    }
}

/* One block per token: k times the best of those behind the last one chosen. */
__global__ void k_top_k(struct logit_candidate *out, const float *logits, int n, int first_id,
                        int k)
{
    SHARED(best_t, bests, N_WARPS);
    const float *l = logits + (size_t)blockIdx.x * (size_t)n;
    best_t last = ~(best_t)0;
    for (int j = 0; j < k; j++) {
        best_t b = 0;
        for (int i = (int)threadIdx.x; i < n && last; i += BLOCK) {
            best_t mine = l[i] == l[i] ? best_of(l[i], i) : 0;
            b = mine < last ? better(b, mine) : b;
        }
        last = last ? block_best(b, bests) : 0; /* 0: nothing is left */
        if (threadIdx.x == 0) {
            struct logit_candidate *to = out + (size_t)blockIdx.x * (size_t)k + j;
            int at = place_of(last);
            to->logit = at < 0 ? -INFINITY : l[at];
            to->id = at < 0 ? -1 : first_id + at;
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
