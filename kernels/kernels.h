/* The backends of this build. Owns nothing but their registration; each backend's table lives in
 * its own file. Includes only core.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_KERNELS_KERNELS_H
#define PMPD_KERNELS_KERNELS_H

#include "core/backend.h"

/* The scalar oracle: strict IEEE, one thread, sums in double; the definition that the other
 * backends are tested against. */
extern const struct backend_ops cpu_ref_ops;
/* Threads and, where the processor has it, AVX2. */
extern const struct backend_ops cpu_ops;
/* NVIDIA GPUs; in a build without CUDA kernels it answers ST_UNSUPPORTED. */
extern const struct backend_ops cuda_ops;

/* Registers all of them; a second call does nothing. Call once at start, before threads. */
void kernels_register_all(void);

#endif
