#include "backend/cuda/device_batch.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace fastserve::cuda {

namespace {

constexpr int64_t kFilledUp = 512;  // larger batches are taken as they are

bool one_token_a_row(const Batch& batch) {
  const auto tokens = static_cast<int64_t>(batch.token_ids.size());
  return tokens > 0 && tokens <= kFilledUp && batch.logit_tokens.size() == batch.token_ids.size() &&
         batch.rows.size() == batch.token_ids.size();
}

}  // namespace

int64_t filled_up_rows(int64_t rows) {
  if (rows > kFilledUp) return rows;
  if (rows <= 8) return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
  return round_up(rows, rows <= 64 ? 8 : rows <= 256 ? 16 : 32);
}

void BatchUploader::reserve(int64_t rows, int64_t positions, cudaStream_t stream) {
  constexpr int64_t kRowWords = 12, kPadding = 64;  // what lay_out() places of a row besides its table, and aligns
  const int64_t words = static_cast<int64_t>(words_.size()) + kPadding +
                        filled_up_rows(rows) * (kRowWords + ceil_div(positions, block_size_));
  uploads_.reserve(words * sizeof(int32_t), stream);
}

DeviceBatch BatchUploader::lay_out(int64_t tokens, const Batch& batch, cudaStream_t stream) {
  words_.clear();
  const auto place = [&](auto count) {
    const size_t at = words_.size();
    words_.resize(round_up(static_cast<int64_t>(at + count), 4));  // 16-byte aligned
    return at;
  };
  const auto given = static_cast<int64_t>(batch.token_ids.size());
  const auto num_rows = static_cast<int64_t>(batch.rows.size()) + (tokens - given);
  const int64_t logits = replayable_ ? tokens : static_cast<int64_t>(batch.logit_tokens.size());

  DeviceBatch result{};
  result.num_tokens = tokens;
  result.num_rows = num_rows;
  result.num_logits = logits;
  const size_t ids = place(tokens), positions = place(tokens), token_rows = place(tokens), rows = place(4 * num_rows),
               decode_rows = place(num_rows), first_segments = place(num_rows), logit_tokens = place(logits);
  std::ranges::copy(batch.token_ids, words_.begin() + ids);
  std::ranges::copy(batch.positions, words_.begin() + positions);
  std::fill_n(words_.begin() + token_rows, tokens, -1);
  std::ranges::copy(batch.logit_tokens, words_.begin() + logit_tokens);

  std::vector<PrefillTile> tiles;
  std::vector<int32_t> tables;
  for (size_t r = 0; r < batch.rows.size(); ++r) {
    const Row& row = batch.rows[r];
    const auto index = static_cast<int32_t>(r);
    const BatchRow held{static_cast<int32_t>(row.first), static_cast<int32_t>(row.tokens),
                        static_cast<int32_t>(row.start), static_cast<int32_t>(tables.size())};
    std::memcpy(&words_[rows + 4 * r], &held, sizeof held);
    std::fill_n(words_.begin() + token_rows + row.first, row.tokens, index);
    tables.insert(tables.end(), row.table, row.table + ceil_div(row.start + row.tokens, block_size_));
    if (row.tokens == 1) {
      words_[first_segments + result.num_decodes] = static_cast<int32_t>(result.num_segments);
      words_[decode_rows + result.num_decodes++] = index;
      const int64_t segments = ceil_div(row.start + 1, kSegment);
      if (segments > 1) result.num_segments += segments;
      result.max_context = std::max(result.max_context, row.start + 1);
      continue;
    }
    for (int64_t first = 0; first < row.tokens; first += kPrefillTile) {
      tiles.push_back({index, static_cast<int32_t>(row.first + first)});
    }
  }
  if (replayable_) {  // rows of no tokens, which lie there as zeros
    for (int64_t r = given; r < tokens; ++r) {
      words_[decode_rows + result.num_decodes++] = static_cast<int32_t>(r);
      words_[logit_tokens + r] = static_cast<int32_t>(r);
    }
    result.max_context =
        static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(result.max_context, kSegment))));
  }
  result.num_tiles = static_cast<int64_t>(tiles.size());
  const size_t tile_words = place(2 * tiles.size()), table_words = place(tables.size());  // of any length, so last
  if (!tiles.empty()) std::memcpy(&words_[tile_words], tiles.data(), tiles.size() * sizeof(PrefillTile));
  std::ranges::copy(tables, words_.begin() + table_words);

  const auto* base = reinterpret_cast<const int32_t*>(uploads_.reserve(words_.size() * sizeof(int32_t), stream));
  result.token_ids = base + ids;
  result.positions = base + positions;
  result.token_rows = base + token_rows;
  result.rows = reinterpret_cast<const BatchRow*>(base + rows);
  result.decode_rows = base + decode_rows;
  result.first_segments = base + first_segments;
  result.logit_tokens = base + logit_tokens;
  result.tiles = reinterpret_cast<const PrefillTile*>(base + tile_words);
  result.tables = base + table_words;
  return result;
}

DeviceBatch BatchUploader::upload(const Batch& batch, cudaStream_t stream) {
  const auto given = static_cast<int64_t>(batch.token_ids.size());
  replayable_ = one_token_a_row(batch);
  const DeviceBatch result = lay_out(replayable_ ? filled_up_rows(given) : given, batch, stream);
  uploads_.upload(std::as_bytes(std::span(words_)), stream);
  return result;
}

}  // namespace fastserve::cuda
