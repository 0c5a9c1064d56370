// The only file that knows Python: checks nothing but dtype and layout (kernels/<op>/cpu.py checks shapes), releases the GIL,
// calls the table of the chosen instruction set.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef FASTRANK_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "pairs.hpp"
#include "wordpiece.hpp"

namespace py = pybind11;

// numpy has no bf16: its bits come as int16.
namespace pybind11::detail {
template <>
struct npy_format_descriptor<fastrank::Bf16> {
  static constexpr auto name = const_name("numpy.int16");
  static pybind11::dtype dtype() { return pybind11::dtype::of<int16_t>(); }
};
}  // namespace pybind11::detail

namespace {

// Contiguous and of exactly this type, or a TypeError: a silent conversion would write into a copy.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

#ifdef FASTRANK_X86
const fastrank::Kernels* avx512_kernels() {
#ifdef FASTRANK_AVX512_BF16
  static const fastrank::Kernels with_bf16 = [] {
    fastrank::Kernels table = fastrank::avx512::kernels;
    table.linear_forward = fastrank::avx512_bf16::linear_forward;
    table.multiplies_bf16 = true;
    return table;
  }();
  if (__builtin_cpu_supports("avx512bf16")) return &with_bf16;
#endif
  return &fastrank::avx512::kernels;
}

#ifdef FASTRANK_AMX
// Whether the processor has AMX for bf16 and Linux lets this process use its registers, which it wants to be asked for.
bool grants_tiles() {
  unsigned int eax, ebx, ecx, edx = 0;
  constexpr unsigned int AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & AMX_BF16) || !(edx & AMX_TILE)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

const fastrank::Kernels* amx_kernels() {
  static const fastrank::Kernels table = [] {
    fastrank::Kernels table = *avx512_kernels();
    table.isa = "amx";
    table.linear_layout = fastrank::amx::linear_layout;
    table.linear_forward = fastrank::amx::linear_forward;
    table.encoder_forward = fastrank::amx::encoder_forward;
    table.multiplies_in_tiles = true;
    return table;
  }();
  return &table;
}
#endif
#endif

std::vector<const fastrank::Kernels*> supported() {  // the fastest first
  std::vector<const fastrank::Kernels*> tables;
#ifdef FASTRANK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
#ifdef FASTRANK_AMX
    if (__builtin_cpu_supports("avx512bf16") && grants_tiles()) tables.push_back(amx_kernels());
#endif
    tables.push_back(avx512_kernels());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&fastrank::avx2::kernels);
#endif
  tables.push_back(&fastrank::plain::kernels);
  return tables;
}

// FASTRANK_CPU_ISA is read at every call, so that one process can compare instruction sets.
const fastrank::Kernels& kernels() {
  static const auto tables = supported();
  const char* wanted = std::getenv("FASTRANK_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.front();
  std::string names;
  for (const auto* table : tables) {
    if (std::strcmp(wanted, table->isa) == 0) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument("FASTRANK_CPU_ISA=" + std::string(wanted) + " cannot run on this processor, which offers " + names +
                           ".");
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// A matrix (rows, heads, head_dim) that may be strided in all but the last dimension.
template <class Value>
using HeadsArray = py::array_t<Value, 0>;
template <class Value>
using MaybeHeads = std::optional<HeadsArray<Value>>;
template <class Value>
using MaybeArray = std::optional<Array<Value>>;
using MaybeFloats = MaybeArray<float>;

template <class Value>
void check_heads(const HeadsArray<Value>& array) {
  if (array.ndim() != 3 || (array.size() > 0 && array.shape(2) > 1 && array.strides(2) != sizeof(Value)))
    throw std::invalid_argument("expected an array (rows, heads, head_dim) whose last dimension is contiguous");
}
template <class Value>
fastrank::ConstHeads<Value> heads_in(const HeadsArray<Value>& array) {
  check_heads(array);
  return {array.data(), int64_t(array.strides(0) / sizeof(Value)), int64_t(array.strides(1) / sizeof(Value))};
}
template <class Value>
fastrank::Heads<Value> heads_out(MaybeHeads<Value>& array) {
  if (!array) return {nullptr, 0, 0};
  check_heads(*array);
  return {array->mutable_data(), int64_t(array->strides(0) / sizeof(Value)), int64_t(array->strides(1) / sizeof(Value))};
}
template <class Value>
const Value* read(const MaybeArray<Value>& array) {
  return array ? array->data() : nullptr;
}
template <class Value>
Value* write(MaybeArray<Value>& array) {
  return array ? array->mutable_data() : nullptr;
}

template <class Value>
fastrank::AttentionShape attention_shape(const HeadsArray<Value>& q, const std::vector<Array<int32_t>>& segments, float scale,
                                         int num_threads) {
  if (segments.size() != 4) throw std::invalid_argument("expected the begins and ends of queries and of keys");
  return {segments[0].size(), q.shape(1), q.shape(2), q.shape(0), {segments[0].data(), segments[1].data()},
          {segments[2].data(), segments[3].data()}, scale, num_threads};
}

// The value of this name, or a ValueError with the known ones.
template <class Value>
Value choice(const char* option, const std::string& name, std::initializer_list<std::pair<const char*, Value>> known) {
  std::string names;
  for (const auto& [other, value] : known) {
    if (name == other) return value;
    names += (names.empty() ? "" : ", ") + std::string(other);
  }
  throw std::invalid_argument(std::string(option) + " must be one of " + names + ", not " + name);
}

fastrank::Precision precision_named(const std::string& name) {
  using fastrank::Precision;
  return choice<Precision>("precision", name,
                           {{"float32", Precision::FLOAT32}, {"bf16", Precision::BF16}, {"int8", Precision::INT8}});
}

fastrank::Activation activation_named(const std::string& name) {
  using fastrank::Activation;
  return choice<Activation>("activation", name,
                            {{"none", Activation::NONE},
                             {"gelu", Activation::GELU},
                             {"gelu_tanh", Activation::GELU_TANH},
                             {"relu", Activation::RELU}});
}

// The weights of a product as fastrank.kernels.linear.cpu packs them: precision, panels, scales, sums, bias, columns, depth.
using PackedWeights = std::tuple<std::string, py::array, MaybeFloats, MaybeFloats, Array<float>, int64_t, int64_t>;

fastrank::LinearWeights linear_weights(const PackedWeights& packed, const fastrank::Kernels& table) {
  const auto& [name, panels, scales, sums, bias, columns, depth] = packed;
  const auto precision = precision_named(name);
  const bool int8 = precision == fastrank::Precision::INT8;
  const int64_t item_size = int8 ? 1 : precision == fastrank::Precision::BF16 ? 2 : 4;
  const auto layout = table.linear_layout(precision);
  const auto count = [](int64_t n, int64_t step) { return (n + step - 1) / step; };
  const int64_t filled = count(columns, layout.panel_columns) * layout.panel_columns, blocks = count(depth, layout.block);
  if (!(panels.flags() & py::array::c_style) || panels.itemsize() != item_size ||
      panels.size() != filled * blocks * layout.block || bias.size() != filled || scales.has_value() != int8 ||
      sums.has_value() != int8 || (int8 && (scales->size() != filled * blocks || sums->size() != filled * blocks)))
    throw std::invalid_argument("weights that are not packed for the instruction set " + std::string(table.isa));
  return {precision, panels.data(), read(scales), read(sums), bias.data(), columns, depth};
}

// Weight, bias and eps of a LayerNorm; and a layer: qkv, attention_output and its norm, up, down and the last norm.
using PackedNorm = std::tuple<Array<float>, Array<float>, float>;
using PackedLayer = std::tuple<PackedWeights, PackedWeights, PackedNorm, PackedWeights, PackedWeights, PackedNorm>;

void define_listwise(py::module_& m, const char* name, fastrank::ListwiseKernel* fastrank::Kernels::*member) {
  m.def(
      name,
      [member](const Array<float>& scores, const Array<double>& labels, const Array<int32_t>& offsets, Array<float> sums,
               Array<int64_t> terms, Array<float> gradients, int num_threads, double temperature, const std::string& discount,
               const std::string& ties, std::optional<double> margin, bool squared, const std::string& weighting,
               std::optional<int64_t> k, const std::string& gain) {
        using Discount = fastrank::RankDiscount;
        using Weighting = fastrank::PairWeighting;
        const fastrank::ListwiseBatch batch{scores.data(),       labels.data(),        offsets.data(),           offsets.size() - 1,
                                            sums.mutable_data(), terms.mutable_data(), gradients.mutable_data()};
        const fastrank::ListwiseOptions options{
            temperature,
            choice<Discount>("discount", discount,
                             {{"log2", Discount::LOG2}, {"reciprocal", Discount::RECIPROCAL}, {"none", Discount::NONE}}),
            choice<bool>("ties", ties, {{"average", true}, {"first", false}}),
            margin,
            squared,
            choice<Weighting>("weighting", weighting,
                              {{"ndcg2pp", Weighting::NDCG2PP},
                               {"ndcg2", Weighting::NDCG2},
                               {"ndcg1", Weighting::NDCG1},
                               {"lambdarank", Weighting::LAMBDARANK},
                               {"none", Weighting::NONE}}),
            k,
            choice<bool>("gain", gain, {{"exponential", true}, {"linear", false}})};
        auto* const kernel = kernels().*member;
        py::gil_scoped_release released;
        kernel(batch, options, num_threads);
      },
      "Writes each list's sum and number of terms, and the gradients of the sums. A loss reads the options that it has.",
      py::arg("scores").noconvert(), py::arg("labels").noconvert(), py::arg("offsets").noconvert(), py::arg("sums").noconvert(),
      py::arg("terms").noconvert(), py::arg("gradients").noconvert(), py::arg("num_threads"), py::arg("temperature") = 1.0,
      py::arg("discount") = "none", py::arg("ties") = "average", py::arg("margin") = py::none(), py::arg("squared") = false,
      py::arg("weighting") = "none", py::arg("k") = py::none(), py::arg("gain") = "exponential");
}

// The values of a vector as an array that owns them.
template <class T>
py::array_t<T> array_of(std::vector<T>&& values) {
  auto* const owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  return py::array_t<T>(int64_t(owned->size()), owned->data(), owner);
}

void define_wordpiece(py::module_& m) {
  using fastrank::WordPiece;
  py::class_<WordPiece>(m, "WordPiece", py::module_local())
      .def(py::init<const std::vector<std::pair<std::string, int32_t>>&, const std::string&, int32_t, int64_t,
                    std::vector<std::string>>(),
           py::arg("vocabulary"), py::arg("continuation"), py::arg("unknown_id"), py::arg("max_characters"),
           py::arg("left_to_reference"))
      .def(
          "set_page",
          [](WordPiece& self, uint32_t page, const std::vector<py::bytes>& replacements) {
            self.set_page(page, std::vector<std::string>(replacements.begin(), replacements.end()));
          },
          "Sets what a page of characters becomes; a page that is set stays.", py::arg("page"), py::arg("replacements"))
      .def(
          "encode",
          [](const WordPiece& self, const py::list& texts, int64_t enough, int num_threads) {
            std::vector<std::string_view> views(texts.size());
            std::vector<size_t> unreadable;  // no text, or one with a lone surrogate
            for (size_t i = 0; i < views.size(); ++i) {
              PyObject* const text = PyList_GET_ITEM(texts.ptr(), Py_ssize_t(i));
              Py_ssize_t size = 0;
              const char* const bytes = PyUnicode_Check(text) ? PyUnicode_AsUTF8AndSize(text, &size) : nullptr;
              if (bytes == nullptr) {
                PyErr_Clear();
                unreadable.push_back(i);
              } else {
                views[i] = {bytes, size_t(size)};
              }
            }
            WordPiece::Encoded encoded;
            {
              py::gil_scoped_release released;
              encoded = self.encode(views, enough, num_threads);
            }
            std::vector<int64_t> left(unreadable.begin(), unreadable.end());
            for (size_t i = 0; i < views.size(); ++i)
              if (encoded.states[i] == WordPiece::State::LEFT) left.push_back(int64_t(i));
            std::sort(left.begin(), left.end());
            return py::make_tuple(array_of(std::move(encoded.ids)), array_of(std::move(encoded.ends)), encoded.pages, left);
          },
          "ids of all texts, where each text's end, the pages that some need, without which they have no ids, and the texts that "
          "are left to the reference and have none. The list must not change meanwhile.",
          py::arg("texts"), py::arg("enough"), py::arg("num_threads"));
}

// Pairs in flat arrays (csrc/pairs.hpp). Nothing outside of these is read or written: begins and counts are checked.
void define_pairs(py::module_& m) {
  using Ids = Array<int32_t>;
  using Places = Array<int64_t>;
  const auto check_spans = [](const Places& begins, const Places& counts, int64_t size) {
    require(begins.size() == counts.size(), "expected as many begins as counts");
    const int64_t* const begin = begins.data();
    const int64_t* const count = counts.data();
    for (int64_t i = 0; i < counts.size(); ++i)
      require(begin[i] >= 0 && count[i] >= 0 && begin[i] <= size && count[i] <= size - begin[i],
              "expected spans inside of the ids");
  };
  const auto view = [check_spans](const Ids& ids, const Ids& types, const Places& begins, const Places& counts) {
    require(ids.size() == types.size(), "expected as many types as ids");
    check_spans(begins, counts, ids.size());
    return fastrank::PairsView{ids.data(), types.data(), begins.data(), counts.data(), counts.size()};
  };
  m.def(
      "join_pairs",
      [check_spans](const Ids& query_ids, const Places& query_begins, const Places& query_counts, const Ids& document_ids,
                    const Places& document_begins, const Places& document_counts,
                    const std::vector<std::pair<Ids, Ids>>& frame, int32_t query_type, int32_t document_type) {
        check_spans(query_begins, query_counts, query_ids.size());
        check_spans(document_begins, document_counts, document_ids.size());
        require(query_counts.size() == document_counts.size(), "expected as many documents as queries");
        require(frame.size() == 3, "expected what stands before, between and behind the texts");
        const int64_t count = query_counts.size();
        fastrank::Frame around{{}, {}, {}, query_type, document_type};
        int64_t num_around = 0, end = 0;
        for (size_t i = 0; i < 3; ++i) {
          const auto& [ids, types] = frame[i];
          require(ids.size() == types.size(), "expected as many types as ids");
          around.ids[i] = ids.data(), around.types[i] = types.data(), around.counts[i] = ids.size();
          num_around += ids.size();
        }
        std::vector<int64_t> ends(size_t(count), 0);
        for (int64_t i = 0; i < count; ++i)
          ends[size_t(i)] = end += num_around + query_counts.data()[i] + document_counts.data()[i];
        py::array_t<int32_t> ids(end), types(end);
        {
          int32_t* const ids_out = ids.mutable_data();
          int32_t* const types_out = types.mutable_data();
          py::gil_scoped_release released;
          fastrank::join_pairs({query_ids.data(), query_begins.data(), query_counts.data()},
                               {document_ids.data(), document_begins.data(), document_counts.data()}, around, count, ids_out,
                               types_out);
        }
        return py::make_tuple(ids, types, array_of(std::move(ends)));
      },
      "Joins spans of query and document ids, each (begins, counts) in its ids, within a frame of three (ids, types): ids, types "
      "and ends of the pairs.",
      py::arg("query_ids").noconvert(), py::arg("query_begins").noconvert(), py::arg("query_counts").noconvert(),
      py::arg("document_ids").noconvert(), py::arg("document_begins").noconvert(), py::arg("document_counts").noconvert(),
      py::arg("frame"), py::arg("query_type"), py::arg("document_type"));
  m.def(
      "find_distinct",
      [view](const Ids& ids, const Ids& types, const Places& begins, const Places& counts) {
        const auto pairs = view(ids, types, begins, counts);
        py::array_t<int64_t> place(pairs.num_pairs);
        std::vector<int64_t> first;
        {
          int64_t* const out = place.mutable_data();
          py::gil_scoped_release released;
          fastrank::find_distinct(pairs, out, first);
        }
        return py::make_tuple(place, array_of(std::move(first)));
      },
      "Which of the different pairs each one is, and where each of those stands first.", py::arg("ids").noconvert(),
      py::arg("types").noconvert(), py::arg("begins").noconvert(), py::arg("counts").noconvert());
  m.def(
      "pack_pairs",
      [view](const Ids& ids, const Ids& types, const Places& begins, const Places& counts, int32_t filler_id,
             int32_t filler_type, Places& token_ids, Places& token_types, Places& positions, Ids& pair_offsets) {
        const auto pairs = view(ids, types, begins, counts);
        const int64_t num_tokens = token_ids.size(), missing = pair_offsets.size() - 1 - pairs.num_pairs;
        int64_t left = num_tokens;
        for (int64_t i = 0; i < pairs.num_pairs && left >= 0; ++i) left -= pairs.counts[i];
        require(token_types.size() == num_tokens && positions.size() == num_tokens && num_tokens <= INT32_MAX,
                "expected arrays of equally many tokens");
        require(left >= 0 && missing >= 0 && (missing > 0 || left == 0), "expected room for the pairs, and pairs to fill it up");
        const fastrank::PackedView packed{token_ids.mutable_data(),    token_types.mutable_data(), positions.mutable_data(),
                                          pair_offsets.mutable_data(), token_ids.size(),           pair_offsets.size() - 1};
        py::gil_scoped_release released;
        fastrank::pack_pairs(pairs, filler_id, filler_type, packed);
      },
      "Writes pairs into a batch's arrays, and fills up what these have room for.", py::arg("ids").noconvert(),
      py::arg("types").noconvert(), py::arg("begins").noconvert(), py::arg("counts").noconvert(), py::arg("filler_id"),
      py::arg("filler_type"), py::arg("token_ids").noconvert(), py::arg("token_types").noconvert(),
      py::arg("positions").noconvert(), py::arg("pair_offsets").noconvert());
}

// Operations on hidden states, under the same names for float32 and bf16 (Value).
template <class Value>
void define_hidden_states(py::module_& m) {
  m.def(
      "attention_forward",
      [](const HeadsArray<Value>& q, const HeadsArray<Value>& k, const HeadsArray<Value>& v,
         const std::vector<Array<int32_t>>& segments, float scale, MaybeHeads<Value> out, MaybeFloats maxima,
         MaybeFloats inverse_sums, int num_threads) {
        const fastrank::AttentionForward<Value> arguments{attention_shape(q, segments, scale, num_threads),
                                                          heads_in(q),
                                                          heads_in(k),
                                                          heads_in(v),
                                                          heads_out(out),
                                                          {write(maxima), write(inverse_sums)}};
        const auto kernel = kernels().attention_forward;
        py::gil_scoped_release released;
        kernel(arguments);
      },
      "segments: begins and ends of each pair's queries, then of its keys. Writes out and, where given, the statistics.",
      py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(), py::arg("segments").noconvert(),
      py::arg("scale"), py::arg("out").noconvert(), py::arg("maxima").noconvert(), py::arg("inverse_sums").noconvert(),
      py::arg("num_threads"));
  m.def(
      "attention_backward",
      [](const HeadsArray<Value>& q, const HeadsArray<Value>& k, const HeadsArray<Value>& v,
         const std::vector<Array<int32_t>>& segments, float scale, const HeadsArray<Value>& dout, Array<float> maxima,
         Array<float> inverse_sums, MaybeHeads<Value> dq, MaybeHeads<Value> dk, MaybeHeads<Value> dv, int num_threads) {
        const fastrank::AttentionBackward<Value> arguments{attention_shape(q, segments, scale, num_threads),
                                                    heads_in(q),
                                                    heads_in(k),
                                                    heads_in(v),
                                                    heads_in(dout),
                                                    {maxima.mutable_data(), inverse_sums.mutable_data()},
                                                    heads_out(dq),
                                                    heads_out(dk),
                                                    heads_out(dv)};
        const auto kernel = kernels().attention_backward;
        py::gil_scoped_release released;
        kernel(arguments);
      },
      "Writes those of dq, dk, dv that are given.", py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
      py::arg("segments").noconvert(), py::arg("scale"), py::arg("dout").noconvert(), py::arg("maxima").noconvert(),
      py::arg("inverse_sums").noconvert(), py::arg("dq").noconvert(), py::arg("dk").noconvert(), py::arg("dv").noconvert(),
      py::arg("num_threads"));
  m.def(
      "gelu_forward",
      [](const Array<Value>& x, const Array<float>& bias, bool tanh_form, Array<Value> out, int num_threads) {
        const fastrank::GeluForward<Value> arguments{x.data(),   bias.data(), out.mutable_data(), x.shape(0),
                                              x.shape(1), tanh_form,   num_threads};
        const auto kernel = kernels().gelu_forward;
        py::gil_scoped_release released;
        kernel(arguments);
      },
      "Writes out = GELU(x + bias).", py::arg("x").noconvert(), py::arg("bias").noconvert(), py::arg("tanh_form"),
      py::arg("out").noconvert(), py::arg("num_threads"));
  m.def(
      "gelu_backward",
      [](const Array<Value>& x, const Array<float>& bias, bool tanh_form, const Array<Value>& dout, Array<Value> dx,
         MaybeFloats dbias, int num_threads) {
        const fastrank::GeluBackward<Value> arguments{x.data(),     bias.data(), dout.data(), dx.mutable_data(),
                                               write(dbias), x.shape(0),  x.shape(1),  tanh_form,
                                               num_threads};
        const auto kernel = kernels().gelu_backward;
        py::gil_scoped_release released;
        kernel(arguments);
      },
      "Writes dx and, where given, dbias.", py::arg("x").noconvert(), py::arg("bias").noconvert(), py::arg("tanh_form"),
      py::arg("dout").noconvert(), py::arg("dx").noconvert(), py::arg("dbias").noconvert(), py::arg("num_threads"));
  m.def(
      "embedding_norm_forward",
      [](const std::vector<Array<int64_t>>& ids, const std::vector<Array<float>>& tables, const Array<float>& weight,
         const Array<float>& bias, float eps, Array<Value> out, int num_threads) {
        if (ids.size() != 3 || tables.size() != 3) throw std::invalid_argument("expected the ids and tables of three vectors");
        fastrank::EmbeddingNormForward<Value> arguments{out.shape(0), out.shape(1), {}, {}, weight.data(), bias.data(), eps,
                                                 out.mutable_data(), num_threads};
        for (int table = 0; table < 3; ++table) {
          arguments.ids[table] = ids[table].data(), arguments.tables[table] = tables[table].data();
          const int64_t rows = tables[table].shape(0);
          for (int64_t i = 0; i < arguments.rows; ++i)
            if (const int64_t id = arguments.ids[table][i]; id < 0 || id >= rows)
              throw py::index_error("id " + std::to_string(id) + " is outside of a table of " + std::to_string(rows) +
                                    " vectors");
        }
        const auto kernel = kernels().embedding_norm_forward;
        py::gil_scoped_release released;
        kernel(arguments);
      },
      "Writes out; ids of words, types and positions, and their tables. Raises IndexError for an id that has no vector.",
      py::arg("ids"), py::arg("tables"), py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("eps"),
      py::arg("out").noconvert(), py::arg("num_threads"));
  m.def(
      "layer_norm_forward",
      [](const Array<Value>& x, const MaybeArray<Value>& residual, const Array<float>& weight, const Array<float>& bias,
         float eps, Array<Value> out, MaybeFloats means, MaybeFloats inverse_deviations, int num_threads) {
        const fastrank::LayerNormForward<Value> arguments{x.shape(0),     x.shape(1),  x.data(), read(residual),
                                                   weight.data(),  bias.data(), eps,      out.mutable_data(),
                                                   write(means),   write(inverse_deviations), num_threads};
        const auto kernel = kernels().layer_norm_forward;
        py::gil_scoped_release released;
        kernel(arguments);
      },
      "Writes out and, where given, the statistics of each row.", py::arg("x").noconvert(), py::arg("residual").noconvert(),
      py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("eps"), py::arg("out").noconvert(),
      py::arg("means").noconvert(), py::arg("inverse_deviations").noconvert(), py::arg("num_threads"));
  m.def(
      "layer_norm_backward",
      [](const Array<Value>& dout, const Array<Value>& x, const MaybeArray<Value>& residual, const Array<float>& weight,
         const Array<float>& means, const Array<float>& inverse_deviations, Array<Value> dx, MaybeFloats dweight,
         MaybeFloats dbias, int num_threads) {
        const fastrank::LayerNormBackward<Value> arguments{x.shape(0),    x.shape(1),   dout.data(),
                                                    x.data(),      read(residual), weight.data(),
                                                    means.data(),  inverse_deviations.data(), dx.mutable_data(),
                                                    write(dweight), write(dbias), num_threads};
        const auto kernel = kernels().layer_norm_backward;
        py::gil_scoped_release released;
        kernel(arguments);
      },
      "Writes dx and, where given (both or neither), dweight and dbias.", py::arg("dout").noconvert(),
      py::arg("x").noconvert(), py::arg("residual").noconvert(), py::arg("weight").noconvert(), py::arg("means").noconvert(),
      py::arg("inverse_deviations").noconvert(), py::arg("dx").noconvert(), py::arg("dweight").noconvert(),
      py::arg("dbias").noconvert(), py::arg("num_threads"));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of fastrank; use them through fastrank.ops.";
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use: plain, avx2, avx512 or amx.");
  m.def("multiplies_bf16", [] { return kernels().multiplies_bf16; },
        "Whether the instruction set in use has an instruction for products of bf16.");
  m.def("multiplies_in_tiles", [] { return kernels().multiplies_in_tiles; },
        "Whether the instruction set in use multiplies bf16 in matrix units.");
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (const auto* table : supported()) names.emplace_back(table->isa);
        return names;
      },
      "Every instruction set that this build and this processor offer, the fastest first.");

  define_hidden_states<float>(m);
  define_hidden_states<fastrank::Bf16>(m);

  m.def(
      "linear_layout",
      [](const std::string& precision) {
        const auto layout = kernels().linear_layout(precision_named(precision));
        return std::make_tuple(layout.panel_columns, layout.group, layout.block);
      },
      "How weights are packed: columns of a panel, and neighbours along the depth in a group and in a block.", py::arg("precision"));
  m.def(
      "linear_forward",
      [](const Array<float>& x, const PackedWeights& first, const std::string& activation,
         const std::optional<PackedWeights>& second, const MaybeFloats& residual, const MaybeFloats& norm_weight,
         const MaybeFloats& norm_bias, float eps, Array<float> out, int64_t groups, int num_threads) {
        const fastrank::Kernels& table = kernels();
        const fastrank::LinearWeights first_weights = linear_weights(first, table);
        fastrank::LinearWeights second_weights{};
        if (second) second_weights = linear_weights(*second, table);
        const fastrank::LinearForward arguments{x.data(),
                                                x.shape(0),
                                                first_weights,
                                                activation_named(activation),
                                                second ? &second_weights : nullptr,
                                                read(residual),
                                                read(norm_weight),
                                                read(norm_bias),
                                                eps,
                                                out.mutable_data(),
                                                groups,
                                                num_threads};
        py::gil_scoped_release released;
        table.linear_forward(arguments);
      },
      "Writes out = LayerNorm(activation(x first) second + residual), of which only the first product must be there.",
      py::arg("x").noconvert(), py::arg("first"), py::arg("activation"), py::arg("second"), py::arg("residual").noconvert(),
      py::arg("norm_weight").noconvert(), py::arg("norm_bias").noconvert(), py::arg("eps"), py::arg("out").noconvert(),
      py::arg("groups"), py::arg("num_threads"));

  m.def("encodes_layers", [] { return kernels().encoder_forward != nullptr; },
        "Whether the instruction set in use has encoder_forward, for heads of 32, 64, 96 or 128 columns.");
  m.def(
      "encoder_forward",
      [](Array<float> x, const Array<int32_t>& offsets, int64_t num_heads, float scale, const std::vector<PackedLayer>& layers,
         const std::string& activation, const PackedWeights& query, const PackedWeights& key_value, Array<float> attended,
         int num_threads) {
        const fastrank::Kernels& table = kernels();
        if (table.encoder_forward == nullptr) throw std::invalid_argument("this instruction set computes no layers in one call");
        require(x.ndim() == 2 && offsets.ndim() == 1 && offsets.size() > 0, "expected x (tokens, hidden) and offsets (pairs + 1,)");
        const int64_t hidden = x.shape(1), pairs = offsets.size() - 1;
        require(num_heads > 0 && hidden % num_heads == 0, "expected heads of equal size");
        require(hidden / num_heads % 32 == 0 && hidden / num_heads >= 32 && hidden / num_heads <= 128,
                "expected heads of 32, 64, 96 or 128 columns");
        require(attended.ndim() == 2 && attended.shape(0) == pairs && attended.shape(1) == hidden, "expected attended (pairs, hidden)");
        const auto weights = [&](const PackedWeights& packed) {
          const auto one = linear_weights(packed, table);
          require(one.precision != fastrank::Precision::INT8 && std::get<0>(packed) == std::get<0>(query),
                  "expected weights that are all float32 or all bf16");
          return one;
        };
        const auto norm = [](const PackedNorm& packed) {
          return fastrank::LayerNormWeights{std::get<0>(packed).data(), std::get<1>(packed).data(), std::get<2>(packed)};
        };
        std::vector<fastrank::EncoderLayer> all;
        const auto require_shape = [&](const fastrank::LinearWeights& one, int64_t columns, int64_t depth) {
          require(one.columns == columns && one.depth == depth, "expected weights that fit the hidden size and each other");
        };
        for (const auto& [qkv, output, attention_norm, up, down, last_norm] : layers) {
          all.push_back({weights(qkv), weights(output), norm(attention_norm), weights(up), weights(down), norm(last_norm)});
          const fastrank::EncoderLayer& layer = all.back();
          require_shape(layer.qkv, 3 * hidden, hidden);
          require_shape(layer.attention_output, hidden, hidden);
          require_shape(layer.up, layer.up.columns, hidden);
          require_shape(layer.down, hidden, layer.up.columns);
          for (const PackedNorm* one : {&attention_norm, &last_norm})
            require(std::get<0>(*one).size() == hidden && std::get<1>(*one).size() == hidden, "expected norms of the hidden size");
        }
        require_shape(weights(query), hidden, hidden);
        require_shape(weights(key_value), 2 * hidden, hidden);
        const fastrank::EncoderForward arguments{x.mutable_data(),
                                                 offsets.data(),
                                                 pairs,
                                                 num_heads,
                                                 hidden / num_heads,
                                                 scale,
                                                 all.data(),
                                                 int64_t(all.size()),
                                                 activation_named(activation),
                                                 weights(query),
                                                 weights(key_value),
                                                 attended.mutable_data(),
                                                 num_threads};
        py::gil_scoped_release released;
        table.encoder_forward(arguments);
      },
      "Takes x through layers of float32 or of bf16 weights, and writes the attention of each pair's first token in a last one.",
      py::arg("x").noconvert(), py::arg("offsets").noconvert(), py::arg("num_heads"), py::arg("scale"), py::arg("layers"),
      py::arg("activation"), py::arg("query"), py::arg("key_value"), py::arg("attended").noconvert(), py::arg("num_threads"));

  define_listwise(m, "ranknet", &fastrank::Kernels::ranknet);
  define_listwise(m, "weighted_ranknet", &fastrank::Kernels::weighted_ranknet);
  define_listwise(m, "teacher_order", &fastrank::Kernels::teacher_order);
  define_listwise(m, "lambda", &fastrank::Kernels::lambda_loss);
  define_listwise(m, "margin_mse", &fastrank::Kernels::margin_mse);
  define_listwise(m, "hinge", &fastrank::Kernels::hinge);
  define_listwise(m, "lce", &fastrank::Kernels::lce);
  define_listwise(m, "contrastive_imitation", &fastrank::Kernels::contrastive_imitation);
  define_listwise(m, "listnet", &fastrank::Kernels::listnet);
  define_listwise(m, "kl", &fastrank::Kernels::kl);
  define_listwise(m, "listmle", &fastrank::Kernels::listmle);
  define_listwise(m, "p_listmle", &fastrank::Kernels::p_listmle);
  define_listwise(m, "adr_mse", &fastrank::Kernels::adr_mse);
  define_listwise(m, "approx_ndcg", &fastrank::Kernels::approx_ndcg);
  define_listwise(m, "approx_mrr", &fastrank::Kernels::approx_mrr);
  define_listwise(m, "bce", &fastrank::Kernels::bce);
  define_listwise(m, "mse", &fastrank::Kernels::mse);
  define_listwise(m, "pearson", &fastrank::Kernels::pearson);
  define_wordpiece(m);
  define_pairs(m);
}
