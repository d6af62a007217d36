// The kernels of isa_amx.cc with emulated tile instructions: how they are tested on machines without AMX.
#define FS_AMX_EMULATED
#include "backend/cpu/isa_amx.cc"
