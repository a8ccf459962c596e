/* SPDX-License-Identifier: Apache-2.0 */
#include "core/session.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/log.h"
#include "core/mem.h"

/* session.at: no slot is worked on by itself */
enum { EVERY_SLOT = -1 };

/* One slot's sequence. */
struct sequence {
    bool active;
    _Atomic int64_t suspect; /* ordinal of the prompt until its record is out of hand; else -1 */
    const struct prompt *prompt; /* borrowed */
    int32_t turn;
    int32_t n_fed; /* tokens of this turn's prefill already in the cache */
    int32_t n_new; /* tokens generated in this turn */
    int32_t last;  /* the last of them, not yet in the cache */
    bool carry;    /* this turn's prefill begins with the token left over from the last */
    float dial;    /* of its lease */
    int32_t prefill_level;
    uint32_t last_pass; /* number of its last pass */
    double started_s, turn_s, decode_s;
    struct finished_record rec; /* its arrays are owned, sized for the largest prompt */
};

struct session {
    struct decoder *dec;               /* borrowed */
    struct collective *coll;           /* borrowed */
    struct policy *policy;             /* borrowed */
    const struct level_table *levels;  /* borrowed */
    const struct model_config *config; /* borrowed */
    struct session_options opt;
    struct sequence *seq;       /* (n_slots) owned */
    struct pass_record *passes; /* owned: passes not yet in any record */
    int32_t n_passes, max_passes;
    uint32_t next_pass;
    int32_t *chunk;               /* (prefill_chunk) owned */
    struct decode_token *tokens;  /* (2 * n_slots) owned: with probes */
    struct token_result *results; /* (2 * n_slots) owned */
    float *features;         /* owned: K and V features for the policy; NULL when it needs none */
    int32_t *slots, *steps;  /* (n_slots) owned: of the pass */
    struct planner *planner; /* owned */
    bool observes;           /* the policy looks at every step */
    uint32_t measured;       /* SIGNALS_MEASURED that somebody wants */
    _Atomic int32_t at;      /* the slot that is worked on by itself */
};

/* A record's capacities. */
struct limits {
    size_t turns, steps, switches, passes, decisions, features;
};

static enum status find_limits(struct limits *out, const struct session_options *o,
                               int32_t head_dim)
{
    size_t chunks = (size_t)(o->max_tok / o->prefill_chunk) + 2, n = 0;
    *out = (struct limits){.turns = (size_t)o->max_turns};
    TRY(mem_mul(&out->steps, out->turns, (size_t)o->max_new_tokens));
    out->switches = out->steps;
    TRY(planner_max_decisions(&out->decisions, o->max_turns, o->max_new_tokens));
    /* every pass moves some sequence on, so this many bring at least one to its end */
    TRY(mem_mul(&n, out->turns, (size_t)o->max_new_tokens + chunks));
    TRY(mem_mul(&out->passes, n, (size_t)o->n_slots));
    if (o->kv_features) {
        TRY(mem_mul(&out->features, 2 * (size_t)head_dim, (size_t)o->max_tok));
    }
    return ST_OK;
}

enum status session_max_record_bytes(size_t *out, const struct session_options *options,
                                     int32_t head_dim)
{
    struct limits l;
    TRY(find_limits(&l, options, head_dim));
    struct finished_record r = {.n_turns = (int32_t)l.turns,
                                .n_steps = (int32_t)l.steps,
                                .n_switches = (int32_t)l.switches,
                                .n_passes = (int32_t)l.passes,
                                .n_decisions = (int32_t)l.decisions};
    if (l.steps > INT32_MAX || l.passes > INT32_MAX) {
        FAIL(ST_SHAPE,
             "decode.max_new_tokens = %d with %d slots and %d turns makes records too large",
             options->max_new_tokens, options->n_slots, options->max_turns);
    }
    if (options->kv_features) {
        r.n_feature_tok = options->max_tok;
        r.feature_dim = head_dim;
    }
    *out = trace_packed_bytes(&r);
    return ST_OK;
}

static enum status sequence_create(struct sequence *q, const struct limits *l)
{
    TRY(MEM_NEW(&q->rec.turns, l->turns));
    TRY(MEM_NEW(&q->rec.steps, l->steps));
    TRY(MEM_NEW(&q->rec.switches, l->switches));
    if (l->features) {
        TRY(MEM_NEW(&q->rec.features, l->features));
    }
    return ST_OK;
}

/* Heads of the features that the policy sees; 0: it wants none. */
static int32_t n_feature_heads(const struct session *s)
{
    uint32_t needs = s->policy->ops->needs;
    return needs & SIGNAL_KV_HEADS ? s->config->n_kv_heads : (needs & SIGNAL_KV_FEATURES) != 0;
}

enum status session_create(struct session **out, struct decoder *dec, struct collective *coll,
                           struct policy *policy, const struct level_table *levels,
                           const struct model_config *config, const struct session_options *options)
{
    enum status st = ST_OK;
    struct session *s = NULL;
    struct limits l;
    TRY(find_limits(&l, options, config->head_dim));
    TRY(mem_alloc_array((void **)&s, 1, sizeof *s));
    *s = (struct session){.dec = dec,
                          .coll = coll,
                          .policy = policy,
                          .levels = levels,
                          .config = config,
                          .opt = *options,
                          .max_passes = (int32_t)l.passes,
                          .observes = (policy->ops->needs & SIGNAL_LOGITS) != 0,
                          .measured = (policy->ops->needs & SIGNALS_MEASURED) |
                                      (options->signals ? SIGNAL_HIDDEN | SIGNAL_KV_NORMS : 0),
                          .at = EVERY_SLOT};
    TRY_GOTO(st, MEM_NEW(&s->seq, options->n_slots), fail);
    for (int32_t i = 0; i < options->n_slots; i++) {
        atomic_init(&s->seq[i].suspect, -1);
        TRY_GOTO(st, sequence_create(&s->seq[i], &l), fail);
    }
    TRY_GOTO(st, MEM_NEW(&s->passes, l.passes), fail);
    TRY_GOTO(st, MEM_NEW(&s->chunk, options->prefill_chunk), fail);
    TRY_GOTO(st, MEM_NEW(&s->tokens, 2 * options->n_slots), fail);
    TRY_GOTO(st, MEM_NEW(&s->results, 2 * options->n_slots), fail);
    if (n_feature_heads(s) > 0) {
        size_t n = 0;
        TRY_GOTO(st,
                 mem_mul(&n, 2 * (size_t)n_feature_heads(s) * (size_t)config->head_dim,
                         (size_t)options->max_tok),
                 fail);
        TRY_GOTO(st, MEM_NEW(&s->features, n), fail);
    }
    TRY_GOTO(st, MEM_NEW(&s->slots, options->n_slots), fail);
    TRY_GOTO(st, MEM_NEW(&s->steps, options->n_slots), fail);
    struct planner_options po = {.n_slots = options->n_slots,
                                 .n_levels = levels->n,
                                 .max_new_tokens = options->max_new_tokens,
                                 .lag = options->lag > 0 ? options->lag : 1,
                                 .max_turns = options->max_turns,
                                 .remote = options->remote};
    TRY_GOTO(st, planner_create(&s->planner, policy, coll, &po), fail);
    *out = s;
    return ST_OK;
fail:
    session_destroy(&s);
    return st;
}

void session_destroy(struct session **session)
{
    struct session *s = *session;
    if (!s) {
        return;
    }
    for (int32_t i = 0; s->seq && i < s->opt.n_slots; i++) {
        struct finished_record *r = &s->seq[i].rec;
        mem_free(r->turns);
        mem_free(r->steps);
        mem_free(r->switches);
        mem_free(r->features);
    }
    mem_free(s->seq);
    mem_free(s->passes);
    mem_free(s->chunk);
    mem_free(s->tokens);
    mem_free(s->results);
    mem_free(s->features);
    mem_free(s->slots);
    mem_free(s->steps);
    planner_destroy(&s->planner);
    mem_free(s);
    *session = NULL;
}

int32_t session_n_active(const struct session *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->opt.n_slots; i++) {
        n += s->seq[i].active;
    }
    return n;
}

int32_t session_n_free(const struct session *s)
{
    return s->opt.n_slots - session_n_active(s);
}

int32_t session_suspects(const struct session *s, int64_t *ordinals, int32_t capacity)
{
    int32_t at = atomic_load(&s->at), n = 0;
    for (int32_t i = 0; i < s->opt.n_slots && n < capacity; i++) {
        int64_t ordinal = atomic_load(&s->seq[i].suspect);
        if (ordinal >= 0 && (at == EVERY_SLOT || at == i)) {
            ordinals[n++] = ordinal;
        }
    }
    return n;
}

/* ---- what a sequence is doing ---- */

/* Tokens of this turn's prefill; a later turn begins with the token its predecessor left over. */
static int32_t turn_n_prefill(const struct sequence *q)
{
    return q->prompt->n_ids[q->turn] + (q->carry ? 1 : 0);
}

static bool is_prefilling(const struct sequence *q)
{
    return q->active && q->n_fed < turn_n_prefill(q);
}

static enum status begin_turn(struct session *s, struct sequence *q, int32_t slot)
{
    q->n_fed = 0;
    q->n_new = 0;
    q->turn_s = clock_s();
    const struct prompt_facts facts = {.ordinal = q->rec.ordinal,
                                       .turn = q->turn,
                                       .id = q->prompt->id ? q->prompt->id : "",
                                       .task = q->prompt->task ? q->prompt->task : "",
                                       .n_prompt_tok = turn_n_prefill(q),
                                       .n_context_tok = decoder_n_filled(s->dec, slot),
                                       .max_new_tokens = s->opt.max_new_tokens,
                                       .dial = q->dial};
    TRY(planner_begin(s->planner, slot, &facts, &q->prefill_level));
    q->rec.turns[q->turn] =
        (struct turn_record){.prefill_level = q->prefill_level, .n_prompt_tok = turn_n_prefill(q)};
    return ST_OK;
}

static double unix_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum status session_start(struct session *s, const struct prompt *prompt, int64_t ordinal,
                          const uint64_t key[2], int32_t attempt, float dial)
{
    int32_t slot = 0;
    while (slot < s->opt.n_slots && s->seq[slot].active) {
        slot++;
    }
    INVARIANT(slot < s->opt.n_slots && prompt->n_turns <= s->opt.max_turns);
    struct sequence *q = &s->seq[slot];
    struct finished_record *r = &q->rec;
    atomic_store(&q->suspect, ordinal);
    atomic_store(&s->at, slot);
    decoder_clear_slot(s->dec, slot);
    q->active = true;
    q->prompt = prompt;
    q->turn = 0;
    q->carry = false;
    q->dial = dial;
    q->started_s = clock_s();
    r->ordinal = ordinal;
    r->key[0] = key[0];
    r->key[1] = key[1];
    r->attempt = attempt;
    r->epoch = s->opt.epoch;
    r->replica = s->opt.replica;
    r->started_unix_s = unix_s();
    r->n_turns = prompt->n_turns;
    r->n_steps = r->n_switches = r->n_passes = r->n_decisions = 0;
    r->n_feature_tok = r->feature_dim = 0;
    TRY(begin_turn(s, q, slot));
    atomic_store(&s->at, EVERY_SLOT);
    return ST_OK;
}

static struct logit_want want_of(const struct session *s, const struct sequence *q, int32_t step)
{
    struct logit_want w = {.target = -1, .temperature = s->opt.temperature};
    sampler_key(w.key, s->opt.seed, (uint64_t)q->rec.ordinal, (uint32_t)q->turn, (uint32_t)step);
    return w;
}

static void keep_pass(struct session *s, struct pass_record *pass)
{
    INVARIANT(s->n_passes < s->max_passes);
    pass->pass = s->next_pass++;
    s->passes[s->n_passes++] = *pass;
}

/* ---- the end of turns and prompts ---- */

static bool is_eos(const struct session *s, int32_t token)
{
    for (int32_t i = 0; i < s->config->n_eos; i++) {
        if (s->config->eos[i] == token) {
            return true;
        }
    }
    return false;
}

/* The plan as it was carried out: one switch for every change of level. */
static void record_realised(struct sequence *q)
{
    struct turn_record *t = &q->rec.turns[q->turn];
    int32_t first = q->rec.n_steps - t->n_steps, before = -1;
    for (int32_t i = 0; i < t->n_steps; i++) {
        const struct step_record *step = &q->rec.steps[first + i];
        if (step->level != before) {
            q->rec.switches[q->rec.n_switches++] = (struct plan_switch){step->step, step->level};
            t->n_switches++;
            before = step->level;
        }
    }
}

static enum status finish_prompt(struct session *s, struct sequence *q)
{
    q->active = false;
    q->rec.wall_s = clock_s() - q->started_s;
    q->rec.passes = s->passes;
    q->rec.n_passes = s->n_passes;
    q->rec.decisions = planner_log(s->planner, (int32_t)(q - s->seq), &q->rec.n_decisions);
    if (s->opt.on_finished) {
        TRY(s->opt.on_finished(s->opt.ctx, &q->rec));
    }
    q->rec.passes = NULL;
    q->rec.decisions = NULL;
    s->n_passes = 0;
    atomic_store(&q->suspect, -1);
    return ST_OK;
}

/* A token has come out: is the turn, or the prompt, over? */
static enum status take_token(struct session *s, struct sequence *q, int32_t slot, int32_t token)
{
    struct turn_record *t = &q->rec.turns[q->turn];
    q->last = token;
    q->n_new++;
    t->n_new_tok = q->n_new;
    if (s->opt.on_token) {
        s->opt.on_token(s->opt.ctx, slot, token);
    }
    bool eos = s->opt.stop_at_eos && is_eos(s, token);
    if (!eos && q->n_new < s->opt.max_new_tokens) {
        return ST_OK;
    }
    t->finish = eos ? FINISH_EOS : FINISH_LENGTH;
    t->decode_s = (float)(clock_s() - q->decode_s);
    record_realised(q);
    planner_end(s->planner, slot);
    if (q->turn + 1 < q->prompt->n_turns) {
        q->turn++;
        q->carry = true;
        return begin_turn(s, q, slot);
    }
    return finish_prompt(s, q);
}

/* ---- passes ---- */

/* Names the prompt whose logits are no numbers: it is then the only suspect. */
static enum status blame(struct session *s, enum status st, int32_t slot, int32_t step,
                         int32_t level)
{
    const struct sequence *q = &s->seq[slot];
    char where[32] = "prefill";
    if (st != ST_NUMERIC) {
        return st;
    }
    atomic_store(&s->at, slot);
    if (step >= 0) {
        snprintf(where, sizeof where, "step %d", step);
    }
    return status_prefix(st, "prompt %lld, turn %d, %s at level %s: ", (long long)q->rec.ordinal,
                         q->turn, where, s->levels->level[level].text);
}

/* What result i of the last pass says. */
static struct signals signals_of(const struct session *s, const struct token_result *r, int32_t i,
                                 int32_t step, int32_t level)
{
    struct signals out = {.step = step,
                          .level = level,
                          .token = r->token,
                          .logprob = r->logprob,
                          .entropy = r->entropy,
                          .margin = r->margin,
                          .max_prob = r->max_prob,
                          .hidden_mean = NAN,
                          .hidden_rms = NAN,
                          .k_norm = NAN,
                          .v_norm = NAN,
                          .n_layers = s->config->n_layers,
                          .probe_level = -1};
    const struct measured *m = s->measured ? decoder_measured(s->dec, i) : NULL;
    if (s->measured & SIGNAL_HIDDEN) {
        out.hidden_mean = m->hidden_mean;
        out.hidden_rms = m->hidden_rms;
    }
    if (s->measured & SIGNAL_KV_NORMS) {
        out.k_norm = m->k_norm;
        out.v_norm = m->v_norm;
    }
    if (s->measured & SIGNAL_ACTIVATION) {
        out.activation = m->activation;
    }
    return out;
}

/* K and V of the slot's whole context. Collective over the replica. */
static enum status take_features(struct session *s, struct signals *signals, int32_t slot)
{
    int32_t n_tok = decoder_n_filled(s->dec, slot), n_heads = n_feature_heads(s);
    if (n_heads == 0) {
        return ST_OK;
    }
    bool all_heads = (s->policy->ops->needs & SIGNAL_KV_HEADS) != 0;
    TRY(decoder_features(s->dec, slot, n_tok, all_heads, s->features));
    signals->features = s->features;
    signals->n_feature_heads = n_heads;
    signals->n_feature_tok = n_tok;
    signals->feature_dim = s->config->head_dim;
    return ST_OK;
}

static enum status prefill_chunk(struct session *s, struct sequence *q, int32_t slot)
{
    int32_t total = turn_n_prefill(q), n = total - q->n_fed;
    n = n < s->opt.prefill_chunk ? n : s->opt.prefill_chunk;
    for (int32_t i = 0; i < n; i++) {
        int32_t at = q->n_fed + i - (q->carry ? 1 : 0);
        s->chunk[i] = at < 0 ? q->last : q->prompt->ids[q->turn][at];
    }
    bool last = q->n_fed + n == total;
    struct logit_want want = want_of(s, q, 0);
    struct token_result result = {0};
    struct pass_record pass;
    atomic_store(&s->at, slot);
    enum status st = decoder_prefill(s->dec, slot, s->chunk, n, q->prefill_level, &want,
                                     last ? 1 : 0, &result, &pass);
    TRY(blame(s, st, slot, -1, q->prefill_level));
    keep_pass(s, &pass);
    q->n_fed += n;
    if (!last) {
        return ST_OK;
    }
    struct turn_record *t = &q->rec.turns[q->turn];
    t->token0 = result.token;
    t->logprob0 = result.logprob;
    t->entropy0 = result.entropy;
    t->margin0 = result.margin;
    t->prefill_s = (float)(clock_s() - q->turn_s);
    q->decode_s = clock_s();
    if (s->opt.kv_features && q->turn == 0) {
        TRY(decoder_features(s->dec, slot, total, false, q->rec.features));
        q->rec.n_feature_tok = total;
        q->rec.feature_dim = s->config->head_dim;
    }
    q->last_pass = s->next_pass - 1;
    struct signals signals = signals_of(s, &result, 0, -1, q->prefill_level);
    TRY(take_features(s, &signals, slot));
    TRY(planner_ask(s->planner, slot, -1, s->coll->rank == 0 ? &signals : NULL));
    return take_token(s, q, slot, result.token);
}

/* n tokens, probes among them. */
static enum status observe_steps(struct session *s, int32_t n)
{
    for (int32_t i = 0; s->observes && i < n; i++) {
        const struct decode_token *token = &s->tokens[i];
        if (token->probe) {
            continue;
        }
        int32_t step = s->seq[token->slot].n_new - 1;
        struct signals signals = signals_of(s, &s->results[i], i, step, token->level);
        if (i + 1 < n && s->tokens[i + 1].probe) {
            signals.probe_level = s->tokens[i + 1].level;
            signals.probe_kl = s->results[i + 1].probe_kl;
        }
        atomic_store(&s->at, token->slot);
        TRY(planner_ask(s->planner, token->slot, step, s->coll->rank == 0 ? &signals : NULL));
    }
    atomic_store(&s->at, EVERY_SLOT);
    return ST_OK;
}

/* The slots that run the next pass: s->slots and s->steps. */
static int32_t choose_slots(struct session *s)
{
    int32_t n = 0;
    for (int32_t slot = 0; slot < s->opt.n_slots; slot++) {
        if (s->seq[slot].active) {
            s->slots[n] = slot;
            s->steps[n++] = s->seq[slot].n_new - 1; // it consumes generated token `step`
        }
    }
    return n;
}

/* Of n settled slots, those at the level of the one that has waited longest. */
static int32_t keep_cohort(struct session *s, int32_t n)
{
    int32_t first = 0, kept = 0;
    for (int32_t i = 1; i < n; i++) {
        uint32_t waited = s->next_pass - s->seq[s->slots[i]].last_pass;
        first = waited > s->next_pass - s->seq[s->slots[first]].last_pass ? i : first;
    }
    int32_t level = planner_level(s->planner, s->slots[first], s->steps[first]);
    for (int32_t i = 0; i < n; i++) {
        if (planner_level(s->planner, s->slots[i], s->steps[i]) == level) {
            s->slots[kept] = s->slots[i];
            s->steps[kept++] = s->steps[i];
        }
    }
    return kept;
}

/* The tokens of a decode pass, each followed by its probe if it has one. */
static enum status gather_tokens(struct session *s, int32_t *n_tokens)
{
    int32_t n_chosen = choose_slots(s), n = 0;
    TRY(planner_settle(s->planner, n_chosen, s->slots, s->steps));
    n_chosen = s->opt.by_level ? keep_cohort(s, n_chosen) : n_chosen;
    for (int32_t i = 0; i < n_chosen; i++) {
        int32_t slot = s->slots[i], probe = planner_probe(s->planner, slot);
        const struct sequence *q = &s->seq[slot];
        s->tokens[n++] =
            (struct decode_token){.slot = slot,
                                  .id = q->last,
                                  .level = planner_level(s->planner, slot, s->steps[i]),
                                  .want = want_of(s, q, s->steps[i] + 1)};
        if (probe >= 0) {
            s->tokens[n++] = (struct decode_token){
                .slot = slot, .id = q->last, .level = probe, .probe = true, .want = {.target = -1}};
        }
    }
    *n_tokens = n;
    return ST_OK;
}

static enum status decode_pass(struct session *s)
{
    int32_t n = 0, bad = 0;
    struct pass_record pass;
    TRY(gather_tokens(s, &n));
    enum status st = decoder_step(s->dec, s->tokens, n, s->results, &pass);
    for (int32_t i = n - 1; i >= 0 && st == ST_NUMERIC; i--) {
        bad = s->results[i].token < 0 ? i : bad;
    }
    const struct decode_token *blamed = &s->tokens[bad];
    TRY(blame(s, st, blamed->slot, s->seq[blamed->slot].n_new - 1, blamed->level));
    keep_pass(s, &pass);
    uint32_t number = s->next_pass - 1;
    TRY(observe_steps(s, n));
    for (int32_t i = 0; i < n; i++) {
        struct sequence *q = &s->seq[s->tokens[i].slot];
        const struct token_result *r = &s->results[i];
        if (s->tokens[i].probe) {
            continue;
        }
        bool probed = i + 1 < n && s->tokens[i + 1].probe;
        struct signals g = signals_of(s, r, i, q->n_new - 1, s->tokens[i].level);
        q->rec.steps[q->rec.n_steps++] =
            (struct step_record){.turn = q->turn,
                                 .step = g.step,
                                 .level = g.level,
                                 .token = g.token,
                                 .logprob = g.logprob,
                                 .entropy = g.entropy,
                                 .margin = g.margin,
                                 .pass = number,
                                 .max_prob = g.max_prob,
                                 .probe_kl = probed ? s->results[i + 1].probe_kl : NAN,
                                 .hidden_mean = g.hidden_mean,
                                 .hidden_rms = g.hidden_rms,
                                 .k_norm = g.k_norm,
                                 .v_norm = g.v_norm};
        q->rec.turns[q->turn].n_steps++;
        q->last_pass = number;
        atomic_store(&s->at, s->tokens[i].slot);
        TRY(take_token(s, q, s->tokens[i].slot, r->token));
    }
    return ST_OK;
}

enum status session_advance(struct session *s)
{
    int32_t prefilling = -1;
    bool any = false;
    for (int32_t slot = 0; slot < s->opt.n_slots && prefilling < 0; slot++) {
        prefilling = is_prefilling(&s->seq[slot]) ? slot : -1;
        any = any || s->seq[slot].active;
    }
    if (prefilling >= 0) {
        TRY(prefill_chunk(s, &s->seq[prefilling], prefilling));
    } else if (any) {
        TRY(decode_pass(s));
    }
    atomic_store(&s->at, EVERY_SLOT);
    return ST_OK;
}
