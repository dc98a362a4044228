"""A layer with a low-rank adapter: y = layer(x) + scaling · (x A) B, in a Flax NNX model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from lora_jax import errors
from lora_jax.kernels import explicit
from lora_jax.layers import linear_map, mixin, projections, registry, stack, weight
from lora_jax.lora import algebra
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import dropout, sites
from lora_jax.lora.nnx.model_state import LoRAParam
from lora_jax.quant import linear as quant_linear


class LoRALayer(mixin.Mixin):
    """y = layer(x) + scaling · (dropout(x) A) B: a second class that an adapted layer gets.

    The layer keeps its own class, and its attributes and parameters stay where they are.
    lora_A [K, R] and lora_B [R, N] (of an embedding lora_embedding_A and _B) have leading axes
    [L, …] in a stacked module; see linear_map.py for K and N. They are float32; the products take
    x's dtype and accumulate in float32. lora_ranks holds the rank of each layer, 0 for none. A, B
    and their gradients are zero beyond it. With a lora_magnitude_vector [N] this is DoRA, see
    algebra.py. With lora_bias [N], y has scaling · lora_bias added.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.

    Where the weight itself is read, by the model or by a class with a `__call__` of its own, it is
    W + scaling · A B, as after a merge.
    """

    # Only some adapters have these.
    lora_mask = lora_magnitude_vector = lora_square = lora_bias = None
    lora_dropout_key = lora_dropout_stream = None
    lora_initial_A = lora_initial_B = None
    lora_index = None
    lora_members = 0  # see `per_member`
    lora_axis = 0  # of the stack in each parameter
    lora_num_axes = 0  # of a stack or of experts, in A and B

    @classmethod
    def mixin_attributes(cls, original: type[nnx.Module]) -> dict[str, Any]:
        known = registry.registration_of(original)
        name = known.reads or known.weight
        return {name: weight.attribute(name, changed_weight)}

    def __call__(self, *args: Any, **kwargs: Any) -> Num[Array, "..."]:
        if not registry.is_usual(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)  # which reads the changed weight
        with weight.as_stored(self):
            y = super().__call__(*args, **kwargs)
        return self._adapted(registry.input_of(self, args, kwargs), y)

    def with_product(self, x: Float[Array, "..."], product: Float[Array, "..."]) -> jax.Array:
        """The same output, from x · W that was computed already."""
        return self._adapted(x, projections.with_bias(self, product))

    def _adapted(self, x, y):
        dropped, bias = None, registry.bias_of(self)
        if not isinstance(registry.linear_map_of(self), linear_map.Embedding):
            x = x.astype(jnp.promote_types(x.dtype, y.dtype))  # as the layer itself did
        if self.lora_dropout and not self.deterministic:
            dropped = lora_site.dropped(self._dropout_key(), self.lora_dropout, x)
        how, packed = registry.linear_map_of(self), quant_linear.packed_of(self)
        shape = sites.weight_shape(self)

        def output(x, y, dropped, own):
            factors, of_b = own
            y = algebra.output(
                how,
                shape,
                x,
                y,
                factors,
                dropped=x if dropped is None else dropped,
                weight=packed.multiplier if packed else registry.weight_of(self)[...],
                square=_own(self, self.lora_square),
                bias=bias,
            )
            return y if of_b is None else algebra.with_bias(how, shape, y, of_b, factors[2])

        own = arrays(self), bias_of_b(self)
        return per_member(output, self.lora_members, (x, y, dropped), own)

    def set_view(self, deterministic: bool | None = None) -> None:
        """For nnx.view(model, deterministic=…), which turns dropout off or on."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _dropout_key(self) -> jax.Array:
        key, stream = _own(self, self.lora_dropout_key), self.lora_dropout_stream
        if stream is None or stream.key[...].ndim:  # a scan that leaves random states whole
            return key
        return dropout.reseed_by(key, jax.random.bits(stream()))


class LoRAEmbedding(LoRALayer):
    """An adapted embedding. Where it is also the output, it computes with the same weight there."""

    def attend(self, query: Float[Array, "*B N"], *args: Any, **kwargs: Any) -> jax.Array:
        """query · (W + scaling · A B)ᵀ, as after a merge."""
        if not registry.is_usual(self):
            return super().attend(query, *args, **kwargs)  # which reads the changed weight
        plain, table = super().attend, registry.weight_of(self)[...]

        def output(query, factors):
            def attend(query):
                with weight.as_stored(self):
                    return plain(query, *args, **kwargs)

            return algebra.attended(attend, table, query, factors)

        return per_member(output, self.lora_members, (query,), arrays(self))


def changed_weight(layer: LoRALayer) -> weight.Computed:
    """W + scaling · A B (with DoRA, as algebra.merged) of an adapted layer, in W's shape and dtype.

    Raises: UserError when it is read, if dropout of the layer's input, a bias or the adapters of a
    sweep would have to be part of it.
    """
    packed = quant_linear.packed_of(layer)
    stored = registry.weight_of(layer) if packed is None else quant_linear.dense_weight(layer)

    def compute():
        check_readable(layer, mixin.original(layer).__name__)
        how, tensor = registry.linear_map_of(layer), stored[...]
        axis = layer.lora_axis if tensor.ndim > how.ndim else 0
        merged = merged_tensor(how, jnp.moveaxis(tensor, axis, 0), arrays(layer))
        return jnp.moveaxis(merged, 0, axis)

    return weight.Computed(stored.shape, stored.dtype, compute)


def merged_tensor(
    how: linear_map.LinearMap, tensor: jax.Array, own: Sequence[jax.Array]
) -> jax.Array:
    """W + scaling · A B (with DoRA, as algebra.merged) of a weight as it is stored.

    own: as of `arrays`.
    """

    def compute(tensor, *own):
        return how.tensor(algebra.merged(how.matrix(tensor), *own), tensor.shape)

    return explicit.like(tensor, compute, tensor, *own)


def check_readable(layer: LoRALayer, name: str) -> None:
    """Raises: UserError if W + scaling · A B is not all that the layer's adapter does."""
    problems = []
    if layer.lora_dropout and not layer.deterministic:
        problems.append(f"dropout {layer.lora_dropout} of its input")
    if layer.lora_bias is not None:
        problems.append("a bias of B (lora_bias)")
    if layer.lora_members:
        problems.append(f"{layer.lora_members} adapters at once")
    if problems:
        raise errors.UserError(
            expected="adapted layers that are only called, for dropout, lora_bias and sweeps",
            found=f"a {name} whose weight is read, with {' and '.join(problems)}",
            do="set dropout to 0, leave out lora_bias and train one adapter, or leave the layer "
            "out of the targets",
        )


def is_adapted(module: nnx.Module) -> bool:
    """Whether the module has an adapter."""
    return isinstance(module, LoRALayer) and "lora_ranks" in vars(module)


def per_member(function: Callable, num_members: int, rows: Sequence[Any], own: Any) -> Any:
    """function(*rows, own), for the rows of each member of a sweep with its own arrays.

    Several adapters are trained on one base: a batch has S · B rows, those of the first adapter
    first. The base's layers take all rows at once. Only the adapters, whose arrays have an axis
    [S, …], are computed one by one.
    num_members: S; 0 for a single adapter, whose arrays lack that axis.
    """
    if not num_members:
        return function(*rows, own)

    def split(array):
        return array.reshape(num_members, -1, *array.shape[1:])

    found = jax.vmap(function)(*jax.tree.map(split, tuple(rows)), own)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)


def names_of_factors(layer: nnx.Module) -> tuple[str, str]:
    """The attributes that hold A and B."""
    if isinstance(layer, nnx.Embed):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A", "lora_B"


def factors(layer: LoRALayer) -> tuple[LoRAParam, LoRAParam]:
    """A and B."""
    A, B = (getattr(layer, name) for name in names_of_factors(layer))
    return A, B


def arrays(layer: LoRALayer) -> tuple[jax.Array | np.ndarray, ...]:
    """A, B (zero where it is masked), the scaling, and with DoRA the magnitude.

    The axis of stacked layers is the first.
    """
    A, B, magnitude = (_stack_first(layer, part)
                       for part in (*factors(layer), layer.lora_magnitude_vector))  # fmt: skip
    if layer.lora_mask is not None:
        B = B * _own(layer, layer.lora_mask)
    return (A, B, _own(layer, layer.lora_scaling), *([] if magnitude is None else [magnitude]))


def bias_of_b(layer: LoRALayer) -> jax.Array | np.ndarray | None:
    """The bias of B, zero at outputs that are not adapted; None without one. Axes: as `arrays`."""
    bias = _stack_first(layer, layer.lora_bias)
    if bias is None or layer.lora_mask is None:
        return bias
    return bias * _own(layer, layer.lora_mask).max(axis=-2)


def _stack_first(layer: LoRALayer, part: LoRAParam | None) -> jax.Array | np.ndarray | None:
    """The parameter with the axis of stacked layers first."""
    if part is None:
        return None
    is_whole = factors(layer)[0].ndim == 2 + layer.lora_num_axes + bool(layer.lora_members)
    axis = layer.lora_axis if is_whole else 0
    return jnp.moveaxis(part[...], axis, 0) if axis else part[...]


def _own(layer: LoRALayer, constant: nnx.Variable | None) -> jax.Array | None:
    """The value of a constant for this layer: a scan may slice the parameters alone."""
    if constant is None:
        return None
    if layer.lora_scaling[...].ndim == factors(layer)[0].ndim:
        return constant[...]
    index = stack.current(layer.lora_index, layer.lora_axis)
    return constant[...][0 if index is None else index]  # without an index all layers are alike
