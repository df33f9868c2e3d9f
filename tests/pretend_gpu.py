"""A GPU that is not there, so that tests on a CPU find what would fail on one.

On a GPU both tensors of an operation have to be on the same device. A CPU never shows the mistake,
since everything is on it. Inside `pretend_gpu` torch finds a GPU, and what is made or moved there
is a PretendTensor: its values are on the CPU, its `device` says cuda:0. An operation that mixes it
with a tensor of the CPU raises DeviceMismatch. What torch allows is allowed here as well: a number
without dimensions from the CPU, a CPU index into a GPU tensor, and copies.

It says nothing about a GPU's kernels, their rounding, memory or speed. What runs in a backward pass
is not checked, since the engine hands it plain tensors.
"""

import contextlib
from collections import Counter

import peft  # noqa: F401  first, or bitsandbytes would look for a real GPU
import pytest
import torch
import torch.utils.checkpoint
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

# What makes the host wait for the GPU. (A boolean index is a nonzero; it is counted apart.)
SYNCS = {
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "bincount",
    "cpu",
    "equal",
    "item",
    "masked_select",
    "nonzero",
    "tolist",
    "unique",
}
MAY_MIX = {"__set__", "copy_", "cpu", "cuda", "to"}  # copies; __set__ is `tensor.data = other`


class DeviceMismatch(RuntimeError):
    """An operation on tensors of two devices."""


class PretendTensor(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = GPU
    is_cuda = True
    is_cpu = False


class PretendGenerator(torch.Generator):
    """A CPU generator that says it is on the device it was made for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.device_type = torch.device(device).type


def is_on_gpu(x):
    return isinstance(x, PretendTensor)


def is_device(x):
    return isinstance(x, torch.device) or isinstance(x, str) and x[:4] in ("cpu", "cuda")


def moved_to_gpu(result):
    """A result whose tensors, wherever they are in it, are PretendTensors."""

    def moved(x):
        is_plain = isinstance(x, torch.Tensor) and not is_on_gpu(x)
        return x.as_subclass(PretendTensor) if is_plain else x

    return tree_map(moved, result)


def device_of_call(name, args, kwargs):
    """The device that a call names by keyword, or as an argument of `to`; None: it names none."""
    if name in ("cpu", "cuda"):
        return torch.device(name)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if name == "to":
        for argument in args[1:]:
            if isinstance(argument, torch.Tensor):
                return argument.device
            if is_device(argument):
                return torch.device(argument)
    return None


class PretendGpu(TorchFunctionMode):
    """Every call of torch goes through `__torch_function__`, which checks and labels.

    `syncs` counts, by name, how often the host has waited for the GPU.
    """

    def __init__(self, is_strict=True):
        super().__init__()
        self.is_strict = is_strict
        self.syncs = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name == "__get__":  # an attribute, whose own name its descriptor has
            name = func.__self__.__name__
        tensors = [x for x in tree_leaves([args, kwargs]) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if is_on_gpu(x)]
        if func is torch.Tensor.backward:
            with PretendGpu(is_strict=False):
                return torch.autograd.backward(args[0], kwargs.get("gradient"))
        if on_gpu and name in ("device", "is_cuda", "is_cpu"):
            return getattr(PretendTensor, name)
        if on_gpu and name in SYNCS:
            self.syncs[name] += 1
        if name in ("__getitem__", "__setitem__"):
            self.check_index(name, *args)
        elif self.is_strict and name not in MAY_MIX:
            check_devices(name, tensors)

        device = device_of_call(name, args, kwargs)
        if device is not None:
            generator = kwargs.get("generator")
            if generator is not None and generator.device_type != device.type:
                raise DeviceMismatch(f"{name}: the generator is on the {generator.device_type}")
            if "device" in kwargs:
                kwargs["device"] = CPU
            args = tree_map(lambda x: CPU if is_device(x) else x, args)
        if func is torch.mm and "out_dtype" in kwargs:  # which only a GPU has
            out_dtype = kwargs.pop("out_dtype")
            args = [x.to(out_dtype) for x in args]
        if func is torch.histc:  # of whole numbers likewise
            args = [args[0].float(), *args[1:]]

        result = func(*args, **kwargs)
        if device is None:
            return moved_to_gpu(result) if on_gpu else result
        if device.type == "cuda":
            # A copy of pageable memory waits for all that the GPU has to do.
            if tensors and not on_gpu and name in ("to", "cuda"):
                self.syncs["copy to the GPU"] += 1
            return moved_to_gpu(result)
        return result.as_subclass(torch.Tensor) if is_on_gpu(result) else result

    def check_index(self, name, tensor, index, value=None):
        indices = [x for x in tree_leaves(index) if isinstance(x, torch.Tensor)]
        if not is_on_gpu(tensor) and any(map(is_on_gpu, indices)):
            raise DeviceMismatch(f"{name}: a CPU tensor is indexed by a GPU tensor")
        if is_on_gpu(tensor) and any(is_on_gpu(x) and x.dtype == torch.bool for x in indices):
            self.syncs["boolean index"] += 1
        if isinstance(value, torch.Tensor) and indices:  # without an index tensor it is a copy
            check_devices(name, [tensor, value])


def check_devices(name, tensors):
    """Raises DeviceMismatch if GPU tensors meet CPU tensors that have a dimension."""
    on_cpu = [tuple(x.shape) for x in tensors if not is_on_gpu(x) and x.dim() > 0]
    if on_cpu and any(map(is_on_gpu, tensors)):
        raise DeviceMismatch(f"{name}: {on_cpu} are shapes of CPU tensors, others are on the GPU")


# ---- what torch would do outside Python ----------------------------------------------------------

MODULE_TO = nn.Module.to
FROM_PRETRAINED = transformers.PreTrainedModel.from_pretrained.__func__
SAVE = torch.save


def move(module):
    """Moves a module's weights and buffers to the pretended GPU, in place. Returns it."""
    moved = {}  # by id, so that tied weights stay tied
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None:
                if id(p) not in moved:
                    moved[id(p)] = nn.Parameter(p.data.to(GPU), p.requires_grad)
                child._parameters[name] = moved[id(p)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(GPU)
    return module


def module_to(module, *args, **kwargs):
    """nn.Module.to"""
    device = device_of_call("to", (module, *args), kwargs)
    if device is None or device.type == "cpu":
        return MODULE_TO(module, *args, **kwargs)
    kwargs.pop("device", None)
    others = [x for x in args if not is_device(x)]
    if others or kwargs:
        MODULE_TO(module, *others, **kwargs)
    return move(module)


def from_pretrained(cls, *args, device_map, **kwargs):
    """PreTrainedModel.from_pretrained"""
    with _pop_mode_temporarily():
        model, info = FROM_PRETRAINED(cls, *args, device_map={"": "cpu"}, **kwargs)
    if torch.device(device_map[""]).type == "cuda":
        model = move(model)
    return model, info


def save(state, file):
    """torch.save, which would write the tensors' class too."""
    SAVE(tree_map(lambda x: x.cpu() if is_on_gpu(x) else x, state), file)


class CpuAutocast(torch.autocast):
    """torch.autocast, of the device where the values are."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@contextlib.contextmanager
def pretend_gpu():
    """Inside it torch finds a GPU of 80 GiB. Yields the PretendGpu, which counts syncs."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "pretended",
        "is_bf16_supported": True,
        "max_memory_allocated": 0,
        "mem_get_info": (80 * 2**30, 80 * 2**30),  # free, in all
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }
    # What is recomputed is compared with what was saved, which the engine has made plain tensors.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    with pytest.MonkeyPatch.context() as patch, PretendGpu() as mode:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        patch.setattr(torch, "Generator", PretendGenerator)
        patch.setattr(torch, "autocast", CpuAutocast)
        patch.setattr(torch, "save", save)
        patch.setattr(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(nn.Module, "to", module_to)
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        patch.setitem(checks, "default", lambda x: (x.shape, x.dtype))
        yield mode
