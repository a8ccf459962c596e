/* The SentencePiece library behind C functions: the only C++ of core/, and only because that
 * library has no other face. The model's bytes have been checked by tokenizer_model.c.
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef PMPD_CORE_TOKENIZER_SPM_H
#define PMPD_CORE_TOKENIZER_SPM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct spm;

/* A serialised ModelProto. false: why holds a line that says what is wrong. */
bool spm_open(struct spm **out, const void *model, size_t bytes, char *why, size_t why_bytes);
void spm_close(struct spm *spm); /* NULL is allowed */
int32_t spm_n_pieces(const struct spm *spm);
int32_t spm_bos(const struct spm *spm); /* -1: none */

/* Takes one id; false ends the encoding. */
typedef bool spm_sink(void *ctx, int32_t id);
/* Ids of valid UTF-8, without BOS. false: why says what is wrong, and is empty when sink ended it.
 */
bool spm_encode(const struct spm *spm, const char *text, size_t bytes, spm_sink *sink, void *ctx,
                char *why, size_t why_bytes);

#ifdef __cplusplus
}
#endif

#endif
