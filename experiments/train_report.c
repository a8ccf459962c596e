/* SPDX-License-Identifier: Apache-2.0 */
#include "experiments/train_report.h"

#include <stdio.h>

/* Mean class_at of predictions, or of labels. */
static double mean_at(const struct held_out *h, const struct classifier *c, bool of_labels)
{
    double sum = 0;
    for (int32_t i = 0; i < h->n_classes; i++) {
        for (int32_t j = 0; j < h->n_classes; j++) {
            sum += h->confusion[i][j] * c->facts.class_at[of_labels ? i : j];
        }
    }
    return h->n > 0 ? sum / h->n : 0;
}

void train_report_print(const struct held_out *h, const struct classifier *c, const char *split)
{
    bool kv = c->shape.kind == CLASSIFIER_KV;
    printf("%s split, %d samples      classifier  class prior  by task\n", split, h->n);
    printf("  accuracy                  %9.4f    %9.4f %9.4f\n", h->accuracy, h->prior_accuracy,
           h->task_accuracy);
    printf("  -log p of the label, nats %9.4f    %9.4f %9.4f\n", h->nll, h->prior_nll, h->task_nll);
    printf("  calibration error (ECE)   %9.4f\n", h->ece);
    printf(kv ? "  switches too early %.1f %%, too late %.1f %%; on average at %.3f of the steps, "
                "labels at %.3f\n"
              : "  stays where it may drop %.1f %%, drops where it may not %.1f %%; drops in %.3f, "
                "labels in %.3f\n",
           100 * h->earlier, 100 * h->later, mean_at(h, c, false), mean_at(h, c, true));
    printf("  label \\ predicted");
    for (int32_t j = 0; j < h->n_classes; j++) {
        printf(" %7.3f", c->facts.class_at[j]);
    }
    for (int32_t i = 0; i < h->n_classes; i++) {
        printf("\n  %17.3f", c->facts.class_at[i]);
        for (int32_t j = 0; j < h->n_classes; j++) {
            printf(" %7d", h->confusion[i][j]);
        }
    }
    printf("\n  reliability: confidence -> accuracy (samples)\n   ");
    for (int b = 0; b < HELD_OUT_BINS; b++) {
        if (h->bins[b].n > 0) {
            printf(" %.2f->%.2f (%d)", h->bins[b].confidence, h->bins[b].accuracy, h->bins[b].n);
        }
    }
    printf("\n");
}

json_t *train_report_json(const struct held_out *h, const struct classifier *c)
{
    json_t *confusion = json_array(), *bins = json_array();
    for (int32_t i = 0; i < h->n_classes; i++) {
        json_t *row = json_array();
        for (int32_t j = 0; j < h->n_classes; j++) {
            json_array_append_new(row, json_integer(h->confusion[i][j]));
        }
        json_array_append_new(confusion, row);
    }
    for (int b = 0; b < HELD_OUT_BINS; b++) {
        json_array_append_new(bins,
                              json_pack("{s:i, s:f, s:f}", "n", h->bins[b].n, "confidence",
                                        h->bins[b].confidence, "accuracy", h->bins[b].accuracy));
    }
    return json_pack("{s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:o, s:o}", "n",
                     h->n, "accuracy", h->accuracy, "nll", h->nll, "prior_accuracy",
                     h->prior_accuracy, "prior_nll", h->prior_nll, "task_accuracy",
                     h->task_accuracy, "task_nll", h->task_nll, "ece", h->ece, "earlier",
                     h->earlier, "later", h->later, "switch_at", mean_at(h, c, false), "label_at",
                     mean_at(h, c, true), "confusion", confusion, "bins", bins);
}
