// SPDX-License-Identifier: Apache-2.0
#include "core/tokenizer_spm.h"

#include <sentencepiece_processor.h>

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

struct spm {
    sentencepiece::SentencePieceProcessor processor;
};

// Nothing thrown may reach C. Runs f, which returns a status of the library.
template <typename F> static bool guarded(char *why, size_t why_bytes, F f)
{
    try {
        const sentencepiece::util::Status status = f();
        if (status.ok()) {
            return true;
        }
        std::snprintf(why, why_bytes, "%s", status.ToString().c_str());
    } catch (const std::exception &e) {
        std::snprintf(why, why_bytes, "%s", e.what());
    } catch (...) {
        std::snprintf(why, why_bytes, "an unknown error");
    }
    return false;
}

bool spm_open(struct spm **out, const void *model, size_t bytes, char *why, size_t why_bytes)
{
    struct spm *spm = nullptr;
    *out = nullptr;
    const bool good = guarded(why, why_bytes, [&] {
        spm = new struct spm;
        return spm->processor.LoadFromSerializedProto({static_cast<const char *>(model), bytes});
    });
    if (!good) {
        delete spm;
        return false;
    }
    *out = spm;
    return true;
}

void spm_close(struct spm *spm)
{
    delete spm;
}

int32_t spm_n_pieces(const struct spm *spm)
{
    return spm->processor.GetPieceSize();
}

int32_t spm_bos(const struct spm *spm)
{
    return spm->processor.bos_id();
}

bool spm_encode(const struct spm *spm, const char *text, size_t bytes, spm_sink *sink, void *ctx,
                char *why, size_t why_bytes)
{
    std::vector<int> ids;
    why[0] = '\0';
    if (!guarded(why, why_bytes, [&] { return spm->processor.Encode({text, bytes}, &ids); })) {
        return false;
    }
    for (const int id : ids) {
        if (!sink(ctx, id)) {
            return false;
        }
    }
    return true;
}
