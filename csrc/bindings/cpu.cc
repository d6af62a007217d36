#include <pybind11/stl.h>

#include "backend/cpu/kernels.h"
#include "bindings/arrays.h"
#include "bindings/register.h"
#include "model/dequantize.h"

namespace fastserve {

void register_cpu(pybind11::module_& module) {
  module.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const cpu::KernelTable* table : cpu::supported_kernels()) names.emplace_back(table->name);
        return names;
      },
      "Names of the instruction sets this build and this machine have, best first; FASTSERVE_ISA forces one. The last "
      "may "
      "be amx_emulated, which is slow and for tests.");
#ifdef FS_X86
  module.def("emulated_amx_works", &cpu::emulated_amx_works,
             "For tests: what a machine with AMX is asked before it is trusted, asked of the emulation.");
#endif
  module.def(
      "dequantize",
      [](const std::string& type, const Array<uint8_t>& data, int64_t count) {
        const SourceType source = parse_source_type(type);
        FS_CHECK(count >= 0 && data.size() == source_bytes(source, count), "dequantize: ", data.size(),
                 " bytes do not hold ", count, " elements of ", type);
        std::vector<float> values(count);
        dequantize(source, data.data(), count, values.data());
        return to_array(std::move(values), {static_cast<pybind11::ssize_t>(count)});
      },
      pybind11::arg("dtype"), pybind11::arg("data"), pybind11::arg("count"), "Stored elements as float32.");
}

}  // namespace fastserve
