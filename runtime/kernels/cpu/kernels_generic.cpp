// The loops for any machine: four-float vectors that the compiler lowers to what the target has.
#define KERNELS_ISA generic
#define KERNELS_GENERIC
#include "kernels_impl.h"

namespace coldstream {
extern const KernelTable generic_kernels;
const KernelTable generic_kernels = {
    "generic", generic::ffn, generic::sketch_scores, generic::plane_scores, generic::linear, generic::paged_attention,
    generic::read_through, generic::read_records};
}  // namespace coldstream
