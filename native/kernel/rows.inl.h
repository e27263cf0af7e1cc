// Where the rows of an array lie: at strides, or, for keys and values, in pages that a table names.

// Row (b, h, i) of an array.
template <class T> TW_INLINE T *tensor_row(const tw_tensor &x, int64_t b, int64_t h, int64_t i) {
    return static_cast<T *>(x.data) + b * x.stride_b + h * x.stride_h + i * x.stride_s;
}

// Rows of a block of keys or values: row j is rows[j].
template <class T> struct Rows {
    const T *first; // NULL: no rows
    int64_t stride;
    const T *const *each; // where not NULL, the rows one by one, and there is no stride
    __attribute__((always_inline)) const T *operator[](int64_t j) const { return each ? each[j] : first + j * stride; }
};

// The n rows of x (k or v of the problem) from `key` on, for n <= block_keys; where they lie in pages, one by one in
// `each`, which holds that many. Rows that one page holds are found at once.
template <class T>
TW_INLINE Rows<T> key_rows(const tw_problem &p, const tw_tensor &x, int64_t b, int64_t kv_head, int64_t key, int n,
                           const T **each) {
    const tw_pages &pages = p.pages;
    if (__builtin_expect(!pages.table, 1)) return {tensor_row<const T>(x, b, kv_head, key), x.stride_s, nullptr};
    const int32_t *page = pages.table + b * pages.stride_b + key / pages.size;
    int64_t at = key % pages.size;
    const T *row = tensor_row<const T>(x, *page, kv_head, at);
    if (at + n <= pages.size) return {row, x.stride_s, nullptr};
    const T *const first = row;
    for (int j = 0; j < n; ++j, ++at, row += x.stride_s) {
        if (at == pages.size) {
            at = 0;
            row = tensor_row<const T>(x, *++page, kv_head, 0);
        }
        each[j] = row;
    }
    return {first, 0, each};
}

// Query rows of a kv head that this call computes.
TW_INLINE int64_t rows_in_call(const tw_problem &p) { return p.q_heads / p.kv_heads * (p.row_end - p.row_begin); }
