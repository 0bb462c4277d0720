// The passes of causal TSSA over one chunk of one head: CHUNK tokens or fewer, HEAD_WIDTH channels.
//
// w, dy, y and dw are rows of tokens C apart; what is per token and head (Pi, n, ...) is a row of CHUNK floats. A
// running sum at token t is what the chunk has summed itself, from zero, plus its share of what came in: forward
// sum_t + a_1 .. a_t before, in reverse sum_t + a_{t+1} .. a_last after. Passes leave the chunk's own sum in `own`, and
// the caller carries on in float64. The columns are taken a tile at a time, whose sums stay in registers. Letters and
// step numbers are those of docs/tssa.md.
#pragma once

#include <algorithm>

#include "simd.h"

constexpr int D = HEAD_WIDTH;
static_assert(D % 16 == 0 && CHUNK % 16 == 0, "whole vectors of every width");

constexpr int tile_vectors() {
  int most = LANES == 16 ? 8 : 4;  // two sums a vector, in 32 registers or 16
  while (D / LANES % most) most--;
  return most;
}
constexpr int VECTORS = tile_vectors();
constexpr int TILE = VECTORS * LANES;

// Rows a pass asks for before it needs them; the processor's own prefetchers do not follow rows C apart. Addresses
// beyond the tensor do no harm.
constexpr int AHEAD = 24;
constexpr int AHEAD_TO_WRITE = 8;  // more drives the chunk's w out of the cache

// The decays of one head over a chunk.
struct Decay {
  const float* a;       // 0 where a document begins
  const float* reach;   // a_1 .. a_t
  const float* beyond;  // a_{t+1} .. a_last
  double whole;         // a_1 .. a_last
};

INLINE Vector floored(Vector s) { return at_least(EPS, at_most(FLT_MAX, s)); }

// First scan: n_t, without the bias.
template <class X>
void share_pass(const X* w, int64_t C, int rows, const Decay& decay, const float* before, float* n, float* own) {
  std::fill(n, n + rows, 0.f);
  for (int j = 0; j < D; j += TILE) {
    Vector s[VECTORS] = {}, in[VECTORS];
    for (int i = 0; i < VECTORS; i++) in[i] = load(before + j + i * LANES);
    for (int t = 0; t < rows; t++) {
      const Vector a = splat(decay.a[t]), reach = splat(decay.reach[t]);
      Vector shares = {};
      for (int i = 0; i < VECTORS; i++) {
        const X* at = w + t * C + j + i * LANES;
        prefetch(at + AHEAD * C);
        const Vector x = load(at), u = x * x;
        s[i] = s[i] * a + u;
        shares += u * reciprocal(floored(s[i] + reach * in[i]));
      }
      n[t] += sum(shares);
    }
    for (int i = 0; i < VECTORS; i++) store(own + j + i * LANES, s[i]);
  }
}

// Second scan: y_t. `mass` is c'_t.
template <class X>
void output_pass(const X* w, X* y, int64_t C, int rows, const Decay& decay, const float* before, const float* Pi,
                 const float* mass, float* own) {
  for (int j = 0; j < D; j += TILE) {
    Vector m[VECTORS] = {}, in[VECTORS];
    for (int i = 0; i < VECTORS; i++) in[i] = load(before + j + i * LANES);
    for (int t = 0; t < rows; t++) {
      const Vector a = splat(decay.a[t]), reach = splat(decay.reach[t]), c = splat(mass[t]);
      const Vector p = splat(Pi[t]), scale = splat(-Pi[t] * mass[t]);
      for (int i = 0; i < VECTORS; i++) {
        const int64_t at = t * C + j + i * LANES;
        prefetch_to_write(y + at + AHEAD_TO_WRITE * C);
        const Vector x = load(w + at);
        m[i] = m[i] * a + x * x * p;
        const Vector total = at_most(FLT_MAX, c + (m[i] + reach * in[i]));
        store(y + at, x * scale * reciprocal(total));
      }
    }
    for (int i = 0; i < VECTORS; i++) store(own + j + i * LANES, m[i]);
  }
}

// c'_t of a chunk from the mass c before it.
inline void mass_pass(int rows, const Decay& decay, double c, const float* Pi, float* mass) {
  for (int t = 0; t < rows; t++) {
    c = c * decay.a[t] + Pi[t];
    mass[t] = static_cast<float>(c) + EPS_MASS;
  }
}

// What e_t and f_t of steps 1 and 2 add to the adjoints of the state before the chunk: `own` [D] of the weighted sums,
// and the result of the mass.
template <class X>
double state_grad_pass(const X* w, const X* dy, int64_t C, int rows, const Decay& decay, const float* before,
                       const float* Pi, const float* mass, float* own) {
  double d_mass = 0;
  for (int j = 0; j < D; j += TILE) {
    Vector m[VECTORS] = {}, in[VECTORS], total[VECTORS] = {};
    for (int i = 0; i < VECTORS; i++) in[i] = load(before + j + i * LANES);
    for (int t = 0; t < rows; t++) {
      const float share = decay.reach[t] * (Pi[t] / mass[t]);
      const Vector a = splat(decay.a[t]), reach = splat(decay.reach[t]), c = splat(mass[t]), p = splat(Pi[t]);
      Vector closed = {};
      for (int i = 0; i < VECTORS; i++) {
        const int64_t at = t * C + j + i * LANES;
        prefetch(dy + at + AHEAD * C);
        const Vector x = load(w + at), g = load(dy + at);
        m[i] = m[i] * a + x * x * p;
        const Vector A = c * reciprocal(at_most(FLT_MAX, c + (m[i] + reach * in[i])));
        const Vector v = x * A * g, vA = v * A;
        total[i] += vA * splat(share);
        closed += v - vA;
      }
      d_mass -= share * sum(closed);
    }
    for (int i = 0; i < VECTORS; i++) store(own + j + i * LANES, total[i]);
  }
  return d_mass;
}

// A scan again, every row kept: sums [rows + 1, D], before the first token and after each. WEIGHTED by Pi or not.
template <bool WEIGHTED, class X>
void replay(const X* w, int64_t C, int rows, const Decay& decay, const float* before, const float* Pi, float* sums) {
  for (int j = 0; j < D; j += TILE) {
    Vector s[VECTORS] = {}, in[VECTORS];
    for (int i = 0; i < VECTORS; i++) {
      in[i] = load(before + j + i * LANES);
      store(sums + j + i * LANES, in[i]);
    }
    for (int t = 0; t < rows; t++) {
      const Vector a = splat(decay.a[t]), reach = splat(decay.reach[t]);
      for (int i = 0; i < VECTORS; i++) {
        const X* at = w + t * C + j + i * LANES;
        if (WEIGHTED) prefetch(at + AHEAD * C);  // the first pass over the chunk
        const Vector x = load(at);
        s[i] = s[i] * a + (WEIGHTED ? x * x * Pi[t] : x * x);
        store(sums + (t + 1) * D + j + i * LANES, at_most(FLT_MAX, s[i] + reach * in[i]));
      }
    }
  }
}

// What the pass below leaves for the steps that follow.
struct WeightedAdjoints {
  float* d_Pi;     // [rows] sum_d (Mb_t u_t - v_t), step 4 without the mass's part
  float* d_mass;   // [rows] f_t, step 2
  float* partial;  // [rows, D] of dw, all that needs no dn
  float* own;      // [D]
  double d_rho;    // step 9, if RHO
};

// Steps 1 to 4. `m` are the rows of replay<true>, `share` Pi_t / c'_t.
template <bool RHO, class X>
void weighted_adjoint_pass(const X* w, const X* dy, int64_t C, int rows, const Decay& decay, const float* after,
                           const float* Pi, const float* mass, const float* share, const float* m,
                           WeightedAdjoints& out) {
  std::fill(out.d_Pi, out.d_Pi + rows, 0.f);
  std::fill(out.d_mass, out.d_mass + rows, 0.f);
  Vector d_rho = {};
  for (int j = 0; j < D; j += TILE) {
    Vector M[VECTORS] = {}, in[VECTORS];
    for (int i = 0; i < VECTORS; i++) in[i] = load(after + j + i * LANES);
    for (int t = rows - 1; t >= 0; t--) {
      const Vector a = splat(decay.a[t]), beyond = splat(decay.beyond[t]), c = splat(mass[t]);
      const Vector p = splat(Pi[t]), q = splat(share[t]), p2 = p + p;
      Vector d_Pi = {}, d_mass = {};
      for (int i = 0; i < VECTORS; i++) {
        const int column = j + i * LANES;
        prefetch(dy + (t - AHEAD) * C + column);
        const Vector x = load(w + t * C + column), g = load(dy + t * C + column);
        const Vector A = c * reciprocal(c + load(m + (t + 1) * D + column));
        const Vector gated = A * g, v = x * gated, vA = v * A;
        const Vector Mb = M[i] + beyond * in[i] + vA * q;
        M[i] = (M[i] + vA * q) * a;
        d_mass += v - vA;
        d_Pi += x * (x * Mb) - v;
        store(out.partial + t * D + column, p2 * (x * Mb) - p * gated);
        if (RHO && decay.a[t] != 0) d_rho += Mb * load(m + t * D + column);
      }
      out.d_Pi[t] += sum(d_Pi);
      out.d_mass[t] -= sum(d_mass) * share[t];
    }
    for (int i = 0; i < VECTORS; i++) store(out.own + j + i * LANES, M[i]);
  }
  out.d_rho = RHO ? sum(d_rho) : 0;
}

// Steps 6 and 7, after dn. `s` are the rows of replay<false>. Returns step 9's part, if RHO.
template <bool RHO, class X>
double energy_adjoint_pass(const X* w, X* dw, int64_t C, int rows, const Decay& decay, const float* after,
                           const float* dn, const float* s, const float* partial, float* own) {
  Vector d_rho = {};
  for (int j = 0; j < D; j += TILE) {
    Vector S[VECTORS] = {}, in[VECTORS];
    for (int i = 0; i < VECTORS; i++) in[i] = load(after + j + i * LANES);
    for (int t = rows - 1; t >= 0; t--) {
      const Vector a = splat(decay.a[t]), beyond = splat(decay.beyond[t]), k = splat(dn[t]);
      for (int i = 0; i < VECTORS; i++) {
        const int column = j + i * LANES;
        const Vector x = load(w + t * C + column);
        const Vector last = load(s + t * D + column), now = load(s + (t + 1) * D + column);
        const Vector r = reciprocal(at_least(EPS, now)), direct = k * r;
        // direct - through is direct times the part of s_t that is older than t: without a subtraction it is exactly
        // zero at a document's first token.
        const Vector difference = now < EPS ? direct : direct * (a * last * r);
        const Vector through = now < EPS ? Vector{} : direct * (x * x * r);
        const Vector arriving = S[i] + beyond * in[i];
        S[i] = (S[i] - through) * a;
        store(dw + t * C + column, load(partial + t * D + column) + (x + x) * (arriving + difference));
        if (RHO && decay.a[t] != 0) d_rho += (arriving - through) * last;
      }
    }
    for (int i = 0; i < VECTORS; i++) store(own + j + i * LANES, S[i]);
  }
  return RHO ? sum(d_rho) : 0;
}

// Pi from n, both [H, CHUNK].
inline void softmax(int64_t H, int rows, const float* temp, const float* n, float* Pi) {
  for (int t = 0; t < rows; t += LANES) {
    Vector top = load(n + t) * temp[0];
    for (int64_t h = 1; h < H; h++) {
      const Vector z = load(n + h * CHUNK + t) * temp[h];
      top = top > z ? top : z;
    }
    Vector total = {};
    for (int64_t h = 0; h < H; h++) {
      const Vector e = exponential(load(n + h * CHUNK + t) * temp[h] - top);
      store(Pi + h * CHUNK + t, e);
      total += e;
    }
    const Vector scale = 1.f / total;
    for (int64_t h = 0; h < H; h++) store(Pi + h * CHUNK + t, load(Pi + h * CHUNK + t) * scale);
  }
}

// Step 5: dz from Pi and dPi, all [H, CHUNK].
inline void softmax_adjoint(int64_t H, int rows, const float* Pi, const float* d_Pi, float* dz) {
  for (int t = 0; t < rows; t += LANES) {
    Vector inner = {};
    for (int64_t h = 0; h < H; h++) inner += load(Pi + h * CHUNK + t) * load(d_Pi + h * CHUNK + t);
    for (int64_t h = 0; h < H; h++) {
      const float* p = Pi + h * CHUNK + t;
      store(dz + h * CHUNK + t, load(p) * (load(d_Pi + h * CHUNK + t) - inner));
    }
  }
}
