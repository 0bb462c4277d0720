// Causal TSSA, forward and backward, on CPUs: plain C, called through ctypes. docs/tssa.md has the equations.
//
// Compiled for one head width with -DHEAD_WIDTH, -DCHUNK, -DEPS and -DEPS_MASS.
//
// Layout: w, y, dy, dw [B, T, C]; Pi, n, dn [B, T, H]; states [B, C], [B, H] float64; starts, the states before each
// chunk, [B, N, C], [B, N, H] float32; all contiguous. d_temp and d_rho are [B, H] float64, a sum for each sequence.
//
// Schedule: one pass over memory, a chunk of tokens at a time, which stays in the cache for all passes over it. Threads
// take whole sequences; when there are more threads than sequences a team shares one by its heads. Heads meet once
// a chunk, at the softmax, and every thread takes the softmax of them all, so results do not depend on the threads.
#include <atomic>
#include <cstdlib>
#include <deque>
#include <new>
#include <omp.h>
#include <thread>

#include "passes.h"

namespace {

// Zeroed memory on a cache line's boundary.
template <class Element>
class Buffer {
 public:
  explicit Buffer(size_t count) {
    const size_t bytes = (count * sizeof(Element) / 64 + 1) * 64;
    at_ = static_cast<Element*>(std::aligned_alloc(64, bytes));
    if (at_ == nullptr) throw std::bad_alloc();
    memset(at_, 0, bytes);
  }
  ~Buffer() { std::free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator Element*() const { return at_; }

 private:
  Element* at_;
};

struct Inputs {
  int64_t B, T, H, C;
  const float* temp;
  const float* rho;      // [H] or null for 1
  const uint8_t* reset;  // [B, T] or null

  int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
  int rows(int64_t chunk) const { return static_cast<int>(std::min<int64_t>(CHUNK, T - chunk * CHUNK)); }
};

// Where the threads of a team meet, and what they show each other there: [H, CHUNK], twice, so that the next chunk's
// can be written while this one's are read.
class Meeting {
 public:
  explicit Meeting(int64_t H) : size_(H * CHUNK), boards_(2 * H * CHUNK) {}

  float* board(int64_t chunk) const { return boards_ + chunk % 2 * size_; }

  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int tries = 0; round_.load(std::memory_order_acquire) == round; tries++)
      if (tries > 2000) std::this_thread::yield();  // the others may have no processor
  }

 private:
  std::atomic<int> arrived_{0}, round_{0};
  size_t size_;
  Buffer<float> boards_;
};

// One thread's part in a team.
struct Member {
  int rank, size;
  Meeting& meeting;

  int64_t first(int64_t of) const { return of * rank / size; }
  int64_t last(int64_t of) const { return of * (rank + 1) / size; }
};

// body(sequence, member) for the `count` sequences from `first`, `size` threads each.
template <class Body>
void with_teams(int64_t first, int64_t count, int64_t H, int size, int threads, const Body& body) {
  std::deque<Meeting> meetings;
  for (int64_t b = 0; b < count; b++) meetings.emplace_back(H);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int given = omp_get_num_threads();  // may be fewer than were asked for
    const int members = given >= count * size ? size : 1;
    const int thread = omp_get_thread_num();
    for (int64_t b = thread / members; b < count; b += std::max(1, given / members))
      body(first + b, Member{thread % members, members, meetings[b]});
  }
}

template <class Body>
void for_sequences(int64_t B, int64_t H, int threads, const Body& body) {
  const int64_t shared = B % threads, alone = B - shared;
  if (alone > 0) with_teams(0, alone, H, 1, threads, body);
  if (shared > 0) {
    const int size = static_cast<int>(std::min<int64_t>(H, threads / shared));
    with_teams(alone, shared, H, size, static_cast<int>(shared) * size, body);
  }
}

// The decays of a member's heads over the chunk at hand; computed again only where chunks differ.
class Decays {
 public:
  Decays(const Inputs& in, int64_t b, const Member& member)
      : in_(in), reset_(in.reset ? in.reset + b * in.T : nullptr), first_(member.first(in.H)),
        last_(member.last(in.H)), a_(in.H * CHUNK), reach_(in.H * CHUNK), beyond_(in.H * CHUNK), whole_(in.H) {}

  void move_to(int64_t chunk) {
    const int rows = in_.rows(chunk);
    const uint8_t* reset = reset_ ? reset_ + chunk * CHUNK : nullptr;
    if (reset && std::find(reset, reset + rows, 1) == reset + rows) reset = nullptr;
    if (rows == rows_ && !reset && !had_reset_) return;
    rows_ = rows;
    had_reset_ = reset != nullptr;
    for (int64_t h = first_; h < last_; h++) fill(h, reset);
  }

  Decay of(int64_t h) const { return {a_ + h * CHUNK, reach_ + h * CHUNK, beyond_ + h * CHUNK, whole_[h]}; }

 private:
  void fill(int64_t h, const uint8_t* reset) {
    const float rho = in_.rho ? in_.rho[h] : 1;
    float *a = a_ + h * CHUNK, *reach = reach_ + h * CHUNK, *beyond = beyond_ + h * CHUNK;
    double product = 1;
    for (int t = 0; t < rows_; t++) {
      a[t] = reset && reset[t] ? 0 : rho;
      reach[t] = static_cast<float>(product *= a[t]);
    }
    whole_[h] = product;
    product = 1;
    for (int t = rows_ - 1; t >= 0; product *= a[t--]) beyond[t] = static_cast<float>(product);
  }

  const Inputs& in_;
  const uint8_t* reset_;
  int64_t first_, last_;
  int rows_ = 0;
  bool had_reset_ = false;
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

  void operator()(int64_t b, Member member) const {
    const int64_t T = in.T, H = in.H, C = in.C, N = in.chunks();
    const int64_t first = member.first(H), last = member.last(H);
    Decays decays(in, b, member);
    Buffer<float> Pi_heads(H * CHUNK), mass_rows(H * CHUNK), own(D);
    for (int64_t k = 0; k < N; k++) {
      const int rows = in.rows(k);
      const int64_t token = b * T + k * CHUNK;
      float* n_heads = member.meeting.board(k);
      decays.move_to(k);
      for (int64_t h = first; h < last; h++) {
        double* carry = energy + b * C + h * D;
        float* start = starts_energy + (b * N + k) * C + h * D;
        narrow(carry, start);
        share_pass(w + token * C + h * D, C, rows, decays.of(h), start, n_heads + h * CHUNK, own);
        carry_on(carry, decays.of(h).whole, own);
        if (bias != nullptr) add_bias(b, k * CHUNK, h, rows, n_heads + h * CHUNK);
      }
      member.meeting.wait(member.size);
      softmax(H, rows, in.temp, n_heads, Pi_heads);
      to_tokens(H, member.first(rows), member.last(rows), n_heads, n + token * H);
      to_tokens(H, member.first(rows), member.last(rows), Pi_heads, Pi + token * H);
      sum_mass(b, k, first, last, decays, Pi_heads, mass_rows);
      for (int64_t h = first; h < last; h++) {
        double* carry = weighted + b * C + h * D;
        float* start = starts_weighted + (b * N + k) * C + h * D;
        narrow(carry, start);
        const int64_t corner = token * C + h * D;
        output_pass(w + corner, y + corner, C, rows, decays.of(h), start, Pi_heads + h * CHUNK,
                    mass_rows + h * CHUNK, own);
        carry_on(carry, decays.of(h).whole, own);
      }
    }
  }

  void add_bias(int64_t b, int64_t t0, int64_t h, int rows, float* n_row) const {
    const float* from = bias + b * bias_stride + t0 * in.H + h;
    for (int t = 0; t < rows; t++) n_row[t] += D * from[t * in.H];
  }

  // c'_t of the member's heads.
  void sum_mass(int64_t b, int64_t k, int64_t first, int64_t last, const Decays& decays, const float* Pi_heads,
                float* rows_out) const {
    double* carry = mass + b * in.H;
    float* start = starts_mass + (b * in.chunks() + k) * in.H;
    std::copy(carry + first, carry + last, start + first);
    for (int t = 0; t < in.rows(k); t++)
      for (int64_t h = first; h < last; h++) {
        carry[h] = carry[h] * decays.of(h).a[t] + Pi_heads[h * CHUNK + t];
        rows_out[h * CHUNK + t] = static_cast<float>(carry[h]) + EPS_MASS;
      }
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

  // What a member works in, [H, CHUNK] where nothing else is said.
  struct Scratch {
    explicit Scratch(const Inputs& in, int rows)
        : Pi(in.H * CHUNK), n(in.H * CHUNK), mass(in.H * CHUNK), share(in.H * CHUNK), d_mass(in.H * CHUNK),
          dn(in.H * CHUNK), sums((rows + 1) * D), partial(rows * in.C), after(D), own(D) {}
    Buffer<float> Pi, n, mass, share, d_mass, dn;
    Buffer<float> sums;     // [rows + 1, D]
    Buffer<float> partial;  // [H, rows, D]
    Buffer<float> after, own;
  };

  void operator()(int64_t b, Member member) const { d_rho ? run<true>(b, member) : run<false>(b, member); }

  template <bool RHO>
  void run(int64_t b, Member member) const {
    const int64_t H = in.H;
    Decays decays(in, b, member);
    Scratch scratch(in, in.rows(0));
    for (int64_t k = in.chunks() - 1; k >= 0; k--) {
      const int rows = in.rows(k);
      const int64_t token = b * in.T + k * CHUNK;
      float* d_Pi = member.meeting.board(k);
      decays.move_to(k);
      to_heads(H, rows, Pi + token * H, scratch.Pi);
      to_heads(H, rows, n + token * H, scratch.n);
      for (int64_t h = member.first(H); h < member.last(H); h++)
        through_weighted<RHO>(b, k, h, decays.of(h), d_Pi + h * CHUNK, scratch);
      member.meeting.wait(member.size);
      // Rows past a ragged chunk's last are zeros: it is the first that is handled.
      softmax_adjoint(H, rows, scratch.Pi, d_Pi, scratch.dn);
      for (int64_t h = 0; h < H; h++) through_temp(b, h, rows, h >= member.first(H) && h < member.last(H), scratch);
      to_tokens(H, member.first(rows), member.last(rows), scratch.dn, dn + token * H);
      for (int64_t h = member.first(H); h < member.last(H); h++)
        through_energy<RHO>(b, k, h, decays.of(h), scratch);
    }
  }

  // Steps 1 to 4 for one head of a chunk.
  template <bool RHO>
  void through_weighted(int64_t b, int64_t k, int64_t h, const Decay& decay, float* d_Pi, Scratch& scratch) const {
    const int rows = in.rows(k);
    const int64_t block = b * in.chunks() + k, corner = (b * in.T + k * CHUNK) * in.C + h * D;
    const float* p = scratch.Pi + h * CHUNK;
    float *mass = scratch.mass + h * CHUNK, *share = scratch.share + h * CHUNK;
    double c = starts_mass[block * in.H + h];
    for (int t = 0; t < rows; t++) {
      c = c * decay.a[t] + p[t];
      mass[t] = static_cast<float>(c) + EPS_MASS;
      share[t] = p[t] / mass[t];
    }
    replay<true>(w + corner, in.C, rows, decay, starts_weighted + block * in.C + h * D, p, scratch.sums);
    double* carry = d_weighted + b * in.C + h * D;
    narrow(carry, scratch.after);
    WeightedAdjoints out{d_Pi, scratch.d_mass + h * CHUNK, partial(scratch, h), scratch.own, 0};
    weighted_adjoint_pass<RHO>(w + corner, dy + corner, in.C, rows, decay, scratch.after, p, mass, share, scratch.sums,
                               out);
    carry_on(carry, decay.whole, scratch.own);

    double& Cb = d_mass[b * in.H + h];
    for (int t = rows - 1; t >= 0; t--) {
      Cb += out.d_mass[t];
      d_Pi[t] += static_cast<float>(Cb);
      if (RHO && decay.a[t] != 0) out.d_rho += Cb * (t > 0 ? mass[t - 1] - EPS_MASS : starts_mass[block * in.H + h]);
      Cb *= decay.a[t];
    }
    if (RHO) d_rho[b * in.H + h] += out.d_rho;
  }

  // Step 5 after dz, which becomes dn.
  void through_temp(int64_t b, int64_t h, int rows, bool mine, Scratch& scratch) const {
    Vector total = {};
    float *dz = scratch.dn + h * CHUNK, *n_row = scratch.n + h * CHUNK;
    for (int t = 0; t < rows; t += LANES) {
      total += load(dz + t) * load(n_row + t);
      store(dz + t, load(dz + t) * in.temp[h]);
    }
    if (mine) d_temp[b * in.H + h] += sum(total);
  }

  // Steps 6 and 7 for one head of a chunk.
  template <bool RHO>
  void through_energy(int64_t b, int64_t k, int64_t h, const Decay& decay, Scratch& scratch) const {
    const int rows = in.rows(k);
    const int64_t block = b * in.chunks() + k, corner = (b * in.T + k * CHUNK) * in.C + h * D;
    replay<false>(w + corner, in.C, rows, decay, starts_energy + block * in.C + h * D, nullptr, scratch.sums);
    double* carry = d_energy + b * in.C + h * D;
    narrow(carry, scratch.after);
    const double found = energy_adjoint_pass<RHO>(w + corner, dw + corner, in.C, rows, decay, scratch.after,
                                                  scratch.dn + h * CHUNK, scratch.sums, partial(scratch, h),
                                                  scratch.own);
    if (RHO) d_rho[b * in.H + h] += found;
    carry_on(carry, decay.whole, scratch.own);
  }

  float* partial(const Scratch& scratch, int64_t h) const { return scratch.partial + h * in.rows(0) * D; }
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
                  const float* bias, int64_t bias_stride, const float* rho, const uint8_t* reset, void* y,
                  double* energy, double* mass, double* weighted, float* Pi, float* n, float* starts_energy,
                  float* starts_mass, float* starts_weighted) {
  const Inputs in{B, T, H, H * D, temp, rho, reset};
  (is_bf16 ? run_forward<bf16> : run_forward<float>)(in, threads, w, bias, bias_stride, y, energy, mass, weighted, Pi,
                                                     n, starts_energy, starts_mass, starts_weighted);
}

// The adjoints of the state after arrive in d_energy, d_mass and d_weighted, and are replaced by those of the one
// before. d_temp and, unless null, d_rho arrive as zeros.
void tssa_backward(int is_bf16, int threads, int64_t B, int64_t T, int64_t H, const void* dy, const void* w,
                   const float* temp, const float* rho, const uint8_t* reset, const float* Pi, const float* n,
                   const float* starts_energy, const float* starts_mass, const float* starts_weighted, void* dw,
                   double* d_temp, float* dn, double* d_rho, double* d_energy, double* d_mass, double* d_weighted) {
  const Inputs in{B, T, H, H * D, temp, rho, reset};
  (is_bf16 ? run_backward<bf16> : run_backward<float>)(in, threads, dy, w, Pi, n, starts_energy, starts_mass,
                                                       starts_weighted, dw, d_temp, dn, d_rho, d_energy, d_mass,
                                                       d_weighted);
}
}
