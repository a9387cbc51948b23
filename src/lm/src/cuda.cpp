// Operations of libtorch that tch does not pass on. Tensors are pointers as tch has them; a new one is the caller's, and so
// is the text that says what went wrong. Null means that nothing did.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_fused_rms_norm_backward.h>

#include <cstring>
#include <exception>
#include <mutex>
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

// While it lives, operations add up in the same order each time, as far as they know how. That is libtorch's switch for the
// whole process; what it had been is put back. One waits for another, so that none puts back what the other set.
class InOneOrder {
 public:
  InOneOrder() {
    context_.setDeterministicAlgorithms(true, /*warn_only=*/false);
    context_.setDeterministicFillUninitializedMemory(false);
  }
  ~InOneOrder() {
    context_.setDeterministicAlgorithms(was_set_, only_warned_);
    context_.setDeterministicFillUninitializedMemory(filled_);
  }

 private:
  static inline std::mutex only_one_;
  const std::lock_guard<std::mutex> lock_{only_one_};
  at::Context &context_ = at::globalContext();
  const bool was_set_ = context_.deterministicAlgorithms();
  const bool only_warned_ = context_.deterministicAlgorithmsWarnOnly();
  const bool filled_ = context_.deterministicFillUninitializedMemory();
};

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

// One query of each sequence to the first `lengths` of its keys, which begin at `starts`; there is room for `capacity`.
char *doppel_cached_attention(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v, const at::Tensor *queries,
                              const at::Tensor *starts, const at::Tensor *lengths, int64_t capacity, at::Tensor **found) {
  return guarded([=] {
    auto result = at::_flash_attention_forward(*q, *k, *v, *queries, *starts, /*max_q=*/1, /*max_k=*/capacity,
                                               /*dropout_p=*/0.0, /*is_causal=*/false, /*return_debug_mask=*/false,
                                               /*scale=*/std::nullopt, /*window_size_left=*/std::nullopt,
                                               /*window_size_right=*/std::nullopt, /*seqused_k=*/*lengths);
    found[0] = new at::Tensor(std::get<0>(result));
  });
}

// `found`: gradients of q, k and v. By default libtorch adds up those of q as threads come.
char *doppel_causal_attention_backward(const at::Tensor *gradient, const at::Tensor *q, const at::Tensor *k,
                                       const at::Tensor *v, const at::Tensor *output, const at::Tensor *normaliser,
                                       const at::Tensor *offsets, int64_t longest, const at::Tensor *one,
                                       const at::Tensor *other, at::Tensor **found) {
  return guarded([=] {
    InOneOrder in_one_order;
    auto result = at::_flash_attention_backward(*gradient, *q, *k, *v, *output, *normaliser, *offsets, *offsets, longest,
                                                longest, /*dropout_p=*/0.0, /*is_causal=*/true, *one, *other);
    found[0] = new at::Tensor(std::get<0>(result));
    found[1] = new at::Tensor(std::get<1>(result));
    found[2] = new at::Tensor(std::get<2>(result));
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
