// The CPU handlers of XLA's foreign function interface for `linear`, `convolution` and `mlp`.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cpu_handlers.h"
#include "linear_cpu.h"
#include "linear_ffi.h"

namespace linear::cpu {
namespace {

using namespace ::cpu;

constexpr double kFew = 2e6;  // multiply-adds that are not worth dividing: some 20 us

// Cuts sets of calls into tiles, and computes them, with a bias of `zeros` if there are any.
ffi::Future start(ffi::ThreadPool& pool, const Call& call, int64_t sets,
                  std::shared_ptr<const std::vector<float>> zeros) {
  const double cost = double(sets) * double(call.rows) * double(call.inputs) * double(call.outputs);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const double wanted = std::min(cost / kFew, 4. * double(threads)) / double(std::max<int64_t>(sets, 1));
  const Tiles tiles = tiles_of(call, static_cast<int64_t>(wanted), threads);
  const int64_t each = tiles.down * tiles.across;
  return run(pool, sets * each, [call, tiles, each, zeros = std::move(zeros)](int64_t i) {
    const int64_t tile = i % each;
    Call set = of_set(call, i / each);
    if (zeros) set.bias = zeros->data();
    forward(set, tiles, tile / tiles.across, tile % tiles.across);
  });
}

template <Form form>
ffi::Future forward_call(ffi::ThreadPool pool, Operand x, Operand kernel, Operand bias, Result y,
                         int64_t version) {
  Call call = {};
  int64_t sets;
  ffi::Error error = describe(name_of(form), x, kernel, bias, *y, version, form, &call, &sets);
  if (error.failure()) return failed(error);
  prefer_large_pages(y);
  return start(pool, call, sets, nullptr);
}

template <Form form>
ffi::Future backward_call(ffi::ThreadPool pool, Operand x, Operand dy, Result dkernel, int64_t version) {
  Call call = {};
  int64_t sets;
  ffi::Error error = describe_backward(x, dy, dkernel, version, form, &call, &sets);
  if (error.failure()) return failed(error);
  prefer_large_pages(dkernel);
  if (call.inputs == 0) {
    std::memset(call.y, 0, dkernel->size_bytes());
    sets = 0;
  }
  return start(pool, call, sets, std::make_shared<std::vector<float>>(call.outputs));
}

ffi::Future mlp_call(ffi::ThreadPool pool, Operand x, Operand kernel1, Operand bias1, Operand kernel2,
                     Operand bias2, Result y, int64_t version) {
  Call first = {}, second = {};
  int64_t sets;
  ffi::Error error = describe_mlp(x, kernel1, bias1, kernel2, bias2, y, version, &first, &second, &sets);
  if (error.failure()) return failed(error);
  prefer_large_pages(y);
  const double cost = double(first.rows) * double(first.outputs) * double(first.inputs + second.outputs);
  const double wanted = double(std::max<int64_t>(pool.num_threads(), 1)) / double(std::max<int64_t>(sets, 1));
  const int64_t threads = std::max<int64_t>(static_cast<int64_t>(std::min(wanted, cost / kFew)), 1);
  const int64_t tiles = mlp_tiles(first, second, threads);
  return run(pool, sets * tiles, [first, second, tiles](int64_t i) {
    mlp(of_set(first, i / tiles), of_set(second, i / tiles), tiles, i % tiles);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_linear_forward, forward_call<Form::kProduct>, bind_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_linear_gelu_forward, forward_call<Form::kGelu>,
                              bind_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_convolution_forward, forward_call<Form::kConvolution>,
                              bind_forward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_linear_backward, backward_call<Form::kProduct>,
                              bind_backward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_convolution_backward, backward_call<Form::kConvolution>,
                              bind_backward(bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(internimage_mlp_forward, mlp_call, bind_mlp(bind()));

}  // namespace linear::cpu
