// The loops for AVX2, FMA and F16C (x86-64-v3).
#define KERNELS_ISA avx2
#define KERNELS_AVX2
#include "kernels_impl.h"

namespace coldstream {
extern const KernelTable avx2_kernels;
const KernelTable avx2_kernels = {
    "avx2", avx2::ffn, avx2::sketch_scores, avx2::plane_scores, avx2::linear, avx2::paged_attention,
    avx2::read_through, avx2::read_records};
}  // namespace coldstream
