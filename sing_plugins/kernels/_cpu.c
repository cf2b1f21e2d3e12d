/* One step of SING for float32 tensors in the memory of the CPU: statistics of all gradients, then one pass over
   weights and state. Nothing of Python's or torch's is needed: the caller gives addresses and keeps threads apart.

   The work is cut into units, whose size does not depend on the number of threads and whose sums are added in their
   order, so that the result does not depend on it either. Statistics are summed up in double, but for short blocks whose
   squares float32 can hold: neither the square of 3e38 nor that of 1e-45 is lost, and 1e8 entries cost no digit.

   Compile with -fno-math-errno -fno-trapping-math, never with -ffast-math: NaN and infinity must stay what they are. */
#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#include <math.h>
#define EXPORT __declspec(dllexport)
#define INLINE static __forceinline
#define SIMD __pragma(loop(ivdep))
#define SIMD_MAX(TOP) __pragma(loop(ivdep))
#define RESTRICT __restrict
#define SQRT sqrt
#define SQRTF sqrtf
#else
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
#define PRAGMA(TEXT) _Pragma(#TEXT)
#define SIMD_MAX(TOP) PRAGMA(omp simd reduction(max : TOP))
#define RESTRICT restrict
#define SQRT __builtin_sqrt
#define SQRTF __builtin_sqrtf
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define DISPATCH 1
#endif

#define UNIT 131072 /* entries of a unit: 512 kB of gradient */
#define LANES 32    /* sums that are kept apart, for the processor to add at once */
#define BLOCK 128   /* entries between float32 sums and double ones */
#define CHUNK 128   /* entries whose changes are computed by the same formula */

/* Mirrored in cpu.py, whose ABI and sing_abi's are to be changed with them; every field has eight bytes. */
typedef struct {
  float *param, *first, *second, *slow, *step; /* first and second: the host's moments, or momentum buffer and nothing */
  const float *grad;
  int64_t rows, columns; /* one row, where rows are not centred */
  int64_t centred, decays;
  int64_t row;           /* of its first row among those of all tensors */
} Tensor;

typedef struct {
  double lr, weight_decay, eps, beta1, beta2, softplus_beta, momentum, alpha;
  int64_t host, softplus, relative, normalize, maximize, merge; /* relative: beta is for a tensor of one entry */
} Options;

typedef struct {
  int64_t tensor, begin, end; /* rows where the tensor is centred, else entries */
  int64_t first, last;        /* the units of its tensor */
} Unit;

/* What of the options and the statistics an entry is updated with. */
typedef struct {
  float scale, inverse; /* of the gradient: scale is a power of two, and keeps the inverse of its norm a normal number */
  float mix1, beta2, mix2, root, size, keep, eps, momentum, alpha;
} Factors;

enum { ADAMW, ADABELIEF, SGD, SGD_MOMENTUM, SGD_NESTEROV };

/* Sums of (x - shift) and of its square, in double throughout. */
INLINE void exact_sums(const float *x, int64_t n, double shift, double *sum, double *squares) {
  double s = 0, q = 0;
  for (int64_t i = 0; i < n; i++) {
    double d = x[i] - shift;
    s += d;
    q += d * d;
  }
  *sum = s;
  *squares = q;
}

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));

/* The eight sums of a block, added to four in double. */
INLINE void add(Doubles *total, const Floats *block) {
  Half halves[2];
  memcpy(halves, block, sizeof(halves));
  *total += __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
}
#endif

/* The same, four entries to each sum in float32 before they reach the double. */
INLINE void sums(const float *x, int64_t n, float shift, double *sum, double *squares) {
  double s = 0, q = 0;
  int64_t i = 0;
#if defined(__GNUC__)
  if (n >= LANES) {
    Doubles total = {0}, total_squares = {0};
    while (n - i >= LANES) {
      Floats s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, q0 = {0}, q1 = {0}, q2 = {0}, q3 = {0};
      int64_t end = n - i < BLOCK ? n : i + BLOCK;
      for (; i + LANES <= end; i += LANES) {
        const Floats *v = (const Floats *)(x + i);
        Floats d0 = v[0] - shift, d1 = v[1] - shift, d2 = v[2] - shift, d3 = v[3] - shift;
        s0 += d0; s1 += d1; s2 += d2; s3 += d3;
        q0 += d0 * d0; q1 += d1 * d1; q2 += d2 * d2; q3 += d3 * d3;
      }
      s0 = (s0 + s1) + (s2 + s3);
      q0 = (q0 + q1) + (q2 + q3);
      add(&total, &s0);
      add(&total_squares, &q0);
    }
    s = (total[0] + total[1]) + (total[2] + total[3]);
    q = (total_squares[0] + total_squares[1]) + (total_squares[2] + total_squares[3]);
  }
#endif
  double rest, rest_squares;
  exact_sums(x + i, n - i, shift, &rest, &rest_squares);
  *sum = s + rest;
  *squares = q + rest_squares;
  if (!(*squares > 1e-20 && *squares < 1e37)) exact_sums(x, n, shift, sum, squares); /* too small or large for float32 */
}

/* The sum of the squares of a unit's entries, centred where they are to be; their rows' means go into `means`. */
INLINE double statistics_body(const Tensor *t, int64_t begin, int64_t end, float *means) {
  double s, q, total = 0;
  if (!t->centred) {
    sums(t->grad + begin, end - begin, 0, &s, &q);
    return q;
  }
  for (int64_t row = begin; row < end; row++) {
    const float *grad = t->grad + row * t->columns;
    float shift = grad[0]; /* the squares of what is left of a row whose mean is large lose nothing then */
    sums(grad, t->columns, shift, &s, &q);
    double centred = q - s * (s / (double)t->columns);
    total += centred < 0 ? 0 : centred; /* not the other way round: NaN stays */
    means[t->row + row] = (float)((double)shift + s / (double)t->columns);
  }
  return total;
}

/* The weight after its change, for one entry or a vector of them. */
INLINE float moved(float weight, float change, float *slow, const Factors *f, const int merge) {
  float fast = f->keep * weight - f->size * change;
  if (!merge) return fast;
  return *slow += f->alpha * (fast - *slow);
}

/* Up to CHUNK entries of one row for a host with a second moment. y is the root of the corrected moment; with softplus
   times beta, whose 1/beta is in f->size: the denominator is ln(1 + e^y) then. */
INLINE void update_adaptive(float *RESTRICT param, const float *RESTRICT grad, float *RESTRICT first,
                            float *RESTRICT second, float *RESTRICT slow, int64_t n, float mean, const Factors *f,
                            const int host, const int softplus, const int merge) {
  const float scale = f->scale, scaled_mean = mean * f->scale, inverse = f->inverse, mix1 = f->mix1, beta2 = f->beta2,
              mix2 = f->mix2, root = f->root, eps = f->eps;
  float y[CHUNK], top = 0;
  SIMD_MAX(top)
  for (int64_t i = 0; i < n; i++) {
    float g = (grad[i] * scale - scaled_mean) * inverse;
    float m = first[i] + mix1 * (g - first[i]);
    float deviation = host == ADABELIEF ? g - m : g;
    float v = beta2 * second[i] + mix2 * (deviation * deviation) + (host == ADABELIEF ? eps : 0.f);
    first[i] = m;
    second[i] = v;
    y[i] = SQRTF(v) * root;
    if (softplus) top = y[i] > top ? y[i] : top;
  }
  if (!softplus) {
    SIMD
    for (int64_t i = 0; i < n; i++) param[i] = moved(param[i], first[i] / (y[i] + eps), slow + i, f, merge);
  } else if (top <= 2.f) { /* nearly always: entries of a tensor of norm 1 are small */
    /* y/2 and an even function of y, within 1e-7; 2e-7 with the rounding of float32. */
    SIMD
    for (int64_t i = 0; i < n; i++) {
      float a = y[i], z = a * a, z2 = z * z;
      float even = (0.693147242f + 0.124998376f * z) + z2 * ((-0.00520249596f + 0.000339853403f * z) +
                                                             z2 * (-2.2107055e-05f + 9.14229702e-07f * z));
      param[i] = moved(param[i], first[i] / (even + 0.5f * a), slow + i, f, merge);
    }
  } else { /* P/Q up to 14, and y beyond, within 2e-7; 5e-7 with the rounding of float32. */
    SIMD
    for (int64_t i = 0; i < n; i++) {
      float a = y[i] < 14.f ? y[i] : 14.f, beyond = y[i] - a, a2 = a * a, a4 = a2 * a2;
      float p = ((0.693147302f + 0.716306031f * a) + a2 * (0.360261172f + 0.109994091f * a)) +
                a4 * (0.020469334f + 0.00145198999f * a);
      float q = ((1.f + 0.312074035f * a) + a2 * (0.114210598f + 0.0202806741f * a)) + a4 * 0.0014554183f;
      param[i] = moved(param[i], first[i] * q / (p + beyond * q), slow + i, f, merge);
    }
  }
}

/* The same for SGD. */
INLINE void update_sgd(float *RESTRICT param, const float *RESTRICT grad, float *RESTRICT first, float *RESTRICT slow,
                       int64_t n, float mean, const Factors *f, const int host, const int merge) {
  const float scale = f->scale, scaled_mean = mean * f->scale, inverse = f->inverse, momentum = f->momentum;
  SIMD
  for (int64_t i = 0; i < n; i++) {
    float change = (grad[i] * scale - scaled_mean) * inverse;
    if (host != SGD) {
      float buffer = momentum * first[i] + change;
      first[i] = buffer;
      change = host == SGD_NESTEROV ? change + momentum * buffer : buffer;
    }
    param[i] = moved(param[i], change, slow + i, f, merge);
  }
}

/* Entries of one row. `host`, `softplus` and `merge` are constants wherever this is inlined. */
INLINE void update_row(float *param, const float *grad, float *first, float *second, float *slow, int64_t n, float mean,
                       const Factors *f, const int host, const int softplus, const int merge) {
  for (int64_t i = 0; i < n; i += CHUNK) {
    int64_t left = n - i < CHUNK ? n - i : CHUNK;
    if (host == ADAMW || host == ADABELIEF)
      update_adaptive(param + i, grad + i, first + i, second + i, slow + i, left, mean, f, host, softplus, merge);
    else update_sgd(param + i, grad + i, first + i, slow + i, left, mean, f, host, merge);
  }
}

INLINE void update_rows(const Tensor *t, int64_t begin, int64_t end, const float *means, const Factors *f,
                        const int host, const int softplus, const int merge) {
  int64_t columns = t->centred ? t->columns : end - begin, rows = t->centred ? end - begin : 1;
  int64_t start = t->centred ? begin * columns : begin;
  for (int64_t row = 0; row < rows; row++) {
    int64_t at = start + row * columns;
    update_row(t->param + at, t->grad + at, t->first + at, t->second + at, t->slow + at, columns,
               t->centred ? means[t->row + begin + row] : 0.f, f, host, softplus, merge);
  }
}

INLINE void update_body(const Tensor *t, int64_t begin, int64_t end, const float *means, const Factors *f, int variant) {
#define VARIANT(HOST, SOFTPLUS, MERGE) \
  case (HOST) * 4 + (SOFTPLUS) * 2 + (MERGE): \
    update_rows(t, begin, end, means, f, HOST, SOFTPLUS, MERGE); \
    break;
#define VARIANTS(HOST, SOFTPLUS) VARIANT(HOST, SOFTPLUS, 0) VARIANT(HOST, SOFTPLUS, 1)
  switch (variant) {
    VARIANTS(ADAMW, 0)
    VARIANTS(ADAMW, 1)
    VARIANTS(ADABELIEF, 0)
    VARIANTS(ADABELIEF, 1)
    VARIANTS(SGD, 0)
    VARIANTS(SGD_MOMENTUM, 0)
    VARIANTS(SGD_NESTEROV, 0)
  }
}

/* (grad - mean) / norm, which is what a host that is not written here is given. */
INLINE void divide_body(const Tensor *t, int64_t begin, int64_t end, const float *means, const Factors *f) {
  int64_t columns = t->centred ? t->columns : end - begin, rows = t->centred ? end - begin : 1;
  int64_t start = t->centred ? begin * columns : begin;
  for (int64_t row = 0; row < rows; row++) {
    const float scale = f->scale, inverse = f->inverse;
    const float mean = t->centred ? means[t->row + begin + row] * scale : 0.f;
    const float *RESTRICT grad = t->grad + start + row * columns;
    float *RESTRICT out = t->first + start + row * columns;
    SIMD
    for (int64_t i = 0; i < columns; i++) out[i] = (grad[i] * scale - mean) * inverse;
  }
}

typedef struct {
  double (*statistics)(const Tensor *, int64_t, int64_t, float *);
  void (*update)(const Tensor *, int64_t, int64_t, const float *, const Factors *, int);
  void (*divide)(const Tensor *, int64_t, int64_t, const float *, const Factors *);
} Code;

#define COMPILE(NAME, TARGET) \
  TARGET static double statistics_##NAME(const Tensor *t, int64_t b, int64_t e, float *m) { \
    return statistics_body(t, b, e, m); \
  } \
  TARGET static void update_##NAME(const Tensor *t, int64_t b, int64_t e, const float *m, const Factors *f, int v) { \
    update_body(t, b, e, m, f, v); \
  } \
  TARGET static void divide_##NAME(const Tensor *t, int64_t b, int64_t e, const float *m, const Factors *f) { \
    divide_body(t, b, e, m, f); \
  } \
  static const Code NAME = {statistics_##NAME, update_##NAME, divide_##NAME};

COMPILE(baseline, )
#ifdef DISPATCH
COMPILE(avx2, __attribute__((target("avx2,fma"))))
COMPILE(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,fma,prefer-vector-width=512"))))
#endif

/* To be compared with cpu.py's, which may have changed since this was compiled. */
EXPORT int64_t sing_abi(void) { return 3; }

#ifdef _WIN32
EXPORT void *PyInit__cpu(void) { return 0; } /* which the linker is told to look for there */
#endif

/* The instruction sets that this processor has: 0 is the compiler's baseline, 1 AVX2 with FMA, 2 AVX-512. */
EXPORT int64_t sing_instruction_sets(void) {
#ifdef DISPATCH
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
             ? 2 : 1;
#else
  return 0;
#endif
}

static const Code *code(int64_t instruction_set) {
#ifdef DISPATCH
  if (instruction_set == 2) return &avx512;
  if (instruction_set == 1) return &avx2;
#endif
  (void)instruction_set;
  return &baseline;
}

/* Cut tensors into units; how many there are. Call it without `units` to learn that. */
EXPORT int64_t sing_units(const Tensor *tensors, int64_t count, Unit *units) {
  int64_t made = 0;
  for (int64_t i = 0; i < count; i++) {
    const Tensor *t = tensors + i;
    int64_t total = t->centred ? t->rows : t->columns, each = t->centred ? UNIT / t->columns : UNIT, first = made;
    if (each < 1) each = 1;
    int64_t last = first + (total + each - 1) / each;
    for (int64_t begin = 0; begin < total; begin += each, made++) {
      if (!units) continue;
      Unit unit = {i, begin, begin + each < total ? begin + each : total, first, last};
      units[made] = unit;
    }
  }
  return made;
}

/* x to the power of n >= 0, without the C library, whose pow would tie a wheel to its version. */
static double power(double x, int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1, x *= x)
    if (n & 1) result *= x;
  return result;
}

static Factors factors(const Tensor *t, const Options *o, double squares) {
  Factors f = {1.f, 1.f, 0.f, 0.f, 0.f, 0.f, (float)o->lr, 1.f, 0.f, 0.f, 0.f};
  double scale = 1, inverse = 1;
  if (o->normalize) {
    double norm = SQRT(squares) + o->eps;
    while (norm * scale > 1e30 && scale > 0x1p-120) scale *= 0x1p-60;
    while (norm * scale < 1e-30 && scale < 0x1p120) scale *= 0x1p60;
    inverse = 1 / (norm * scale); /* 0 for an infinite norm, whose infinite entry becomes NaN */
  }
  f.scale = (float)scale;
  f.inverse = (float)(o->maximize ? -inverse : inverse);
  f.keep = (float)(t->decays ? 1 - o->lr * o->weight_decay : 1);
  f.momentum = (float)o->momentum;
  f.alpha = (float)o->alpha;
  if (o->host == ADAMW || o->host == ADABELIEF) {
    int64_t step = (int64_t)*t->step + 1;
    double beta = o->softplus ? o->softplus_beta : 1; /* beta and the change's 1/beta leave the loop */
    double size = o->relative ? (double)(t->rows * t->columns) : 1;
    beta *= SQRT(size);
    f.mix1 = (float)(1 - o->beta1);
    f.beta2 = (float)o->beta2;
    f.mix2 = (float)(1 - o->beta2);
    f.eps = (float)(o->eps / size); /* AdaBelief adds it to what is of the order of 1/size */
    f.root = (float)(beta / SQRT(1 - power(o->beta2, step)));
    f.size = (float)(beta * o->lr / (1 - power(o->beta1, step)));
  }
  return f;
}

static double sum_of_units(const Unit *unit, const double *squares) {
  double total = 0;
  for (int64_t k = unit->first; k < unit->last; k++) total += squares[k];
  return total;
}

static int variant(const Options *o) { return (int)(o->host * 4 + (o->softplus ? 2 : 0) + (o->merge ? 1 : 0)); }

/* Whether units begin..end, which one thread has, are all units of this one's tensor. */
static int has_all(const Unit *unit, int64_t begin, int64_t end) { return unit->first >= begin && unit->last <= end; }

/* Statistics of those of units begin..end whose tensors reach beyond them. */
EXPORT void sing_shared(const Tensor *tensors, const Unit *units, int64_t begin, int64_t end, float *means,
                        double *squares, int64_t instruction_set) {
  const Code *run = code(instruction_set);
  for (int64_t k = begin; k < end; k++)
    if (!has_all(units + k, begin, end))
      squares[k] = run->statistics(tensors + units[k].tensor, units[k].begin, units[k].end, means);
}

/* Update units begin..end, after sing_shared of all units: tensor by tensor, so that the gradient, of which statistics
   are taken first, is in the cache. Without `options->host`, a negative one, the divided gradient is written to where
   `first` points. */
EXPORT void sing_step(const Tensor *tensors, const Unit *units, int64_t begin, int64_t end, float *means,
                      double *squares, const Options *options, int64_t instruction_set) {
  const Code *run = code(instruction_set);
  for (int64_t next; begin < end; begin = next) {
    const Tensor *t = tensors + units[begin].tensor;
    next = units[begin].last < end ? units[begin].last : end;
    if (has_all(units + begin, begin, end))
      for (int64_t k = begin; k < next; k++)
        squares[k] = run->statistics(t, units[k].begin, units[k].end, means);
    Factors f = factors(t, options, sum_of_units(units + begin, squares));
    for (int64_t k = next - 1; k >= begin; k--) { /* backwards: what was read last may still be in the cache */
      if (options->host < 0) run->divide(t, units[k].begin, units[k].end, means, &f);
      else run->update(t, units[k].begin, units[k].end, means, &f, variant(options));
    }
  }
}

/* Count the step that was made. */
EXPORT void sing_count(const Tensor *tensors, int64_t count) {
  for (int64_t i = 0; i < count; i++) *tensors[i].step += 1;
}
