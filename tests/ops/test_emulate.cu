/* kernels/emulate.h catches what it says it catches: planted races, indices out of bounds, missing
 * and divergent barriers.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/device.cuh"

extern "C" {
#include "tests/check.h"
}

enum { N = 64 };

/* Every thread writes its element, and reads its neighbour's. */
__global__ void k_neighbour(float *out, bool with_barrier)
{
    SHARED(float, tile, N);
    int i = (int)threadIdx.x;
    tile[i] = (float)i;
    if (with_barrier) {
        __syncthreads();
    }
    out[i] = tile[(i + 1) % N];
}

__global__ void k_one_after_another(float *out)
{
    SHARED(float, sum, 1);
    sum[0] = (float)threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = sum[0];
}

__global__ void k_outside(float *out, int n)
{
    SHARED(float, tile, N);
    tile[(int)threadIdx.x + n] = 1;
    out[threadIdx.x] = 0;
}

__global__ void k_unwritten(float *out)
{
    SHARED(float, tile, N);
    if (threadIdx.x != 7) {
        tile[threadIdx.x] = 1;
    }
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void k_missing_barrier(float *out)
{
    out[threadIdx.x] = 0;
    if (threadIdx.x != 3) {
        __syncthreads();
    }
}

__global__ void k_two_barriers(float *out)
{
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 0;
}

__global__ void k_missing_lane(float *out)
{
    float v = 1;
    if (threadIdx.x != 5) {
        v = warp_sum(v);
    }
    out[threadIdx.x] = v;
}

/* Blocks that add to one place depend on their order. */
__global__ void k_order(float *out)
{
    out[0] = out[0] * 1.5f + (float)blockIdx.x;
}

__global__ void k_sums(float *out)
{
    SHARED(float, parts, 2);
    float v = warp_sum((float)(threadIdx.x + 1));
    float below = __shfl_down_sync(ALL_LANES, (float)threadIdx.x, 1);
    if (threadIdx.x % WARP == 0) {
        parts[(int)threadIdx.x / WARP] = v;
    }
    __syncthreads();
    out[blockIdx.x * N + threadIdx.x] = parts[0] + parts[1] + below;
}

__global__ void k_warp_race(float *out, bool synced)
{
    SHARED(float, tile, N);
    int i = (int)threadIdx.x;
    tile[i] = (float)i;
    if (synced) {
        __syncwarp();
    }
    out[i] = tile[i ^ 1];
}

static void expect(struct gpu *g, const char *kernel, const char *part)
{
    enum status st = gpu_launched(g, kernel);
    if (part) {
        CHECK_STATUS(st, ST_CUDA, part);
    } else {
        CHECK(st == ST_OK);
    }
    status_clear();
    gpu_close(g);
    CHECK(gpu_open(g, -1) == ST_OK); /* forgets the fault */
}

int main(void)
{
    struct gpu g;
    void *memory = NULL;
    CHECK(gpu_open(&g, -1) == ST_OK);
    CHECK(gpu_alloc(&g, &memory, 4 * N * sizeof(float)) == ST_OK);
    float *out = (float *)memory;

    LAUNCH(k_neighbour, 1, N, &g, out, true);
    CHECK(out[0] == 1 && out[N - 1] == 0);
    expect(&g, "k_neighbour", NULL);
    LAUNCH(k_neighbour, 1, N, &g, out, false);
    expect(&g, "k_neighbour", "tile[");
    LAUNCH(k_one_after_another, 1, N, &g, out);
    expect(&g, "k_one_after_another", "with no barrier between");
    LAUNCH(k_outside, 1, N, &g, out, 1);
    expect(&g, "k_outside", "tile[64] is outside its 64 elements");
    LAUNCH(k_outside, 1, N, &g, out, 0);
    expect(&g, "k_outside", NULL);
    LAUNCH(k_unwritten, 1, N, &g, out);
    expect(&g, "k_unwritten", "tile[7] is read by thread 7, but nobody has written it");
    LAUNCH(k_missing_barrier, 1, N, &g, out);
    expect(&g, "k_missing_barrier", "");
    LAUNCH(k_two_barriers, 1, N, &g, out);
    expect(&g, "k_two_barriers", "another __syncthreads");
    LAUNCH(k_missing_lane, 1, N, &g, out);
    expect(&g, "k_missing_lane", "");
    LAUNCH(k_warp_race, 1, N, &g, out, false);
    expect(&g, "k_warp_race", "tile[");
    LAUNCH(k_warp_race, 1, N, &g, out, true);
    expect(&g, "k_warp_race", NULL);
    LAUNCH(k_sums, dim3(2, 2), N, &g, out);
    CHECK(out[0] == 2080 + 1 && out[31] == 2080 + 31 && out[N] == 2080 + 1);
    expect(&g, "k_sums", NULL);

    bool differs = false;
    float first = 0;
    for (uint64_t seed = 0; seed < 8; seed++) {
        emulate::set_seed(seed);
        out[0] = 0;
        LAUNCH(k_order, 8, 1, &g, out);
        first = seed == 0 ? out[0] : first;
        differs = differs || out[0] != first;
    }
    CHECK(differs);
    expect(&g, "k_order", NULL);
    gpu_release(&g, memory);
    gpu_close(&g);
    return check_report();
}
