/* The gradient of the cross-entropy, written out. z: scores; P: softmax of z.
 *   dz = P - onehot(label);  dW2 = dz^T h;  dh = dz W2, through the dropout mask and ReLU
 *   dW1 = dh^T y;  dy = dh W1;  layer norm: y = n * gain + bias, n = (x - mean) * rstd,
 *   dx = rstd * (dn - mean(dn) - n * mean(dn * n)), dn = dy * gain
 *   pooling, by group: p_q = softmax(r K q), x = mean_q(p_q) V, r = 1 / sqrt(d):
 *   dp = V dx / n_queries;  ds_q = p_q * (dp - <p_q, dp>);  dq = r * ds_q K
 * Scores of the pooling are computed again on the way back instead of being kept.
 * SPDX-License-Identifier: Apache-2.0
 */
#include "sched/train.h"

#include <cblas.h>
#include <math.h>
#include <string.h>

#include "core/mem.h"
#include "core/sampler.h"

enum status gradient_work_create(struct gradient_work *out, const struct classifier_shape *s,
                                 int32_t n, int32_t max_tok)
{
    size_t rows = (size_t)n, tok = (size_t)max_tok, used = 0;
    size_t queries = s->kind == CLASSIFIER_KV ? (size_t)s->n_queries : 0;
    const size_t count[] = {rows * (size_t)s->n_in,
                            rows,
                            rows * (size_t)s->n_hidden,
                            rows * (size_t)s->n_classes,
                            rows * (size_t)s->n_hidden,
                            rows * (size_t)s->n_in,
                            queries * tok,
                            tok,
                            tok};
    enum { N_PARTS = sizeof count / sizeof *count };
    *out = (struct gradient_work){.n = n, .max_tok = max_tok};
    float **const part[N_PARTS] = {&out->x,  &out->rstd,   &out->h, &out->dz, &out->dh,
                                   &out->dx, &out->scores, &out->p, &out->dp};
    for (int i = 0; i < N_PARTS; i++) {
        used += count[i];
    }
    TRY(MEM_NEW(&out->block, used));
    float *at = out->block;
    for (int i = 0; i < N_PARTS; i++) {
        *part[i] = at;
        at += count[i];
    }
    return ST_OK;
}

void gradient_work_free(struct gradient_work *w)
{
    mem_free(w->block);
    *w = (struct gradient_work){0};
}

/* Rows of scores (n_queries, n_tok) become the softmax of r Q K^T. */
static void attend(const struct classifier_shape *s, const float *query, const float *k,
                   int32_t n_tok, float *scores)
{
    float r = 1 / sqrtf((float)s->head_dim);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, s->n_queries, n_tok, s->head_dim, r, query,
                s->head_dim, k, s->head_dim, 0, scores, n_tok);
    for (int32_t q = 0; q < s->n_queries; q++) {
        float *row = scores + (size_t)q * (size_t)n_tok, most = row[0], sum = 0;
        for (int32_t t = 1; t < n_tok; t++) {
            most = row[t] > most ? row[t] : most;
        }
        for (int32_t t = 0; t < n_tok; t++) {
            row[t] = expf(row[t] - most);
            sum += row[t];
        }
        for (int32_t t = 0; t < n_tok; t++) {
            row[t] /= sum;
        }
    }
}

struct head {
    const float *k, *v; /* (n_tok, head_dim) */
};

static struct head head_of(const struct classifier_shape *s, const struct train_sample *sample,
                           int32_t g)
{
    size_t head = (size_t)sample->n_tok * (size_t)s->head_dim;
    const float *k = sample->features + (s->n_kv_heads == 1 ? 0 : (size_t)g * head);
    return (struct head){k, k + (size_t)s->n_kv_heads * head};
}

static void pool(const struct classifier_shape *s, const float *query,
                 const struct train_sample *sample, struct gradient_work *w, float *x)
{
    int32_t n_tok = sample->n_tok, d = s->head_dim;
    for (int32_t g = 0; g < s->n_groups; g++) {
        struct head head = head_of(s, sample, g);
        attend(s, query + (size_t)g * (size_t)s->n_queries * (size_t)d, head.k, n_tok, w->scores);
        memset(w->p, 0, (size_t)n_tok * sizeof *w->p);
        for (int32_t q = 0; q < s->n_queries; q++) {
            cblas_saxpy(n_tok, 1 / (float)s->n_queries, w->scores + (size_t)q * (size_t)n_tok, 1,
                        w->p, 1);
        }
        cblas_sgemv(CblasRowMajor, CblasTrans, n_tok, d, 1, head.v, d, w->p, 1, 0,
                    x + (size_t)g * (size_t)d, 1);
    }
}

static void pool_back(const struct classifier_shape *s, const float *query,
                      const struct train_sample *sample, struct gradient_work *w, const float *dx,
                      float *dquery)
{
    int32_t n_tok = sample->n_tok, d = s->head_dim;
    float r = 1 / sqrtf((float)d);
    for (int32_t g = 0; g < s->n_groups; g++) {
        struct head head = head_of(s, sample, g);
        size_t at = (size_t)g * (size_t)s->n_queries * (size_t)d;
        attend(s, query + at, head.k, n_tok, w->scores);
        cblas_sgemv(CblasRowMajor, CblasNoTrans, n_tok, d, 1 / (float)s->n_queries, head.v, d,
                    dx + (size_t)g * (size_t)d, 1, 0, w->dp, 1);
        for (int32_t q = 0; q < s->n_queries; q++) {
            float *p = w->scores + (size_t)q * (size_t)n_tok;
            float inner = cblas_sdot(n_tok, p, 1, w->dp, 1);
            for (int32_t t = 0; t < n_tok; t++) {
                p[t] *= w->dp[t] - inner;
            }
        }
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, s->n_queries, d, n_tok, r, w->scores,
                    n_tok, head.k, d, 1, dquery + at, d);
    }
}

/* x (n_in) becomes n, the normed input without gain and bias; its 1 / deviation comes back. */
static float norm(float *x, int32_t n)
{
    double mean = 0, variance = 0;
    for (int32_t i = 0; i < n; i++) {
        mean += (double)x[i];
    }
    mean /= n;
    for (int32_t i = 0; i < n; i++) {
        double d = (double)x[i] - mean;
        variance += d * d;
    }
    float m = (float)mean, r = (float)(1 / sqrt(variance / n + (double)CLASSIFIER_NORM_EPS));
    for (int32_t i = 0; i < n; i++) {
        x[i] = (x[i] - m) * r;
    }
    return r;
}

/* dy (n_in) becomes dx; n: what norm left. */
static void norm_back(float *dy, const float *n, const float *gain, float rstd, int32_t n_in)
{
    double sum = 0, along = 0;
    for (int32_t i = 0; i < n_in; i++) {
        dy[i] *= gain[i];
        sum += (double)dy[i];
        along += (double)dy[i] * (double)n[i];
    }
    float a = (float)(sum / n_in), b = (float)(along / n_in);
    for (int32_t i = 0; i < n_in; i++) {
        dy[i] = rstd * (dy[i] - a - n[i] * b);
    }
}

/* ReLU and dropout in place; a unit left out is 0, which also stops its gradient. */
static void hidden(float *h, int32_t n, double dropout, const uint32_t key[2], int32_t sample)
{
    double keep = 1 / (1 - dropout);
    uint32_t limit = (uint32_t)(dropout * 4294967295.0), random[4] = {0};
    for (int32_t i = 0; i < n; i++) {
        if (dropout > 0) {
            if (i % 4 == 0) {
                const uint32_t counter[4] = {(uint32_t)i, (uint32_t)sample, 0, 0};
                philox4x32(random, counter, key);
            }
            h[i] = random[i % 4] < limit ? 0 : h[i] * (float)keep;
        }
        h[i] = h[i] < 0 ? 0 : h[i];
    }
}

/* Scores of a row become dz, scaled; its loss comes back. */
static double loss_back(float *z, int32_t n, int32_t label, float weight, bool *right)
{
    double most = (double)z[0], sum = 0, at_label = (double)z[label];
    *right = classifier_argmax(z, n) == label;
    for (int32_t i = 1; i < n; i++) {
        most = (double)z[i] > most ? (double)z[i] : most;
    }
    for (int32_t i = 0; i < n; i++) {
        sum += exp((double)z[i] - most);
    }
    for (int32_t i = 0; i < n; i++) {
        double p = exp((double)z[i] - most) / sum;
        z[i] = weight * (float)(p - (i == label));
    }
    return (double)weight * (most + log(sum) - at_label);
}

void train_gradient(const struct classifier *c, const struct train_sample *samples,
                    const int32_t *order, int32_t n, const float *weight, double dropout,
                    const uint32_t dropout_key[2], struct gradient_work *w, float *gradient,
                    double *loss, int32_t *n_right)
{
    const struct classifier_shape *s = &c->shape;
    struct classifier_view p = classifier_view(s, c->params), d = classifier_view(s, gradient);
    size_t in = (size_t)s->n_in, width = (size_t)s->n_hidden, classes = (size_t)s->n_classes;
    float keep = (float)(1 / (1 - dropout));
    *loss = 0;
    *n_right = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct train_sample *sample = &samples[order[i]];
        float *x = w->x + (size_t)i * in, *y = w->dx + (size_t)i * in;
        if (s->kind == CLASSIFIER_KV) {
            pool(s, p.query, sample, w, x);
        } else {
            for (size_t j = 0; j < in; j++) {
                x[j] = (sample->features[j] - c->shift[j]) * c->scale[j];
            }
        }
        w->rstd[i] = norm(x, s->n_in);
        for (size_t j = 0; j < in; j++) {
            y[j] = x[j] * p.gain[j] + p.bias[j];
        }
        memcpy(w->h + (size_t)i * width, p.b1, width * sizeof(float));
        memcpy(w->dz + (size_t)i * classes, p.b2, classes * sizeof(float));
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, s->n_hidden, s->n_in, 1, w->dx, s->n_in,
                p.w1, s->n_in, 1, w->h, s->n_hidden);
    for (int32_t i = 0; i < n; i++) {
        hidden(w->h + (size_t)i * width, s->n_hidden, dropout, dropout_key, order[i]);
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, s->n_classes, s->n_hidden, 1, w->h,
                s->n_hidden, p.w2, s->n_hidden, 1, w->dz, s->n_classes);
    for (int32_t i = 0; i < n; i++) {
        int32_t label = samples[order[i]].label;
        bool right = false;
        *loss += loss_back(w->dz + (size_t)i * classes, s->n_classes, label, weight[label], &right);
        *n_right += right;
    }
    /* back; w->dx still holds y */
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, s->n_classes, s->n_hidden, n, 1, w->dz,
                s->n_classes, w->h, s->n_hidden, 1, d.w2, s->n_hidden);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, s->n_hidden, s->n_classes, 1, w->dz,
                s->n_classes, p.w2, s->n_hidden, 0, w->dh, s->n_hidden);
    for (size_t i = 0; i < (size_t)n * width; i++) {
        w->dh[i] = w->h[i] > 0 ? (dropout > 0 ? w->dh[i] * keep : w->dh[i]) : 0;
    }
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, s->n_hidden, s->n_in, n, 1, w->dh,
                s->n_hidden, w->dx, s->n_in, 1, d.w1, s->n_in);
    for (int32_t i = 0; i < n; i++) {
        cblas_saxpy(s->n_hidden, 1, w->dh + (size_t)i * width, 1, d.b1, 1);
        cblas_saxpy(s->n_classes, 1, w->dz + (size_t)i * classes, 1, d.b2, 1);
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, s->n_in, s->n_hidden, 1, w->dh,
                s->n_hidden, p.w1, s->n_in, 0, w->dx, s->n_in);
    for (int32_t i = 0; i < n; i++) {
        float *x = w->x + (size_t)i * in, *dx = w->dx + (size_t)i * in;
        for (size_t j = 0; j < in; j++) {
            d.gain[j] += dx[j] * x[j];
            d.bias[j] += dx[j];
        }
        norm_back(dx, x, p.gain, w->rstd[i], s->n_in);
        if (s->kind == CLASSIFIER_KV) {
            pool_back(s, p.query, &samples[order[i]], w, dx, d.query);
        }
    }
}
