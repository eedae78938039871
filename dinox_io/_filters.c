/* The filters of docs/format.md and the histogram of HU, in C: the fast tier of dinox_io/filters.py.
 *
 * Invariant: bit for bit what the NumPy tier gives, and never a byte read or written outside the buffers: each one is
 * checked for dimensions, format, strides, alignment and size before it is touched; what does not fit is ValueError.
 * Stable ABI of CPython 3.11; the GIL is released while the arithmetic runs. All sums are modulo 2^16: they are made
 * of uint16_t, which C defines to wrap, or of wider ints that are cut to it. Converting back to int16_t and shifting a
 * negative int right are left to the compiler by C11 (6.3.1.3, 6.5.7); all that build CPython wrap and keep the sign.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* On x86-64 running sums are worth intrinsics: SSE2, which each such processor has, and AVX2 where it is found when the
 * module is loaded. Elsewhere the plain loops do all the work. */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86_64 1
#include <immintrin.h>
#endif

/* filters.py asks for this number: a library left over from other sources is not used. Raise it with every change. */
#define INTERFACE 1
#define BINS 4096

/* A slice: int16, rows `stride` values apart (may be negative), columns next to each other. */
typedef struct {
    int16_t *first;
    Py_ssize_t rows, columns, stride;
} Slice;

static int16_t *row_of(const Slice *slice, Py_ssize_t y) { return slice->first + y * slice->stride; }

/* --- one row ---------------------------------------------------------------------------------------------------- */
static int mean_of(int16_t up, int16_t down) { return (int16_t)(uint16_t)(up + down) >> 1; }

/* value = (int8_t)low + 256 high: 128 more, and the high byte is the rounded one. */
static inline void split(uint16_t value, uint8_t *low, uint8_t *high)
{
    *low = (uint8_t)value;
    *high = (uint8_t)((uint16_t)(value + 128) >> 8);
}

/* low, high = the byte planes of the horizontal difference of row - mean(up, down), or of row where up is NULL. */
static void filter_row(const int16_t *restrict row, const int16_t *restrict up, const int16_t *restrict down,
                       Py_ssize_t columns, uint8_t *restrict low, uint8_t *restrict high)
{
    split((uint16_t)(row[0] - (up == NULL ? 0 : mean_of(up[0], down[0]))), low, high);
    if (up == NULL)
        for (Py_ssize_t x = 1; x < columns; x++)
            split((uint16_t)(row[x] - row[x - 1]), low + x, high + x);
    else
        for (Py_ssize_t x = 1; x < columns; x++) {
            int left = row[x - 1] - mean_of(up[x - 1], down[x - 1]);
            split((uint16_t)(row[x] - mean_of(up[x], down[x]) - left), low + x, high + x);
        }
}

/* Undoes a row from column `x` on, with `sum` before it. */
static void unfilter_rest(const uint8_t *low, const uint8_t *high, const int16_t *up, const int16_t *down,
                          Py_ssize_t columns, int16_t *row, Py_ssize_t x, uint16_t sum)
{
    Py_ssize_t begin = x;
    for (; x < columns; x++) {
        sum = (uint16_t)(sum + (int8_t)low[x] + 256 * high[x]);
        row[x] = (int16_t)sum;
    }
    if (up != NULL)
        for (x = begin; x < columns; x++)
            row[x] = (int16_t)(uint16_t)(row[x] + mean_of(up[x], down[x]));
}

/* row = running sum of (int8_t)low + 256 high, plus mean(up, down) where up is not NULL. */
typedef void UnfilterRow(const uint8_t *low, const uint8_t *high, const int16_t *up, const int16_t *down,
                         Py_ssize_t columns, int16_t *row);

#ifdef X86_64
/* Running sums of eight values: three shifted additions. */
static __m128i sums_of_eight(__m128i values)
{
    values = _mm_add_epi16(values, _mm_slli_si128(values, 2));
    values = _mm_add_epi16(values, _mm_slli_si128(values, 4));
    return _mm_add_epi16(values, _mm_slli_si128(values, 8));
}

static __m128i last_of_eight(__m128i values) { return _mm_shuffle_epi32(_mm_shufflehi_epi16(values, 0xFF), 0xFF); }

static __m128i mean_of_eight(const int16_t *up, const int16_t *down)
{
    __m128i above = _mm_loadu_si128((const __m128i *)up), below = _mm_loadu_si128((const __m128i *)down);
    return _mm_srai_epi16(_mm_add_epi16(above, below), 1);
}

static void unfilter_row_sse2(const uint8_t *low, const uint8_t *high, const int16_t *up, const int16_t *down,
                              Py_ssize_t columns, int16_t *row)
{
    /* The bytes side by side are low + 256 high with an unsigned low; (low ^ 128) - 128 is the signed one. */
    const __m128i flip = _mm_set1_epi8((char)-128), offset = _mm_set1_epi16(128);
    __m128i carry = _mm_setzero_si128();
    Py_ssize_t x = 0;
    for (; x + 16 <= columns; x += 16) {
        __m128i lows = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(low + x)), flip);
        __m128i highs = _mm_loadu_si128((const __m128i *)(high + x));
        __m128i left = sums_of_eight(_mm_sub_epi16(_mm_unpacklo_epi8(lows, highs), offset));
        __m128i right = sums_of_eight(_mm_sub_epi16(_mm_unpackhi_epi8(lows, highs), offset));
        __m128i middle = _mm_add_epi16(carry, last_of_eight(left));
        left = _mm_add_epi16(left, carry);
        carry = _mm_add_epi16(middle, last_of_eight(right));
        right = _mm_add_epi16(right, middle);
        if (up != NULL) {
            left = _mm_add_epi16(left, mean_of_eight(up + x, down + x));
            right = _mm_add_epi16(right, mean_of_eight(up + x + 8, down + x + 8));
        }
        _mm_storeu_si128((__m128i *)(row + x), left);
        _mm_storeu_si128((__m128i *)(row + x + 8), right);
    }
    unfilter_rest(low, high, up, down, columns, row, x, (uint16_t)_mm_extract_epi16(carry, 0));
}

__attribute__((target("avx2"))) static void unfilter_row_avx2(const uint8_t *low, const uint8_t *high,
                                                              const int16_t *up, const int16_t *down,
                                                              Py_ssize_t columns, int16_t *row)
{
    const __m256i last = _mm256_set1_epi16(0x0F0E); /* byte indices: the last value of each half, in all its places */
    __m256i carry = _mm256_setzero_si256();
    Py_ssize_t x = 0;
    for (; x + 16 <= columns; x += 16) {
        __m256i lows = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(low + x)));
        __m256i highs = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(high + x)));
        __m256i values = _mm256_add_epi16(lows, _mm256_slli_epi16(highs, 8));
        values = _mm256_add_epi16(values, _mm256_slli_si256(values, 2));
        values = _mm256_add_epi16(values, _mm256_slli_si256(values, 4));
        values = _mm256_add_epi16(values, _mm256_slli_si256(values, 8));
        /* Each half has its own sums: the left one's total goes on top of the right one. */
        __m256i totals = _mm256_shuffle_epi8(values, last);
        values = _mm256_add_epi16(values, _mm256_permute2x128_si256(totals, totals, 0x08));
        __m256i sums = _mm256_add_epi16(values, carry);
        carry = _mm256_add_epi16(carry, _mm256_permute4x64_epi64(_mm256_shuffle_epi8(values, last), 0xFF));
        if (up != NULL) {
            __m256i above = _mm256_loadu_si256((const __m256i *)(up + x));
            __m256i below = _mm256_loadu_si256((const __m256i *)(down + x));
            sums = _mm256_add_epi16(sums, _mm256_srai_epi16(_mm256_add_epi16(above, below), 1));
        }
        _mm256_storeu_si256((__m256i *)(row + x), sums);
    }
    unfilter_rest(low, high, up, down, columns, row, x, (uint16_t)_mm256_extract_epi16(carry, 0));
}
#else
static void unfilter_row_plain(const uint8_t *low, const uint8_t *high, const int16_t *up, const int16_t *down,
                               Py_ssize_t columns, int16_t *row)
{
    unfilter_rest(low, high, up, down, columns, row, 0, 0);
}
#endif

/* --- one slice -------------------------------------------------------------------------------------------------- */
/* Where row y stands in the filtered stack (y % 4 == 0, y % 4 == 2, odd), and how far its neighbours are; 0: none. */
static Py_ssize_t place_of(Py_ssize_t y, Py_ssize_t rows, Py_ssize_t *distance)
{
    Py_ssize_t first = (rows + 3) / 4, second = (rows + 1) / 4; /* rows of the first two groups */
    *distance = y % 4 == 0 ? 0 : y % 4 == 2 ? 2 : 1;
    return y % 4 == 0 ? y / 4 : y % 4 == 2 ? first + y / 4 : first + second + y / 2;
}

static void filter_hilp(const Slice *slice, uint8_t *filtered)
{
    Py_ssize_t rows = slice->rows, columns = slice->columns, distance;
    for (Py_ssize_t y = 0; y < rows; y++) {
        uint8_t *low = filtered + place_of(y, rows, &distance) * columns, *high = low + rows * columns;
        const int16_t *up = distance ? row_of(slice, y - distance) : NULL;
        const int16_t *down = distance && y + distance < rows ? row_of(slice, y + distance) : up;
        filter_row(row_of(slice, y), up, down, columns, low, high);
    }
}

static UnfilterRow *unfilter_row; /* chosen when the module is loaded */

static void unfilter_hilp_row(const uint8_t *filtered, const Slice *slice, Py_ssize_t y)
{
    Py_ssize_t rows = slice->rows, columns = slice->columns, distance;
    const uint8_t *low = filtered + place_of(y, rows, &distance) * columns, *high = low + rows * columns;
    const int16_t *up = distance ? row_of(slice, y - distance) : NULL;
    const int16_t *down = distance && y + distance < rows ? row_of(slice, y + distance) : up;
    unfilter_row(low, high, up, down, columns, row_of(slice, y));
}

static void unfilter_hilp(const Slice *slice, uint8_t *filtered)
{
    /* Four rows at a time, so that neighbours are still in the cache: first the next row that stands by itself. */
    unfilter_hilp_row(filtered, slice, 0);
    for (Py_ssize_t y = 0; y < slice->rows; y += 4) {
        static const int order[] = {4, 2, 1, 3};
        for (int i = 0; i < 4; i++)
            if (y + order[i] < slice->rows)
                unfilter_hilp_row(filtered, slice, y + order[i]);
    }
}

static void filter_planes(const Slice *slice, uint8_t *filtered)
{
    for (Py_ssize_t y = 0; y < slice->rows; y++) {
        const int16_t *restrict row = row_of(slice, y);
        uint8_t *restrict low = filtered + y * slice->columns;
        uint8_t *restrict high = low + slice->rows * slice->columns;
        for (Py_ssize_t x = 0; x < slice->columns; x++) {
            low[x] = (uint8_t)row[x];
            high[x] = (uint8_t)((uint16_t)row[x] >> 8);
        }
    }
}

static void unfilter_planes(const Slice *slice, uint8_t *filtered)
{
    for (Py_ssize_t y = 0; y < slice->rows; y++) {
        const uint8_t *restrict low = filtered + y * slice->columns;
        const uint8_t *restrict high = low + slice->rows * slice->columns;
        int16_t *restrict row = row_of(slice, y);
        for (Py_ssize_t x = 0; x < slice->columns; x++)
            row[x] = (int16_t)(uint16_t)(low[x] | high[x] << 8);
    }
}

/* counts[b] += how many values lie in bin b. Four tables in turn: neighbours are often equal, and adding twice to one
 * place makes the processor wait. `tables`: 4 x BINS zeros; at most 2^32 - 1 values, so that none can overflow. */
static void count_values(const int16_t *values, Py_ssize_t count, uint32_t *tables, int64_t *counts)
{
    Py_ssize_t i = 0;
    for (; i + 4 <= count; i += 4) {
        uint64_t four;
        memcpy(&four, values + i, 8);
        four = four >> 4 & UINT64_C(0x0FFF0FFF0FFF0FFF);
        tables[four & 0xFFFF]++;
        tables[BINS + (four >> 16 & 0xFFFF)]++;
        tables[2 * BINS + (four >> 32 & 0xFFFF)]++;
        tables[3 * BINS + (four >> 48)]++;
    }
    for (; i < count; i++)
        tables[(uint16_t)values[i] >> 4]++;
    /* Counted as unsigned: the negative values, which come first, stand in the upper half. */
    for (int bin = 0; bin < BINS; bin++)
        for (int table = 0; table < 4; table++)
            counts[bin] += tables[table * BINS + (bin + BINS / 2) % BINS];
}

/* --- what Python sees ------------------------------------------------------------------------------------------- */
/* Fills `view` and checks its item: 1 if it is to be released, else 0 with ValueError set. */
static int get_buffer(PyObject *object, Py_buffer *view, int writable, const char *format, Py_ssize_t item_bytes,
                      const char *name)
{
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s is no %sbuffer", name, writable ? "writable " : "");
        return 0;
    }
    const char *found = view->format ? view->format : "B";
    /* int64 is "l" or "q", whichever is 8 bytes long on this system. */
    int known = strcmp(found, format) == 0 || (strcmp(format, "q") == 0 && strcmp(found, "l") == 0);
    if (!known || view->itemsize != item_bytes || (uintptr_t)view->buf % (uintptr_t)item_bytes != 0) {
        PyErr_Format(PyExc_ValueError, "%s has items '%s' of %zd bytes where aligned '%s' of %zd are needed", name,
                     found, view->itemsize, format, item_bytes);
        PyBuffer_Release(view);
        return 0;
    }
    return 1;
}

static int get_slice(PyObject *object, Py_buffer *view, int writable, Slice *slice)
{
    if (!get_buffer(object, view, writable, "h", 2, "the slice"))
        return 0;
    if (view->ndim == 2 && view->shape[0] >= 1 && view->shape[1] >= 1 && (view->strides[1] == 2 || view->shape[1] == 1)
        && view->strides[0] % 2 == 0 && view->shape[1] <= PY_SSIZE_T_MAX / 2 / view->shape[0]) {
        *slice = (Slice){(int16_t *)view->buf, view->shape[0], view->shape[1], view->strides[0] / 2};
        return 1;
    }
    PyErr_SetString(PyExc_ValueError, "the slice is not int16 (y, x), at least 1 x 1, with its columns side by side");
    PyBuffer_Release(view);
    return 0;
}

static int get_contiguous(PyObject *object, Py_buffer *view, int writable, const char *format, Py_ssize_t item_bytes,
                          Py_ssize_t items, const char *name)
{
    if (!get_buffer(object, view, writable, format, item_bytes, name))
        return 0;
    if (PyBuffer_IsContiguous(view, 'C') && (items < 0 || view->len == items * item_bytes))
        return 1;
    PyErr_Format(PyExc_ValueError, "%s is not contiguous, or has %zd bytes where %zd are needed", name, view->len,
                 items < 0 ? view->len : items * item_bytes);
    PyBuffer_Release(view);
    return 0;
}

static int has_two(Py_ssize_t given)
{
    if (given != 2)
        PyErr_Format(PyExc_TypeError, "2 arguments are needed, %zd were given", given);
    return given == 2;
}

typedef void Work(const Slice *slice, uint8_t *filtered);

/* Checks both buffers and does the work between them; `to_slice`: the slice is what is written. */
static PyObject *run(PyObject *slice_object, PyObject *filtered_object, int to_slice, Work *work)
{
    Py_buffer slice_view, filtered_view;
    Slice slice;
    if (!get_slice(slice_object, &slice_view, to_slice, &slice))
        return NULL;
    Py_ssize_t bytes = 2 * slice.rows * slice.columns;
    if (!get_contiguous(filtered_object, &filtered_view, !to_slice, "B", 1, bytes, "the filtered")) {
        PyBuffer_Release(&slice_view);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    work(&slice, filtered_view.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&filtered_view);
    PyBuffer_Release(&slice_view);
    return Py_NewRef(Py_None);
}

static PyObject *py_filter_hilp(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    return has_two(count) ? run(arguments[0], arguments[1], 0, filter_hilp) : NULL;
}

static PyObject *py_filter_planes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    return has_two(count) ? run(arguments[0], arguments[1], 0, filter_planes) : NULL;
}

static PyObject *py_unfilter_hilp(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    return has_two(count) ? run(arguments[1], arguments[0], 1, unfilter_hilp) : NULL;
}

static PyObject *py_unfilter_planes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    return has_two(count) ? run(arguments[1], arguments[0], 1, unfilter_planes) : NULL;
}

static PyObject *py_add_histogram(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer values, counts;
    if (!has_two(count) || !get_contiguous(arguments[0], &values, 0, "h", 2, -1, "the values"))
        return NULL;
    if (!get_contiguous(arguments[1], &counts, 1, "q", 8, BINS, "the counts")) {
        PyBuffer_Release(&values);
        return NULL;
    }
    uint32_t *tables = NULL;
    if ((uint64_t)values.len / 2 > UINT32_MAX)
        PyErr_SetString(PyExc_ValueError, "more than 2^32 - 1 values at once");
    else if ((tables = PyMem_Calloc(4 * BINS, sizeof(uint32_t))) == NULL)
        PyErr_NoMemory();
    else {
        Py_BEGIN_ALLOW_THREADS
        count_values(values.buf, values.len / 2, tables, counts.buf);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(tables);
    PyBuffer_Release(&counts);
    PyBuffer_Release(&values);
    return tables == NULL ? NULL : Py_NewRef(Py_None);
}

static int fill_module(PyObject *module)
{
#ifdef X86_64
    const char *instructions = __builtin_cpu_supports("avx2") ? "AVX2" : "SSE2";
    unfilter_row = __builtin_cpu_supports("avx2") ? unfilter_row_avx2 : unfilter_row_sse2;
#else
    const char *instructions = "plain";
    unfilter_row = unfilter_row_plain;
#endif
    if (PyModule_AddStringConstant(module, "INSTRUCTIONS", instructions) != 0)
        return -1;
    return PyModule_AddIntConstant(module, "INTERFACE", INTERFACE);
}

#define FUNCTION(name, doc) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, #name doc}

static PyMethodDef functions[] = {
    FUNCTION(filter_hilp, "(slice, filtered): int16 (y, x) into uint8 (2·y·x,)."),
    FUNCTION(filter_planes, "(slice, filtered): int16 (y, x) into uint8 (2·y·x,)."),
    FUNCTION(unfilter_hilp, "(filtered, slice): uint8 (2·y·x,) into int16 (y, x)."),
    FUNCTION(unfilter_planes, "(filtered, slice): uint8 (2·y·x,) into int16 (y, x)."),
    FUNCTION(add_histogram, "(values, counts): adds contiguous int16 to int64 (4096,), bins of 16 from -32768."),
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_filters", .m_size = 0, .m_methods = functions, .m_slots = slots};

PyMODINIT_FUNC PyInit__filters(void) { return PyModuleDef_Init(&definition); }
