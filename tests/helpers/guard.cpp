// A device guard for CUDA that does nothing: CPU builds of torch have none, and refuse to slice a tensor without it.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at::detail {
using NoGuard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, NoGuard);
}  // namespace at::detail
