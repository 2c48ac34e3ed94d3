"""A GPU that is not there: tensors that say they are on another device, compute on the CPU, and keep a record of two kinds of mistake.

An operation on tensors of two devices raises `MixedDevices`, as on CUDA. What would make the host wait for the device (a value asked for,
a result whose size depends on values, a copy from memory that is not pinned) is counted, with the line of the package that asked.
`install()` registers the device for the rest of the process, so use it in a process of its own.
"""

import collections
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"
PACKAGE = str(Path(__file__).resolve().parent.parent / "e2e_sae_nb")
aten = torch.ops.aten
ASK = {  # operations whose answer decides sizes or goes to the host, and how often each waits
    "aten::_local_scalar_dense": 1, "aten::nonzero": 1, "aten::bincount": 2, "aten::equal": 1, "aten::masked_select": 1, "aten::_unique2": 1,
    "aten::unique_dim": 1, "aten::unique_consecutive": 1, "aten::repeat_interleave": 1, "aten::histc": 1, "aten::is_nonzero": 1,
}
INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class MixedDevices(RuntimeError):
    "Tensors of two devices met in one operation."


class Record:
    "What happened on the device."

    def __init__(self) -> None:
        self.waits: collections.Counter[str] = collections.Counter()  # "line: what" -> times
        self.operations = 0
        self.launches: collections.Counter[str] = collections.Counter()  # of the package's own kernels

    def wait(self, what: str, times: int = 1) -> None:
        self.waits[f"{_line()}: {what}"] += times


RECORD = Record()


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    "A fresh record for the block."
    global RECORD
    before, RECORD = RECORD, Record()
    try:
        yield RECORD
    finally:
        RECORD = before


def _line() -> str:
    "The innermost line of the package, or of the library that called torch."
    frames = traceback.extract_stack()
    own = [f for f in frames if f.filename.startswith(PACKAGE)]
    own = own or [f for f in frames if "site-packages" in f.filename and "/torch/" not in f.filename]
    return f"{Path(own[-1].filename).name} {own[-1].name} `{(own[-1].line or '').strip()[:100]}`" if own else "?"


def there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class Pretend(torch.Tensor):
    "A tensor on the pretend device; what it holds is `inner`."

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Pretend":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, layout=inner.layout,
            device=torch.device(NAME, 0), requires_grad=False)
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor):
        pass

    def tolist(self) -> Any:
        RECORD.wait("tolist")
        return self.inner.tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, **{"dtype": self.dtype} | kwargs).to(self.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretend({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Dispatch(TorchDispatchMode):
    "Sees what no tensor argument leads to the device: tensors made there."

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    "One operation: judged, then computed on what the tensors hold."
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on, off = [t for t in tensors if isinstance(t, Pretend)], [t for t in tensors if not isinstance(t, Pretend)]
    name, wanted = func._schema.name, kwargs.get("device")
    if on:
        RECORD.operations += 1
    _judge(name, args, kwargs, on, off, wanted)
    a, k = pytree.tree_map(lambda t: t.inner if isinstance(t, Pretend) else t, (args, kwargs))
    if there(wanted):
        k = {**k, "device": torch.device("cpu")} | ({"pin_memory": False} if "pin_memory" in k else {})
    out = func(*a, **k)
    if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], torch.Tensor):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if out is None or not (there(wanted) if wanted is not None else on):
        return out
    return pytree.tree_map(lambda t: Pretend(t) if isinstance(t, torch.Tensor) and not isinstance(t, Pretend) else t, out)


def _judge(name: str, args: Any, kwargs: dict[str, Any], on: list, off: list, wanted: Any) -> None:
    if name == "aten::_to_copy":
        if wanted is not None and bool(on) != there(wanted):
            RECORD.wait("copy to the host" if on else "copy to the device")
        return
    if name == "aten::copy_":
        if on and off and args[1].dim() > 0:
            RECORD.wait("copy to the device" if isinstance(args[0], Pretend) else "copy to the host")
        return
    if not on:
        return
    if name in INDEX:
        indices = [i for i in args[1] if i is not None]
        if not isinstance(args[0], Pretend):
            raise MixedDevices(f"{name} of a tensor on the CPU with indices on the device, in {_line()}")
        masks = sum(i.dtype in (torch.bool, torch.uint8) for i in indices)
        fills = name != "aten::index" and args[2].numel() == 1  # a mask and one value: no positions are needed
        if masks and not fills:
            RECORD.wait("a Boolean index", masks)
        if any(not isinstance(i, Pretend) and i.dim() > 0 for i in indices):
            RECORD.wait("an index from the host")
        off = [t for t in off if not any(t is i for i in indices)]
    elif name in ASK:
        RECORD.wait(name.removeprefix("aten::"), ASK[name])
    if mixed := [tuple(t.shape) for t in off if t.dim() > 0]:
        raise MixedDevices(f"{name} takes tensors on the device and on the CPU (of shapes {mixed}), in {_line()}")


def install() -> torch.device:
    "Register the device with torch, for the rest of the process."
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        def __getattr__(self, name: str) -> Any:
            if name in ("get_rng_state", "set_rng_state", "is_autocast_enabled"):
                return lambda *_, **__: None
            raise AttributeError(name)

    _setup_privateuseone_for_python_backend(NAME, Module())
    Dispatch().__enter__()
    return torch.device(NAME, 0)


def install_kernels() -> None:
    "Let the package take its way for CUDA: its kernels (here their twins on what the tensors hold, each one launch) and the screened encoder."
    import sys
    import types

    from e2e_sae_nb import kernels, sparse_step

    def launched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            RECORD.launches[function.__name__] += 1
            for t in args:
                if isinstance(t, torch.Tensor) and not isinstance(t, Pretend):
                    raise MixedDevices(f"{function.__name__} takes a tensor on the CPU, in {_line()}")
            out = function(*(t.inner if isinstance(t, Pretend) else t for t in args))
            return pytree.tree_map(lambda t: Pretend(t) if isinstance(t, torch.Tensor) else t, out)

        return call

    def pair_products(row: Any, token: Any, rows: Any, x: Any) -> Any:
        return kernels.pair_products(row, token, torch.searchsorted(row, torch.arange(len(rows) + 1)), rows, x)

    def segment_sums(values: Any, starts: Any) -> Any:
        return kernels.segment_sums(values, torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff()), starts)

    def kl_rows(z: Any, dz: Any, scale: Any, softcap: Any, factor: Any, width: Any) -> Any:
        total, slope = kernels.kl_rows(z, dz, scale, softcap, factor, None, width)
        return total.float(), slope

    stub = types.ModuleType("e2e_sae_nb.triton_kernels")
    for function in (kl_rows, pair_products, kernels.bag_sums, segment_sums):
        setattr(stub, function.__name__, launched(function))
    sys.modules[stub.__name__] = stub
    kernels.use_triton = lambda x: isinstance(x, Pretend)
    sparse_step.can_screen = lambda x: isinstance(x, Pretend) and x.dtype == torch.float32
