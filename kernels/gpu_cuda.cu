/* kernels/gpu.h on a device: CUDA's runtime for memory and the stream, the driver's virtual memory
 * functions (found at run time, so that the program starts without a driver) for address ranges.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/gpu.h"

enum { N_PINNED = 2, OLDEST_MAJOR = 8 };
static const size_t PINNED_BYTES = (size_t)8 << 20;

struct gpu_impl {
    void *pinned[N_PINNED];
    cudaEvent_t free_again[N_PINNED]; /* the copy out of this buffer is over */
    int next;
    CUmemAllocationProp prop;
    CUmemAccessDesc access;
    CUresult (*reserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
    CUresult (*unreserve)(CUdeviceptr, size_t);
    CUresult (*create)(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *,
                       unsigned long long);
    CUresult (*release)(CUmemGenericAllocationHandle);
    CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
    CUresult (*unmap)(CUdeviceptr, size_t);
    CUresult (*set_access)(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t);
    CUresult (*granularity)(size_t *, const CUmemAllocationProp *,
                            CUmemAllocationGranularity_flags);
};

static struct gpu_impl *impl_of(const struct gpu *g)
{
    return (struct gpu_impl *)g->impl;
}

static cudaStream_t stream_of(const struct gpu *g)
{
    return (cudaStream_t)g->stream;
}

#define TRY_CUDA(call)                                                                         \
    do {                                                                                       \
        cudaError_t rc_ = (call);                                                              \
        if (rc_ != cudaSuccess) {                                                              \
            FAIL(rc_ == cudaErrorMemoryAllocation ? ST_NOMEM : ST_CUDA, "GPU %d: %s: %s (%d)", \
                 g->device, #call, cudaGetErrorString(rc_), (int)rc_);                         \
        }                                                                                      \
    } while (0)

#define TRY_DRIVER(call)                                                                   \
    do {                                                                                   \
        CUresult rc_ = (call);                                                             \
        if (rc_ != CUDA_SUCCESS) {                                                         \
            FAIL(rc_ == CUDA_ERROR_OUT_OF_MEMORY ? ST_NOMEM : ST_CUDA,                     \
                 "GPU %d: %s: the driver answers %d%s", g->device, #call, (int)rc_,        \
                 rc_ == CUDA_ERROR_OUT_OF_MEMORY ? " (out of memory: use fewer slots, a "  \
                                                   "smaller context or more tensor ranks)" \
                                                 : "");                                    \
        }                                                                                  \
    } while (0)

/* ---- life ---- */

static enum status find_device(struct gpu *g, int device)
{
    int n = 0; /* stays as it is when the call fails */
    cudaError_t rc = cudaGetDeviceCount(&n);
    if (rc != cudaSuccess || n == 0) {
        FAIL(ST_UNSUPPORTED,
             "no GPU: the driver says \"%s\" (%d); run where there is one, or use backend.name = "
             "\"cpu\"",
             rc == cudaSuccess ? "no device" : cudaGetErrorString(rc),
             (int)(rc == cudaSuccess ? cudaErrorNoDevice : rc));
    }
    if (n == 1) {
        device = 0; /* whether somebody else has it, too, the UUID tells */
    }
    if (device >= n) {
        FAIL(ST_USER,
             "GPU %d is asked for, this host shows %d (CUDA_VISIBLE_DEVICES counts): start at most "
             "%d compute ranks on it",
             device, n, n);
    }
    g->device = device < 0 ? 0 : device;
    struct cudaDeviceProp prop;
    TRY_CUDA(cudaSetDevice(g->device));
    TRY_CUDA(cudaGetDeviceProperties(&prop, g->device));
    if (prop.major < OLDEST_MAJOR) {
        FAIL(ST_UNSUPPORTED, "%s has compute capability %d.%d; this build runs on 8.0 and newer",
             prop.name, prop.major, prop.minor);
    }
    const unsigned char *u = (const unsigned char *)prop.uuid.bytes;
    int used = snprintf(g->id, sizeof g->id, "GPU-");
    for (int i = 0; i < 16; i++) {
        used += snprintf(g->id + used, sizeof g->id - (size_t)used, "%02x", u[i]);
    }
    snprintf(g->name, sizeof g->name, "%s", prop.name);
    snprintf(g->arch, sizeof g->arch, "sm_%d%d", prop.major, prop.minor);
    g->n_processors = prop.multiProcessorCount;
    return ST_OK;
}

static enum status find_function(struct gpu *g, void **out, const char *name)
{
    enum cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    TRY_CUDA(cudaGetDriverEntryPointByVersion(name, out, 11020, cudaEnableDefault, &found));
#else
    TRY_CUDA(cudaGetDriverEntryPoint(name, out, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) {
        FAIL(ST_UNSUPPORTED, "the GPU's driver lacks %s; CUDA 11.2's or newer is needed", name);
    }
    return ST_OK;
}

static enum status find_functions(struct gpu *g)
{
    struct gpu_impl *i = impl_of(g);
    const struct {
        void **to;
        const char *name;
    } wanted[] = {{(void **)&i->reserve, "cuMemAddressReserve"},
                  {(void **)&i->unreserve, "cuMemAddressFree"},
                  {(void **)&i->create, "cuMemCreate"},
                  {(void **)&i->release, "cuMemRelease"},
                  {(void **)&i->map, "cuMemMap"},
                  {(void **)&i->unmap, "cuMemUnmap"},
                  {(void **)&i->set_access, "cuMemSetAccess"},
                  {(void **)&i->granularity, "cuMemGetAllocationGranularity"}};
    for (size_t k = 0; k < sizeof wanted / sizeof *wanted; k++) {
        TRY(find_function(g, wanted[k].to, wanted[k].name));
    }
    i->prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    i->prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    i->prop.location.id = g->device;
    i->access.location = i->prop.location;
    i->access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    TRY_DRIVER(i->granularity(&g->page_bytes, &i->prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    return ST_OK;
}

static enum status open_parts(struct gpu *g, int device)
{
    TRY(find_device(g, device));
    cudaStream_t stream;
    TRY_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    g->stream = stream;
    for (int i = 0; i < N_PINNED; i++) {
        TRY_CUDA(cudaMallocHost(&impl_of(g)->pinned[i], PINNED_BYTES));
        TRY_CUDA(cudaEventCreateWithFlags(&impl_of(g)->free_again[i], cudaEventDisableTiming));
    }
    return find_functions(g);
}

enum status gpu_open(struct gpu *g, int device)
{
    memset(g, 0, sizeof *g);
    g->impl = calloc(1, sizeof(struct gpu_impl));
    if (!g->impl) {
        FAIL(ST_NOMEM, "no memory for a GPU's description");
    }
    enum status st = open_parts(g, device);
    if (st != ST_OK) {
        gpu_close(g);
        return status_trace(st, __FILE__, __LINE__, __func__);
    }
    return ST_OK;
}

void gpu_close(struct gpu *g)
{
    struct gpu_impl *i = impl_of(g);
    if (i) {
        for (int k = 0; k < N_PINNED; k++) {
            if (i->pinned[k]) {
                cudaFreeHost(i->pinned[k]);
            }
            if (i->free_again[k]) {
                cudaEventDestroy(i->free_again[k]);
            }
        }
        if (g->stream) {
            cudaStreamDestroy(stream_of(g));
        }
        free(i);
    }
    memset(g, 0, sizeof *g);
}

/* ---- memory ---- */

enum status gpu_alloc(struct gpu *g, void **out, size_t bytes)
{
    TRY_CUDA(cudaMalloc(out, bytes ? bytes : 1));
    cudaError_t rc = cudaMemsetAsync(*out, 0, bytes, stream_of(g));
    if (rc != cudaSuccess) {
        cudaFree(*out);
        *out = NULL;
        TRY_CUDA(rc);
    }
    return ST_OK;
}

void gpu_release(struct gpu *g, void *ptr)
{
    (void)g;
    cudaFree(ptr); /* waits for what uses it */
}

/* The next pinned buffer, free of its last copy. */
static enum status pinned_buffer(struct gpu *g, int *which)
{
    struct gpu_impl *i = impl_of(g);
    *which = i->next;
    i->next = (i->next + 1) % N_PINNED;
    TRY_CUDA(cudaEventSynchronize(i->free_again[*which]));
    return ST_OK;
}

enum status gpu_upload(struct gpu *g, void *dst, const void *src_host, size_t bytes)
{
    struct gpu_impl *i = impl_of(g);
    for (size_t done = 0; done < bytes;) {
        size_t n = bytes - done < PINNED_BYTES ? bytes - done : PINNED_BYTES;
        int k = 0;
        TRY(pinned_buffer(g, &k));
        memcpy(i->pinned[k], (const char *)src_host + done, n);
        TRY_CUDA(cudaMemcpyAsync((char *)dst + done, i->pinned[k], n, cudaMemcpyHostToDevice,
                                 stream_of(g)));
        TRY_CUDA(cudaEventRecord(i->free_again[k], stream_of(g)));
        done += n;
    }
    return ST_OK;
}

enum status gpu_upload_rows(struct gpu *g, void *dst, size_t dst_stride, const void *src_host,
                            size_t src_stride, size_t row_bytes, size_t n_rows)
{
    struct gpu_impl *i = impl_of(g);
    if (src_stride == row_bytes && dst_stride == row_bytes) {
        return gpu_upload(g, dst, src_host, row_bytes * n_rows);
    }
    size_t per_buffer = PINNED_BYTES / row_bytes;
    if (per_buffer == 0) { /* rows longer than a buffer: one at a time */
        for (size_t r = 0; r < n_rows; r++) {
            TRY(gpu_upload(g, (char *)dst + r * dst_stride, (const char *)src_host + r * src_stride,
                           row_bytes));
        }
        return ST_OK;
    }
    for (size_t done = 0; done < n_rows;) {
        size_t n = n_rows - done < per_buffer ? n_rows - done : per_buffer;
        int k = 0;
        TRY(pinned_buffer(g, &k));
        for (size_t r = 0; r < n; r++) {
            memcpy((char *)i->pinned[k] + r * row_bytes,
                   (const char *)src_host + (done + r) * src_stride, row_bytes);
        }
        TRY_CUDA(cudaMemcpy2DAsync((char *)dst + done * dst_stride, dst_stride, i->pinned[k],
                                   row_bytes, row_bytes, n, cudaMemcpyHostToDevice, stream_of(g)));
        TRY_CUDA(cudaEventRecord(i->free_again[k], stream_of(g)));
        done += n;
    }
    return ST_OK;
}

enum status gpu_download(struct gpu *g, void *dst_host, const void *src, size_t bytes)
{
    struct gpu_impl *i = impl_of(g);
    for (size_t done = 0; done < bytes;) {
        size_t n = bytes - done < PINNED_BYTES ? bytes - done : PINNED_BYTES;
        int k = 0;
        TRY(pinned_buffer(g, &k));
        TRY_CUDA(cudaMemcpyAsync(i->pinned[k], (const char *)src + done, n, cudaMemcpyDeviceToHost,
                                 stream_of(g)));
        TRY_CUDA(cudaStreamSynchronize(stream_of(g)));
        memcpy((char *)dst_host + done, i->pinned[k], n);
        done += n;
    }
    return ST_OK;
}

enum status gpu_zero(struct gpu *g, void *dst, size_t bytes)
{
    TRY_CUDA(cudaMemsetAsync(dst, 0, bytes, stream_of(g)));
    return ST_OK;
}

enum status gpu_sync(struct gpu *g)
{
    TRY_CUDA(cudaStreamSynchronize(stream_of(g)));
    return ST_OK;
}

enum status gpu_launched(struct gpu *g, const char *kernel)
{
    cudaError_t rc = cudaGetLastError();
    if (rc != cudaSuccess) {
        FAIL(ST_CUDA, "GPU %d: the launch of %s failed: %s (%d)", g->device, kernel,
             cudaGetErrorString(rc), (int)rc);
    }
    return ST_OK;
}

/* ---- address ranges ---- */

enum status gpu_reserve(struct gpu *g, void **out, size_t bytes)
{
    CUdeviceptr at = 0;
    TRY_DRIVER(impl_of(g)->reserve(&at, bytes, 0, 0, 0));
    *out = (void *)at;
    return ST_OK;
}

void gpu_unreserve(struct gpu *g, void *begin, size_t bytes)
{
    impl_of(g)->unreserve((CUdeviceptr)begin, bytes);
}

/* The mapping keeps the memory; its handle is not needed again. */
enum status gpu_commit(struct gpu *g, void *begin, size_t bytes)
{
    struct gpu_impl *i = impl_of(g);
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at = (CUdeviceptr)begin;
    TRY_DRIVER(i->create(&handle, bytes, &i->prop, 0));
    CUresult rc = i->map(at, bytes, 0, handle, 0);
    i->release(handle);
    TRY_DRIVER(rc);
    rc = i->set_access(at, bytes, &i->access, 1);
    if (rc != CUDA_SUCCESS) {
        i->unmap(at, bytes);
        TRY_DRIVER(rc);
    }
    return ST_OK;
}

void gpu_decommit(struct gpu *g, void *begin, size_t bytes)
{
    impl_of(g)->unmap((CUdeviceptr)begin, bytes);
}
