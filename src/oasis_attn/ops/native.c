/* What decoding one new token per sequence does beside the family's own work, in float32.
 *
 * Axes: B sequences, H heads, d head width, D width, R routers, S sources.
 */
#include <math.h>
#include <stdint.h>

typedef struct {
    int64_t B, H, D, S, block, null, scaled;
    float eps;
    const float *queries_RD;   /* key-norm gains folded in */
    const float *couplings_R;  /* or NULL: no signal */
    float *sources_BSD, *inverse_rms_BS, *psi_BS, *weights_S;
    int64_t router, row;       /* the router to mix for next, and the source being written */
} DepthState;

static float dot(const float *a, const float *b, int64_t D) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; d++) sum += a[d] * b[d];
    return sum;
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

/* Depth routing in one call a sublayer: what DepthStream computes.  The null of Softmax1 over depth
 * has the logit of a source of evidence mean psi, which here is 0: psi is centred.
 *
 * Add a sublayer's output [B, D] and its null mass [B, H] (or NULL: evidence 0) to the sources, and
 * write the next router's mix [B, D].  The first call's output is the embedding. */
void depth_step(DepthState *s, const float *branch_BD, const float *null_BH, float *mixed_BD) {
    const int64_t D = s->D, S = s->S, row = s->row, rows = row + 1;
    const int64_t members = s->router ? (s->router - 1) % s->block : 0;
    const float *query = s->queries_RD + s->router * D;
    const float beta = s->couplings_R ? s->couplings_R[s->router] : 0;

    for (int64_t b = 0; b < s->B; b++) {
        const float *branch = branch_BD + b * D;
        float *sources = s->sources_BSD + b * S * D, *source = sources + row * D;
        float *inverse_rms = s->inverse_rms_BS + b * S, *psi = s->psi_BS + b * S;
        float *weights = s->weights_S, *mixed = mixed_BD + b * D;

        for (int64_t d = 0; d < D; d++) source[d] = members ? source[d] + branch[d] : branch[d];
        inverse_rms[row] = 1 / sqrtf(dot(source, source, D) / D + s->eps);
        float evidence = 0;
        for (int64_t h = 0; null_BH && h < s->H; h++) evidence += null_BH[b * s->H + h] / s->H;
        psi[row] = members ? psi[row] + (evidence - psi[row]) / (members + 1) : evidence;

        float mean = 0, top = s->null ? 0 : -INFINITY, total = 0;
        for (int64_t i = 0; i < rows; i++) mean += psi[i] / rows;
        for (int64_t i = 0; i < rows; i++) {
            weights[i] = dot(sources + i * D, query, D) * inverse_rms[i] - beta * (psi[i] - mean);
            top = fmaxf(top, weights[i]);
        }
        for (int64_t i = 0; i < rows; i++) total += weights[i] = expf(weights[i] - top);
        if (s->null) total += expf(-top);
        const float scale = (s->scaled ? rows + s->null : 1) / total;

        for (int64_t d = 0; d < D; d++) mixed[d] = 0;
        for (int64_t i = 0; i < rows; i++) {
            const float weight = weights[i] * scale;
            for (int64_t d = 0; d < D; d++) mixed[d] += weight * sources[i * D + d];
        }
    }
    s->row += s->router == 0 || members + 1 == s->block;
    s->router++;
}
