"""Blocks whose modules or weights are changed for a while, and put back; hooks that are put on for a while, and taken off."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle

from ptq.network.network import Block, Network, replace_module


@contextmanager
def put_back(network: Network, block: Block) -> Iterator[None]:
    """On leaving, the block's modules are those that they were, and its parameters hold what they held.

    Inside the context parameters are copies: what writes into them in place does not reach the originals. One block's
    weights more are in memory for that time.
    """
    modules = modules_of(block)
    originals = [(p, p.data) for p in block.module.parameters()]
    hooks = {module: (dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in modules.values()}
    own = {m: (dict(m._modules), dict(m._parameters), dict(m._buffers)) for m in modules.values()}
    for parameter, data in originals:
        parameter.data = data.clone()
    try:
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data
        for module, held in own.items():
            # Parameters that were replaced, and not written into, come back too.
            for there, then in zip((module._modules, module._parameters, module._buffers), held, strict=True):
                there.clear()  # type: ignore[attr-defined]
                there.update(then)  # type: ignore[attr-defined]
        for module, (before, after) in hooks.items():
            for now, then in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
                now.clear()
                now.update(then)
        restore(network.model, modules)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside the context hooks are on, and on leaving they are taken off, whatever happens.

    Args:
        handles: of the hooks; a generator that puts them on one by one, so that those before a failure are taken off too.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def modules_of(block: Block) -> dict[str, nn.Module]:
    """Returns the block's modules by full name, parents before children."""
    return dict(block.module.named_modules(prefix=block.name))


def restore(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts every module of `modules` (by full name, parents before children) back in its place where another took it."""
    for name, module in modules.items():
        if model.get_submodule(name) is not module:
            replace_module(model, name, module)
