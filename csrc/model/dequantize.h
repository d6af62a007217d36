// Turns stored elements into float32. Quantized formats are GGUF's: blocks of 32 elements.
#pragma once

#include <cstdint>
#include <string>

#include "backend/backend.h"

namespace fastserve {

// Throws for a name that is not one of f32, f16, bf16, q8_0, q8_1, q4_0, q4_1.
SourceType parse_source_type(const std::string& name);

// Bytes of 32 elements of a quantized type.
int64_t block_bytes(SourceType type);

// Bytes of `count` elements; throws when a quantized type cannot hold that many (blocks are of 32).
int64_t source_bytes(SourceType type, int64_t count);

// output[i] for i < count. `source` needs no alignment.
void dequantize(SourceType type, const void* source, int64_t count, float* output);

}  // namespace fastserve
