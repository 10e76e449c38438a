"""A meter of the bytes that tensors take while a computation runs, and fake tensors for it to run on."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

Phases = dict[str, tuple[int, int]]
"""Per phase of a computation its peak in bytes: without gradients of parameters, and with those made so far."""


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it until they die; views count once.

    Gradients of parameters are counted separately and dropped at once (`book`): how long they stay, and how much of
    them a device keeps, is up to the training strategy.

    Attributes:
        live: bytes alive now, without gradients of parameters.
        gradients: bytes of the gradients counted so far.
        peaks: per phase (see `phase`) the largest `live`, and the largest `live + gradients`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.live = 0
        self.gradients = 0
        self.peaks: Phases = {}
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
        """Counts and drops the gradient that a parameter has just received."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self.gradients += size
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
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


def to_fake(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> None:
    """Replaces, in place, the tensors of a module on the meta device by fake ones on a fake CPU; ties stay.

    Args:
        dtype: of the parameters; None keeps theirs.
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


class CudaTypes(TorchFunctionMode):
    """Computes in float32 what autocast computes in float32 on CUDA but not on the CPU (torch.amp's op reference).

    The one that matters is `pow`: it makes the GELU of Phi-2 keep float32 tensors of the width of its MLP.
    """

    FLOAT32 = frozenset({"pow", "__pow__", "rsqrt", "layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FLOAT32:
            args, kwargs = tree_map(_float, (args, kwargs))
        return func(*args, **kwargs)

    def within(self, module: nn.Module) -> None:
        """Is on whenever the module's forward pass runs, also when a backward pass runs it again."""
        module.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        module.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
