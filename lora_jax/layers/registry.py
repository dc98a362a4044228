"""The classes of Flax NNX layers that multiply by a weight: which weight, and how."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax import errors
from lora_jax.layers import linear_map, mixin, programs, stack


class Registration(NamedTuple):
    """Of a layer class: the attribute that holds the weight, and how a layer multiplies by it.

    bias: the attribute that holds the bias. reads: the attribute by which others read the weight.
    is_usual: (layer, *arguments of a call) → whether the call multiplies as linear_map_of says.
    shape_of: layer → the shape of the weight of a single layer, None if it is not known. cls: the
    class that was registered.
    """

    weight: str
    linear_map_of: Callable[[Any], linear_map.LinearMap]
    bias: str = "bias"
    reads: str = ""
    is_usual: Callable[..., bool] = lambda *args, **kwargs: True
    shape_of: Callable[[Any], tuple[int, ...] | None] = lambda layer: None
    cls: type | None = None


REGISTRATIONS: dict[type, Registration] = {}
# Functions for `dot_general` that multiply and do nothing else; also in a functools.partial.
PRODUCTS: list[Callable] = [lax.dot_general]
_PARAMETERS: dict[type, dict[str, linear_map.LinearMap]] = {}
_SHARDINGS = ("out_sharding", "sharding_names", "sharding")


def register(
    cls: type[nnx.Module],
    einsum: str | Callable[[Any], str] | Mapping[str, str],
    *,
    weight: str = "kernel",
    bias: str = "bias",
) -> None:
    """Makes layers of your own class adaptable and quantizable.

    Args:
      cls: its `__call__(x)` returns einsum(x, W), plus a bias if it has one. A call that
        computes anything else does so with W + scaling · A B. The calls are traced to know.
      einsum: such as "...D,DNH->...NH", or a function that returns it for a layer. For a class
        with several weights, which may be adapted but not quantized: {attribute: einsum}.
      weight: the attribute that holds W.
      bias: the attribute that holds the bias; it need not exist.

    Raises: UserError if the einsum is not a product of x with a matrix.
    """
    if isinstance(einsum, Mapping):
        _PARAMETERS[cls] = {name: linear_map.parse(own) for name, own in einsum.items()}
        return
    if isinstance(einsum, str):
        linear_map.parse(einsum)

    def described(layer):
        return linear_map.parse(einsum if isinstance(einsum, str) else einsum(layer))

    def is_product(layer, *args, **kwargs):
        return _is_product(layer, cls, described(layer), (weight, bias), args, kwargs)

    REGISTRATIONS[cls] = Registration(weight, described, bias, is_usual=is_product)
    registration_of.cache_clear()


def _is_product(layer, cls, how, names, args, kwargs) -> bool:
    """Whether cls.__call__(layer, *args, **kwargs) is how(x, W), plus the bias if there is one.

    It is only traced. names: of the weight and of the bias. Without args it is a call with a
    float32 x.
    """
    held = {name: vars(layer)[name] for name in names
            if isinstance(vars(layer).get(name), nnx.Variable)}  # fmt: skip
    if names[0] not in held:  # it is packed
        shape, dtype = layer.quantized_shape[-how.ndim :], layer.quantized.param_dtype
        held[names[0]] = nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    if not args and not kwargs:
        args = (_example(how, held[names[0]].shape[-how.ndim :]),)
    bound = inspect.signature(cls.__call__).bind(layer, *args, **kwargs)
    itself, input, *_ = bound.arguments
    x, alone = bound.arguments[input], object.__new__(mixin.original(layer))
    if not hasattr(x, "ndim"):  # all arguments, of a __call__(self, *args)
        return False
    vars(alone).update({name: part for name, part in vars(layer).items()
                        if not name.startswith(("lora_", "quantized"))})  # fmt: skip

    def call(x, own):
        vars(alone).update({name: held[name].replace(array) for name, array in own.items()})
        bound.arguments.update({itself: alone, input: x})
        return cls.__call__(*bound.args, **bound.kwargs)

    own = {name: held[name].get_value() for name in sorted(held)}
    try:
        program, result = jax.make_jaxpr(call, return_shape=True)(x, own)
    except Exception:  # it changes state, or fails, as the call itself will
        return False
    inputs = [programs.given("x", x)]
    inputs += [programs.given("w", array) if name == names[0] else
               programs.given("bias", array, name) for name, array in own.items()]  # fmt: skip
    if not hasattr(result, "shape"):
        return False
    (found,) = programs.followed(program.jaxpr, inputs)
    own_bias = names[1] if names[1] in held else ""
    return found == programs.expected(how, x.ndim)._replace(bias=own_bias)


def _example(how: linear_map.Einsum, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """An input for a weight of that shape."""
    sizes = dict(zip(how.w, shape, strict=True))
    axes = linear_map.expanded(how.x, len(how.x.replace("...", "_")))
    return jax.ShapeDtypeStruct([sizes.get(axis, 1) for axis in axes], jnp.float32)


def parameters_of(cls: type) -> Mapping[str, linear_map.LinearMap]:
    """{attribute: how it multiplies} of a class that was registered with several weights."""
    return next((_PARAMETERS[base] for base in cls.__mro__ if base in _PARAMETERS), {})


def linear_map_of(layer: nnx.Module) -> linear_map.LinearMap:
    """How the layer multiplies."""
    return registration_of(type(layer)).linear_map_of(layer)


def problem(layer: nnx.Pytree) -> str:
    """Why the layer is no product with a matrix, in words that continue its path; "" if it is."""
    try:
        linear_map_of(layer)
    except errors.UserError as error:
        return f"has an einsum that is no product with a matrix: {error.found}"
    return ""


def weight_of(layer: nnx.Module) -> nnx.Variable:
    """The variable that holds the layer's weight; of a packed weight, its words."""
    return vars(layer)[registration_of(type(layer)).weight]


def stack_axis(layer: nnx.Module, weight: nnx.Variable) -> int:
    """The axis of the layer's weight, and of its other parameters, that numbers stacked layers.

    It is the one that the weight has in addition to the shape of a single layer; where that leaves
    a choice, one that the variable's sharding names after layers, or the first.
    """
    shape, known = weight.shape, registration_of(type(layer))
    if len(shape) != known.linear_map_of(layer).ndim + 1:
        return 0
    single = known.shape_of(layer)
    axes = range(len(shape))
    fits = [a for a in axes if single is None or (*shape[:a], *shape[a + 1 :]) == tuple(single)]
    metadata = weight.get_metadata()
    names = next((metadata[key] for key in _SHARDINGS if metadata.get(key)), ())
    named = [a for a, name in enumerate(names) if isinstance(name, str) and "layer" in name]
    if single is None:
        return named[0] if len(named) == 1 else 0
    return next((a for a in fits if a in named), fits[0] if fits else 0)


def is_base_param(part: Any) -> bool:
    """Whether it is a parameter of the model itself, of nnx.Param or of a subclass of one's own."""
    added = nnx.LoRAParam | stack.LayerIndex
    return isinstance(part, nnx.Param) and not isinstance(part, added)


def bias_of(layer: nnx.Module) -> jax.Array | None:
    """The layer's bias."""
    bias = getattr(layer, registration_of(type(layer)).bias, None)
    return None if bias is None else bias[...]


def is_usual(layer: nnx.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether this call of the layer multiplies as linear_map_of says, and adds a bias at most."""
    return registration_of(type(layer)).is_usual(layer, *args, **kwargs)


def input_of(layer: nnx.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The input x among the arguments of a call: the first one, by position or by name."""
    if args:
        return args[0]
    return kwargs[_first_parameter(registration_of(type(layer)).cls)]


@functools.cache
def _first_parameter(cls: type) -> str:
    return list(inspect.signature(cls.__call__).parameters)[1]


@functools.cache
def registration_of(cls: type) -> Registration | None:
    """The registration of a class or of its nearest base class; None if there is none."""
    found = next((base for base in cls.__mro__ if base in REGISTRATIONS), None)
    return None if found is None else REGISTRATIONS[found]._replace(cls=found)


def _general(layer: nnx.LinearGeneral) -> linear_map.Einsum:
    return linear_map.general(layer.axis, len(layer.out_features), tuple(layer.batch_axis))


def _has_own_functions(layer: nnx.Module) -> bool:
    """Whether the layer was given functions to multiply by, in place of those of Flax.

    They may do anything, such as multiply in 8 bits, or scale the product.
    """
    defaults = _defaults(registration_of(type(layer)).cls)
    own = {name: getattr(layer, name) for name in defaults if hasattr(layer, name)}
    return any(function != defaults[name] and getattr(function, "func", function) not in PRODUCTS
               for name, function in own.items())  # fmt: skip


@functools.cache
def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters
    return {name: parameters[name].default for name in _FUNCTIONS if name in parameters}


_FUNCTIONS = ("promote_dtype", "dot_general", "dot_general_cls", "einsum_op",
              "conv_general_dilated")  # fmt: skip


def _is_plain(layer: nnx.Module, *args: Any, **kwargs: Any) -> bool:
    return not _has_own_functions(layer)


def _is_own_einsum(
    layer: nnx.Einsum, inputs: Any = None, einsum_str: str | None = None, *more: Any, **others: Any
) -> bool:
    return einsum_str in (None, layer.einsum_str) and not _has_own_functions(layer)


def _conv(layer: nnx.Conv) -> linear_map.Conv:
    def slide(x, kernel):
        own = {name: getattr(layer, name) for name in _CONV}
        sizes = (layer.in_features, kernel.shape[-1], layer.kernel_size)
        conv = nnx.eval_shape(lambda: nnx.Conv(*sizes, use_bias=False, **own, rngs=nnx.Rngs(0)))
        conv.kernel = nnx.Param(kernel)
        return conv(x)

    return linear_map.Conv(slide, tuple(layer.kernel_size))


def _is_plain_conv(layer: nnx.Conv, *args: Any, **kwargs: Any) -> bool:
    is_whole = layer.feature_group_count == 1 and layer.mask is None
    return is_whole and not _has_own_functions(layer)


_CONV = (
    *("strides", "padding", "input_dilation", "kernel_dilation", "dtype", "param_dtype"),
    *("precision", "conv_general_dilated", "promote_dtype", "preferred_element_type"),
)


def _features(layer: nnx.Linear) -> tuple[int, ...]:
    return (layer.in_features, layer.out_features)


def _kernel_shape(layer: nnx.Module) -> tuple[int, ...]:
    return tuple(layer.kernel_shape)


REGISTRATIONS |= {
    nnx.Linear: Registration(
        "kernel", lambda _: linear_map.LINEAR, is_usual=_is_plain, shape_of=_features
    ),
    nnx.LinearGeneral: Registration(
        "kernel",
        _general,
        is_usual=_is_plain,
        shape_of=lambda layer: (
            *layer.batch_axis.values(),
            *layer.in_features,
            *layer.out_features,
        ),
    ),
    nnx.Einsum: Registration(
        "kernel",
        lambda layer: linear_map.parse(layer.einsum_str),
        is_usual=_is_own_einsum,
        shape_of=_kernel_shape,
    ),
    nnx.Embed: Registration(
        "embedding",
        lambda _: linear_map.Embedding(),
        is_usual=_is_plain,
        shape_of=lambda layer: (layer.num_embeddings, layer.features),
    ),
    nnx.Conv: Registration("kernel", _conv, is_usual=_is_plain_conv, shape_of=_kernel_shape),
    nnx.ConvTranspose: Registration(
        "kernel",
        lambda layer: linear_map.Conv(linear_map.unknown, tuple(layer.kernel_size)),
        is_usual=lambda *args, **kwargs: False,
        shape_of=_kernel_shape,
    ),
}
