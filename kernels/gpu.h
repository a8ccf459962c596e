/* A GPU as the cuda backend needs it: memory, one stream, errors. Two implementations of the same
 * functions: gpu_cuda.cu on a device, gpu_emulated.cc on the host (for tests; kernels then run by
 * kernels/emulate.h). C and C++ include this.
 *
 * One stream: everything runs in the order of the calls. Copies to the device go through pinned
 * buffers of the implementation, so the source may change as soon as gpu_upload returns.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_GPU_H
#define PMPD_KERNELS_GPU_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "core/status.h"

struct gpu {
    void *impl;   /* owned by the implementation */
    void *stream; /* cudaStream_t; NULL when emulated */
    int device;
    char id[64];       /* "GPU-" and its UUID; "" when emulated: everybody has one */
    char name[256];    /* "NVIDIA H100 80GB HBM3", "emulated" */
    char arch[16];     /* "sm_90", "emulated": part of the arithmetic class */
    int n_processors;  /* streaming multiprocessors */
    size_t page_bytes; /* granularity of gpu_commit */
};

/* device: its number; -1: the first. Where only one can be seen (a batch system gave this rank its
 * own) it is that one, whatever the number. Errors: ST_UNSUPPORTED (no device, no driver: with the
 * driver's reason; a device too old for this build), ST_USER (no such device: how many there are).
 * The caller owns *g, back with gpu_close (a zeroed one is allowed). */
MUST_CHECK enum status gpu_open(struct gpu *g, int device);
void gpu_close(struct gpu *g);

MUST_CHECK enum status gpu_alloc(struct gpu *g, void **out, size_t bytes); /* zeroed */
void gpu_release(struct gpu *g, void *ptr);                                /* NULL too */
MUST_CHECK enum status gpu_upload(struct gpu *g, void *dst, const void *src_host, size_t bytes);
/* n_rows rows of row_bytes each, src_stride bytes apart in host memory, dst_stride on the device.
 */
MUST_CHECK enum status gpu_upload_rows(struct gpu *g, void *dst, size_t dst_stride,
                                       const void *src_host, size_t src_stride, size_t row_bytes,
                                       size_t n_rows);
/* Waits for the copy. */
MUST_CHECK enum status gpu_download(struct gpu *g, void *dst_host, const void *src, size_t bytes);
MUST_CHECK enum status gpu_zero(struct gpu *g, void *dst, size_t bytes);
/* Waits for everything; reports what went wrong since the last look. */
MUST_CHECK enum status gpu_sync(struct gpu *g);
/* After a launch: ST_CUDA with the kernel's name when it was not accepted (or, emulated, when it
 * did something wrong). */
MUST_CHECK enum status gpu_launched(struct gpu *g, const char *kernel);

/* Address space without memory, and memory for pages of it. Addresses stay valid until
 * gpu_unreserve; begin and bytes are multiples of page_bytes. Fresh pages hold anything. */
MUST_CHECK enum status gpu_reserve(struct gpu *g, void **out, size_t bytes);
void gpu_unreserve(struct gpu *g, void *begin, size_t bytes);
MUST_CHECK enum status gpu_commit(struct gpu *g, void *begin, size_t bytes);
void gpu_decommit(struct gpu *g, void *begin, size_t bytes);

#ifdef __cplusplus
}
#endif

#endif
