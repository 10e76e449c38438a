"""Memory and arithmetic of a computation that never runs: the real modules on fake tensors, every storage counted.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes and lifetimes but no data, so that a step of a 7B model is
walked through in a second on a laptop. What autograd keeps, what a kernel's backward pass needs and when each tensor
dies is then measured on the very code that will run, for any architecture, rather than written down per architecture.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from prism_deco.plan.counter import FORMULAS


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it, views counted once, until they die; and the arithmetic.

    Gradients of parameters are booked apart and dropped at once (`book`): how long they stay, and how large a share
    of them a device keeps, is the training strategy's business.

    Attributes:
        live: bytes alive now, without gradients of parameters.
        gradients: bytes of the gradients booked so far.
        flops: floating-point operations of all matrix products and convolutions.
        peaks: per phase (see `phase`), the largest `live`, and the largest `live + gradients`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.live = 0
        self.gradients = 0
        self.flops = 0
        self.peaks: dict[str, tuple[int, int]] = {}
        self._phase = "start"
        # The storages of the weights were there before; views of them must not count.
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.book)

    def phase(self, name: str) -> None:
        """Starts a phase of the computation; a name that comes again continues its phase."""
        self._phase = name
        self._note()

    def book(self, parameter: Tensor) -> None:
        """Takes the gradient that a parameter has just got."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self.gradients += size
        self._note()

    def multiply(self, module: nn.Module, times: int) -> None:
        """Counts the operations of a module's forward pass that often."""
        begin: list[int] = []
        module.register_forward_pre_hook(lambda *_: begin.append(self.flops))

        def end(*_: Any) -> None:
            self.flops += (times - 1) * (self.flops - begin.pop())

        module.register_forward_hook(end)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self._note()
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(id(storage))
        if known is not None and known() is storage:
            return
        size = storage.nbytes()
        self.live += size

        def gone(_: Any) -> None:
            self.live -= size

        self._known[id(storage)] = weakref.ref(storage, gone)

    def _note(self) -> None:
        alone, both = self.peaks.get(self._phase, (0, 0))
        self.peaks[self._phase] = max(alone, self.live), max(both, self.live + self.gradients)


def to_fake(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces, in place, the tensors of a module on the meta device by fake ones on a fake CPU; ties stay.

    Args:
        dtype: type of the parameters; None keeps theirs.
    """
    made: dict[int, Tensor] = {}
    originals = []  # kept alive, so that no id is used twice
    with mode:
        for part in module.modules():
            for name, old in part._buffers.items():
                if old is not None:
                    part._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            for name, old in part._parameters.items():
                if old is not None:
                    originals.append(old)
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=dtype or old.dtype, device="cpu")
                        made[id(old)] = nn.Parameter(new, old.requires_grad)
                    part._parameters[name] = made[id(old)]  # type: ignore[assignment]
    return module


class CudaTypes(TorchFunctionMode):
    """The operations that autocast computes in float32 on CUDA but not on the CPU (torch.amp's op reference).

    The one that counts is `pow`: it makes the GELU of Phi-2 keep float32 tensors of the width of its MLP.
    """

    FLOAT32 = frozenset({"pow", "__pow__", "rsqrt", "layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FLOAT32:
            args, kwargs = tree_map(_float, (args, kwargs))
        return func(*args, **kwargs)

    def within(self, module: nn.Module) -> None:
        """Is on whenever the module's forward pass runs, as part of a backward pass too."""
        module.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        module.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
