"""BatchNorm over the images of all ranks, so that N processes compute what one would.

torch's SyncBatchNorm works on GPUs only; on CPUs the statistics are all-reduced here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ssl_pretrain.errors import UsageError


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with mean and variance over every rank's (B, C, ...) input."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two up."""

    def forward(self, x_BC: Tensor) -> Tensor:
        """In two passes, mean first: the square of a mean would lose digits."""
        if not self.training:
            return super().forward(x_BC)
        over = [d for d in range(x_BC.ndim) if d != 1]
        shape = [1, -1, *[1] * (x_BC.ndim - 2)]
        kind = x_BC.dtype
        x_BC = x_BC if kind == torch.float64 else x_BC.float()
        count = x_BC.numel() // x_BC.shape[1] * dist.get_world_size()
        mean = all_reduce(x_BC.sum(over)) / count
        centred = x_BC - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / (count - 1), share)
        y_BC: Tensor = centred * (variance + self.eps).rsqrt().view(shape)
        return (y_BC if self.weight is None else y_BC * self.weight.view(shape) + self.bias.view(shape)).to(kind)


def synchronised(module: nn.Module, device: torch.device) -> None:
    """Replaces each BatchNorm inside the module by one that sees all ranks."""
    if device.type != "cpu":
        convert_sync_batchnorm(module)  # works in place but for a module that is a BatchNorm itself
        return
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, _cpu(child))
        else:
            synchronised(child, device)


def _cpu(norm: nn.modules.batchnorm._BatchNorm) -> CpuSyncBatchNorm:
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        raise UsageError(f"{type(norm).__name__} cannot be shared between CPU processes: use one process or GPUs")
    shared = CpuSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    # The very same tensors: a teacher's are not trained, and an optimizer may already hold a student's.
    for name, parameter in norm.named_parameters():
        shared.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers():
        shared.register_buffer(name, buffer)
    return shared
