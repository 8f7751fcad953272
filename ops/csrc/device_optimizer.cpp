// The AdamW update of buffers that are not in host memory, by libtorch's fused kernel, which tch does
// not bind. Host memory has a pass of its own: optimizer.cpp.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>

#include "guarded.h"

extern "C" {

// One update, number `step` counted from 1. All tensors are fp32, on one device.
int phx_fused_adamw(const at::Tensor *param, const at::Tensor *grad, const at::Tensor *exp_avg,
                    const at::Tensor *exp_avg_sq, double step, double lr, double beta1, double beta2,
                    double decay, double eps) {
  return guarded([&] {
    const at::Tensor steps = at::full({}, step, param->options().dtype(at::kFloat));
    at::_fused_adamw_({*param}, {*grad}, {*exp_avg}, {*exp_avg_sq}, /*max_exp_avg_sqs=*/{}, {steps},
                      lr, beta1, beta2, decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}
}
