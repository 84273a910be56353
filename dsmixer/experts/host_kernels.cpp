// Products of rows with the matrices of their experts on the CPU: see host.py, which compiles and calls this.
//
// Rows lie in the order of their experts; those of expert e are limit[e] to limit[e + 1]. Sums are float32, each
// made by one thread in a fixed order, so a run is the same bit for bit whatever the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Index = std::int64_t;

constexpr Index LANES = 16;
constexpr Index ROWS = 4;       // rows of a tile of accumulators
constexpr Index COLUMNS = 4;    // vectors, or matrix rows, of such a tile
constexpr Index CHUNK = 32;     // rows of an expert that one task takes
constexpr Index PANEL = 2048;   // columns that one task takes: long streams, which processors read ahead
constexpr Index BUFFER = 512;   // columns that one task takes where sums are gathered in a buffer
constexpr Index PIECE = 32768;  // elements of a row that one task takes

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef std::uint32_t Words __attribute__((vector_size(LANES * sizeof(std::uint32_t))));
typedef std::uint16_t Halves __attribute__((vector_size(LANES * sizeof(std::uint16_t))));

// bfloat16 is the upper half of a float32
struct Bfloat16 {
    std::uint16_t bits;
};

inline float widened(float value) { return value; }

inline float widened(Bfloat16 value) {
    const std::uint32_t word = static_cast<std::uint32_t>(value.bits) << 16;
    float out;
    std::memcpy(&out, &word, sizeof out);
    return out;
}

inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, Bfloat16* out) {
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if (value != value) {
        out->bits = static_cast<std::uint16_t>((word >> 16) | 0x40);
        return;
    }
    out->bits = static_cast<std::uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);  // to nearest even
}

inline Vector load(const float* from) {
    Vector out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline Vector load(const Bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Vector out;
    std::memcpy(&out, &words, sizeof out);
    return out;
}

inline void store(Vector value, float* to) { std::memcpy(to, &value, sizeof value); }

inline float total(Vector value) {
    float sum = 0;
    for (Index lane = 0; lane < LANES; ++lane) sum += value[lane];
    return sum;
}

template <class From>
void widen(const From* from, float* to, Index count) {
    Index x = 0;
    for (; x + LANES <= count; x += LANES) store(load(from + x), to + x);
    for (; x < count; ++x) to[x] = widened(from[x]);
}

// rows, or columns, of one expert that one task takes
struct Task {
    Index expert, begin, end;
};

std::vector<Task> tasks(const Index* limit, Index num_experts, Index most) {
    std::vector<Task> found;
    for (Index e = 0; e < num_experts; ++e)
        for (Index begin = limit[e]; begin < limit[e + 1]; begin += most)
            found.push_back({e, begin, std::min(begin + most, limit[e + 1])});
    return found;
}

// out[m][n] = sum_x rows[m][x] * matrix[n][x] for a tile of M rows and N rows of the matrix
template <Index M, Index N, class Bank, class Row>
void dots(const float* rows, Index width, const Bank* matrix, Index stride, Row* out, Index out_stride) {
    Vector sums[M][N] = {};
    Index x = 0;
    for (; x + LANES <= width; x += LANES) {
        Vector right[N];
        for (Index n = 0; n < N; ++n) right[n] = load(matrix + n * stride + x);
        for (Index m = 0; m < M; ++m) {
            const Vector left = load(rows + m * width + x);
            for (Index n = 0; n < N; ++n) sums[m][n] += left * right[n];
        }
    }
    for (Index m = 0; m < M; ++m)
        for (Index n = 0; n < N; ++n) {
            float sum = total(sums[m][n]);
            for (Index rest = x; rest < width; ++rest)
                sum += rows[m * width + rest] * widened(matrix[n * stride + rest]);
            narrow(sum, out + m * out_stride + n);
        }
}

// out[m][.] (+)= sum_x left[m][x] * matrix[x][.] for a tile of M rows and N vectors of columns
template <Index M, Index N, bool ADD, class Row, class Bank>
void mix(const Row* left, Index left_stride, const Bank* matrix, Index stride, Index depth, float* const* out) {
    Vector sums[M][N] = {};
    for (Index x = 0; x < depth; ++x) {
        Vector right[N];
        for (Index n = 0; n < N; ++n) right[n] = load(matrix + x * stride + n * LANES);
        for (Index m = 0; m < M; ++m) {
            const float factor = widened(left[m * left_stride + x]);
            for (Index n = 0; n < N; ++n) sums[m][n] += factor * right[n];
        }
    }
    for (Index m = 0; m < M; ++m)
        for (Index n = 0; n < N; ++n) {
            float* to = out[m] + n * LANES;
            store(ADD ? load(to) + sums[m][n] : sums[m][n], to);
        }
}

// The same for a last panel that no vector fills.
template <bool ADD, class Row, class Bank>
void mix_rest(const Row* left, const Bank* matrix, Index stride, Index depth, Index columns, float* out) {
    for (Index y = 0; y < columns; ++y) {
        float sum = 0;
        for (Index x = 0; x < depth; ++x) sum += widened(left[x]) * widened(matrix[x * stride + y]);
        out[y] = ADD ? out[y] + sum : sum;
    }
}

template <Index M, bool ADD, class Row, class Bank>
void mix_columns(
    const Row* left, Index left_stride, const Bank* matrix, Index stride, Index depth, Index columns, float** out
) {
    Index y = 0;
    const auto advance = [&](Index by) {
        y += by;
        for (Index m = 0; m < M; ++m) out[m] += by;
    };
    while (y + COLUMNS * LANES <= columns) {
        mix<M, COLUMNS, ADD>(left, left_stride, matrix + y, stride, depth, out);
        advance(COLUMNS * LANES);
    }
    while (y + LANES <= columns) {
        mix<M, 1, ADD>(left, left_stride, matrix + y, stride, depth, out);
        advance(LANES);
    }
    for (Index m = 0; m < M; ++m)
        mix_rest<ADD>(left + m * left_stride, matrix + y, stride, depth, columns - y, out[m]);
}

template <class Row, class Bank>
void of_tokens(
    const Row* tokens, Index token_stride, const Bank* bank, Index expert_stride, Index row_stride, Row* out,
    const Index* token, const Index* limit, Index num_experts, Index depth, Index columns, Index threads
) {
    const std::vector<Task> all = tasks(limit, num_experts, CHUNK);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> rows(ROWS * depth);
#pragma omp for schedule(dynamic)
        for (std::size_t number = 0; number < all.size(); ++number) {
            const Task task = all[number];
            const Bank* matrix = bank + task.expert * expert_stride;
            for (Index i = task.begin; i < task.end; i += ROWS) {
                const Index count = std::min(ROWS, task.end - i);
                for (Index m = 0; m < count; ++m)
                    widen(tokens + token[i + m] * token_stride, rows.data() + m * depth, depth);
                Row* to = out + i * columns;
                Index y = 0;
                for (; y + COLUMNS <= columns; y += COLUMNS) {
                    const Bank* some = matrix + y * row_stride;
                    if (count == ROWS)
                        dots<ROWS, COLUMNS>(rows.data(), depth, some, row_stride, to + y, columns);
                    else
                        for (Index m = 0; m < count; ++m)
                            dots<1, COLUMNS>(
                                rows.data() + m * depth, depth, some, row_stride, to + m * columns + y, columns
                            );
                }
                for (; y < columns; ++y)
                    for (Index m = 0; m < count; ++m)
                        dots<1, 1>(
                            rows.data() + m * depth, depth, matrix + y * row_stride, row_stride,
                            to + m * columns + y, columns
                        );
            }
        }
    }
}

template <class Row, class Bank>
void to_tokens(
    const Row* left, const Bank* bank, Index expert_stride, Index row_stride, float* out, const Index* token,
    const Index* limit, Index num_experts, Index depth, Index columns, Index threads
) {
    // a thread has columns of its own, for several experts add to one token
    const Index panels = (columns + LANES - 1) / LANES;
    const Index share = (panels + threads - 1) / threads * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index thread = 0; thread < threads; ++thread) {
        const Index last = std::min(columns, (thread + 1) * share);
        for (Index first = thread * share; first < last; first += PANEL) {
            const Index width = std::min(PANEL, last - first);
            for (Index e = 0; e < num_experts; ++e) {
                const Bank* matrix = bank + e * expert_stride + first;
                float* to[ROWS];
                Index i = limit[e];
                for (; i + ROWS <= limit[e + 1]; i += ROWS) {
                    for (Index m = 0; m < ROWS; ++m) to[m] = out + token[i + m] * columns + first;
                    mix_columns<ROWS, true>(left + i * depth, depth, matrix, row_stride, depth, width, to);
                }
                for (; i < limit[e + 1]; ++i) {
                    to[0] = out + token[i] * columns + first;
                    mix_columns<1, true>(left + i * depth, depth, matrix, row_stride, depth, width, to);
                }
            }
        }
    }
}

// to[x][.] (+)= sum_i left[i][x] * rows[i][.] for some rows of an expert and one panel of columns
template <bool ADD>
void add_outer(
    const float* left, const float* rows, Index row_stride, Index count, Index depth, Index width, float* to,
    Index stride
) {
    float* some[ROWS];
    Index x = 0;
    for (; x + ROWS <= depth; x += ROWS) {
        for (Index m = 0; m < ROWS; ++m) some[m] = to + (x + m) * stride;
        mix_columns<ROWS, ADD>(left + x * CHUNK, CHUNK, rows, row_stride, count, width, some);
    }
    for (; x < depth; ++x) {
        some[0] = to + x * stride;
        mix_columns<1, ADD>(left + x * CHUNK, CHUNK, rows, row_stride, count, width, some);
    }
}

inline float* as_sums(float* to) { return to; }
inline float* as_sums(Bfloat16*) { return nullptr; }

template <class Row, class Bank>
void outer(
    const Row* tokens, Index token_stride, const Row* left, Bank* out, const Index* token, const Index* limit,
    Index num_experts, Index depth, Index columns, Index threads
) {
    // what is added to again and again is better off close together
    const auto in_place = [&](Index e) { return as_sums(out) && limit[e + 1] - limit[e] <= CHUNK; };
    std::vector<Task> all;
    for (Index e = 0; e < num_experts; ++e)
        for (Index first = 0, width = in_place(e) ? PANEL : BUFFER; first < columns; first += width)
            all.push_back({e, first, std::min(first + width, columns)});
#pragma omp parallel num_threads(threads)
    {
        // rows a little apart, or the same columns of all would share one place in a cache
        const Index row_stride = std::min(PANEL, (columns + LANES - 1) / LANES * LANES) + LANES;
        std::vector<float> rows(CHUNK * row_stride), turned(CHUNK * depth), buffer(depth * BUFFER);
#pragma omp for schedule(dynamic)
        for (std::size_t number = 0; number < all.size(); ++number) {
            const Index e = all[number].expert, first = all[number].begin, width = all[number].end - first;
            Bank* to = out + e * depth * columns + first;
            float* sums = in_place(e) ? as_sums(to) : buffer.data();
            const Index stride = in_place(e) ? columns : BUFFER;
            if (limit[e] == limit[e + 1])
                for (Index x = 0; x < depth; ++x) std::fill_n(sums + x * stride, width, 0.0f);
            for (Index begin = limit[e]; begin < limit[e + 1]; begin += CHUNK) {
                const Index count = std::min(CHUNK, limit[e + 1] - begin);
                for (Index i = 0; i < count; ++i) {
                    widen(tokens + token[begin + i] * token_stride + first, rows.data() + i * row_stride, width);
                    for (Index x = 0; x < depth; ++x)
                        turned[x * CHUNK + i] = widened(left[(begin + i) * depth + x]);
                }
                (begin == limit[e] ? add_outer<false> : add_outer<true>)(
                    turned.data(), rows.data(), row_stride, count, depth, width, sums, stride
                );
            }
            if (!in_place(e))
                for (Index x = 0; x < depth; ++x)
                    for (Index y = 0; y < width; ++y) narrow(sums[x * stride + y], to + x * columns + y);
        }
    }
}

// to[.] += factors[0] * rows[0][.] + ... for N rows, a stream each
template <Index N, class Bank>
void add_rows(const float* factors, const Bank* rows, Index stride, Index width, float* to) {
    Index y = 0;
    for (; y + LANES <= width; y += LANES) {
        Vector sum = load(to + y);
        for (Index n = 0; n < N; ++n) sum += factors[n] * load(rows + n * stride + y);
        store(sum, to + y);
    }
    for (; y < width; ++y)
        for (Index n = 0; n < N; ++n) to[y] += factors[n] * widened(rows[n * stride + y]);
}

// What a few tokens are answered, one after the other, each expert's matrices read by all threads. Whether an index
// names no expert: then nothing is done.
template <class Row, class Bank>
int answer(
    const Row* tokens, Index token_stride, const Bank* a, const Bank* b, const float* scale, const Index* expert,
    const float* weight, Row* out, Index num_tokens, Index top_k, Index num_experts, Index rank, Index depth,
    Index columns, Index threads
) {
    for (Index n = 0; n < num_tokens * top_k; ++n)
        if (expert[n] >= num_experts) return 1;
    std::vector<float> x(depth), inner(top_k * rank), sums(columns);
    const Index parts = (rank + COLUMNS - 1) / COLUMNS;
    const Index panels = (columns + LANES - 1) / LANES, share = (panels + threads - 1) / threads * LANES;
#pragma omp parallel num_threads(threads)
    for (Index t = 0; t < num_tokens; ++t) {
        const Index* chosen = expert + t * top_k;
#pragma omp single
        widen(tokens + t * token_stride, x.data(), depth);
#pragma omp for schedule(static)
        for (Index number = 0; number < top_k * parts; ++number) {
            const Index k = number / parts, first = number % parts * COLUMNS;
            if (chosen[k] < 0) continue;
            const Bank* matrix = a + (chosen[k] * rank + first) * depth;
            float* to = inner.data() + k * rank + first;
            const Index count = std::min(COLUMNS, rank - first);
            if (count == COLUMNS)
                dots<1, COLUMNS>(x.data(), depth, matrix, depth, to, COLUMNS);
            else
                for (Index r = 0; r < count; ++r) dots<1, 1>(x.data(), depth, matrix + r * depth, depth, to + r, 1);
            for (Index r = 0; r < count; ++r) to[r] *= weight[t * top_k + k] * scale[chosen[k]];
        }
#pragma omp for schedule(static)
        for (Index thread = 0; thread < threads; ++thread) {
            const Index first = thread * share, width = std::min(columns - first, share);
            if (width <= 0) continue;
            float* sum = sums.data() + first;
            std::fill_n(sum, width, 0.0f);
            for (Index k = 0; k < top_k; ++k) {
                if (chosen[k] < 0) continue;
                const Bank* matrix = b + chosen[k] * rank * columns + first;
                const float* factors = inner.data() + k * rank;
                Index r = 0;
                for (; r + COLUMNS <= rank; r += COLUMNS)
                    add_rows<COLUMNS>(factors + r, matrix + r * columns, columns, width, sum);
                for (; r < rank; ++r) add_rows<1>(factors + r, matrix + r * columns, columns, width, sum);
            }
            Row* to = out + t * columns + first;
            for (Index y = 0; y < width; ++y) narrow(widened(to[y]) + sum[y], to + y);
        }
    }
    return 0;
}

// Of some elements of a row: gradient += pull * (weights - origin), and the squares of both factors summed.
inline void hold_some(
    float* gradient, const float* weights, const float* origin, float pull, Index count, float* square, float* moved
) {
    Vector squares = {}, moves = {};
    Index x = 0;
    for (; x + LANES <= count; x += LANES) {
        Vector value = load(gradient + x);
        if (pull != 0) {
            const Vector away = load(weights + x) - load(origin + x);
            value += pull * away;
            store(value, gradient + x);
            moves += away * away;
        }
        squares += value * value;
    }
    *square = total(squares), *moved = total(moves);
    for (; x < count; ++x) {
        if (pull != 0) {
            const float away = weights[x] - origin[x];
            gradient[x] += pull * away;
            *moved += away * away;
        }
        *square += gradient[x] * gradient[x];
    }
}

// Rows pulled to their origin, with the square of each one's gradient and of its way; pull is null where none is.
void hold(
    float* gradient, const float* weights, const float* origin, const float* pull, float* squares, float* moves,
    Index num_rows, Index width, Index threads
) {
    const Index pieces = (width + PIECE - 1) / PIECE;
    std::vector<float> square(num_rows * pieces), moved(num_rows * pieces);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index number = 0; number < num_rows * pieces; ++number) {
        const Index row = number / pieces, first = number % pieces * PIECE, begin = row * width + first;
        hold_some(
            gradient + begin, weights + begin, origin + begin, pull ? pull[row] : 0, std::min(PIECE, width - first),
            &square[number], &moved[number]
        );
    }
    for (Index row = 0; row < num_rows; ++row) {
        double of_gradient = 0, of_way = 0;
        for (Index number = row * pieces; number < (row + 1) * pieces; ++number)
            of_gradient += square[number], of_way += moved[number];
        squares[row] = static_cast<float>(of_gradient), moves[row] = static_cast<float>(of_way);
    }
}

}  // namespace

extern "C" void hold_float32_float32(
    float* gradient, const float* weights, const float* origin, const float* pull, float* squares, float* moves,
    Index num_rows, Index width, Index threads
) {
    hold(gradient, weights, origin, pull, squares, moves, num_rows, width, threads);
}

#define EXPORTED(NAME, ROW, BANK)                                                                              \
    extern "C" void of_tokens_##NAME(                                                                          \
        const ROW* tokens, Index token_stride, const BANK* bank, Index expert_stride, Index row_stride,        \
        ROW* out, const Index* token, const Index* limit, Index num_experts, Index depth, Index columns,       \
        Index threads                                                                                          \
    ) {                                                                                                        \
        of_tokens(                                                                                             \
            tokens, token_stride, bank, expert_stride, row_stride, out, token, limit, num_experts, depth,      \
            columns, threads                                                                                   \
        );                                                                                                     \
    }                                                                                                          \
    extern "C" void to_tokens_##NAME(                                                                          \
        const ROW* left, const BANK* bank, Index expert_stride, Index row_stride, float* out,                  \
        const Index* token, const Index* limit, Index num_experts, Index depth, Index columns, Index threads   \
    ) {                                                                                                        \
        to_tokens(                                                                                             \
            left, bank, expert_stride, row_stride, out, token, limit, num_experts, depth, columns, threads     \
        );                                                                                                     \
    }                                                                                                          \
    extern "C" void outer_##NAME(                                                                              \
        const ROW* tokens, Index token_stride, const ROW* left, BANK* out, const Index* token,                 \
        const Index* limit, Index num_experts, Index depth, Index columns, Index threads                       \
    ) {                                                                                                        \
        outer(tokens, token_stride, left, out, token, limit, num_experts, depth, columns, threads);            \
    }                                                                                                          \
    extern "C" int answer_##NAME(                                                                              \
        const ROW* tokens, Index token_stride, const BANK* a, const BANK* b, const float* scale,               \
        const Index* expert, const float* weight, ROW* out, Index num_tokens, Index top_k, Index num_experts,  \
        Index rank, Index depth, Index columns, Index threads                                                  \
    ) {                                                                                                        \
        return answer(                                                                                         \
            tokens, token_stride, a, b, scale, expert, weight, out, num_tokens, top_k, num_experts, rank,      \
            depth, columns, threads                                                                            \
        );                                                                                                     \
    }

EXPORTED(float32_float32, float, float)
EXPORTED(float32_bfloat16, float, Bfloat16)
EXPORTED(bfloat16_float32, Bfloat16, float)
EXPORTED(bfloat16_bfloat16, Bfloat16, Bfloat16)
