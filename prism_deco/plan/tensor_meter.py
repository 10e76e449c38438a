"""Measures the bytes of tensors during a computation, and replaces a module's weights by fake tensors."""

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
"""Peak bytes per phase of a computation: without gradients of parameters, and with those computed so far."""


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside it while they live; views count once.

    Gradients of parameters are counted separately and freed at once (`book`): their lifetime and sharding depend on the
    training strategy.

    Attributes:
        live: bytes alive now, without gradients of parameters.
        gradients: bytes of all gradients of parameters so far.
        peaks: per phase (see `phase`) the largest `live`, and the largest `live + gradients`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.live = 0
        self.gradients = 0
        self.peaks: Phases = {}
        self._phase = "start"
        # Weights are not counted, nor are views of them.
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            # All views of a storage return the same Python object while it lives, so its id identifies it.
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.book)

    def phase(self, name: str) -> None:
        """Starts a phase of the computation, or continues the phase of that name."""
        self._phase = name
        self._note()

    def book(self, parameter: Tensor) -> None:
        """Counts and frees the gradient that a parameter has just received."""
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
        # The weak reference tells whether the id still belongs to the storage that was counted.
        known = self._known.get(id(storage))
        if known is not None and known() is storage:
            return
        size = storage.nbytes()
        self.live += size

        # Called when the storage is freed.
        def gone(_: Any) -> None:
            self.live -= size

        self._known[id(storage)] = weakref.ref(storage, gone)

    def _note(self) -> None:
        alone, both = self.peaks.get(self._phase, (0, 0))
        self.peaks[self._phase] = max(alone, self.live), max(both, self.live + self.gradients)


def to_fake(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> None:
    """Replaces the tensors of a module on the meta device by fake CPU tensors, in place; tied weights stay tied.

    Args:
        dtype: of the parameters; None keeps theirs.
    """
    made: dict[int, Tensor] = {}
    originals = []  # keeps the parameters alive, since a freed one's id could be reused
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
    """Runs in float32 what autocast runs in float32 on CUDA but not on the CPU (torch.amp's op reference).

    The one that matters is `pow`: it makes Phi-2's GELU save float32 tensors of the MLP's width.
    """

    FLOAT32 = frozenset({"pow", "__pow__", "rsqrt", "layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FLOAT32:
            args, kwargs = tree_map(_float, (args, kwargs))
        return func(*args, **kwargs)

    def within(self, module: nn.Module) -> None:
        """Activates the mode in the module's forward pass, also when checkpointing repeats it in the backward pass."""
        # `and None`: what a pre-hook returns would replace the inputs.
        module.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        module.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
