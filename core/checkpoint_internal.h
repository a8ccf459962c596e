/* Inside of a checkpoint, shared by checkpoint.c (opening and checking) and checkpoint_read.c
 * (access, nested matrices, digest). Only the test of mutations includes it, too.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_CHECKPOINT_INTERNAL_H
#define PMPD_CORE_CHECKPOINT_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "core/checkpoint.h"

enum { CHECKPOINT_DTYPE_TEXT = 16, CHECKPOINT_PATH_BYTES = 4096 };

struct shard {
    char *path;         /* owned */
    unsigned char *map; /* (bytes) mapped read-only */
    size_t bytes;
    size_t data_at; /* where the data part begins */
};

struct entry {
    char *name;                             /* owned */
    char dtype_text[CHECKPOINT_DTYPE_TEXT]; /* as the file spells it */
    enum dtype dtype;                       /* DT_N: not one of ours */
    int32_t shard;
    size_t begin, bytes; /* inside the data part */
    int32_t n_dims;      /* 0: a scalar */
    int32_t dims[TENSOR_MAX_DIMS];
};

struct checkpoint {
    char *path; /* owned; the file or index that was opened, for messages */
    struct shard *shards;
    int32_t n_shards, room_shards;
    struct entry *entries; /* in order of name once open */
    int32_t n_entries, room_entries;
};

/* The tensor of that name, or NULL. Only once the entries are sorted. */
const struct entry *checkpoint_find(const struct checkpoint *ckpt, const char *name);
/* folder/file. Errors: ST_IO when it does not fit. */
MUST_CHECK enum status checkpoint_join(char out[CHECKPOINT_PATH_BYTES], const char *folder,
                                       const char *file);

#endif
