"""What is trained and saved of a Flax NNX model besides A and B: modules and rows of embeddings.

PEFT's modules_to_save and trainable_token_indices; `tokens` has the latter.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lora_jax import errors
from lora_jax.layers import mixin, placement, places, registry, weight, wrappers
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx import sites, tokens
from lora_jax.lora.nnx.model_state import LoRAConstant, LoRAParam
from lora_jax.quant import linear as quant_linear


class SavedLayer(mixin.Mixin):
    """y = copy(x): a second class that a fully trained module gets; its copy is trained.

    The copy is `modules_to_save`, whose methods are called in place of the module's. Its parameters
    are in float32, and it computes with them in the module's own dtypes. The module's own
    parameters do not change, for others that use them.
    saved_ones: of a stack, which of its layers are trained; None: all. saved_layers: the same, as
    an array. The others compute with the module's own parameters.
    """

    lora_members = 0  # see layer.per_member
    saved_ones: tuple[bool, ...] | None = None
    saved_layers: LoRAConstant | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [kind for kind in cls.mixin_original.__mro__ if not issubclass(nnx.Module, kind)]
        for name, value in [item for kind in own for item in vars(kind).items()]:
            taken = name.startswith("__") or name in vars(SavedLayer)
            if inspect.isfunction(value) and not taken:
                setattr(cls, name, _of_copy(name))

    @classmethod
    def mixin_attributes(cls, original: type[nnx.Module]) -> dict[str, Any]:
        known = registry.registration_of(original)
        return {known.weight: weight.attribute(known.weight, _weight_of_copy)} if known else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _of_copy("__call__")(self, *args, **kwargs)

    def with_product(self, x: Float[Array, "..."], product: Any) -> jax.Array:
        """The same output: `product` is of the module's own weight, which is not used."""
        return self(x)


def _of_copy(name: str) -> Callable:
    """The method of that name of a SavedLayer: that of its copy."""

    def method(self, *args, **kwargs):
        graphdef, state = nnx.split(self.modules_to_save)
        own = dict(nnx.to_flat_state(nnx.state(self)))
        cast = [(path, variable.replace(_trained(self, variable, own[path])))
                for path, variable in nnx.to_flat_state(state)]  # fmt: skip

        def output(*args):
            *args, state = args
            return getattr(nnx.merge(graphdef, state), name)(*args, **kwargs)

        return lora_layer.per_member(output, self.lora_members, args, nnx.from_flat_state(cast))

    return method


def _trained(module: SavedLayer, copied: nnx.Variable, own: nnx.Variable) -> jax.Array:
    """A parameter of the copy, in its own dtype; that of the module where it is not trained."""
    trained, ones = copied[...].astype(own.dtype), module.saved_layers
    if ones is None:
        return trained
    is_trained = ones[...].reshape(*ones.shape, *[1] * (trained.ndim - ones.ndim))
    return jnp.where(is_trained, trained, own[...])


def _weight_of_copy(module: SavedLayer) -> weight.Computed:
    own, trained = registry.weight_of(module), registry.weight_of(module.modules_to_save)

    def compute():
        if module.lora_members:
            raise errors.UserError(
                expected="fully trained modules that are only called, for a sweep",
                found=f"a {mixin.original(module).__name__} whose weight is read",
                do="train one adapter, or leave it out of modules_to_save",
            )
        return _trained(module, trained, own)

    return weight.Computed(own.shape, own.dtype, compute)


class Saved(NamedTuple):
    """A module that is or becomes a SavedLayer. depths: as of a Site. ones: see SavedLayer."""

    path: tuple[str | int, ...]
    module: nnx.Module
    depths: tuple[int, ...]
    ones: tuple[bool, ...] | None = None
    extent = "fully trained"

    @property
    def names(self) -> tuple[str | None, ...]:
        """The path of the module, or of each in a stack; None for one that is not trained."""
        names = _layers(self.path, self.depths, self.module) or [places.dotted(self.path)]
        if self.ones is None:
            return tuple(names)
        return tuple(name if one else None for name, one in zip(names, self.ones, strict=True))

    def begin(self, given: Mapping[str, np.ndarray] | None = None) -> None:
        """Makes the module a SavedLayer; its copy has the values `given`, or the module's own."""
        copied = nnx.clone(self.module)
        held = {id(variable): variable for _, variable in nnx.iter_graph(copied)
                if isinstance(variable, nnx.Param)}  # fmt: skip
        everywhere = places.find(copied)
        for own, variable in held.items():
            array = jnp.array(variable[...], jnp.float32)
            trained = LoRAParam(array, **placement.metadata(variable))
            for place in everywhere[own]:
                place.put(trained)
        mixin.become(self.module, SavedLayer)
        self.module.modules_to_save = copied
        if self.ones is not None:
            self.module.saved_ones = self.ones
            self.module.saved_layers = LoRAConstant(jnp.array(self.ones))
        for name, path, index, variable in self._tensors() if given else ():
            turn = _turn(self.module, path, given[name].ndim)
            array = given[name].astype(np.float32).transpose(np.argsort(turn))
            variable.set_value(variable[...].at[index].set(array))

    def end(self) -> None:
        """Makes the module what it was before, without its copy."""
        added = () if self.ones is None else ("saved_ones", "saved_layers")
        mixin.leave(self.module, SavedLayer, "modules_to_save", *added)

    def merge(self, where: places.Places) -> None:
        """The same as `end`, but the module takes the values of its copy.

        where: places.find of the model. A variable that other modules hold, too, is left to them.
        """
        copied = nnx.to_flat_state(nnx.state(self.module.modules_to_save, LoRAParam))
        own = dict(nnx.to_flat_state(nnx.state(self.module)))
        values = [(path, _trained(self.module, trained, own[path])) for path, trained in copied]
        self.end()
        inside = places.find(self.module)
        for path, value in values:
            variable = places.at(self.module, path)
            if len(where[id(variable)]) == len(inside[id(variable)]):
                variable.set_value(value)
            else:
                new = variable.replace(value)
                for place in inside[id(variable)]:
                    place.put(new)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each tensor in PEFT's file."""
        for name, path, index, variable in self._tensors():
            shape = jax.eval_shape(lambda v=variable, i=index: v[...][i]).shape
            yield name, tuple(shape[axis] for axis in _turn(self.module, path, len(shape)))

    def files(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of each tensor in PEFT's file, in the module's own dtype."""
        own = dict(nnx.to_flat_state(nnx.state(self.module)))
        for name, path, index, variable in self._tensors():
            array = np.asarray(variable[...][index].astype(own[path].dtype))
            yield name, array.transpose(_turn(self.module, path, array.ndim))

    def _tensors(self) -> Iterator[tuple[str, tuple, tuple[int, ...], nnx.Variable]]:
        """(name in the file, path in the module, index in the stack, variable)."""
        copied = getattr(self.module, "modules_to_save", self.module)
        for path, variable in nnx.iter_graph(copied):
            if isinstance(variable, nnx.Param):
                weight = path[-1] in ("kernel", "embedding", "scale")
                leaf = places.dotted((*path[:-1], "weight" if weight else path[-1]))
                for n, index in enumerate(np.ndindex(*variable.shape[: len(self.depths)])):
                    if self.ones is not None and not self.ones[n]:
                        continue
                    name = sites.numbered(self.path, self.depths, index)
                    yield f"{name}.{leaf}", path, index, variable


Part = Saved | tokens.Tokens


def find(model: nnx.Module) -> list[Part]:
    """The fully trained modules of `model`, and the layers with trained tokens."""
    known = list(sites.find(model))
    depths = _depths(known)
    whole = [Saved(path, node, depths(path), node.saved_ones)
             for path, node in nnx.iter_graph(model) if isinstance(node, SavedLayer)]  # fmt: skip
    return [*whole, *tokens.find(known)]


def choose(
    model: nnx.Module, found: list[sites.Site], config: lora_config.LoRAConfig
) -> list[Part]:
    """What `config` trains besides A and B. found: the model's sites.

    Raises: UserError as tokens.choose; if a name in modules_to_save matches nothing, and for
    modules that are quantized or scaled.
    """
    return [*_modules(model, found, config), *tokens.choose(found, config)]


_HEADS = ("score", "classifier")  # which PEFT saves with such adapters of its own accord


def _modules(
    model: nnx.Module, found: list[sites.Site], config: lora_config.LoRAConfig
) -> list[Saved]:
    """The modules whose paths end in one of config.modules_to_save, as PEFT reads it."""
    ends = config.modules_to_save
    depths, taken, matched, problems = _depths(found), [], set(), []
    scaled = wrappers.scaled(model)
    for path, node in sorted(nnx.iter_graph(model), key=lambda item: len(item[0])):
        inside = any(path[: len(outer.path)] == outer.path for outer in taken)
        if inside or not isinstance(node, nnx.Module):
            continue
        named = {end for end in ends if places.dotted(path).endswith(end)}
        layers = _layers(path, depths(path), node)
        of_layers = {end for end in ends if any(layer.endswith(end) for layer in layers)}
        if not named | of_layers:
            continue
        matched |= named | of_layers
        ones = tuple(layer.endswith(tuple(of_layers)) for layer in layers)
        ones = None if named or all(ones) else ones
        inner = [site for site in found if site.path[: len(path)] == path]
        if ones and any(targets.is_chosen(name, config) for site in inner for name in site.names):
            problems.append(f"{places.dotted(path)} has an adapter on other layers of the stack")
        if any(quant_linear.packed_of(part) for _, part in nnx.iter_graph(node)):
            problems.append(f"{places.dotted(path)} is quantized")
        if id(node) in scaled:
            problems.append(f"{places.dotted(path)} {scaled[id(node)]}")
        if isinstance(node, nnx.List | nnx.Dict):
            problems.append(f"{places.dotted(path)} is a container, which is not called: name what "
                            "is in it")  # fmt: skip
        taken.append(Saved(path, node, depths(path), ones))
    problems += [
        f"{end} matches nothing" + (": the head of a classifier (SEQ_CLS)" if end in _HEADS else "")
        for end in ends
        if end not in matched
    ]
    if problems:
        names = {str(path[-1]) for path, node in nnx.iter_graph(model)
                 if path and isinstance(node, nnx.Module)}  # fmt: skip
        raise errors.UserError(
            expected="modules_to_save that are unquantized modules of the model",
            found=problems,
            where="modules that exist: " + ", ".join(sorted(names)),
            do="choose embeddings, the head and norms, and adapt the others",
        )
    return taken


def _layers(path: tuple[str | int, ...], depths: tuple[int, ...], node: nnx.Module) -> list[str]:
    """The path of each layer of a stack, which PEFT knows; [] of another module."""
    arrays = jax.tree.leaves(nnx.state(node, nnx.Param))
    if not depths or not arrays:
        return []
    indices = np.ndindex(*arrays[0].shape[: len(depths)])
    return [sites.numbered(path, depths, index) for index in indices]


def _depths(found: list[sites.Site]) -> Callable[[tuple[str | int, ...]], tuple[int, ...]]:
    """Returns `depths` of a module by its path, from those of the model's sites."""
    stacks = {site.path[: site.depths[0]]: site.depths[:1] for site in found if site.depths}
    return lambda path: next((d for outer, d in stacks.items() if path[: len(outer)] == outer), ())


def _turn(module: nnx.Module, path: tuple, ndim: int) -> tuple[int, ...]:
    """The order of a parameter's axes in a file: outputs first, then inputs, as in PyTorch."""
    owner = places.at(module, path[:-1])
    if path[-1] == "kernel" and (ndim == 2 or isinstance(owner, nnx.Conv)):
        return (ndim - 1, ndim - 2, *range(ndim - 2))
    return tuple(range(ndim))
