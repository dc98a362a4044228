"""Change a Flax NNX model as a whole or not at all."""

import contextlib
from collections.abc import Callable, Iterator

from flax import nnx


@contextlib.contextmanager
def on_error(model: nnx.Module) -> Iterator[None]:
    """An exception in this context leaves the model as it was before."""
    restore = _memory(model)
    try:
        yield
    except BaseException:
        restore()
        raise


@contextlib.contextmanager
def always(model: nnx.Module) -> Iterator[None]:
    """The model is as it was before when this context ends, such as after a trial."""
    restore = _memory(model)
    try:
        yield
    finally:
        restore()


def _memory(model: nnx.Module) -> Callable[[], None]:
    """A function that gives the modules their classes and attributes, and the variables their
    values, as they are now."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    modules = [(node, type(node), dict(vars(node))) for node in nodes
               if isinstance(node, nnx.Pytree)]  # fmt: skip
    values = [(node, node.get_raw_value()) for node in nodes if isinstance(node, nnx.Variable)]

    def restore():
        for module, cls, attributes in modules:
            object.__setattr__(module, "__class__", cls)
            vars(module).clear()
            vars(module).update(attributes)
        for variable, value in values:
            variable.set_raw_value(value)

    return restore
