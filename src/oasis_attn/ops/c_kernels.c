/* Kernels for inference on a CPU in float32: the null option of attention, and mixes over depth.
 *
 * Axes: N tokens, B sequences, H heads, d head width, D width (a multiple of LANES), R routers,
 * S sources, G routers of a group (rounded up to a multiple of TILE).
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

/* Scale the output of softmax attention, [rows, d] with rows = B * H, by the probability of its keys,
 * in place, and write the null probability of each row.  lse is the log-sum-exp of the logits of the
 * keys.  The null logits are `logit`, or those of `logits`, if not NULL: its `count` entries are those
 * of the first rows and repeat (count is 1, H or B * H). */
void null_step(float *out, const float *lse, float *null, const float *logits, int64_t count,
               float logit, int64_t rows, int64_t d) {
    for (int64_t i = 0; i < rows; i++) {
        const float excess = lse[i] - (logits ? logits[i % count] : logit);
        const float rest = 1 / (1 + expf(-excess)); /* 1 - null */
        null[i] = 1 / (1 + expf(excess));
        for (int64_t j = 0; j < d; j++) out[i * d + j] *= rest;
    }
}

/* Mixes over depth, in two phases (arXiv 2603.15031, inference).  Routers are processed in groups:
 * those of a block, or a fixed number if every sublayer is a source of its own.  When a group begins,
 * one pass over the earlier sources computes the partial mixes of its routers.  Each router then
 * merges its partial mix with the recent sources, those added since, by the online softmax.
 *
 * The mean of psi is not subtracted from the logits: for a softmax it has no effect; for Softmax1,
 * -beta mean psi is added to the null's logit instead. */
typedef struct {
    int64_t N, D, R, block, group, null;
    int64_t scale;        /* of a mix: 0 none, 1 times the number of sources, 2 to a mean square of 1 */
    float eps, unit_eps;  /* of the keys' RMSNorm; of scale 2 */
    const float *queries_RD;  /* times the gains of the key norms; TILE rows of zeros at the end */
    const float *beta_R;      /* NULL: no null signal */
    float *sources_SND, *inverse_rms_SN, *psi_SN, *psi_sum_N;
    float *partial_GND, *top_GN, *total_GN;  /* sum e^(logit - top) v, largest logit, sum e^(logit - top) */
} DepthState;

static float beta_of(const DepthState *s, int64_t router) {
    return s->beta_R && router < s->R ? s->beta_R[router] : 0;
}

/* Phase one: partial mixes of token n over its first `count` sources, for the routers of the group
 * that begins with router `first`. */
static void mix_earlier(const DepthState *s, int64_t n, int64_t first, int64_t count) {
    const int64_t N = s->N, D = s->D;
    for (int64_t g = 0; g < s->group && first + g < s->R; g += TILE) {
        const float *queries = s->queries_RD + (first + g) * D;
        float weights[count][TILE], top[TILE], totals[TILE] = {0};

        for (int r = 0; r < TILE; r++) top[r] = -INFINITY;
        for (int64_t i = 0; i < count; i++) {
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
        for (int64_t i = 0; i < count; i++)
            for (int r = 0; r < TILE; r++) totals[r] += weights[i][r] = expf(weights[i][r] - top[r]);
        for (int64_t d = 0; d < D; d += LANES) {
            vector sums[TILE] = {{0}};
            for (int64_t i = 0; i < count; i++) {
                const vector values = load(s->sources_SND + (i * N + n) * D + d);
                for (int r = 0; r < TILE; r++) sums[r] += weights[i][r] * values;
            }
            for (int r = 0; r < TILE; r++) store(s->partial_GND + ((g + r) * N + n) * D + d, sums[r]);
        }
        for (int r = 0; r < TILE; r++) {
            s->top_GN[(g + r) * N + n] = top[r];
            s->total_GN[(g + r) * N + n] = totals[r];
        }
    }
}

/* Add the output of sublayer `router` (sublayer 0 is the embedding) to the sources, and write the mix
 * of the router [N, D].  branch_ND is the output, psi_N its null evidence (NULL: 0).  The output
 * becomes a new source, or is added to the newest one if its block is unfinished.  Processes tokens
 * start to stop (exclusive); tokens are independent. */
void depth_step(const DepthState *s, int64_t router, const float *branch_ND, const float *psi_N,
                float *mixed_ND, int64_t start, int64_t stop) {
    const int64_t N = s->N, D = s->D, place = router % s->group;
    const int64_t members = router ? (router - 1) % s->block : 0;
    const int64_t row = router ? 1 + (router - 1) / s->block : 0, count = row + 1;
    const int64_t earlier = 1 + (router - place) / s->block, recent = count - earlier;
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
        const float old_psi = members ? s->psi_SN[row * N + n] : 0;
        const float psi = old_psi + (evidence - old_psi) / (members + 1);
        s->psi_SN[row * N + n] = psi;
        s->psi_sum_N[n] = router ? s->psi_sum_N[n] + psi - old_psi : psi;

        if (place == 0) mix_earlier(s, n, router, count);
        const float earlier_top = s->top_GN[place * N + n];
        const float null = s->null ? -beta * s->psi_sum_N[n] / count : -INFINITY;
        float top = fmaxf(earlier_top, null);
        for (int64_t i = 0; i < recent; i++) {
            const int64_t at = (earlier + i) * N + n;
            const float score = dot(s->sources_SND + at * D, query, D);
            weights[i] = score * s->inverse_rms_SN[at] - beta * s->psi_SN[at];
            top = fmaxf(top, weights[i]);
        }
        float partial = expf(earlier_top - top);
        float sum = partial * s->total_GN[place * N + n] + expf(null - top);
        for (int64_t i = 0; i < recent; i++) sum += weights[i] = expf(weights[i] - top);
        const float scale = (s->scale == 1 ? count + s->null : 1) / sum;
        partial *= scale;
        for (int64_t i = 0; i < recent; i++) weights[i] *= scale;
        for (int64_t d = 0; d < D; d += LANES) {
            vector mixed = partial * load(s->partial_GND + (place * N + n) * D + d);
            for (int64_t i = 0; i < recent; i++)
                mixed += weights[i] * load(s->sources_SND + ((earlier + i) * N + n) * D + d);
            store(mixed_ND + n * D + d, mixed);
        }
        if (s->scale == 2) {
            float *mixed = mixed_ND + n * D;
            const float inverse_rms = 1 / sqrtf(dot(mixed, mixed, D) / D + s->unit_eps);
            for (int64_t d = 0; d < D; d++) mixed[d] *= inverse_rms;
        }
    }
}
