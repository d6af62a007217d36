#include "bindings/plan.h"

#include <cstring>
#include <utility>
#include <vector>

#include "bindings/arrays.h"

namespace py = pybind11;

namespace fastserve {

namespace {

// Walks a flat array whose pieces belong to consecutive slots.
template <class T>
class Pieces {
 public:
  Pieces(const py::handle& plan, const char* name) : name_(name), array_(array_attribute<T>(plan, name)) {}
  std::vector<T> take(int64_t count) {
    FS_CHECK(count >= 0 && next_ + count <= array_.shape(0), "plan.", name_, " is too short");
    const T* data = array_.data() + next_;
    next_ += count;
    return {data, data + count};
  }

 private:
  const char* name_;
  Array<T> array_;
  int64_t next_ = 0;
};

std::vector<OpenedSlot> read_opened(const py::handle& plan) {
  const auto opened = array_attribute<int32_t>(plan, "opened", 8);
  const auto params = array_attribute<float>(plan, "opened_params", 6);
  const auto seeds = array_attribute<uint64_t>(plan, "opened_seeds");
  FS_CHECK(params.shape(0) == opened.shape(0) && seeds.shape(0) == opened.shape(0),
           "plan.opened, opened_params and opened_seeds differ in length");
  Pieces<int32_t> history(plan, "history"), bias_tokens(plan, "bias_tokens"), stop_tokens(plan, "stop_tokens");
  Pieces<float> bias_values(plan, "bias_values");
  std::vector<OpenedSlot> result(opened.shape(0));
  for (size_t i = 0; i < result.size(); ++i) {
    const int32_t* columns = opened.data(i, 0);
    const float* floats = params.data(i, 0);
    OpenedSlot& slot = result[i];
    slot.slot = columns[0];
    slot.prompt_length = columns[1];
    slot.history = history.take(columns[2]);
    slot.params = {.temperature = floats[0],
                   .top_k = columns[3],
                   .top_p = floats[1],
                   .min_p = floats[2],
                   .repetition_penalty = floats[3],
                   .presence_penalty = floats[4],
                   .frequency_penalty = floats[5],
                   .logprobs = columns[4],
                   .min_tokens = columns[5],
                   .seed = seeds.at(i),
                   .bias = {},
                   .stop_tokens = stop_tokens.take(columns[7])};
    const auto tokens = bias_tokens.take(columns[6]);
    const auto values = bias_values.take(columns[6]);
    for (size_t j = 0; j < tokens.size(); ++j) slot.params.bias.emplace_back(tokens[j], values[j]);
  }
  return result;
}

// [values.size() / columns, columns], or one dimension for 0 columns.
template <class T>
py::array array_of(std::vector<T> values, py::ssize_t columns = 0) {
  const auto count = static_cast<py::ssize_t>(values.size());
  if (columns == 0) return to_array(std::move(values), {count});
  return to_array(std::move(values), {count / columns, columns});
}

// Rows of int32 members.
template <class Row>
py::array table_of(const std::vector<Row>& rows) {
  constexpr size_t kColumns = sizeof(Row) / sizeof(int32_t);
  std::vector<int32_t> values(rows.size() * kColumns);
  if (!rows.empty()) std::memcpy(values.data(), rows.data(), rows.size() * sizeof(Row));
  return array_of(std::move(values), kColumns);
}

template <class T>
void append(std::vector<T>& all, const std::vector<T>& some) {
  all.insert(all.end(), some.begin(), some.end());
}

}  // namespace

BatchPlan read_plan(const py::handle& plan, bool return_logits) {
  BatchPlan result;
  result.plan_id = plan.attr("plan_id").cast<int64_t>();
  result.return_logits = return_logits;
  const auto rows = array_attribute<int32_t>(plan, "rows", 4);
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    result.rows.push_back({rows.at(i, 0), rows.at(i, 1), rows.at(i, 2), rows.at(i, 3)});
  }
  const auto tokens = array_attribute<int32_t>(plan, "tokens");
  result.tokens.assign(tokens.data(), tokens.data() + tokens.size());
  const auto closed = array_attribute<int32_t>(plan, "closed");
  result.closed.assign(closed.data(), closed.data() + closed.size());
  result.opened = read_opened(plan);
  const auto table = array_attribute<int32_t>(plan, "table", 3);
  for (py::ssize_t i = 0; i < table.shape(0); ++i) {
    result.table.push_back({table.at(i, 0), table.at(i, 1), table.at(i, 2)});
  }
  const auto copies = array_attribute<int32_t>(plan, "copies", 4);
  for (py::ssize_t i = 0; i < copies.shape(0); ++i) {
    result.copies.push_back({copies.at(i, 0), copies.at(i, 1), copies.at(i, 2), copies.at(i, 3)});
  }
  return result;
}

py::object write_plan(const BatchPlan& plan) {
  std::vector<int32_t> opened, history, bias_tokens, stop_tokens;
  std::vector<float> floats, bias_values;
  std::vector<uint64_t> seeds;
  for (const OpenedSlot& slot : plan.opened) {
    const SamplingParams& p = slot.params;
    append(opened, {slot.slot, slot.prompt_length, static_cast<int32_t>(slot.history.size()), p.top_k, p.logprobs,
                    p.min_tokens, static_cast<int32_t>(p.bias.size()), static_cast<int32_t>(p.stop_tokens.size())});
    append(floats, {p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty});
    seeds.push_back(p.seed);
    append(history, slot.history);
    append(stop_tokens, p.stop_tokens);
    for (const auto& [token, value] : p.bias) {
      bias_tokens.push_back(token);
      bias_values.push_back(value);
    }
  }
  using namespace py::literals;
  return py::module_::import("fastserve.types")
      .attr("BatchPlan")(
          "plan_id"_a = plan.plan_id, "rows"_a = table_of(plan.rows), "tokens"_a = array_of(plan.tokens),
          "opened"_a = array_of(std::move(opened), 8), "opened_params"_a = array_of(std::move(floats), 6),
          "opened_seeds"_a = array_of(std::move(seeds)), "history"_a = array_of(std::move(history)),
          "bias_tokens"_a = array_of(std::move(bias_tokens)), "bias_values"_a = array_of(std::move(bias_values)),
          "stop_tokens"_a = array_of(std::move(stop_tokens)), "closed"_a = array_of(plan.closed),
          "table"_a = table_of(plan.table), "copies"_a = table_of(plan.copies));
}

}  // namespace fastserve
