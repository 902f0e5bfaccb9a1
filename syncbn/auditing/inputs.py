"""Rules of the audit about the input that a layer receives for a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.auditing.dropout import MIN_DROPOUT
from syncbn.auditing.probe import LayerInput
from syncbn.auditing.ranks import is_frozen
from syncbn.auditing.rules import Finding, new_finding
from syncbn.auditing.statistics import are_initial
from syncbn.nn.batchnorm import SyncBatchNorm

# Divergence in nats above which train-eval-gap is reported. For a batch of n independent values it is about 1/n by
# chance alone; 0.5 is that of a mean that is off by one standard deviation, or of a variance that is 3.1 times too
# large, on the median channel. Measured on healthy runs: at most 0.14 after the first 20 steps (docs/audit.md).
GAP = 0.5
GAP_SAMPLES = 8  # samples the rule needs; with fewer, the divergence by chance would not be small against GAP
# |mean| / sqrt(var + eps) above which activation-range is reported, by dtype of the input. float32: F.batch_norm is off
# by 5e-4 to 1e-3 from here on (measured at mean/std of 1e4; `SyncBatchNorm` by less than 1e-6). Half types: rounding
# the input, with unit roundoff u, is an error of u times this ratio in standard deviations; the limit stands for 0.1
# standard deviations in float16 (u = 2^-11) and bfloat16 (u = 2^-8).
RANGE = {torch.float32: 1e4, torch.float16: 0.1 * 2**11, torch.bfloat16: 0.1 * 2**8}
HALF_OVERFLOW = torch.finfo(torch.float16).max / 2  # half of the largest float16: a factor of two below overflow


def of_input(name: str, layer: _BatchNorm, seen: LayerInput) -> Iterator[Finding]:
    """Findings from the inputs that the layer receives for a batch."""
    if seen.dropout >= MIN_DROPOUT and not is_frozen(layer):
        yield new_finding("dropout-before-bn", name)
    if not seen.is_finite:
        remedy = "look for the first layer with this finding, and at what feeds it"
        yield new_finding(
            "activation-range", name, severity="error", observed="values that are not finite", remedy=remedy
        )
        return
    mean, var = layer.running_mean, layer.running_var
    if mean is not None and var is not None and not is_frozen(layer) and seen.rows >= GAP_SAMPLES:
        gap = _divergence(seen, mean, var, layer.eps)
        # After n batches the initial 0 and 1 still have the weight (1 - momentum)^n. They are taken out: early in a
        # run, they alone are no finding.
        batches = 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
        left = (1 - (layer.momentum or 1.0)) ** batches
        if 0 < left < 1:
            settled = ((var - left) / (1 - left)).clamp(min=0)
            gap = min(gap, _divergence(seen, mean / (1 - left), settled, layer.eps))
        if gap > GAP and not are_initial(mean, var, layer.num_batches_tracked):
            yield new_finding("train-eval-gap", name, gap=gap)
    # A tenth of the channels has to exceed the limit: single dead ones (constant, almost no variance) are common.
    ratios = seen.mean.abs() / (seen.var + layer.eps).sqrt()
    ratio = float(ratios.kthvalue(math.ceil(0.9 * ratios.numel())).values)
    exact = isinstance(layer, SyncBatchNorm) and seen.dtype == torch.float32
    if not exact and ratio > RANGE.get(seen.dtype, float("inf")):
        lost = f"a mean of {ratio:.2g} standard deviations in {seen.dtype}: the digits that carry the signal are lost"
        remedy = "centre the input in front of it, or compute there in float32 with syncbn.SyncBatchNorm"
        yield new_finding("activation-range", name, observed=lost, remedy=remedy)
    elif seen.dtype == torch.float16 and seen.max_abs > HALF_OVERFLOW:
        near = f"values up to {seen.max_abs:.3g}, near the largest of float16"
        remedy = "use bfloat16 or float32, or normalize earlier"
        yield new_finding("activation-range", name, observed=near, remedy=remedy)


def _divergence(seen: LayerInput, mean: Tensor, var: Tensor, eps: float) -> float:
    """Kullback-Leibler divergence KL(batch || running statistics) in nats, the median over channels.

    Both are taken as normal distributions: ((m - mean)^2 / var + ratio - 1 - log(ratio)) / 2, with ratio = v / var, for
    mean m and variance v of the batch; eps is added to both variances.
    """
    mean, var = mean.detach().to(torch.float64), var.detach().to(torch.float64) + eps
    ratio = (seen.var + eps) / var
    return float((((seen.mean - mean) ** 2 / var + ratio - 1 - ratio.log()) / 2).median())
