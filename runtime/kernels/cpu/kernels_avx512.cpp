// The loops for AVX-512 F, BW, VL and DQ (x86-64-v4).
#define KERNELS_ISA avx512
#define KERNELS_AVX512
#include "kernels_impl.h"

namespace coldstream {
extern const KernelTable avx512_kernels;
const KernelTable avx512_kernels = {
    "avx512", avx512::ffn, avx512::sketch_scores, avx512::plane_scores, avx512::linear, avx512::paged_attention,
    avx512::read_through, avx512::read_records};
}  // namespace coldstream
