// Operations of libtorch that tch does not pass on. Tensors are pointers as tch has them; a new one is the caller's, and so
// is the text that says what went wrong. Null means that nothing did.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_fused_rms_norm_backward.h>

#include <cstring>
#include <exception>
#include <tuple>

namespace {

template <typename Work>
char *guarded(Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception &error) {
    return strdup(error.what());
  }
}

}  // namespace

extern "C" {

// `found`: output, normaliser, and two that the backward pass asks for.
char *doppel_causal_attention(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v, const at::Tensor *offsets,
                              int64_t longest, at::Tensor **found) {
  return guarded([=] {
    auto result = at::_flash_attention_forward(*q, *k, *v, *offsets, *offsets, longest, longest, /*dropout_p=*/0.0,
                                               /*is_causal=*/true, /*return_debug_mask=*/false);
    found[0] = new at::Tensor(std::get<0>(result));
    found[1] = new at::Tensor(std::get<1>(result));
    found[2] = new at::Tensor(std::get<2>(result));
    found[3] = new at::Tensor(std::get<3>(result));
  });
}

char *doppel_rms_norm_backward(const at::Tensor *gradient, const at::Tensor *x, const at::Tensor *inverse,
                               const at::Tensor *weight, at::Tensor **found) {
  return guarded([=] {
    auto result = at::_fused_rms_norm_backward(*gradient, *x, x->sizes().slice(x->dim() - 1), *inverse, *weight,
                                               {true, false});
    found[0] = new at::Tensor(std::get<0>(result));
  });
}
}
