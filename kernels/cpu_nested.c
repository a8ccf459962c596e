/* Nested matrices of the cpu backend: load and drop, and the product. Each plane is a block of its
 * own, so that dropping one gives its memory back and a product at b bits touches b of them; the
 * F16 levels of one precision lie in one block, so that bytes follow bits. Layout and arithmetic
 * are written down in cpu_nested.h.
 *
 * Three ways through a product, named by configuration (`how->product`) and by what a precision's
 * levels are, never by who shares the pass:
 *   ONE, and TIED, FREE or TAIL levels: look-ups.
 *   SLOTS and CHUNK, TIED levels of at most NESTED_DOT_BITS: integer dots.
 *   Everything else: rows are decoded to f32 once and multiplied in f32.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kernels/cpu_nested.h"

#include <omp.h>
#include <string.h>

#include "core/mem.h"
#include "kernels/cpu.h"

/* What nested_matrix.planes points to. */
struct cpu_planes {
    uint8_t *plane[BITS_MAX]; /* tiles as in cpu_nested.h, owned; NULL: not resident */
};

static int32_t n_tiles_of(const struct nested_matrix *w)
{
    return (w->n_rows + NESTED_ROWS - 1) / NESTED_ROWS;
}

static int32_t n_groups_of(const struct nested_matrix *w)
{
    return w->n_cols_padded / w->group_cols;
}

/* Columns of a group of activations: the most that fit, in whole steps, a scale group. */
static int32_t act_cols_of(int32_t group_cols)
{
    int32_t n = NESTED_ACT_MAX;
    while (group_cols % n != 0) {
        n -= NESTED_STEP;
    }
    return n;
}

/* F16 values of one tile's levels; LUT levels are kept by row. */
static size_t level_values_per_tile(const struct nested_matrix *w, enum level_kind kind, int b)
{
    if (kind == LEVEL_LUT) {
        return (size_t)NESTED_ROWS << b;
    }
    return (size_t)n_groups_of(w) * (size_t)(nested_terms(kind, b) + 1) * NESTED_ROWS;
}

/* ---- load and drop ---- */

/* One row's levels of precision b into its tile. */
static void put_row_levels(uint16_t *tile, int32_t r, const struct nested_matrix *w,
                           const struct nested_source *src, size_t src_row, size_t first_group,
                           int b)
{
    if (src->kind[b] == LEVEL_LUT) {
        memcpy(tile + ((size_t)r << b), src->lut[b] + (src_row << b), sizeof *tile << b);
        return;
    }
    size_t n_terms = (size_t)nested_terms(src->kind[b], b),
           src_groups = (size_t)nested_n_groups(src);
    for (size_t g = 0; g < (size_t)n_groups_of(w); g++) {
        size_t from = src_row * src_groups + first_group + g;
        uint16_t *to = tile + g * (n_terms + 1) * NESTED_ROWS + (size_t)r;
        if (src->kind[b] == LEVEL_FREE) {
            for (size_t t = 0; t < n_terms; t++) {
                to[t * NESTED_ROWS] = src->alpha[b][from * n_terms + t];
            }
        } else {
            to[0] = src->scale[b][from];
        }
        if (src->kind[b] == LEVEL_TAIL) {
            to[NESTED_ROWS] = src->tail[from];
        }
        to[n_terms * NESTED_ROWS] = src->offset[b][from];
    }
}

static void put_row_plane(uint8_t *tile, int32_t r, const uint8_t *row, size_t row_bytes,
                          size_t together)
{
    for (size_t j = 0; j < row_bytes; j += together) {
        memcpy(tile + j * NESTED_ROWS + (size_t)r * together, row + j, together);
    }
}

/* Fills a plane and the levels of the precision that it completes (NULL: none), each tile by the
 * thread that will multiply it, so that its memory is near. */
static void put_tiles(const struct cpu *cpu, uint8_t *plane, uint16_t *levels,
                      const struct nested_matrix *w, const struct nested_source *src,
                      const struct matrix_range *range, int b)
{
    size_t row_bytes = (size_t)w->n_cols_padded / 8, src_row_bytes = (size_t)src->n_cols_padded / 8;
    size_t together = (size_t)cpu->isa->nested->together;
    size_t per_tile = level_values_per_tile(w, src->kind[b], b);
    const uint8_t *from = src->planes + (size_t)(b - 1) * src_row_bytes * (size_t)src->n_rows +
                          (size_t)range->col_begin / 8;
    size_t first_group = (size_t)(range->col_begin / w->group_cols);
    int32_t n_tiles = n_tiles_of(w);
#pragma omp parallel for schedule(static) num_threads(cpu->n_threads)
    for (int32_t t = 0; t < n_tiles; t++) {
        uint8_t *tile = plane + (size_t)t * NESTED_ROWS * row_bytes;
        for (int32_t r = t * NESTED_ROWS; r < (t + 1) * NESTED_ROWS && r < w->n_rows; r++) {
            size_t src_row = (size_t)(range->row_begin + r);
            put_row_plane(tile, r % NESTED_ROWS, from + src_row * src_row_bytes, row_bytes,
                          together);
            if (levels) {
                put_row_levels(levels + (size_t)t * per_tile, r % NESTED_ROWS, w, src, src_row,
                               first_group, b);
            }
        }
    }
}

static enum status load_one(struct cpu *cpu, uint8_t **plane, void **levels,
                            const struct nested_matrix *w, const struct nested_source *src,
                            const struct matrix_range *range, int b)
{
    size_t n_rows = (size_t)n_tiles_of(w) * NESTED_ROWS, bytes = 0, values = 0;
    TRY(mem_mul(&bytes, n_rows, (size_t)w->n_cols_padded / 8));
    TRY(arena_alloc(&cpu->planes[b - 1], (void **)plane, bytes));
    if (src->kind[b] != LEVEL_NONE) {
        TRY(mem_mul(&values, (size_t)n_tiles_of(w), level_values_per_tile(w, src->kind[b], b)));
        TRY(mem_mul(&bytes, values, sizeof(uint16_t)));
        TRY(arena_alloc(&cpu->levels[b], levels, bytes));
    }
    put_tiles(cpu, *plane, *levels, w, src, range, b);
    return ST_OK;
}

static enum status reserve(struct cpu *cpu, const struct nested_matrix *w);

enum status cpu_planes_load(struct backend *be, struct nested_matrix *w,
                            const struct nested_source *src, const struct matrix_range *range,
                            int n_planes)
{
    struct cpu *cpu = be->impl;
    struct cpu_planes *planes = w->planes, *fresh = NULL;
    uint8_t *plane[BITS_MAX] = {0};
    void *levels[BITS_ALL] = {0};
    enum status st;
    TRY_GOTO(st, reserve(cpu, w), failed);
    for (int b = w->n_resident + 1; b <= n_planes; b++) {
        TRY_GOTO(st, load_one(cpu, &plane[b - 1], &levels[b], w, src, range, b), failed);
    }
    if (!planes) {
        TRY_GOTO(st, MEM_NEW(&fresh, 1), failed);
        w->planes = planes = fresh;
    }
    for (int b = w->n_resident + 1; b <= n_planes; b++) {
        planes->plane[b - 1] = plane[b - 1];
        w->levels[b] = levels[b];
    }
    return ST_OK;
failed:
    for (int b = 1; b <= BITS_MAX; b++) {
        arena_free(&cpu->planes[b - 1], plane[b - 1]);
        arena_free(&cpu->levels[b], levels[b]);
    }
    return st;
}

void cpu_planes_drop(struct backend *be, struct nested_matrix *w, int keep)
{
    struct cpu *cpu = be->impl;
    struct cpu_planes *planes = w->planes;
    for (int b = keep + 1; b <= BITS_MAX; b++) {
        arena_free(&cpu->planes[b - 1], planes->plane[b - 1]);
        planes->plane[b - 1] = NULL;
        arena_free(&cpu->levels[b], w->levels[b]);
        w->levels[b] = NULL;
    }
    if (keep == 0) {
        mem_free(planes);
        w->planes = NULL;
    }
}

/* ---- the product ---- */

enum way { BY_LOOK_UP, BY_DOTS, BY_ROWS };

/* One product of at most NESTED_TOKENS tokens, as every thread needs it. */
struct pass {
    struct cpu *cpu;
    const struct nested_matrix *w;
    const float *x; /* of the first of its tokens */
    const int32_t *cut;
    int32_t n_segments, act_cols;
    struct cpu_output out;
    size_t first_token; /* in out */
    int n_tok, n_shares;
    bool for_look_ups, quantises, is_quantised;
    enum way way[BITS_ALL];       /* of each precision */
    int n_of[BITS_ALL];           /* tokens of each precision, listed in token[] one precision */
    int at_of[BITS_ALL];          /* after the other from here */
    uint8_t token[NESTED_TOKENS]; /* numbers of tokens, by precision */
    struct nested_acts acts[NESTED_TOKENS]; /* by number */
};

/* What a thread writes while it multiplies; pieces of its share of cpu->rows, and its tables. */
struct lane {
    struct nested_acts acts; /* look-ups */
    float *weights;          /* (n_cols_padded, whole steps): a row in f32 */
    float *sums;             /* (NESTED_TOKENS, NESTED_ROWS) */
    uint8_t *codes;          /* (columns of a block, NESTED_ROWS) */
    uint8_t *planes;         /* (BITS_MAX, n_cols_padded / 8): a row's planes */
    uint16_t *levels;        /* a row's levels, as struct nested_row has them */
};

static size_t take(size_t *used, size_t bytes)
{
    size_t at = *used;
    *used += (bytes + MEM_ALIGN - 1) / MEM_ALIGN * MEM_ALIGN;
    return at;
}

static int32_t block_cols_of(int32_t group_cols)
{
    return group_cols >= NESTED_BLOCK_COLS ? group_cols
                                           : NESTED_BLOCK_COLS / group_cols * group_cols;
}

/* Bytes of a lane; with base also its pieces. */
static size_t lay_out(struct lane *lane, char *base, const struct nested_matrix *w)
{
    size_t used = 0, n = (size_t)w->n_cols_padded;
    size_t weights = take(&used, cpu_scratch_width(n) * sizeof(float));
    size_t sums = take(&used, sizeof(float) * NESTED_TOKENS * NESTED_ROWS);
    size_t codes = take(&used, (size_t)block_cols_of(w->group_cols) * NESTED_ROWS);
    size_t planes = take(&used, BITS_MAX * n / 8);
    size_t levels = take(&used, sizeof(uint16_t) * (BITS_MAX + 1) * (size_t)n_groups_of(w));
    if (base) {
        *lane = (struct lane){.weights = (float *)(void *)(base + weights),
                              .sums = (float *)(void *)(base + sums),
                              .codes = (uint8_t *)base + codes,
                              .planes = (uint8_t *)base + planes,
                              .levels = (uint16_t *)(void *)(base + levels)};
    }
    return used;
}

/* Bytes of the quantised activations of n_tok tokens; with base also where they go. */
static size_t lay_out_acts(struct nested_acts *acts, char *base, const struct nested_matrix *w,
                           size_t n_tok, size_t bytes_per_col)
{
    size_t used = 0, n = (size_t)w->n_cols_padded;
    size_t n_acts = n / (size_t)act_cols_of(w->group_cols);
    for (size_t t = 0; t < n_tok; t++) {
        size_t values = take(&used, n * bytes_per_col), scale = take(&used, n_acts * sizeof(float));
        size_t sum = take(&used, n_acts * sizeof(float)),
               total = take(&used, n_acts * sizeof(int32_t));
        if (base) {
            acts[t] = (struct nested_acts){.values = (int8_t *)base + values,
                                           .scale = (float *)(void *)(base + scale),
                                           .sum = (float *)(void *)(base + sum),
                                           .total = (int32_t *)(void *)(base + total)};
        }
    }
    return used;
}

enum {
    TILES_AT_ONCE = 4,       /* look-ups: what a thread takes from a share */
    TABLE_BYTES = 4,         /* of look-up tables per column; codes take one */
    WEIGHTS_PER_MULTIPLY = 8 /* look-ups in the time of a multiply-add */
};

/* Room for whatever product of this matrix comes, so that the token loop allocates nothing. */
static enum status reserve(struct cpu *cpu, const struct nested_matrix *w)
{
    size_t n = 0, lane = lay_out(NULL, NULL, w) / sizeof(float);
    TRY(mem_mul(&n, lane, (size_t)cpu->n_threads));
    TRY(host_scratch_reserve(&cpu->rows, n));
    size_t one = lay_out_acts(NULL, NULL, w, 1, TABLE_BYTES);
    size_t many = lay_out_acts(NULL, NULL, w, NESTED_TOKENS, 1);
    TRY(mem_mul(&one, one, (size_t)cpu->n_threads));
    n = (one > many ? one : many) / sizeof(float);
    if (n > cpu->acts.n) {
        cpu->last.n_tok = 0; /* what was there is lost */
        TRY(host_scratch_reserve(&cpu->acts, n));
    }
    if (NESTED_TOKENS * (size_t)w->n_cols > cpu->last.x.n) {
        cpu->last.n_tok = 0;
        TRY(host_scratch_reserve(&cpu->last.x, NESTED_TOKENS * (size_t)w->n_cols));
    }
    return ST_OK;
}

static struct nested_tile tile_at(const struct pass *pass, int32_t t, int b)
{
    const struct nested_matrix *w = pass->w;
    const struct cpu_planes *planes = w->planes;
    struct nested_tile tile = {
        .levels =
            (const uint16_t *)w->levels[b] + (size_t)t * level_values_per_tile(w, w->kind[b], b),
        .kind = w->kind[b],
        .bits = b,
        .group_cols = w->group_cols,
        .act_cols = pass->act_cols,
    };
    for (int p = 0; p < b; p++) {
        tile.plane[p] = planes->plane[p] + (size_t)t * NESTED_ROWS * ((size_t)w->n_cols_padded / 8);
    }
    return tile;
}

/* Where segment s ends, filled up to a whole group. */
static int32_t segment_end(const struct pass *pass, int32_t s)
{
    int32_t unit = pass->w->group_cols;
    return (pass->cut[s + 1] + unit - 1) / unit * unit;
}

static void store(const struct pass *pass, int32_t segment, int token, int32_t tile,
                  const float *sum)
{
    int32_t first = tile * NESTED_ROWS, n = pass->w->n_rows - first;
    for (int32_t r = 0; r < n && r < NESTED_ROWS; r++) {
        cpu_store(&pass->out, segment, pass->first_token + (size_t)token, first + r, sum[r]);
    }
}

static void tile_by_look_up(const struct pass *pass, const struct lane *lane, int32_t t, int b)
{
    struct nested_tile tile = tile_at(pass, t, b);
    for (int i = 0; i < pass->n_of[b]; i++) {
        int token = pass->token[pass->at_of[b] + i];
        for (int32_t s = 0; s < pass->n_segments; s++) {
            pass->cpu->isa->nested->look_up(lane->sums, &tile, &lane->acts, pass->cut[s],
                                            segment_end(pass, s));
            store(pass, s, token, t, lane->sums);
        }
    }
}

static void tile_by_dots(const struct pass *pass, const struct lane *lane, int32_t t, int b)
{
    const struct nested_loops *loops = pass->cpu->isa->nested;
    struct nested_tile tile = tile_at(pass, t, b);
    const uint8_t *token = pass->token + pass->at_of[b];
    int n = pass->n_of[b], block = block_cols_of(tile.group_cols);
    for (int32_t s = 0; s < pass->n_segments; s++) {
        memset(lane->sums, 0, (size_t)n * NESTED_ROWS * sizeof *lane->sums);
        int32_t end = segment_end(pass, s);
        for (int32_t c = pass->cut[s]; c < end; c += block) {
            int32_t stop = end - c < block ? end : c + block;
            loops->expand(lane->codes, &tile, c, stop - c);
            for (int i = 0; i < n; i += NESTED_DOT_TOKENS) {
                const struct nested_acts *acts[NESTED_DOT_TOKENS];
                float *sum[NESTED_DOT_TOKENS];
                int n_now = n - i < NESTED_DOT_TOKENS ? n - i : NESTED_DOT_TOKENS;
                for (int j = 0; j < n_now; j++) {
                    acts[j] = &pass->acts[token[i + j]];
                    sum[j] = lane->sums + (i + j) * NESTED_ROWS;
                }
                loops->dots(sum, lane->codes, &tile, acts, n_now, c, stop);
            }
        }
        for (int i = 0; i < n; i++) {
            store(pass, s, token[i], t, lane->sums + i * NESTED_ROWS);
        }
    }
}

/* Row r of a tile, as the loops that decode to f32 want it; its bytes go into the lane. */
static struct nested_row row_of(const struct pass *pass, const struct lane *lane,
                                const struct nested_tile *tile, size_t r)
{
    const struct nested_matrix *w = pass->w;
    size_t row_bytes = (size_t)w->n_cols_padded / 8;
    size_t together = (size_t)pass->cpu->isa->nested->together;
    struct nested_row row = {.levels = tile->levels + (r << tile->bits),
                             .kind = tile->kind,
                             .bits = tile->bits,
                             .group_cols = w->group_cols};
    for (int p = 0; p < tile->bits; p++) {
        uint8_t *to = lane->planes + (size_t)p * row_bytes;
        for (size_t j = 0; j < row_bytes; j += together) {
            memcpy(to + j, tile->plane[p] + j * NESTED_ROWS + r * together, together);
        }
        row.plane[p] = to;
    }
    if (tile->kind != LEVEL_LUT) {
        size_t n = (size_t)n_groups_of(w) * (size_t)(nested_terms(tile->kind, tile->bits) + 1);
        for (size_t i = 0; i < n; i++) {
            lane->levels[i] = tile->levels[i * NESTED_ROWS + r];
        }
        row.levels = lane->levels;
    }
    return row;
}

static void tile_by_rows(const struct pass *pass, const struct lane *lane, int32_t t, int b)
{
    struct nested_tile tile = tile_at(pass, t, b);
    const uint8_t *token = pass->token + pass->at_of[b];
    int32_t first = t * NESTED_ROWS, n_cols = pass->w->n_cols;
    for (int32_t r = 0; r < NESTED_ROWS && first + r < pass->w->n_rows; r++) {
        struct nested_row row = row_of(pass, lane, &tile, (size_t)r);
        pass->cpu->isa->decode(lane->weights, &row, 0, n_cols);
        for (int i = 0; i < pass->n_of[b]; i += CPU_TILE) {
            const float *x[CPU_TILE];
            size_t of[CPU_TILE];
            int n = pass->n_of[b] - i < CPU_TILE ? pass->n_of[b] - i : CPU_TILE;
            for (int j = 0; j < n; j++) {
                x[j] = pass->x + (size_t)token[i + j] * (size_t)n_cols;
                of[j] = pass->first_token + token[i + j];
            }
            cpu_tile(pass->cpu->isa, &pass->out, lane->weights, x, of, n, first + r, pass->cut,
                     pass->n_segments);
        }
    }
}

/* Groups begin..end of one token; beyond n_cols x is zero. */
static void quantise(const struct pass *pass, const struct nested_acts *out, int token,
                     int32_t begin, int32_t end)
{
    const struct nested_loops *loops = pass->cpu->isa->nested;
    int32_t n_cols = pass->w->n_cols, width = pass->act_cols;
    const float *x = pass->x + (size_t)token * (size_t)n_cols;
    for (int32_t a = begin; a < end; a++) {
        float filled[NESTED_ACT_MAX] = {0};
        const float *from = x + (size_t)a * (size_t)width;
        if ((a + 1) * width > n_cols) {
            int32_t n = n_cols - a * width;
            memcpy(filled, n > 0 ? from : filled, sizeof *filled * (size_t)(n > 0 ? n : 0));
            from = filled;
        }
        (pass->for_look_ups ? loops->tables : loops->codes)(out, from, a, width);
    }
}

/* Tables are every thread's own: making them takes less time than fetching another core's. */
static void make_tables(const struct pass *pass, struct lane *lane, int thread)
{
    struct cpu *cpu = pass->cpu;
    size_t bytes = lay_out_acts(NULL, NULL, pass->w, 1, TABLE_BYTES);
    lay_out_acts(&lane->acts, (char *)cpu->acts.data + (size_t)thread * bytes, pass->w, 1,
                 TABLE_BYTES);
    if (cpu->shares[thread].tables != cpu->last.number) {
        quantise(pass, &lane->acts, 0, 0, pass->w->n_cols_padded / pass->act_cols);
        cpu->shares[thread].tables = cpu->last.number;
    }
}

/* Codes of many tokens are shared: each thread makes a part of every token's. */
static void make_codes(const struct pass *pass, int thread, int n_threads)
{
    int32_t n_acts = pass->w->n_cols_padded / pass->act_cols;
    for (int token = 0; token < pass->n_tok; token++) {
        quantise(pass, &pass->acts[token], token, n_acts * thread / n_threads,
                 n_acts * (thread + 1) / n_threads);
    }
}

static void multiply_tile(const struct pass *pass, const struct lane *lane, int32_t t)
{
    for (int b = 1; b <= BITS_MAX; b++) {
        if (pass->n_of[b] == 0) {
            continue;
        }
        if (pass->way[b] == BY_LOOK_UP) {
            tile_by_look_up(pass, lane, t, b);
        } else if (pass->way[b] == BY_DOTS) {
            tile_by_dots(pass, lane, t, b);
        } else {
            tile_by_rows(pass, lane, t, b);
        }
    }
}

/* A thread's share of a product: of the activations, then, when all are there, of the tiles; its
 * own run first, then what others have left of theirs, since no two threads are equally fast. */
static void work(const struct pass *pass, int thread, int n_threads)
{
    size_t lane_floats = lay_out(NULL, NULL, pass->w) / sizeof(float);
    struct lane lane = {0};
    lay_out(&lane, (char *)(pass->cpu->rows.data + (size_t)thread * lane_floats), pass->w);
    if (pass->quantises && pass->for_look_ups) {
        make_tables(pass, &lane, thread);
    } else if (pass->quantises && !pass->is_quantised) {
        make_codes(pass, thread, n_threads);
        if (n_threads > 1) {
#pragma omp barrier
        }
    }
    /* tiles of one token are read in a moment, and best several in a row */
    int at_once = pass->for_look_ups ? TILES_AT_ONCE : 1;
    for (int i = 0; i < pass->n_shares; i++) {
        struct cpu_share *share = &pass->cpu->shares[(thread + i) % pass->n_shares];
        int t;
        while ((t = atomic_fetch_add_explicit(&share->next, at_once, memory_order_relaxed)) <
               share->end) {
            for (int end = t + at_once; t < end && t < share->end; t++) {
                multiply_tile(pass, &lane, t);
            }
        }
    }
}

/* Whether these activations are the last product's; if not, they are from now on. */
static bool were_quantised(struct cpu *cpu, const struct pass *pass)
{
    struct cpu_quantised *last = &cpu->last;
    size_t n = (size_t)pass->n_tok * (size_t)pass->w->n_cols;
    if (last->n_tok == (size_t)pass->n_tok && last->n_cols == pass->w->n_cols &&
        last->group_cols == pass->w->group_cols && last->for_look_ups == pass->for_look_ups &&
        memcmp(last->x.data, pass->x, n * sizeof *pass->x) == 0) {
        return true;
    }
    memcpy(last->x.data, pass->x, n * sizeof *pass->x);
    last->n_tok = (size_t)pass->n_tok;
    last->n_cols = pass->w->n_cols;
    last->group_cols = pass->w->group_cols;
    last->number++;
    last->for_look_ups = pass->for_look_ups;
    return false;
}

static void deal_tiles(struct pass *pass, int n_threads)
{
    int64_t n_tiles = n_tiles_of(pass->w);
    pass->n_shares = n_threads;
    for (int i = 0; i < n_threads; i++) {
        atomic_store_explicit(&pass->cpu->shares[i].next, (int)(n_tiles * i / n_threads),
                              memory_order_relaxed);
        pass->cpu->shares[i].end = (int)(n_tiles * (i + 1) / n_threads);
    }
}

static enum way way_of(enum product product, enum level_kind kind, int b)
{
    if (product == PRODUCT_ONE) {
        return kind == LEVEL_LUT ? BY_ROWS : BY_LOOK_UP;
    }
    return kind == LEVEL_TIED && b <= NESTED_DOT_BITS ? BY_DOTS : BY_ROWS;
}

/* Lists the tokens of a pass by precision; true when some of them need quantised activations. */
static bool sort_tokens(struct pass *pass, const uint8_t *bits, int n)
{
    bool any = false;
    int at = 0;
    pass->n_tok = n;
    for (int b = 1; b <= BITS_MAX; b++) {
        pass->at_of[b] = at;
        pass->n_of[b] = 0;
        for (int t = 0; t < n; t++) {
            if (bits[t] == b) {
                pass->token[at++] = (uint8_t)t;
                pass->n_of[b]++;
                any = any || pass->way[b] != BY_ROWS;
            }
        }
    }
    return any;
}

enum status cpu_matmul_nested(struct backend *be, struct tensor *y, const struct nested_matrix *w,
                              const struct tensor *bits, const struct tensor *x,
                              const struct tensor *bias, const struct how *how)
{
    struct cpu *cpu = be->impl;
    TRY(host_check_bits(bits, how->bits_used));
    TRY(reserve(cpu, w));
    const int32_t whole[] = {0, w->n_cols};
    struct pass pass = {
        .cpu = cpu,
        .w = w,
        .cut = how->cut ? how->cut : whole,
        .n_segments = how->n_segments,
        .act_cols = act_cols_of(w->group_cols),
        .out = cpu_output(y, x, bias, how),
    };
    for (int b = 1; b <= BITS_MAX; b++) {
        pass.way[b] = way_of(how->product, w->kind[b], b);
    }
    pass.for_look_ups = how->product == PRODUCT_ONE;
    size_t n_tok = pass.out.n_tok, most = pass.for_look_ups ? 1 : NESTED_TOKENS;
    if (!pass.for_look_ups) {
        lay_out_acts(pass.acts, (char *)cpu->acts.data, w, most, 1);
    }
    for (size_t first = 0; first < n_tok; first += most) {
        size_t n = n_tok - first < most ? n_tok - first : most;
        pass.first_token = first;
        pass.x = (const float *)x->data + first * (size_t)w->n_cols;
        pass.quantises = sort_tokens(&pass, (const uint8_t *)bits->data + first, (int)n);
        pass.is_quantised = pass.quantises && were_quantised(cpu, &pass);
        int n_threads =
            cpu_threads(cpu, (size_t)w->n_rows * (size_t)w->n_cols / WEIGHTS_PER_MULTIPLY * n);
        deal_tiles(&pass, n_threads);
        if (n_threads == 1) {
            work(&pass, 0, 1);
            continue;
        }
#pragma omp parallel num_threads(n_threads)
        work(&pass, omp_get_thread_num(), omp_get_num_threads());
    }
    return ST_OK;
}
