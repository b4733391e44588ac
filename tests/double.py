"""A device double: tensors on the CPU that claim to be on cuda:0, for machines without a GPU.

Inside `with on_cuda():` the scripts find a GPU. What they put there is a Claimed tensor. It holds
a CPU tensor and computes with it, and raises a DeviceError wherever CUDA would refuse: mixed with
a CPU tensor, drawn from a generator of the other device, or turned into a NumPy array.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN.fill_.Tensor, ATEN.masked_fill.Tensor, ATEN.masked_fill_.Tensor}
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default}  # for the GPU: not in a graph
INDEXING = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default,
            ATEN._index_put_impl_.default}  # a CUDA tensor takes indices on the CPU, too


class DeviceError(RuntimeError):
    """CUDA would have refused."""


recording = []  # the graphs that are being recorded: one or none


def mapped(function, x):
    """As tree_map, for what an operator takes and gives, in a fraction of the time."""
    if type(x) in (tuple, list):
        return type(x)([mapped(function, part) for part in x])
    return {k: mapped(function, v) for k, v in x.items()} if type(x) is dict else function(x)


def tensors(*xs) -> list[torch.Tensor]:
    found = []
    for x in xs:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif type(x) in (tuple, list, dict):
            found += tensors(*(x.values() if type(x) is dict else x))
    return found


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Claimed(torch.Tensor):
    """A tensor that computes with `inner`, on the CPU, and claims to be on cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        assert type(inner) in (torch.Tensor, torch.nn.Parameter)
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu")
        self.inner = inner.detach()
        return self

    def __deepcopy__(self, memo):
        copy = Claimed(self.inner.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol):  # torch.save: as a tensor of this device
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, claimed = kwargs or {}, {}
        check_devices(func, args, kwargs)

        def unwrap(x):
            if isinstance(x, Claimed):
                claimed[id(x.inner)] = x
                return x.inner
            return x

        def wrap(x):
            if isinstance(x, torch.Tensor):
                return claimed[id(x)] if id(x) in claimed else Claimed(x)
            return x

        return mapped(wrap, computed(func, mapped(unwrap, args), mapped(unwrap, kwargs)))


def computed(func, args, kwargs):
    """func(*args, **kwargs); while a graph is recorded, it keeps what was done."""
    result = func(*args, **kwargs)
    for graph in recording:
        graph.log.append((func, args, kwargs, result))
    return result


def grouped(lists, with_indices=False):
    """As _group_tensors_by_device_and_dtype, which finds the true device of a tensor."""
    groups = {}
    for i, (first, *rest) in enumerate(zip(*lists, strict=True)):
        columns, indices = groups.setdefault(
            (first.device, first.dtype), ([[] for _ in lists], []))
        for column, x in zip(columns, (first, *rest)):
            column.append(x)
        indices.append(i)
    return groups


class Graph:
    """As torch.cuda.CUDAGraph: replays the same kernels on the same memory, whatever Python would
    do by now. On the GPU a recording computes nothing; here it does, so the first replay need not.
    """

    def __init__(self):
        self.log, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.log if self.replays > 1 else ():
            for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def record(graph: Graph):
    recording.append(graph)
    try:
        yield
    finally:
        recording.pop()


def check_devices(func, args, kwargs) -> None:
    on_cpu = [x for x in tensors(args, kwargs) if not isinstance(x, Claimed)]
    if func is ATEN._fused_adamw_.tensor_lr:  # torch.optim copies the rate to where it believes
        on_cpu = [x for x in on_cpu if x.dim() > 0]  # the weights to be: here, the CPU
    masked = func in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
    if recording and (func in WAITS or masked or on_cpu):
        raise DeviceError(f"{func} while a CUDA graph is recorded: it needs the CPU")
    if torch.Tag.pointwise in func.tags or func in COPIES:  # they take a number from the CPU
        on_cpu = [x for x in on_cpu if x.dim() > 0]
    if not on_cpu or func is ATEN.copy_.default:
        return
    if func in INDEXING and isinstance(args[0], Claimed):
        values = [x for x in args[2:3] if isinstance(x, torch.Tensor)]
        indices = [x for x in args[1] if x is not None]
        if all(isinstance(x, Claimed) or x.dim() == 0 for x in values) and all(
                x.dtype in (torch.long, torch.bool) for x in indices):
            return
    raise DeviceError(f"{func}: tensors on cuda:0 and on the CPU, {list(on_cpu[0].shape)}")


class Generator(torch.Generator):
    """Of the CPU, but it knows for which device it was made."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.claims = is_cuda(device)
        return self

    device = property(lambda self: CUDA if self.claims else torch.device("cpu"))


class FindCuda(TorchFunctionMode):
    """What is asked for on CUDA becomes a Claimed tensor, with numbers of a CUDA generator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        me = args[0] if args and isinstance(args[0], torch.Tensor) else None
        mine = isinstance(me, Claimed)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and mine:
            raise DeviceError("a tensor on cuda:0 cannot become an array: copy it to the CPU first")
        if func in (torch.Tensor.tolist, torch.Tensor.__format__, torch.Tensor.__repr__) and mine:
            return func(me.inner, *args[1:], **kwargs)
        if func is torch.Tensor.cpu:
            return me.inner.clone() if mine else me
        if func is torch.Tensor.to:
            if recording and not mine:
                raise DeviceError("a copy from the CPU while a CUDA graph is recorded")
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None:
                kwargs = {"dtype": dtype or me.dtype}
                if memory_format is not None:
                    kwargs["memory_format"] = memory_format
                if is_cuda(device):
                    return func(me, **kwargs) if mine else Claimed(func(me, **kwargs))
                return func(me.inner if mine else me, **kwargs)
        there = is_cuda(kwargs["device"]) if kwargs.get("device") is not None else mine
        generator = kwargs.get("generator")
        if generator is not None and there != generator.claims:
            raise DeviceError(f"{func.__name__} with a generator on {generator.device}")
        if is_cuda(kwargs.get("device")):
            return mapped(Claimed, computed(func, args, kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def on_cuda(capability=(9, 0)):
    """A machine with a GPU of that compute capability, as far as the scripts can tell."""
    load, autocast = torch.load, torch.autocast

    def load_there(*args, map_location=None, **more):
        there = is_cuda(map_location)
        state = load(*args, map_location="cpu" if there else map_location, **more)
        claim = lambda x: Claimed(x) if there and isinstance(x, torch.Tensor) else x
        return tree_map(claim, state)

    def cast_here(device, *args, **more):  # where the double computes
        return autocast("cpu" if is_cuda(device) else device, *args, **more)

    stand_ins = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.get_device_name": lambda *device: "a device double",
        "torch.cuda.get_device_capability": lambda *device: capability,
        "torch.cuda.synchronize": lambda *device: None,
        "torch.cuda.CUDAGraph": Graph, "torch.cuda.graph": record,
        "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype": grouped,
        "torch.load": load_there, "torch.Generator": Generator, "torch.autocast": cast_here,
    }
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            for name, stand_in in stand_ins.items():
                stack.enter_context(mock.patch(name, stand_in))
            for name in ("_cuda_graph_capture_health_check",  # of torch 2.11, and of 2.14
                         "_accelerator_graph_capture_health_check"):
                stack.enter_context(mock.patch.object(
                    torch.optim.Optimizer, name, lambda self: None, create=True))
            yield stack.enter_context(FindCuda())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
