// An instance of row8_tiles.cuh, in a file of its own so that they compile side by side.
#include "row8_tiles.cuh"

namespace eetq {

template qm_status MultiplyTiles<Code::kE4M3>(qm_call*, const DeviceProduct&, qm_dtype);

}  // namespace eetq
