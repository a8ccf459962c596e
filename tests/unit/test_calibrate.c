/* The calibration's forward pass, for every model family: with all matrices put back as they are,
 * the second moments of the head's input must lead to those of the logits that Hugging Face
 * transformers gave for the same ids (tests/golden/families): head H head^T = logits^T logits / n.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "core/mem.h"
#include "experiments/quantise/calibrate.h"
#include "experiments/quantise/nested_buffer.h"
#include "kernels/kernels.h"
#include "tests/check.h"
#include "tests/gen.h"

enum { POSITIONS = 96, VOCAB = 64, NPY_HEADER = 128 };

/* A matrix of the checkpoint as a table per row: every column has a code of its own, so that
 * weights are off by the rounding to F16 only. */
static void put_matrix(struct calibrator *cal, const struct model_config *config,
                       const struct checkpoint *ckpt, int layer, enum matrix_role role)
{
    char name[MODEL_NAME_BYTES], tensor[MODEL_NAME_BYTES + 16];
    struct fit_spec spec = {.group_cols = 32, .n_planes = 8};
    struct nested_buffer buffer;
    struct tensor w;
    int32_t rows, cols;
    model_matrix_name(name, config, layer, role);
    snprintf(tensor, sizeof tensor, "%s.weight", name);
    model_matrix_shape(config, role, &rows, &cols);
    spec.kind[8] = LEVEL_LUT;
    CHECK_OK(checkpoint_get_shape(ckpt, tensor, rows, cols, &w));
    CHECK_OK(nested_buffer_create(&buffer, &spec, rows, cols));
    CHECK(cols <= LEVELS_MAX);
    for (int32_t row = 0; row < rows; row++) {
        uint8_t code[LEVELS_MAX] = {0};
        uint16_t lut[LEVELS_MAX] = {0};
        float value[LEVELS_MAX];
        floats_from(value, (const char *)w.data + (size_t)(row * cols) * dtype_bytes(w.dtype),
                    w.dtype, (size_t)cols);
        for (int32_t col = 0; col < cols; col++) {
            code[col] = (uint8_t)col;
            lut[col] = f32_to_f16(value[col]);
        }
        nested_buffer_put_codes(&buffer, row, code);
        nested_buffer_put_lut(&buffer, row, 8, lut);
    }
    CHECK_OK(calibrator_put(cal, layer, role, &buffer.source));
    nested_buffer_free(&buffer);
}

/* Normalised mean square difference of head H head^T and logits^T logits / n, biases taken off. */
static double logit_moments_nmse(const struct hessian *h, const struct model_config *config,
                                 const struct checkpoint *ckpt, float *logits)
{
    struct tensor head, bias;
    float *w = NULL, b[VOCAB] = {0}, *hw = NULL, *got = NULL, *want = NULL;
    int32_t n = config->hidden;
    CHECK_OK(checkpoint_get_shape(
        ckpt, config->tied_head ? MODEL_EMBED_NAME : MODEL_HEAD_NAME ".weight", VOCAB, n, &head));
    CHECK_OK(MEM_NEW(&w, VOCAB * n));
    CHECK_OK(MEM_NEW(&hw, VOCAB * n));
    CHECK_OK(MEM_NEW(&got, VOCAB * VOCAB));
    CHECK_OK(MEM_NEW(&want, VOCAB * VOCAB));
    floats_from(w, head.data, head.dtype, (size_t)(VOCAB * n));
    if (config->head_bias) {
        CHECK_OK(checkpoint_get_shape(ckpt, MODEL_HEAD_NAME ".bias", VOCAB, 0, &bias));
        floats_from(b, bias.data, bias.dtype, VOCAB);
    }
    for (int i = 0; i < POSITIONS * VOCAB; i++) {
        logits[i] -= b[i % VOCAB];
    }
    blas_gemm(VOCAB, n, n, 1, w, n, h->h, n, 0, hw, n);
    blas_gemm_bt(VOCAB, VOCAB, n, 1, hw, n, w, n, 0, got, VOCAB);
    for (int i = 0; i < VOCAB * VOCAB; i++) {
        double sum = 0;
        for (int p = 0; p < POSITIONS; p++) {
            sum += (double)logits[p * VOCAB + i / VOCAB] * (double)logits[p * VOCAB + i % VOCAB];
        }
        want[i] = (float)(sum / POSITIONS);
    }
    double nmse = check_nmse(got, want, VOCAB * VOCAB);
    mem_free(w);
    mem_free(hw);
    mem_free(got);
    mem_free(want);
    return nmse;
}

/* skip: the moments of no matrix are asked for, as when blocks of an earlier run are taken over. */
static double run_family(const char *folder, bool skip)
{
    struct model_config config;
    struct checkpoint *ckpt = NULL;
    struct calibrator *cal = NULL;
    struct windows windows;
    const struct hessian *h;
    const struct calibrator_options options = {.damp = 0.01, .n_threads = 2};
    char path[GEN_PATH_BYTES];
    size_t bytes;
    CHECK_OK(model_config_read(&config, folder));
    CHECK_OK(checkpoint_open(&ckpt, folder));
    CHECK(config.vocab == VOCAB);
    /* ids.json is one row, a list; the reader takes an object */
    char *text = gen_read_file(gen_path(path, folder, "ids.json"), &bytes), *rows = NULL;
    CHECK_OK(mem_alloc_array((void **)&rows, bytes + 32, 1));
    snprintf(rows, bytes + 32, "{\"ids\": [%s]}", text);
    char temporary[GEN_PATH_BYTES];
    gen_folder(temporary);
    gen_put_text(temporary, "ids.json", rows);
    CHECK_OK(windows_read(&windows, gen_path(path, temporary, "ids.json"), folder, VOCAB,
                          config.context, 0));
    CHECK(windows.n == 1 && windows.begin[1] == POSITIONS);
    CHECK_OK(calibrator_create(&cal, &config, ckpt, &windows, &options));
    for (int layer = 0; layer < config.n_layers; layer++) {
        for (int role = 0; role < M_N_ROLES; role++) {
            int32_t r, cols;
            if (!model_has_role(&config, (enum matrix_role)role)) {
                continue;
            }
            model_matrix_shape(&config, (enum matrix_role)role, &r, &cols);
            if (!skip) {
                CHECK_OK(calibrator_moments(cal, layer, (enum matrix_role)role, &h));
                CHECK(h->n == cols && h->n_tok == POSITIONS);
            }
            put_matrix(cal, &config, ckpt, layer, (enum matrix_role)role);
        }
    }
    CHECK_OK(calibrator_moments(cal, config.n_layers, M_Q, &h));
    char *npy = gen_read_file(gen_path(path, folder, "logits.npy"), &bytes);
    CHECK(bytes == NPY_HEADER + POSITIONS * VOCAB * sizeof(float));
    float logits[POSITIONS * VOCAB];
    memcpy(logits, npy + NPY_HEADER, sizeof logits);
    double nmse = logit_moments_nmse(h, &config, ckpt, logits);
    gen_remove(temporary);
    free(npy);
    free(text);
    mem_free(rows);
    calibrator_destroy(&cal);
    windows_free(&windows);
    checkpoint_close(&ckpt);
    return nmse;
}

int main(void)
{
    static const char *const names[] = {
        "llama",      "llama-bias", "llama-linear",  "llama-llama3",      "mistral", "qwen2",
        "qwen2-tied", "stablelm",   "stablelm-bias", "stablelm-parallel", "phi",     "phi-gqa-gelu",
    };
    kernels_register_all();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[GEN_PATH_BYTES];
        snprintf(path, sizeof path, "%s/families/%s", PMPD_GOLDEN, names[i]);
        double nmse = run_family(path, false), skipped = run_family(path, true);
        printf("%-20s NMSE of the logits' second moments %.2g\n", names[i], nmse);
        CHECK(nmse < 1e-5);
        CHECK(!(nmse != skipped));
    }
    return check_report();
}
