/* What inference on a CPU does beside the family's own work, in float32.
 *
 * Axes: N tokens, B sequences, H heads, d head width, D width in whole vectors, R routers, S sources,
 * G routers of a group, filled up to whole tiles.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, TILE = 4 };
typedef float vector __attribute__((vector_size(LANES * sizeof(float))));

static inline vector load(const float *from) {
    vector values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline void store(float *to, vector values) { memcpy(to, &values, sizeof values); }

static inline float total(vector values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}

static float dot(const float *a, const float *b, int64_t W) {
    vector sum = {0};
    for (int64_t w = 0; w < W; w += LANES) sum += load(a + w) * load(b + w);
    return total(sum);
}

/* Give softmax attention's output [B, H, d] its null, in place, and write the null mass [B, H]: from
 * the log-sum-exp of the real logits, and the null's logit, one a head (logits_H) or one for all. */
void null_step(float *out_BHd, const float *lse_BH, float *null_BH, const float *logits_H,
               float logit, int64_t B, int64_t H, int64_t d) {
    for (int64_t i = 0; i < B * H; i++) {
        const float excess = lse_BH[i] - (logits_H ? logits_H[i % H] : logit);
        const float keep = 1 / (1 + expf(-excess));
        null_BH[i] = 1 / (1 + expf(excess));
        for (int64_t j = 0; j < d; j++) out_BHd[i * d + j] *= keep;
    }
}

/* Depth routing: what AutogradMix computes, in two phases (arXiv 2603.15031, inference).  Routers are
 * taken in groups: a block's, or some at a time where every sublayer is a source of its own.  When a
 * group begins, one pass over the finished sources makes its routers' partial mixes; each router then
 * merges its own with the sources that have come since, by the online softmax.
 *
 * psi is not centered: for Softmax1 that moves the null's logit from 0 to -beta mean psi, and for the
 * softmax it changes nothing. */
typedef struct {
    int64_t N, D, R, block, group, null;
    int64_t scale;  /* of a mix: 0 as it is, 1 times the number of sources, 2 to a mean square of 1 */
    float eps, unit_eps;
    const float *queries_RD;   /* key-norm gains folded in; TILE rows of zeros at the end */
    const float *beta_R;  /* or NULL: no signal */
    float *sources_SND, *inverse_rms_SN, *psi_SN, *psi_sum_N;
    float *partial_GND, *top_GN, *mass_GN;  /* sum e^(logit - top) x, top, sum e^(logit - top) */
} DepthState;

static float beta_of(const DepthState *s, int64_t router) {
    return s->beta_R && router < s->R ? s->beta_R[router] : 0;
}

/* Partial mixes of token n over its first sources, for the group that begins at `first`. */
static void fold(const DepthState *s, int64_t n, int64_t first, int64_t rows) {
    const int64_t N = s->N, D = s->D;
    for (int64_t g = 0; g < s->group && first + g < s->R; g += TILE) {
        const float *queries = s->queries_RD + (first + g) * D;
        float weights[rows][TILE], top[TILE], mass[TILE] = {0};

        for (int r = 0; r < TILE; r++) top[r] = -INFINITY;
        for (int64_t i = 0; i < rows; i++) {
            const float *source = s->sources_SND + (i * N + n) * D;
            vector sums[TILE] = {{0}};
            for (int64_t d = 0; d < D; d += LANES) {
                const vector values = load(source + d);
                for (int r = 0; r < TILE; r++) sums[r] += values * load(queries + r * D + d);
            }
            for (int r = 0; r < TILE; r++) {
                const float bias = beta_of(s, first + g + r) * s->psi_SN[i * N + n];
                weights[i][r] = total(sums[r]) * s->inverse_rms_SN[i * N + n] - bias;
                top[r] = fmaxf(top[r], weights[i][r]);
            }
        }
        for (int64_t i = 0; i < rows; i++)
            for (int r = 0; r < TILE; r++) mass[r] += weights[i][r] = expf(weights[i][r] - top[r]);
        for (int64_t d = 0; d < D; d += LANES) {
            vector sums[TILE] = {{0}};
            for (int64_t i = 0; i < rows; i++) {
                const vector values = load(s->sources_SND + (i * N + n) * D + d);
                for (int r = 0; r < TILE; r++) sums[r] += weights[i][r] * values;
            }
            for (int r = 0; r < TILE; r++) store(s->partial_GND + ((g + r) * N + n) * D + d, sums[r]);
        }
        for (int r = 0; r < TILE; r++) {
            s->top_GN[(g + r) * N + n] = top[r];
            s->mass_GN[(g + r) * N + n] = mass[r];
        }
    }
}

/* The mix of `router` [N, D], once the sublayer before it (before router 0: the embedding) has given
 * its output [N, D] and null evidence psi [N] (or NULL: 0).  That output becomes the newest
 * source, or joins it where a block is running.  Of tokens start to stop, which are independent. */
void depth_step(const DepthState *s, int64_t router, const float *branch_ND, const float *psi_N,
                float *mixed_ND, int64_t start, int64_t stop) {
    const int64_t N = s->N, D = s->D, place = router % s->group;
    const int64_t members = router ? (router - 1) % s->block : 0;
    const int64_t row = router ? 1 + (router - 1) / s->block : 0, rows = row + 1;
    const int64_t folded = 1 + (router - place) / s->block, recent = rows - folded;
    const float *query = s->queries_RD + router * D, beta = beta_of(s, router);
    float weights[recent + 1];

    for (int64_t n = start; n < stop; n++) {
        float *newest = s->sources_SND + (row * N + n) * D;
        for (int64_t d = 0; d < D; d += LANES) {
            const vector values = load(branch_ND + n * D + d);
            store(newest + d, members ? load(newest + d) + values : values);
        }
        s->inverse_rms_SN[row * N + n] = 1 / sqrtf(dot(newest, newest, D) / D + s->eps);
        const float evidence = psi_N ? psi_N[n] : 0;
        const float earlier = members ? s->psi_SN[row * N + n] : 0;
        const float psi = earlier + (evidence - earlier) / (members + 1);
        s->psi_SN[row * N + n] = psi;
        s->psi_sum_N[n] = router ? s->psi_sum_N[n] + psi - earlier : psi;

        if (place == 0) fold(s, n, router, rows);
        const float before = s->top_GN[place * N + n];
        const float null = s->null ? -beta * s->psi_sum_N[n] / rows : -INFINITY;
        float top = fmaxf(before, null);
        for (int64_t i = 0; i < recent; i++) {
            const int64_t at = (folded + i) * N + n;
            const float score = dot(s->sources_SND + ((folded + i) * N + n) * D, query, D);
            weights[i] = score * s->inverse_rms_SN[at] - beta * s->psi_SN[at];
            top = fmaxf(top, weights[i]);
        }
        float kept = expf(before - top), mass = kept * s->mass_GN[place * N + n] + expf(null - top);
        for (int64_t i = 0; i < recent; i++) mass += weights[i] = expf(weights[i] - top);
        const float scale = (s->scale == 1 ? rows + s->null : 1) / mass;
        kept *= scale;
        for (int64_t i = 0; i < recent; i++) weights[i] *= scale;
        for (int64_t d = 0; d < D; d += LANES) {
            vector mixed = kept * load(s->partial_GND + (place * N + n) * D + d);
            for (int64_t i = 0; i < recent; i++)
                mixed += weights[i] * load(s->sources_SND + ((folded + i) * N + n) * D + d);
            store(mixed_ND + n * D + d, mixed);
        }
        if (s->scale == 2) {
            float *mixed = mixed_ND + n * D;
            const float inverse_rms = 1 / sqrtf(dot(mixed, mixed, D) / D + s->unit_eps);
            for (int64_t d = 0; d < D; d++) mixed[d] *= inverse_rms;
        }
    }
}
