/* Shards and canonical segments: every size 1..16 of several models in one process.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "dist/shard.h"

#include "tests/check.h"

enum { MAX_SIZE = 16 };

struct model_case {
    const char *name;
    struct model_config config;
    int32_t group;
    /* worked out by hand: */
    int32_t attn_unit;  /* columns: lcm(group, head_dim), at most all */
    int32_t attn_units; /* heads * head_dim / attn_unit, rounded up */
    int32_t most;       /* ranks that fit: the fewest units of attention, MLP and vocabulary */
    const char *even;   /* of 1..64: those that give every rank as many heads */
};

static const struct model_case cases[] = {
    // 256 columns in units of 2 heads
    {"embedded",
     {.hidden = 256, .n_heads = 8, .n_kv_heads = 4, .head_dim = 32, .ffn = 512, .vocab = 1536},
     64,
     64,
     4,
     4,
     "1, 2 and 4 share the"},
    {"embedded dense",
     {.hidden = 256, .n_heads = 8, .n_kv_heads = 4, .head_dim = 32, .ffn = 512, .vocab = 1536},
     1,
     32,
     8,
     8,
     "1, 2, 4 and 8 share the"},
    // 64 columns in units of 4 heads
    {"stories",
     {.hidden = 64, .n_heads = 8, .n_kv_heads = 4, .head_dim = 8, .ffn = 172, .vocab = 512},
     32,
     32,
     2,
     2,
     "1 and 2 share the"},
    {"stories in groups of 64",
     {.hidden = 64, .n_heads = 8, .n_kv_heads = 4, .head_dim = 8, .ffn = 172, .vocab = 512},
     64,
     64,
     1,
     1,
     "1 shares the"},
    {"MobileLLaMA-1.4B",
     {.hidden = 2048,
      .n_heads = 16,
      .n_kv_heads = 16,
      .head_dim = 128,
      .ffn = 5632,
      .vocab = 32000},
     64,
     128,
     16,
     16,
     "1, 2, 4, 8 and 16 share the"},
    {"Llama-3.1-8B",
     {.hidden = 4096,
      .n_heads = 32,
      .n_kv_heads = 8,
      .head_dim = 128,
      .ffn = 14336,
      .vocab = 128256},
     128,
     128,
     32,
     32,
     "1, 2, 4, 8, 16 and 32 share the"},
    {"Vicuna-7B",
     {.hidden = 4096,
      .n_heads = 32,
      .n_kv_heads = 32,
      .head_dim = 128,
      .ffn = 11008,
      .vocab = 32000},
     64,
     128,
     32,
     32,
     "1, 2, 4, 8, 16 and 32 share the"},
    {"Qwen2-0.5B",
     {.hidden = 896, .n_heads = 14, .n_kv_heads = 2, .head_dim = 64, .ffn = 4864, .vocab = 151936},
     64,
     64,
     14,
     14,
     "1, 2, 7 and 14 share the"},
    // 896 columns in units of 2 heads
    {"Qwen2-0.5B in groups of 128",
     {.hidden = 896, .n_heads = 14, .n_kv_heads = 2, .head_dim = 64, .ffn = 4864, .vocab = 151936},
     128,
     128,
     7,
     7,
     "1 and 7 share the"},
    {"six to two",
     {.hidden = 192, .n_heads = 6, .n_kv_heads = 2, .head_dim = 32, .ffn = 320, .vocab = 300},
     32,
     32,
     6,
     6,
     "1, 2, 3 and 6 share the"},
    // 192 columns in units of 2 heads
    {"six to two in groups of 64",
     {.hidden = 192, .n_heads = 6, .n_kv_heads = 2, .head_dim = 32, .ffn = 320, .vocab = 300},
     64,
     64,
     3,
     3,
     "1 and 3 share the"},
    // lcm(32, 96) = 96: 1 head; 9 units, of which the MLP has only 4 (100 = 3 * 32 + 4)
    {"nine to three",
     {.hidden = 864, .n_heads = 9, .n_kv_heads = 3, .head_dim = 96, .ffn = 100, .vocab = 500},
     32,
     96,
     9,
     4,
     "1 and 3 share the"},
    // lcm(64, 96) = 192: 2 heads; 864 columns: 4 units and half of one
    {"nine to three in groups of 64",
     {.hidden = 864, .n_heads = 9, .n_kv_heads = 3, .head_dim = 96, .ffn = 640, .vocab = 500},
     64,
     192,
     5,
     5,
     "1 shares the"},
    // lcm(32, 80) = 160: 2 heads; 400 columns: 2 units and half of one
    {"five to five",
     {.hidden = 400, .n_heads = 5, .n_kv_heads = 5, .head_dim = 80, .ffn = 640, .vocab = 100},
     32,
     160,
     3,
     3,
     "1 shares the"},
    // the vocabulary is the smallest
    {"five to five dense",
     {.hidden = 400, .n_heads = 5, .n_kv_heads = 5, .head_dim = 80, .ffn = 641, .vocab = 4},
     1,
     80,
     5,
     4,
     "1 shares the"},
    {"three to one",
     {.hidden = 768, .n_heads = 12, .n_kv_heads = 4, .head_dim = 64, .ffn = 3072, .vocab = 1000},
     64,
     64,
     12,
     12,
     "1, 2, 3, 4, 6 and 12 share the"},
    // lcm(64, 80) = 320 = 4 heads; 480 columns: 1.5 units
    {"short last unit",
     {.hidden = 480, .n_heads = 6, .n_kv_heads = 6, .head_dim = 80, .ffn = 200, .vocab = 77},
     64,
     320,
     2,
     2,
     "1 shares the"},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

static const struct model_case *case_of(const char *name)
{
    for (int i = 0; i < N_CASES; i++) {
        if (strcmp(cases[i].name, name) == 0) {
            return &cases[i];
        }
    }
    CHECK(!"a case of this name");
    return &cases[0];
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

/* All ranks of one size: what they hold tiles the whole, each KV head is where its query heads are,
 * the segments follow one another. ends: (3, 64) where the segments end; totals: how many. */
static void check_size(const struct model_case *c, const struct shard_options *o, int32_t *ends,
                       int32_t totals[3])
{
    const struct model_config *m = &c->config;
    int32_t head = 0, ffn = 0, vocab = 0, per_kv = m->n_heads / m->n_kv_heads;
    int32_t segment[3] = {0, 0, 0}, n_kv_held = 0, kv_seen = 0;
    struct model_shard s;
    for (int32_t r = 0; r < o->size; r++) {
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
        // the KV heads of its query heads, none more; found as the attention operation finds them
        CHECK(s.kv_begin == s.head_begin / per_kv);
        CHECK(s.kv_end == (s.head_end - 1) / per_kv + 1);
        int32_t in_group = s.head_begin - s.kv_begin * per_kv;
        CHECK(in_group >= 0 && in_group < per_kv);
        for (int32_t h = s.head_begin; h < s.head_end; h++) {
            CHECK(s.kv_begin + (in_group + h - s.head_begin) / per_kv == h / per_kv);
        }
        // in order, no KV head left out
        CHECK(s.kv_begin <= kv_seen && s.kv_end >= kv_seen);
        kv_seen = s.kv_end;
        n_kv_held += s.kv_end - s.kv_begin;
    }
    CHECK(head == m->n_heads && ffn == m->ffn && vocab == m->vocab && kv_seen == m->n_kv_heads);
    CHECK(s.n_kv_held == n_kv_held && n_kv_held >= m->n_kv_heads);
    for (int i = 0; i < 3; i++) {
        CHECK(segment[i] == totals[i]);
    }
}

static void check_refused(const struct model_case *c, const struct shard_options *o, int32_t most,
                          const char *even)
{
    struct model_shard s;
    char use[64];
    snprintf(use, sizeof use, "use 1 to %d; ", most);
    CHECK_STATUS(shard_model(&s, &c->config, c->group, o, 0), ST_USER,
                 "tensor ranks do not fit this model");
    CHECK_STATUS(shard_model(&s, &c->config, c->group, o, 0), ST_USER,
                 most == 1 ? "): use 1" : use);
    CHECK_STATUS(shard_model(&s, &c->config, c->group, o, 0), ST_USER, even);
}

static void test_plain(const struct model_case *c)
{
    for (int32_t size = 1; size <= MAX_SIZE; size++) {
        struct shard_options o = {.size = size};
        int32_t ends[192] = {0}, totals[3];
        if (size > c->most) {
            check_refused(c, &o, c->most, c->most == 1 ? "" : c->even);
            continue;
        }
        check_size(c, &o, ends, totals);
        CHECK(totals[0] == size && totals[1] == size && totals[2] == size);
    }
}

/* The segments of all ranks together are the same for every size. */
static void test_reproducible(const struct model_case *c, int32_t segments)
{
    struct shard_options o = {.size = 1, .reproducible = true, .segments = segments};
    int32_t one[192] = {0}, one_totals[3], most = segments < c->most ? segments : c->most;
    check_size(c, &o, one, one_totals);
    CHECK(one_totals[0] == (segments < c->attn_units ? segments : c->attn_units));
    for (o.size = 2; o.size <= MAX_SIZE; o.size++) {
        int32_t ends[192] = {0}, totals[3];
        if (o.size > most) {
            check_refused(c, &o, most, "");
            continue;
        }
        check_size(c, &o, ends, totals);
        CHECK(memcmp(one, ends, sizeof ends) == 0);
        CHECK(memcmp(one_totals, totals, sizeof totals) == 0);
    }
}

static void test_by_hand(void)
{
    // stories: ffn 172 in groups of 32: 6 units, the last of 12 columns
    const struct model_config *stories = &case_of("stories")->config;
    struct shard_options two = {.size = 2};
    struct model_shard s;
    CHECK_OK(shard_model(&s, stories, 32, &two, 1));
    CHECK(s.head_begin == 4 && s.head_end == 8 && s.kv_begin == 2 && s.kv_end == 4);
    CHECK(s.ffn_begin == 96 && s.ffn_end == 172);
    CHECK(s.vocab_begin == 256 && s.vocab_end == 512);
    CHECK(s.mlp.total == 2 && s.mlp.begin == 1 && s.mlp.end == 2 && s.mlp.cut[1] == 76);
    // with 8 segments asked for: 2 of attention, 6 of the MLP, 8 of the vocabulary
    two.reproducible = true;
    two.segments = 8;
    CHECK_OK(shard_model(&s, stories, 32, &two, 1));
    CHECK(s.attn.total == 2 && s.attn.begin == 1 && s.attn.end == 2 && s.attn.cut[1] == 32);
    CHECK(s.mlp.total == 6 && s.mlp.begin == 3 && s.mlp.end == 6);
    CHECK(s.mlp.cut[0] == 0 && s.mlp.cut[1] == 32 && s.mlp.cut[2] == 64 && s.mlp.cut[3] == 76);
    CHECK(s.vocab.total == 8 && s.vocab.begin == 4 && s.vocab.cut[4] == 256);
    // Vicuna on 8 ranks: 172 MLP units: rank 1 has units 21..43 (21.5 to 43)
    struct shard_options eight = {.size = 8};
    CHECK_OK(shard_model(&s, &case_of("Vicuna-7B")->config, 64, &eight, 1));
    CHECK(s.ffn_begin == 21 * 64 && s.ffn_end == 43 * 64);
    CHECK(s.head_begin == 4 && s.head_end == 8);
    // Llama on 16 ranks: two query heads of a group of four; the KV head is replicated
    struct shard_options sixteen = {.size = 16};
    CHECK_OK(shard_model(&s, &case_of("Llama-3.1-8B")->config, 128, &sixteen, 3));
    CHECK(s.head_begin == 6 && s.head_end == 8 && s.kv_begin == 1 && s.kv_end == 2);
    CHECK(s.n_kv_held == 16);
    // the embedded model on 3 ranks: 4 units of two heads, 1, 1 and 2
    struct shard_options three = {.size = 3};
    CHECK_OK(shard_model(&s, &case_of("embedded")->config, 64, &three, 2));
    CHECK(s.head_begin == 4 && s.head_end == 8 && s.kv_begin == 2 && s.kv_end == 4);
    CHECK(s.n_kv_held == 4);
    // Qwen2-0.5B on 4: heads 0..2, 3..6, 7..9, 10..13, seven to a KV head
    struct shard_options four = {.size = 4};
    static const int32_t kv[4][4] = {{0, 3, 0, 1}, {3, 7, 0, 1}, {7, 10, 1, 2}, {10, 14, 1, 2}};
    for (int r = 0; r < 4; r++) {
        CHECK_OK(shard_model(&s, &case_of("Qwen2-0.5B")->config, 64, &four, r));
        CHECK(s.head_begin == kv[r][0] && s.head_end == kv[r][1]);
        CHECK(s.kv_begin == kv[r][2] && s.kv_end == kv[r][3] && s.n_kv_held == 4);
    }
    // on 3: heads 0..3, 4..8, 9..13: the second rank needs both KV heads
    CHECK_OK(shard_model(&s, &case_of("Qwen2-0.5B")->config, 64, &three, 1));
    CHECK(s.head_begin == 4 && s.head_end == 9 && s.kv_begin == 0 && s.kv_end == 2);
    CHECK(s.n_kv_held == 4);
    // in 8 segments of 1, 2, 2, 2, 1, 2, 2, 2 units: on 3 ranks 2, 3 and 3 segments
    three.reproducible = true;
    three.segments = 8;
    CHECK_OK(shard_model(&s, &case_of("Qwen2-0.5B")->config, 64, &three, 1));
    CHECK(s.attn.begin == 2 && s.attn.end == 5 && s.head_begin == 3 && s.head_end == 8);
    CHECK(s.attn.cut[1] == 128 && s.attn.cut[2] == 256 && s.attn.cut[3] == 320);
}

static void test_errors(void)
{
    struct model_shard s;
    const struct model_config *embedded = &case_of("embedded")->config;
    struct shard_options o = {.size = 5};
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER,
                 "5 tensor ranks do not fit this model (4 units of attention input, 8 units of MLP "
                 "input, vocabulary 1536): use 1 to 4; 1, 2 and 4 share the attention evenly");
    // fewer segments than ranks; of 14 units three segments are 4, 5 and 5
    o = (struct shard_options){.size = 4, .reproducible = true, .segments = 2};
    CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER,
                 "vocabulary 1536, parallel.segments = 2): use 1 to 2; 1 and 2 share the");
    o.segments = 3;
    CHECK_STATUS(shard_model(&s, &case_of("Qwen2-0.5B")->config, 64, &o, 0), ST_USER,
                 "use 1 to 3; 1 shares the");
    int32_t segments[] = {65, 0, -1};
    for (int i = 0; i < 3; i++) {
        o.segments = segments[i];
        CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "expected 1 to 64");
    }
    int32_t sizes[] = {0, -1, 65, 1 << 30};
    for (int i = 0; i < 4; i++) {
        o = (struct shard_options){.size = sizes[i]};
        CHECK_STATUS(shard_model(&s, embedded, 64, &o, 0), ST_USER, "use 1 to 4");
    }
    // more units than segments can be told apart
    struct model_config wide = {
        .hidden = 64, .n_heads = 96, .n_kv_heads = 96, .head_dim = 64, .ffn = 9000, .vocab = 9000};
    CHECK_STATUS(shard_model(&s, &wide, 64, &o, 0), ST_USER, "use 1 to 64");
    // one head: only one rank
    struct model_config one = {
        .hidden = 64, .n_heads = 1, .n_kv_heads = 1, .head_dim = 64, .ffn = 64, .vocab = 10};
    o = (struct shard_options){.size = 2};
    CHECK_STATUS(shard_model(&s, &one, 128, &o, 0), ST_USER, "vocabulary 10): use 1");
    o.size = 1;
    CHECK_OK(shard_model(&s, &one, 128, &o, 0));
    CHECK(s.head_end == 1 && s.ffn_end == 64 && s.vocab_end == 10);
}

int main(void)
{
    for (int i = 0; i < N_CASES; i++) {
        test_plain(&cases[i]);
        static const int32_t segments[] = {1, 2, 3, 4, 8, 64};
        for (int k = 0; k < 6; k++) {
            test_reproducible(&cases[i], segments[k]);
        }
    }
    test_by_hand();
    test_errors();
    return check_report();
}
