/* Shards and canonical segments: every size 1..16 of several models in one process.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "dist/shard.h"

#include "tests/check.h"

enum { MAX_SIZE = 16, MAX_SIZES = 10 };

struct model_case {
    const char *name;
    struct model_config config;
    int32_t group;
    int32_t sizes[MAX_SIZES]; /* those of 1..16 that fit, ends with 0; worked out by hand */
    int32_t attn_unit;        /* columns */
};

/* Sizes by hand: the units of attention input (columns / lcm(group, head_dim)) divided by the size
 * without rest, and the query heads of a rank whole KV groups or inside one. */
static const struct model_case cases[] = {
    // 256 columns / 64 = 4 units of 2 heads
    {"embedded",
     {.hidden = 256, .n_heads = 8, .n_kv_heads = 4, .head_dim = 32, .ffn = 512, .vocab = 1536},
     64,
     {1, 2, 4},
     64},
    // 8 units of 1 head; two heads share a KV head: 8 ranks replicate it
    {"embedded dense",
     {.hidden = 256, .n_heads = 8, .n_kv_heads = 4, .head_dim = 32, .ffn = 512, .vocab = 1536},
     1,
     {1, 2, 4, 8},
     32},
    // 64 columns / 32 = 2 units of 4 heads
    {"stories",
     {.hidden = 64, .n_heads = 8, .n_kv_heads = 4, .head_dim = 8, .ffn = 172, .vocab = 512},
     32,
     {1, 2},
     32},
    {"MobileLLaMA-1.4B",
     {.hidden = 2048,
      .n_heads = 16,
      .n_kv_heads = 16,
      .head_dim = 128,
      .ffn = 5632,
      .vocab = 32000},
     64,
     {1, 2, 4, 8, 16},
     128},
    {"Llama-3.1-8B",
     {.hidden = 4096,
      .n_heads = 32,
      .n_kv_heads = 8,
      .head_dim = 128,
      .ffn = 14336,
      .vocab = 128256},
     128,
     {1, 2, 4, 8, 16},
     128},
    {"Vicuna-7B",
     {.hidden = 4096,
      .n_heads = 32,
      .n_kv_heads = 32,
      .head_dim = 128,
      .ffn = 11008,
      .vocab = 32000},
     64,
     {1, 2, 4, 8, 16},
     128},
    // 12 heads in 4 KV groups of 3: by units 1, 2, 3, 4, 6, 12; with 3 ranks heads 4..8 lie in the
    // groups 3..5 and 6..8; with 6 ranks 2..3 in two groups; with 12 each head in one
    {"three to one",
     {.hidden = 768, .n_heads = 12, .n_kv_heads = 4, .head_dim = 64, .ffn = 3072, .vocab = 1000},
     64,
     {1, 2, 4, 12},
     64},
    // group longer than a head and no multiple: lcm(64, 80) = 320 = 4 heads; 480 columns: 1.5 units
    {"short last unit",
     {.hidden = 480, .n_heads = 6, .n_kv_heads = 6, .head_dim = 80, .ffn = 200, .vocab = 77},
     64,
     {1, 2},
     320},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

static bool listed(const struct model_case *c, int32_t size)
{
    for (int i = 0; i < MAX_SIZES && c->sizes[i] != 0; i++) {
        if (c->sizes[i] == size) {
            return true;
        }
    }
    return false;
}

/* Segments of this rank are as the rank says, inside [begin, end), at unit borders. Adds their
 * global ends to ends[]. */
static void check_share(const struct segment_share *s, int32_t begin, int32_t end, int32_t unit,
                        int32_t whole, int32_t *ends)
{
    CHECK(s->begin < s->end && s->end <= s->total);
    CHECK(s->cut[0] == 0);
    CHECK(s->cut[s->end - s->begin] == end - begin);
    for (int32_t i = s->begin; i < s->end; i++) {
        int32_t at = begin + s->cut[i - s->begin + 1];
        CHECK(s->cut[i - s->begin + 1] > s->cut[i - s->begin]);
        CHECK(at % unit == 0 || at == whole);
        ends[i] = at;
    }
}

static void check_size(const struct model_case *c, const struct shard_options *o, int32_t *ends,
                       int32_t totals[3])
{
    const struct model_config *m = &c->config;
    int32_t head = 0, ffn = 0, vocab = 0, per_kv = m->n_heads / m->n_kv_heads;
    int32_t segment[3] = {0, 0, 0}, first_ratio = 0;
    bool kv_held[64] = {false};
    for (int32_t r = 0; r < o->size; r++) {
        struct model_shard s;
        CHECK_OK(shard_model(&s, m, c->group, o, r));
        CHECK(s.rank == r && s.size == o->size);
        // disjoint, one after the other
        CHECK(s.head_begin == head && s.ffn_begin == ffn && s.vocab_begin == vocab);
        head = s.head_end;
        ffn = s.ffn_end;
        vocab = s.vocab_end;
        CHECK(s.attn.begin == segment[0] && s.mlp.begin == segment[1] &&
              s.vocab.begin == segment[2]);
        segment[0] = s.attn.end;
        segment[1] = s.mlp.end;
        segment[2] = s.vocab.end;
        totals[0] = s.attn.total;
        totals[1] = s.mlp.total;
        totals[2] = s.vocab.total;
        check_share(&s.attn, s.head_begin * m->head_dim, s.head_end * m->head_dim, c->attn_unit,
                    m->n_heads * m->head_dim, ends);
        check_share(&s.mlp, s.ffn_begin, s.ffn_end, c->group, m->ffn, ends + 64);
        check_share(&s.vocab, s.vocab_begin, s.vocab_end, 1, m->vocab, ends + 128);
        // every query head finds its KV head here, at the place that a uniform ratio says
        int32_t local = s.head_end - s.head_begin, kv = s.kv_end - s.kv_begin;
        CHECK(local > 0 && kv > 0 && local % kv == 0);
        CHECK(s.kv_begin >= 0 && s.kv_end <= m->n_kv_heads);
        first_ratio = r == 0 ? local / kv : first_ratio;
        CHECK(local / kv == first_ratio || local < first_ratio * kv);
        for (int32_t h = s.head_begin; h < s.head_end; h++) {
            CHECK(s.kv_begin + (h - s.head_begin) / (local / kv) == h / per_kv);
        }
        for (int32_t k = s.kv_begin; k < s.kv_end; k++) {
            kv_held[k] = true;
        }
    }
    CHECK(head == m->n_heads && ffn == m->ffn && vocab == m->vocab);
    for (int i = 0; i < 3; i++) {
        CHECK(segment[i] == totals[i]);
    }
    for (int32_t k = 0; k < m->n_kv_heads; k++) {
        CHECK(kv_held[k]);
    }
}

static void test_plain(const struct model_case *c)
{
    for (int32_t size = 1; size <= MAX_SIZE; size++) {
        struct shard_options o = {.size = size};
        bool fits = shard_fits(&c->config, c->group, &o);
        if (!CHECK(fits == listed(c, size))) {
            fprintf(stderr, "    %s, %d ranks: fits %d\n", c->name, size, fits);
        }
        if (fits) {
            int32_t ends[192] = {0}, totals[3];
            check_size(c, &o, ends, totals);
            CHECK(totals[0] == size && totals[1] == size && totals[2] == size);
        } else {
            struct model_shard s;
            CHECK_STATUS(shard_model(&s, &c->config, c->group, &o, 0), ST_USER,
                         "tensor ranks do not fit this model");
        }
    }
}

/* The segments of all ranks together are the same for every size. */
static void test_reproducible(const struct model_case *c, int32_t segments)
{
    struct shard_options o = {.size = 1, .reproducible = true, .segments = segments};
    int32_t one[192] = {0}, one_totals[3];
    check_size(c, &o, one, one_totals);
    int32_t units = (c->config.n_heads * c->config.head_dim + c->attn_unit - 1) / c->attn_unit;
    CHECK(one_totals[0] == (segments < units ? segments : units));
    int n_fits = 0;
    for (int32_t size = 2; size <= MAX_SIZE; size++) {
        o.size = size;
        if (!shard_fits(&c->config, c->group, &o)) {
            continue;
        }
        n_fits++;
        CHECK(size <= segments && listed(c, size));
        int32_t ends[192] = {0}, totals[3];
        check_size(c, &o, ends, totals);
        CHECK(memcmp(one, ends, sizeof ends) == 0);
        CHECK(memcmp(one_totals, totals, sizeof totals) == 0);
    }
    CHECK(n_fits > 0 || segments < 2);
}

static void test_by_hand(void)
{
    // stories: ffn 172 in groups of 32: 6 units, the last of 12 columns
    const struct model_case *stories = &cases[2];
    struct shard_options two = {.size = 2};
    struct model_shard s;
    CHECK_OK(shard_model(&s, &stories->config, 32, &two, 1));
    CHECK(s.head_begin == 4 && s.head_end == 8 && s.kv_begin == 2 && s.kv_end == 4);
    CHECK(s.ffn_begin == 96 && s.ffn_end == 172);
    CHECK(s.vocab_begin == 256 && s.vocab_end == 512);
    CHECK(s.mlp.total == 2 && s.mlp.begin == 1 && s.mlp.end == 2 && s.mlp.cut[1] == 76);
    // with 8 segments asked for: 2 of attention, 6 of the MLP, 8 of the vocabulary
    two.reproducible = true;
    two.segments = 8;
    CHECK_OK(shard_model(&s, &stories->config, 32, &two, 1));
    CHECK(s.attn.total == 2 && s.attn.begin == 1 && s.attn.end == 2 && s.attn.cut[1] == 32);
    CHECK(s.mlp.total == 6 && s.mlp.begin == 3 && s.mlp.end == 6);
    CHECK(s.mlp.cut[0] == 0 && s.mlp.cut[1] == 32 && s.mlp.cut[2] == 64 && s.mlp.cut[3] == 76);
    CHECK(s.vocab.total == 8 && s.vocab.begin == 4 && s.vocab.cut[4] == 256);
    // Vicuna on 8 ranks: 172 MLP units: rank 1 has units 21..43 (21.5 to 43)
    struct shard_options eight = {.size = 8};
    CHECK_OK(shard_model(&s, &cases[5].config, 64, &eight, 1));
    CHECK(s.ffn_begin == 21 * 64 && s.ffn_end == 43 * 64);
    CHECK(s.head_begin == 4 && s.head_end == 8);
    // Llama on 16 ranks: two query heads of a group of four; the KV head is replicated
    struct shard_options sixteen = {.size = 16};
    CHECK_OK(shard_model(&s, &cases[4].config, 128, &sixteen, 3));
    CHECK(s.head_begin == 6 && s.head_end == 8 && s.kv_begin == 1 && s.kv_end == 2);
}

static void test_errors(void)
{
    struct model_shard s;
    const struct model_config *embedded = &cases[0].config;
    struct shard_options o = {.size = 3};
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "use 1, 2 or 4");
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER,
                 "3 tensor ranks do not fit this model (4 units of attention input");
    o.size = 3;
    CHECK_STATUS(shard_model(&s, &cases[2].config, 32, &o, 0), ST_USER, "use 1 or 2");
    CHECK_STATUS(shard_model(&s, &cases[4].config, 128, &o, 0), ST_USER,
                 "use 1, 2, 4, 8, 16 or 32");
    // fewer segments than ranks
    o = (struct shard_options){.size = 4, .reproducible = true, .segments = 2};
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "in 2 segments");
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "use 1 or 2");
    o.segments = 65;
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "parallel.segments = 65");
    CHECK(!shard_fits(embedded, 64, &o));
    o.segments = 0;
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "expected 1 to 64");
    int32_t sizes[] = {0, -1, 65, 1 << 30};
    for (int i = 0; i < 4; i++) {
        o = (struct shard_options){.size = sizes[i]};
        CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "use 1, 2 or 4");
        CHECK(!shard_fits(embedded, 64, &o));
    }
    // one head: only one rank
    struct model_config one = {
        .hidden = 64, .n_heads = 1, .n_kv_heads = 1, .head_dim = 64, .ffn = 64, .vocab = 10};
    o = (struct shard_options){.size = 2};
    CHECK_STATUS(shard_model(&s, &one, 128, &o, 0), ST_USER, "use 1");
    o.size = 1;
    CHECK_OK(shard_model(&s, &one, 128, &o, 0));
    CHECK(s.head_end == 1 && s.ffn_end == 64 && s.vocab_end == 10);
}

int main(void)
{
    for (int i = 0; i < N_CASES; i++) {
        test_plain(&cases[i]);
        static const int32_t segments[] = {1, 2, 4, 8, 64};
        for (int k = 0; k < 5; k++) {
            test_reproducible(&cases[i], segments[k]);
        }
    }
    test_by_hand();
    test_errors();
    return check_report();
}
