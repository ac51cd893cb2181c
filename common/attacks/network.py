"""Any network an attack is given: unwrapped, frozen, and afterwards as it was found."""

import contextlib

from torch import nn

from common.run import UserError


class Function(nn.Module):
    """A plain function from images to logits, as a module without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def unwrap(model):
    """The network inside DistributedDataParallel, DataParallel and torch.compile.

    An attack must not run the hooks of gradient exchange, nor recompile for eval mode. A plain
    function becomes a module.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.Module):
            return model
        elif callable(model):
            return Function(model)
        else:
            raise UserError(f"{type(model).__name__} is no model: give a module or a function")


def normal(tensor):
    """The tensor, or its copy where it was made in inference mode, which allows no gradient."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


@contextlib.contextmanager
def frozen(model, mode="eval"):
    """The unwrapped network in `mode`, without parameter gradients; then everything as before.

    In train mode BatchNorm normalises by the batch and writes its running statistics. It is given
    copies to write. Restoring the values in place would count as a modification and break a
    backward pass that is still to come.
    """
    net = unwrap(model)
    modes = [(module, module.training) for module in net.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    buffers = []
    try:
        net.train(mode == "train")
        for parameter, _ in flags:
            parameter.requires_grad_(requires_grad=False)
        if mode == "train":
            for module, _ in modes:
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        buffers.append((module, name, buffer))
                        module._buffers[name] = buffer.clone()
        yield net
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
