// Causal TSSA, forward and backward, on CPUs: plain C, called through ctypes. docs/tssa.md has the equations.
//
// Compiled for one head width with -DHEAD_WIDTH, -DCHUNK, -DEPS and -DEPS_MASS.
//
// Layout: w, y, dy, dw [B, T, C]; Pi, n, dn [B, T, H]; states [B, C], [B, H] float64; starts, the states before each
// chunk, [B, N, C], [B, N, H] float32; all contiguous. d_temp and d_rho are [B, H] float64, a sum for each sequence.
//
// Schedule: once over memory, a chunk of tokens at a time, which stays in the cache for all passes over it. Threads
// take whole sequences; those left over are shared by teams, head by head. Heads meet once a chunk, at the softmax, and
// every thread takes the softmax of them all. So no sum is taken twice, and results do not depend on the threads.
#include "passes.h"
#include "team.h"

namespace {

struct Inputs {
  int64_t B, T, H, C;
  const float* temp;
  const float* rho;      // [H] or null for 1
  const uint8_t* document_start;  // [B, T] or null

  int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
  int64_t block(int64_t b, int64_t chunk) const { return b * chunks() + chunk; }
  int64_t corner(int64_t b, int64_t chunk, int64_t h) const { return (b * T + chunk * CHUNK) * C + h * D; }
  int rows(int64_t chunk) const { return static_cast<int>(std::min<int64_t>(CHUNK, T - chunk * CHUNK)); }
};

// The decays of a member's heads over the chunk at hand; computed again only where chunks differ.
class Decays {
 public:
  Decays(const Inputs& in, int64_t b, const Member& member)
      : in_(in), document_start_(in.document_start ? in.document_start + b * in.T : nullptr), first_(member.first(in.H)),
        last_(member.last(in.H)), a_(in.H * CHUNK), reach_(in.H * CHUNK), beyond_(in.H * CHUNK), whole_(in.H) {}

  void move_to(int64_t chunk) {
    const int rows = in_.rows(chunk);
    const uint8_t* document_start = document_start_ ? document_start_ + chunk * CHUNK : nullptr;
    if (document_start && std::find(document_start, document_start + rows, 1) == document_start + rows) document_start = nullptr;
    if (rows == rows_ && !document_start && !had_start_) return;
    rows_ = rows;
    had_start_ = document_start != nullptr;
    for (int64_t h = first_; h < last_; h++) fill(h, document_start);
  }

  Decay of(int64_t h) const { return {a_ + h * CHUNK, reach_ + h * CHUNK, beyond_ + h * CHUNK, whole_[h]}; }

 private:
  void fill(int64_t h, const uint8_t* document_start) {
    const float rho = in_.rho ? in_.rho[h] : 1;
    float *a = a_ + h * CHUNK, *reach = reach_ + h * CHUNK, *beyond = beyond_ + h * CHUNK;
    double product = 1;
    for (int t = 0; t < rows_; t++) {
      a[t] = document_start && document_start[t] ? 0 : rho;
      reach[t] = static_cast<float>(product *= a[t]);
    }
    whole_[h] = product;
    product = 1;
    for (int t = rows_ - 1; t >= 0; product *= a[t--]) beyond[t] = static_cast<float>(product);
  }

  const Inputs& in_;
  const uint8_t* document_start_;
  int64_t first_, last_;
  int rows_ = 0;
  bool had_start_ = false;
  Buffer<float> a_, reach_, beyond_;
  Buffer<double> whole_;
};

void narrow(const double* from, float* to) {
  for (int d = 0; d < D; d++) to[d] = static_cast<float>(std::min<double>(from[d], FLT_MAX));
}

void carry_on(double* carry, double whole, const float* own) {
  for (int d = 0; d < D; d++) carry[d] = carry[d] * whole + own[d];
}

// [H, CHUNK] to [rows, H], tokens `first` to `last`.
void to_tokens(int64_t H, int64_t first, int64_t last, const float* heads, float* tokens) {
  for (int64_t t = first; t < last; t++)
    for (int64_t h = 0; h < H; h++) tokens[t * H + h] = heads[h * CHUNK + t];
}

void to_heads(int64_t H, int rows, const float* tokens, float* heads) {
  for (int t = 0; t < rows; t++)
    for (int64_t h = 0; h < H; h++) heads[h * CHUNK + t] = tokens[t * H + h];
}

template <class X>
struct Forward {
  Inputs in;
  const X* w;
  const float* bias;  // [T, H] or [B, T, H], or null
  int64_t bias_stride;
  X* y;
  double *energy, *mass, *weighted;  // the state before, and then after
  float *Pi, *n, *starts_energy, *starts_mass, *starts_weighted;

  struct Scratch {
    explicit Scratch(const Inputs& in) : Pi(in.H * CHUNK), mass(in.H * CHUNK), own(D), c(in.H) {}
    Buffer<float> Pi, mass;  // [H, CHUNK]
    Buffer<float> own;       // [D]
    Buffer<double> c;        // [H]
  };

  void operator()(int64_t b, Member member) const {
    Decays decays(in, b, member);
    Scratch scratch(in);
    const auto first_scan = [&](int64_t k) { share(b, k, member, decays, scratch); };
    const auto second_scan = [&](int64_t k) { mix(b, k, member, decays, scratch); };
    member.walk(in.chunks(), first_scan, second_scan);
  }

  // n of the member's heads over chunk k.
  void share(int64_t b, int64_t k, const Member& member, Decays& decays, Scratch& scratch) const {
    const int rows = in.rows(k);
    decays.move_to(k);
    for (int64_t h = member.first(in.H); h < member.last(in.H); h++) {
      double* carry = energy + b * in.C + h * D;
      float* start = starts_energy + in.block(b, k) * in.C + h * D;
      float* n_row = member.meeting.board(k) + h * CHUNK;
      narrow(carry, start);
      share_pass(w + in.corner(b, k, h), in.C, rows, decays.of(h), start, n_row, scratch.own);
      carry_on(carry, decays.of(h).whole, scratch.own);
      if (bias != nullptr) add_bias(b, k, h, rows, n_row);
    }
  }

  // y of the member's heads over chunk k, when all of n is there.
  void mix(int64_t b, int64_t k, const Member& member, Decays& decays, Scratch& scratch) const {
    const int rows = in.rows(k);
    const int64_t token = b * in.T + k * CHUNK;
    const float* n_heads = member.meeting.board(k);
    softmax(in.H, rows, in.temp, n_heads, scratch.Pi);
    to_tokens(in.H, member.first(rows), member.last(rows), n_heads, n + token * in.H);
    to_tokens(in.H, member.first(rows), member.last(rows), scratch.Pi, Pi + token * in.H);
    decays.move_to(k);
    sum_mass(b, k, member, decays, scratch);
    for (int64_t h = member.first(in.H); h < member.last(in.H); h++) {
      double* carry = weighted + b * in.C + h * D;
      float* start = starts_weighted + in.block(b, k) * in.C + h * D;
      const int64_t corner = in.corner(b, k, h);
      narrow(carry, start);
      output_pass(w + corner, y + corner, in.C, rows, decays.of(h), start, scratch.Pi + h * CHUNK,
                  scratch.mass + h * CHUNK, scratch.own);
      carry_on(carry, decays.of(h).whole, scratch.own);
    }
  }

  void add_bias(int64_t b, int64_t k, int64_t h, int rows, float* n_row) const {
    const float* from = bias + b * bias_stride + k * CHUNK * in.H + h;
    for (int t = 0; t < rows; t++) n_row[t] += D * from[t * in.H];
  }

  // c'_t of the member's heads, whose sums hide one another's latency. The carry is copied, as other members' carries
  // are on the same cache line.
  void sum_mass(int64_t b, int64_t k, const Member& member, const Decays& decays, Scratch& scratch) const {
    const int64_t first = member.first(in.H), last = member.last(in.H);
    double *carry = mass + b * in.H, *c = scratch.c;
    std::copy(carry + first, carry + last, c + first);
    std::copy(carry + first, carry + last, starts_mass + in.block(b, k) * in.H + first);
    for (int t = 0; t < in.rows(k); t++)
      for (int64_t h = first; h < last; h++) {
        c[h] = c[h] * decays.of(h).a[t] + scratch.Pi[h * CHUNK + t];
        scratch.mass[h * CHUNK + t] = static_cast<float>(c[h]) + EPS_MASS;
      }
    std::copy(c + first, c + last, carry + first);
  }
};

template <class X>
struct Backward {
  Inputs in;
  const X *dy, *w;
  const float *Pi, *n, *starts_energy, *starts_mass, *starts_weighted;
  X* dw;
  double* d_temp;
  float* dn;
  double* d_rho;                           // null unless wanted
  double *d_energy, *d_mass, *d_weighted;  // adjoints of the state after, and then before

  // What a member works in. What is made in one step and used when others have shown theirs is there twice.
  struct Scratch {
    struct Kept {
      Kept(const Inputs& in, int rows) : Pi(in.H * CHUNK), partial(rows * in.C) {}
      Buffer<float> Pi;       // [H, CHUNK]
      Buffer<float> partial;  // [H, rows, D]
    };

    Scratch(const Inputs& in, int rows)
        : n(in.H * CHUNK), dn(in.H * CHUNK), mass(CHUNK), share(CHUNK), d_mass(CHUNK), sums((rows + 1) * D), after(D),
          own(D), even(in, rows), odd(in, rows) {}
    Buffer<float> n, dn;                // [H, CHUNK]
    Buffer<float> mass, share, d_mass;  // [CHUNK]
    Buffer<float> sums;                 // [rows + 1, D]
    Buffer<float> after, own;           // [D]
    Kept even, odd;

    Kept& kept(int64_t chunk) { return chunk % 2 ? odd : even; }
  };

  void operator()(int64_t b, Member member) const { d_rho ? run<true>(b, member) : run<false>(b, member); }

  template <bool RHO>
  void run(int64_t b, Member member) const {
    const int64_t last = in.chunks() - 1;
    Decays decays(in, b, member);
    Scratch scratch(in, in.rows(0));
    const auto to_d_Pi = [&](int64_t i) {
      const int64_t k = last - i;
      decays.move_to(k);
      to_heads(in.H, in.rows(k), Pi + (b * in.T + k * CHUNK) * in.H, scratch.kept(k).Pi);
      for (int64_t h = member.first(in.H); h < member.last(in.H); h++)
        through_weighted<RHO>(b, k, h, decays.of(h), member.meeting.board(i) + h * CHUNK, scratch);
    };
    const auto to_dw = [&](int64_t i) {
      const int64_t k = last - i;
      through_softmax(b, k, member, member.meeting.board(i), scratch);
      decays.move_to(k);
      for (int64_t h = member.first(in.H); h < member.last(in.H); h++)
        through_energy<RHO>(b, k, h, decays.of(h), scratch);
    };
    member.walk(in.chunks(), to_d_Pi, to_dw);
  }

  // Steps 1 to 4 for one head of a chunk.
  template <bool RHO>
  void through_weighted(int64_t b, int64_t k, int64_t h, const Decay& decay, float* d_Pi, Scratch& scratch) const {
    const int rows = in.rows(k);
    const int64_t block = in.block(b, k), corner = in.corner(b, k, h);
    const float* p = scratch.kept(k).Pi + h * CHUNK;
    float *mass = scratch.mass, *share = scratch.share;
    mass_pass(rows, decay, starts_mass[block * in.H + h], p, mass);
    for (int t = 0; t < rows; t++) share[t] = p[t] / mass[t];
    replay<true>(w + corner, in.C, rows, decay, starts_weighted + block * in.C + h * D, p, scratch.sums);
    double* carry = d_weighted + b * in.C + h * D;
    narrow(carry, scratch.after);
    WeightedAdjoints out{d_Pi, scratch.d_mass, partial(scratch, k, h), scratch.own, 0};
    weighted_adjoint_pass<RHO>(w + corner, dy + corner, in.C, rows, decay, scratch.after, p, mass, share, scratch.sums,
                               out);
    carry_on(carry, decay.whole, scratch.own);

    double Cb = d_mass[b * in.H + h], rho_part = out.d_rho;
    for (int t = rows - 1; t >= 0; t--) {
      Cb += out.d_mass[t];
      d_Pi[t] += static_cast<float>(Cb);
      if (RHO && decay.a[t] != 0) rho_part += Cb * (t > 0 ? mass[t - 1] - EPS_MASS : starts_mass[block * in.H + h]);
      Cb *= decay.a[t];
    }
    d_mass[b * in.H + h] = Cb;
    if (RHO) d_rho[b * in.H + h] += rho_part;
  }

  // Step 5 for all heads of a chunk. Rows past a ragged chunk's last are zeros: it is the first that is handled.
  void through_softmax(int64_t b, int64_t k, const Member& member, const float* d_Pi, Scratch& scratch) const {
    const int rows = in.rows(k);
    const int64_t token = b * in.T + k * CHUNK;
    to_heads(in.H, rows, n + token * in.H, scratch.n);
    softmax_adjoint(in.H, rows, scratch.kept(k).Pi, d_Pi, scratch.dn);
    for (int64_t h = 0; h < in.H; h++) {
      Vector total = {};
      float *dz = scratch.dn + h * CHUNK, *n_row = scratch.n + h * CHUNK;
      for (int t = 0; t < rows; t += LANES) {
        total += load(dz + t) * load(n_row + t);
        store(dz + t, load(dz + t) * in.temp[h]);
      }
      if (member.has(h, in.H)) d_temp[b * in.H + h] += sum(total);
    }
    to_tokens(in.H, member.first(rows), member.last(rows), scratch.dn, dn + token * in.H);
  }

  // Steps 6 and 7 for one head of a chunk.
  template <bool RHO>
  void through_energy(int64_t b, int64_t k, int64_t h, const Decay& decay, Scratch& scratch) const {
    const int rows = in.rows(k);
    const int64_t block = in.block(b, k), corner = in.corner(b, k, h);
    replay<false>(w + corner, in.C, rows, decay, starts_energy + block * in.C + h * D, nullptr, scratch.sums);
    double* carry = d_energy + b * in.C + h * D;
    narrow(carry, scratch.after);
    const double found = energy_adjoint_pass<RHO>(w + corner, dw + corner, in.C, rows, decay, scratch.after,
                                                  scratch.dn + h * CHUNK, scratch.sums, partial(scratch, k, h),
                                                  scratch.own);
    if (RHO) d_rho[b * in.H + h] += found;
    carry_on(carry, decay.whole, scratch.own);
  }

  float* partial(Scratch& scratch, int64_t k, int64_t h) const { return scratch.kept(k).partial + h * in.rows(0) * D; }
};

// The second scan again, a chunk of a head at a time, from memberships that are there.
template <class X>
struct Replay {
  Inputs in;
  const X* w;
  const float *Pi, *starts_mass, *starts_weighted;

  // pass(chunk, head, decay, Pi [CHUNK], mass [CHUNK], weighted sums before [D]) for the member's heads.
  template <class Pass>
  void over_chunks(int64_t b, const Member& member, bool reverse, const Pass& pass) const {
    Decays decays(in, b, member);
    Buffer<float> p(CHUNK), mass(CHUNK);
    for (int64_t i = 0; i < in.chunks(); i++) {
      const int64_t k = reverse ? in.chunks() - 1 - i : i, block = in.block(b, k);
      const int rows = in.rows(k);
      decays.move_to(k);
      for (int64_t h = member.first(in.H); h < member.last(in.H); h++) {
        for (int t = 0; t < rows; t++) p[t] = Pi[(b * in.T + k * CHUNK + t) * in.H + h];
        mass_pass(rows, decays.of(h), starts_mass[block * in.H + h], p, mass);
        pass(k, h, decays.of(h), p, mass, starts_weighted + block * in.C + h * D);
      }
    }
  }

  void outputs(int threads, X* y) const {
    for_sequences(in.B, in.H, threads, [&](int64_t b, Member member) {
      Buffer<float> own(D);
      over_chunks(b, member, false,
                  [&](int64_t k, int64_t h, const Decay& decay, const float* p, const float* mass, const float* start) {
                    const int64_t corner = in.corner(b, k, h);
                    output_pass(w + corner, y + corner, in.C, in.rows(k), decay, start, p, mass, own);
                  });
    });
  }

  void state_grads(int threads, const X* dy, double* d_mass, double* d_weighted) const {
    for_sequences(in.B, in.H, threads, [&](int64_t b, Member member) {
      Buffer<float> own(D);
      over_chunks(b, member, true,
                  [&](int64_t k, int64_t h, const Decay& decay, const float* p, const float* mass, const float* start) {
                    const int64_t corner = in.corner(b, k, h);
                    double& carry = d_mass[b * in.H + h];
                    carry = carry * decay.whole + state_grad_pass(w + corner, dy + corner, in.C, in.rows(k), decay,
                                                                  start, p, mass, own);
                    carry_on(d_weighted + b * in.C + h * D, decay.whole, own);
                  });
    });
  }
};

template <class X>
void run_forward(const Inputs& in, int threads, const void* w, const float* bias, int64_t bias_stride, void* y,
                 double* energy, double* mass, double* weighted, float* Pi, float* n, float* starts_energy,
                 float* starts_mass, float* starts_weighted) {
  for_sequences(in.B, in.H, threads,
                Forward<X>{in, static_cast<const X*>(w), bias, bias_stride, static_cast<X*>(y), energy, mass, weighted,
                           Pi, n, starts_energy, starts_mass, starts_weighted});
}

template <class X>
void run_backward(const Inputs& in, int threads, const void* dy, const void* w, const float* Pi, const float* n,
                  const float* starts_energy, const float* starts_mass, const float* starts_weighted, void* dw,
                  double* d_temp, float* dn, double* d_rho, double* d_energy, double* d_mass, double* d_weighted) {
  for_sequences(in.B, in.H, threads,
                Backward<X>{in, static_cast<const X*>(dy), static_cast<const X*>(w), Pi, n, starts_energy, starts_mass,
                            starts_weighted, static_cast<X*>(dw), d_temp, dn, d_rho, d_energy, d_mass, d_weighted});
}

}  // namespace

extern "C" {

// The state arrives in energy, mass and weighted, and is replaced by the one after the last token.
void tssa_forward(int is_bf16, int threads, int64_t B, int64_t T, int64_t H, const void* w, const float* temp,
                  const float* rho, const uint8_t* document_start, const float* bias, int64_t bias_stride, void* y,
                  double* energy, double* mass, double* weighted, float* Pi, float* n, float* starts_energy,
                  float* starts_mass, float* starts_weighted) {
  const Inputs in{B, T, H, H * D, temp, rho, document_start};
  (is_bf16 ? run_forward<bf16> : run_forward<float>)(in, threads, w, bias, bias_stride, y, energy, mass, weighted, Pi,
                                                     n, starts_energy, starts_mass, starts_weighted);
}

// y from memberships and states before the chunks that are there.
void tssa_outputs(int is_bf16, int threads, int64_t B, int64_t T, int64_t H, const void* w, const float* temp,
                  const float* rho, const uint8_t* document_start, const float* Pi, const float* starts_mass,
                  const float* starts_weighted, void* y) {
  const Inputs in{B, T, H, H * D, temp, rho, document_start};
  if (is_bf16)
    Replay<bf16>{in, static_cast<const bf16*>(w), Pi, starts_mass, starts_weighted}.outputs(threads,
                                                                                            static_cast<bf16*>(y));
  else
    Replay<float>{in, static_cast<const float*>(w), Pi, starts_mass, starts_weighted}.outputs(threads,
                                                                                              static_cast<float*>(y));
}

// The adjoints of mass and weighted before the first token through y alone; they arrive as zeros.
void tssa_state_grads(int is_bf16, int threads, int64_t B, int64_t T, int64_t H, const void* w, const float* temp,
                      const float* rho, const uint8_t* document_start, const void* dy, const float* Pi,
                      const float* starts_mass, const float* starts_weighted, double* d_mass, double* d_weighted) {
  const Inputs in{B, T, H, H * D, temp, rho, document_start};
  if (is_bf16)
    Replay<bf16>{in, static_cast<const bf16*>(w), Pi, starts_mass, starts_weighted}.state_grads(
        threads, static_cast<const bf16*>(dy), d_mass, d_weighted);
  else
    Replay<float>{in, static_cast<const float*>(w), Pi, starts_mass, starts_weighted}.state_grads(
        threads, static_cast<const float*>(dy), d_mass, d_weighted);
}

// The adjoints of the state after arrive in d_energy, d_mass and d_weighted, and are replaced by those of the one
// before. d_temp and, unless null, d_rho arrive as zeros.
void tssa_backward(int is_bf16, int threads, int64_t B, int64_t T, int64_t H, const void* w, const float* temp,
                   const float* rho, const uint8_t* document_start, const void* dy, const float* Pi, const float* n,
                   const float* starts_energy, const float* starts_mass, const float* starts_weighted, void* dw,
                   double* d_temp, float* dn, double* d_rho, double* d_energy, double* d_mass, double* d_weighted) {
  const Inputs in{B, T, H, H * D, temp, rho, document_start};
  (is_bf16 ? run_backward<bf16> : run_backward<float>)(in, threads, dy, w, Pi, n, starts_energy, starts_mass,
                                                       starts_weighted, dw, d_temp, dn, d_rho, d_energy, d_mass,
                                                       d_weighted);
}
}
