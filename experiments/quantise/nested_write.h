/* A dense Hugging Face folder in, a nested folder out (DESIGN "Files"): every linear of the layers,
 * and the head if wanted, as planes and levels; embeddings as F16, norms and biases as F32;
 * config.json with quantization_config; tokenizer files copied. One matrix in memory at a time,
 * with calibration one block. SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_EXPERIMENTS_QUANTISE_NESTED_WRITE_H
#define PMPD_EXPERIMENTS_QUANTISE_NESTED_WRITE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/checkpoint.h"
#include "core/collective.h"
#include "core/model.h"
#include "experiments/quantise/calibrate.h"
#include "experiments/quantise/hessian_fit.h"

/* GPTQ needs calibration, JOINT takes it, the others have none. */
enum nested_method {
    METHOD_JOINT,
    METHOD_RTN,
    METHOD_GREEDY,
    METHOD_KMEANS,
    METHOD_GPTQ,
    N_METHODS
};

struct nested_options {
    enum nested_method method;
    const struct windows *calib; /* borrowed; NULL: without data */
    int sweeps;                  /* with calibration: of coordinate descent */
    double damp;                 /* the same: of the second moments */
    struct fit_spec spec;        /* of the layers */
    struct fit_spec head_spec;   /* used when nested_head; same group and number of planes */
    bool nested_head;
    bool force; /* replace a nested model that is at OUT */
    int n_threads;
    const char *version; /* borrowed: the program, for quantization_config */
    struct collective
        *coll; /* borrowed; with calibration: the ranks that share the fit; NULL: one */
};

/* What was done to the matrices of one role; ROLE_HEAD is the nested head. */
enum { ROLE_HEAD = M_N_ROLES, N_ROLES_REPORTED };

struct role_report {
    struct fit_report fit;
    uint64_t planes_bytes, levels_bytes[BITS_ALL]; /* stored */
    uint64_t read_bytes[BITS_ALL];                 /* by one product at that precision */
};

struct nested_report {
    enum model_family family;
    struct role_report role[N_ROLES_REPORTED];
    uint64_t embed_bytes, norm_bytes, head_bytes, files_bytes; /* norms and biases; dense head */
    uint64_t weights_bytes; /* model.safetensors with its header */
    uint64_t total_bytes;   /* of the folder */
    double fit_s, total_s;
    char source_digest[DIGEST_TEXT], calib_digest[WINDOWS_DIGEST_TEXT];
    struct calibrator_times calib; /* with calibration */
    struct fit_times fit;
    int n_resumed; /* blocks of an earlier run that was killed */
};

/* "rtn"; JOINT with calibration is "joint", without "joint-data-free". */
const char *nested_method_name(enum nested_method method, bool calibrated);

/* Writes the nested folder `out` of the dense folder `model`. `out` appears whole or not at all;
 * with calibration finished blocks are kept in `out`.tmp until then, and a second call with the
 * same options goes on from there. Calibration needs the backend "cpu" registered. Errors: those of
 * model_config_read, checkpoint_open and out_folder_begin; ST_USER (model is nested already);
 * ST_SHAPE (a tensor disagrees with config.json); ST_FORMAT (NaN or infinity, an embedding beyond
 * F16; names the tensor). */
MUST_CHECK enum status nested_write(struct nested_report *report, const char *model,
                                    const char *out, const struct nested_options *options);

#endif
