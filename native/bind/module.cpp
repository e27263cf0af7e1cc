// tilewise._native: a thin shell over the C core. Arrays arrive as addresses with strides in elements; the Python side
// (kernels/native) has checked shapes and types and keeps the arrays alive for the call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/arguments.h"
#include "bind/xla_ffi.h"
#include "core/dispatch.h"
#include "core/large_pages.h"
#include "core/threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tilewise;

namespace {

[[noreturn]] void raise(int status, const char *message) {
    if (status == TW_INVALID) throw nb::value_error(message);
    if (status == TW_OUT_OF_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, message);
        throw nb::python_error();
    }
    throw std::runtime_error(message);
}

// Whether a signal's handler raised, Ctrl-C's above all; the error stays set. Handlers run on Python's main thread alone:
// any other learns so when it asks first, and does not disturb the GIL again.
bool signal_raised(void *asks) {
    if (!*static_cast<bool *>(asks)) return false;
    nb::gil_scoped_acquire locked;
    try { // the kernels that ask let no exception through
        const nb::module_ threading = nb::module_::import_("threading");
        const nb::object main = threading.attr("main_thread")().attr("ident");
        *static_cast<bool *>(asks) = threading.attr("get_ident")().equal(main);
    } catch (nb::python_error &error) {
        error.restore();
        return true;
    }
    return PyErr_CheckSignals() != 0;
}

// Runs with the GIL released and raises what goes wrong, or what a signal's handler raises meanwhile. `threads` is 0 but for
// torch's tensors, whose calls use torch's own threads.
template <class Run> void unlocked(int threads, Run run) {
    const char *message = nullptr;
    int status;
    bool interrupted, asks = true;
    {
        nb::gil_scoped_release released;
        Interruptible interruptible(signal_raised, &asks);
        OnTorchThreads on_torch_threads(threads);
        status = run(&message);
        interrupted = interruptible.given_up();
    }
    if (interrupted) throw nb::python_error();
    if (status != TW_OK) raise(status, message);
}

void forward(int dtype, int threads, nb::tuple sizes, nb::tuple rows, nb::tuple q, nb::tuple k, nb::tuple v,
             nb::tuple out, uintptr_t lse, double scale, double softcap, nb::object ranges, nb::object labels,
             nb::object mask, nb::object bits, nb::tuple biases, nb::object table, uintptr_t sinks, nb::object dropout,
             bool part, nb::object pages, nb::object sequences, bool row_invariant) {
    tw_problem p = problem_of(dtype, threads, sizes, rows, q, k, v, out, lse, scale, softcap);
    p.part = part;
    p.row_invariant = row_invariant;
    read_facts({ranges, labels, mask, bits, biases, table, sinks, dropout, pages, sequences}, p);
    unlocked(threads, [&p](const char **message) { return tw_forward(&p, message); });
}

void backward(int dtype, int threads, nb::tuple sizes, nb::tuple rows, nb::tuple q, nb::tuple k, nb::tuple v,
              nb::tuple out, uintptr_t lse, double scale, double softcap, nb::object ranges, nb::object labels,
              nb::object mask, nb::object bits, nb::tuple biases, nb::object table, uintptr_t sinks, nb::object dropout,
              bool part, nb::object pages, nb::object sequences, nb::tuple d_out, uintptr_t d_lse, nb::tuple d_q,
              nb::tuple d_k, nb::tuple d_v, bool adds, nb::tuple gather, uintptr_t d_sinks, bool row_invariant) {
    tw_problem p = problem_of(dtype, threads, sizes, rows, q, k, v, out, lse, scale, softcap);
    p.part = part;
    p.row_invariant = row_invariant;
    read_facts({ranges, labels, mask, bits, biases, table, sinks, dropout, pages, sequences}, p);
    tw_gradients g = {};
    g.d_out = tensor_of(d_out);
    g.d_lse = reinterpret_cast<const void *>(d_lse);
    g.d_q = tensor_of(d_q);
    g.d_k = tensor_of(d_k);
    g.d_v = tensor_of(d_v);
    g.adds = adds;
    if (nb::len(gather) > TW_MAX_BIASES + 1) throw nb::value_error("bias: at most 4 dense biases");
    for (nb::handle array : gather) {
        Fields f(array);
        tw_gather &own = g.gather[g.gather_count++];
        own.data = f.pointer<void *>();
        for (int64_t *field : {&own.stride_b, &own.stride_h, &own.stride_i, &own.stride_j}) *field = f.next();
    }
    g.sinks = reinterpret_cast<void *>(d_sinks);
    unlocked(threads, [&](const char **message) { return tw_backward(&p, &g, message); });
}

void tangent(int dtype, int threads, nb::tuple sizes, nb::tuple rows, nb::tuple q, nb::tuple k, nb::tuple v,
             nb::tuple out, uintptr_t lse, double scale, double softcap, nb::object ranges, nb::object labels,
             nb::object mask, nb::object bits, nb::tuple biases, nb::object table, uintptr_t sinks, nb::object dropout,
             bool part, nb::tuple d_q, nb::tuple d_k, nb::tuple d_v, nb::tuple d_biases, nb::object d_table,
             uintptr_t d_sinks, nb::tuple d_out, uintptr_t d_lse, bool row_invariant) {
    tw_problem p = problem_of(dtype, threads, sizes, rows, q, k, v, out, lse, scale, softcap);
    p.part = part;
    p.row_invariant = row_invariant;
    read_facts({ranges, labels, mask, bits, biases, table, sinks, dropout, nb::none(), nb::none()}, p);
    tw_tangents t = {};
    t.q = tensor_of(d_q);
    t.k = tensor_of(d_k);
    t.v = tensor_of(d_v);
    t.bias_count = read_biases(d_biases, t.bias);
    t.table = table_of(d_table);
    t.sinks = reinterpret_cast<const void *>(d_sinks);
    t.out = tensor_of(d_out);
    t.lse = reinterpret_cast<void *>(d_lse);
    unlocked(threads, [&](const char **message) { return tw_tangent(&p, &t, message); });
}

const tw_kernel_table *found(const tw_kernel_table *table, const char *message) {
    if (!table) throw std::runtime_error(message);
    return table;
}

const tw_kernel_table *page() {
    const char *message = nullptr;
    const tw_kernel_table *table = page_in_use(&message);
    return found(table, message);
}

const tw_kernel_table *page_of(int dtype) {
    const char *message = nullptr;
    const tw_kernel_table *table = page_for(dtype, &message);
    return found(table, message);
}

uint32_t philox_word(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t word;
    page()->philox(seed, stream, &index, 1, &word);
    return word;
}

nb::tuple describe(int dtype, int threads, nb::tuple sizes, bool row_invariant) {
    // Rows of keys and values so far apart that they are copied where that pays: the workspace is no less anywhere.
    const nb::tuple nowhere = nb::make_tuple(0, 0, 0, 0), apart = nb::make_tuple(0, 0, 0, 1 << 20);
    tw_problem p =
        problem_of(dtype, threads, sizes, nb::make_tuple(0, sizes[3]), nowhere, apart, apart, nowhere, 0, 1, 0);
    p.row_invariant = row_invariant;
    tw_description found;
    const char *message = nullptr;
    const int status = tw_describe(&p, &found, &message);
    if (status != TW_OK) raise(status, message);
    return nb::make_tuple(found.tile_rows, found.chunk_keys, found.split_keys, found.workspace, found.parts,
                          std::string(page_of(dtype)->name));
}

nb::dict build_info() {
    nb::list compiled, supported;
    nb::dict refused;
    int count;
    const Page *list = pages(&count);
    for (int i = 0; i < count; ++i) {
        compiled.append(list[i].table->name);
        if (list[i].host_runs) supported.append(list[i].table->name);
        if (list[i].refusal) refused[list[i].table->name] = list[i].refusal;
    }
    nb::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["pages"] = nb::tuple(compiled);
    info["supported_pages"] = nb::tuple(supported);
    info["refused_pages"] = refused;
    info["xla_ffi_version"] = nb::make_tuple(0, 1);
    return info;
}

// GFLOP/s that `threads` threads reach together on the products of a type, in registers: the yardstick of benchmarks.
double peak_gflops(int threads, double seconds, int dtype) {
    if (dtype < 0 || dtype >= TW_DTYPES) throw nb::value_error("dtype: must be a number of enum tw_dtype");
    struct Probe {
        double (*run)(int64_t steps, float *twelve);
        double seconds;
        std::vector<double> rates;
    } probe{page_of(dtype)->peak_probes[dtype], seconds, {}};
    if (threads <= 0) threads = default_threads();
    probe.rates.assign(size_t(threads), 0.0);
    nb::gil_scoped_release unlocked;
    parallel_for(
        threads, threads,
        [](void *context, int64_t index, int) {
            Probe &own = *static_cast<Probe *>(context);
            const auto begin = std::chrono::steady_clock::now();
            double operations = 0, passed = 0;
            float numbers[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
            do {
                operations += own.run(100000, numbers);
                passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
            } while (passed < own.seconds);
            own.rates[size_t(index)] = operations / passed / 1e9;
        },
        &probe);
    double total = 0;
    for (double rate : probe.rates) total += rate;
    return total;
}

// GB/s at which `threads` threads read `count` numbers, each its own part of them in order.
double read_gbps(uintptr_t address, int64_t count, int threads) {
    if (threads <= 0) threads = default_threads();
    struct Probe {
        const float *numbers;
        int64_t share;
    } probe{reinterpret_cast<const float *>(address), count / threads};
    nb::gil_scoped_release unlocked;
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(
        threads, threads,
        [](void *context, int64_t index, int) {
            const Probe &own = *static_cast<Probe *>(context);
            page_of(TW_FLOAT32)->read_probe(own.numbers + index * own.share, own.share);
        },
        &probe);
    const double passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return double(probe.share * threads) * sizeof(float) / passed / 1e9;
}

void set_num_threads(int threads) {
    if (threads < 0) throw nb::value_error("threads: must be positive, or 0 for the default");
    set_default_threads(threads);
}

} // namespace

NB_MODULE(_native, m) {
    m.doc() = "The compiled kernels of tilewise. Internal: call tilewise.attention.";
    m.def("forward", &forward, nb::kw_only(), "dtype"_a, "threads"_a, "sizes"_a, "rows"_a, "q"_a, "k"_a, "v"_a, "out"_a,
          "lse"_a, "scale"_a, "softcap"_a, "ranges"_a.none(), "labels"_a.none(), "mask"_a.none(), "bits"_a.none(),
          "biases"_a, "table"_a.none(), "sinks"_a, "dropout"_a.none(), "part"_a, "pages"_a = nb::none(),
          "sequences"_a = nb::none(), "row_invariant"_a = false,
          "One forward pass. Tuples of addresses and strides in elements, in the order of native/core/problem.h; "
          "None (0 for sinks): absent. The GIL is released.");
    m.def("backward", &backward, nb::kw_only(), "dtype"_a, "threads"_a, "sizes"_a, "rows"_a, "q"_a, "k"_a, "v"_a,
          "out"_a, "lse"_a, "scale"_a, "softcap"_a, "ranges"_a.none(), "labels"_a.none(), "mask"_a.none(),
          "bits"_a.none(), "biases"_a, "table"_a.none(), "sinks"_a, "dropout"_a.none(), "part"_a,
          "pages"_a = nb::none(), "sequences"_a = nb::none(), "d_out"_a, "d_lse"_a, "d_q"_a, "d_k"_a, "d_v"_a,
          "adds"_a = false, "gather"_a, "d_sinks"_a, "row_invariant"_a = false,
          "One backward pass, after the same keywords: tw_gradients of native/core/problem.h, address 0: not wanted.");
    m.def("tangent", &tangent, nb::kw_only(), "dtype"_a, "threads"_a, "sizes"_a, "rows"_a, "q"_a, "k"_a, "v"_a, "out"_a,
          "lse"_a, "scale"_a, "softcap"_a, "ranges"_a.none(), "labels"_a.none(), "mask"_a.none(), "bits"_a.none(),
          "biases"_a, "table"_a.none(), "sinks"_a, "dropout"_a.none(), "part"_a, "d_q"_a, "d_k"_a, "d_v"_a,
          "d_biases"_a, "d_table"_a.none(), "d_sinks"_a, "d_out"_a, "d_lse"_a, "row_invariant"_a = false,
          "Tangents of out and lse, after the same keywords: tw_tangents of native/core/problem.h, address 0: does not "
          "move.");
    m.def("isa", [] { return std::string(page()->name); }, "Name of the kernel page in use (TILEWISE_ISA chooses).");
    m.def(
        "describe", &describe, "dtype"_a, "threads"_a, "sizes"_a, "row_invariant"_a,
        "(query rows of a tile, keys of a chunk, keys of a split or 0, bytes of workspace, parts in which a number is "
        "multiplied, name of the page) of a forward pass.");
    m.def("build_info", &build_info,
          "compiler, pages (compiled in, best first), supported_pages, refused_pages (name: why), xla_ffi_version.");
    m.def("num_threads", &default_threads, "Threads a call uses where it does not say.");
    m.def("set_num_threads", &set_num_threads, "threads"_a,
          "Set that number for the process; 0 returns to the default.");
    m.def(
        "prefer_large_pages",
        [](uintptr_t address, size_t bytes) { prefer_large_pages(reinterpret_cast<void *>(address), bytes); },
        "address"_a, "bytes"_a, "For memory that is about to be filled; less than 4 MB is left alone.");
    m.def("peak_gflops", &peak_gflops, "threads"_a = 0, "seconds"_a = 0.05, "dtype"_a = 0,
          "Measured peak of the products that the kernels of a dtype (a tw_dtype number) are made of, GFLOP/s.");
    m.def("read_gbps", &read_gbps, "address"_a, "count"_a, "threads"_a = 0,
          "GB/s at which all threads together read `count` float32 numbers, each its own part in order.");
    m.def("philox_word", &philox_word, "seed"_a, "stream"_a, "index"_a,
          "First word of Philox4x32-10 for counter (index, stream), as the page in use draws it.");
    m.def("xla_forward", [] { return nb::capsule(reinterpret_cast<void *>(&tw_xla_forward)); }, "Capsule for jax.ffi.");
    m.def(
        "xla_backward", [] { return nb::capsule(reinterpret_cast<void *>(&tw_xla_backward)); }, "Capsule for jax.ffi.");
    m.def("xla_tangent", [] { return nb::capsule(reinterpret_cast<void *>(&tw_xla_tangent)); }, "Capsule for jax.ffi.");
}
