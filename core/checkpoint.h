/* Tensors by name from a model folder: one model.safetensors, or shards listed by
 * model.safetensors.index.json. Files are mapped read-only and checked whole before use: header
 * size, JSON, dtypes, shapes, offsets inside the data part, no overlap, byte counts that equal
 * shape times dtype. Nothing in a hostile file can make a later read leave the mapping.
 * Also writes safetensors files (to a temporary name, fsync, rename).
 * Source: the safetensors format (huggingface/safetensors README, "Format").
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_CHECKPOINT_H
#define PMPD_CORE_CHECKPOINT_H

#include <stdbool.h>
#include <stddef.h>

#include "core/bitplane.h"
#include "core/json.h"
#include "core/status.h"
#include "core/tensor.h"

struct checkpoint; /* opaque: mappings and a name table */

/* Opens folder/model.safetensors or the shards of folder/model.safetensors.index.json.
 * Errors: ST_IO (missing, unreadable: says what was looked for), ST_FORMAT (damaged, with file and
 * tensor name). The caller owns *out. */
MUST_CHECK enum status checkpoint_open(struct checkpoint **out, const char *folder);
void checkpoint_close(struct checkpoint **ckpt);

/* Number of tensors, and the i-th in order of name. */
int checkpoint_n_tensors(const struct checkpoint *ckpt);
const char *checkpoint_name(const struct checkpoint *ckpt, int i);
/* A scalar is (1). data is NULL where checkpoint_get would refuse the tensor; dtype is DT_N where
 * it is none of ours. */
struct tensor checkpoint_tensor(const struct checkpoint *ckpt, int i);
/* The element type as the file spells it: "F8_E4M3" too. */
const char *checkpoint_dtype(const struct checkpoint *ckpt, int i);
bool checkpoint_has(const struct checkpoint *ckpt, const char *name);
/* A borrowed, read-only view into the mapping, aligned to its element, valid until
 * checkpoint_close. Errors: ST_FORMAT: no such tensor (names the file and the nearest names), its
 * dtype cannot be used here (F64, I8, ...: named), or its data are not aligned (early writers of
 * the format did not pad the header; the message says how to write the file again). */
MUST_CHECK enum status checkpoint_get(const struct checkpoint *ckpt, const char *name,
                                      struct tensor *out);
/* Weights: the same, the shape must be (d0) or (d0, d1) [d1 = 0: one dimension], and the dtype F32,
 * F16 or BF16. Errors: ST_SHAPE, "NAME in FILE: expected (a, b) from config.json, found (c, d)";
 * ST_FORMAT. */
MUST_CHECK enum status checkpoint_get_shape(const struct checkpoint *ckpt, const char *name,
                                            int32_t d0, int32_t d1, struct tensor *out);

/* A nested matrix NAME (without ".weight"): NAME.planes and the levels that `kinds` names (kind of
 * each precision, LEVEL_NONE: not held). Checks every dtype and shape against n_rows, n_cols,
 * group and n_planes. Pointers in *out borrow from the mapping. */
MUST_CHECK enum status checkpoint_get_nested(const struct checkpoint *ckpt, const char *name,
                                             const enum level_kind kinds[BITS_ALL], int32_t n_rows,
                                             int32_t n_cols, int32_t group_cols, int32_t n_planes,
                                             struct nested_source *out);

/* Tells the system that a tensor's pages will not be read again soon, so that walking through a
 * large file does not fill memory. Reading it again is allowed. */
void checkpoint_done_with(const struct checkpoint *ckpt, const char *name);

/* 32 hexadecimal digits of XXH3-128 over config.json and all tensors (name, dtype, shape, bytes) in
 * order of name: the same for one file or shards of the same tensors. Reads everything once. */
enum { DIGEST_TEXT = 33 };
MUST_CHECK enum status checkpoint_digest(const struct checkpoint *ckpt, const char *folder,
                                         char out[DIGEST_TEXT]);

/* Writing: announce every tensor, then write the bytes in the same order, then finish. */
struct checkpoint_writer;
MUST_CHECK enum status checkpoint_writer_create(struct checkpoint_writer **out, const char *path);
/* Announces one tensor; t->data is not read. Errors: ST_SHAPE: announced twice, after the first
 * bytes, or its data would not be aligned (larger elements go first: the format has no holes). */
MUST_CHECK enum status checkpoint_writer_announce(struct checkpoint_writer *w, const char *name,
                                                  const struct tensor *t);
/* The bytes of the next announced tensor, in one call or in pieces. Errors: ST_SHAPE (more bytes
 * than announced), ST_IO (names the file; disk full). */
MUST_CHECK enum status checkpoint_writer_bytes(struct checkpoint_writer *w, const void *data,
                                               size_t bytes);
/* fsync, rename to the final path. Errors: ST_SHAPE when bytes are missing. */
MUST_CHECK enum status checkpoint_writer_finish(struct checkpoint_writer *w);
/* Without a finished file the temporary one is removed. NULL allowed. */
void checkpoint_writer_destroy(struct checkpoint_writer **w);

#endif
