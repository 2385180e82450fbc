"""Any timm model by name, and which of its parameters are prunable."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

from autosparse.core.errors import UsageError, unknown
from autosparse.models import roles
from autosparse.models.config import ModelConfig
from autosparse.models.contract import of_the_machine

COMPILED = "_orig_mod"
"""The attribute under which `torch.compile` holds the module."""
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
COMPUTED = {
    "_mask": ("torch.nn.utils.prune", "prune.remove"),
    "_g": ("weight norm", "remove_weight_norm"),
    "_u": ("spectral norm", "remove_spectral_norm"),
}
"""Ending of a tensor beside a weight that torch computes -> the method, and how it is removed."""
CONV_OR_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def create(
    config: ModelConfig, *, num_classes: int, in_chans: int, image_size: int, seed: int
) -> nn.Module:
    """Build a timm model on the CPU, initialised from `seed`; the global RNG stays as it was.

    Two of timm's defaults are changed. Models of a fixed input size are built for `image_size`,
    unless `config.options` names one. And unless `config.zero_init` is set, nothing starts at zero
    that would hide weights from criteria that look at gradients: `zero_init_last` is off, gains
    and norm weights that timm sets to zero (NFNet, LeViT) start at one, and layers that it sets
    to zero (heads of mixers) are drawn from a normal distribution of standard deviation 0.02.
    """
    options = _options(config, num_classes, in_chans, image_size)
    with torch.device("meta"):
        shape_only = _build(config.name, options)
    if not config.zero_init and "zero_init_last" in inspect.signature(type(shape_only)).parameters:
        options.setdefault("zero_init_last", False)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(config.name, options)
        if config.small_stem:
            _shrink_stem(model)
        if not config.zero_init and "zero_init_last" not in config.options:
            _reveal(model, config.name, torch.zeros(1, in_chans, image_size, image_size))
    settings = dataclasses.asdict(config)
    for name in ("zero_init", "small_stem"):
        if not settings[name]:
            del settings[name]
    model.autosparse_recipe = {  # type: ignore[assignment]
        **settings,
        "num_classes": num_classes,
        "in_chans": in_chans,
        "image_size": image_size,
        "seed": seed,
    }
    return model


def _options(
    config: ModelConfig, num_classes: int, in_chans: int, image_size: int
) -> dict[str, Any]:
    """Return the options for timm; raise UsageError for a name that it does not know."""
    if not timm.is_model(config.name):
        raise unknown("model", config.name, timm.list_models())
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, **config.options}
    default = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if default is not None and default.fixed_input_size:
        options.setdefault("img_size", image_size)
    return options


def check(config: ModelConfig, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """Return the model without values, on the meta device; raise UsageError where it cannot be.

    Name, options and excluded layers are checked; nothing is computed.
    """
    with torch.device("meta"):
        model = _build(config.name, _options(config, num_classes, in_chans, image_size))
    prunable(model, config.exclude)
    return model


def _shrink_stem(model: nn.Module) -> None:
    """Put a 3x3 convolution of stride 1 in place of the first one, and no pooling after it.

    As K. He et al. do for CIFAR-10 (arXiv 1512.03385, section 4.2).
    """
    name = model.default_cfg.get("first_conv")  # type: ignore[union-attr]
    first = model.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(first, nn.Conv2d) or not isinstance(
        getattr(model, "maxpool", None), nn.Module
    ):
        raise UsageError("model.small_stem is for ResNets: one first convolution, then pooling")
    stem = nn.Conv2d(
        first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None
    )
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    path, _, attribute = str(name).rpartition(".")
    setattr(model.get_submodule(path), attribute, stem)
    model.maxpool = nn.Identity()


@torch.no_grad()
def revealing(model: nn.Module, image: torch.Tensor, limit: float) -> dict[str, torch.Tensor]:
    """Return, by name, values for the parameters that hide layers from gradients.

    They are one for gains (see roles.py) that are nowhere larger than `limit`, and drawn from a
    normal distribution of standard deviation 0.02 for prunable weights that are all zero.

    Args:
        model: is not changed.
        image: [1, C, H, W], on the model's device.
        limit: 0 for gains that are zero; roles.FAINT for those that are near zero, too.
    """
    layers = {
        id(module._parameters.get(attribute))
        for module in model.modules()
        for attribute in _prunable_attributes(module)
    }
    gains = set(roles.faint(model, image, limit))
    values = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in layers and not parameter.count_nonzero():
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype)
            values[name] = nn.init.trunc_normal_(drawn, std=0.02)
        elif name in gains:
            values[name] = torch.ones_like(parameter)
    return values


def _reveal(model: nn.Module, name: str, image: torch.Tensor) -> None:
    """Give gains and layers that start at zero other values; see `revealing`."""
    try:
        roles.set_values(model, revealing(model, image, 0.0))
    except (RuntimeError, TypeError, AttributeError, AssertionError, ValueError) as error:
        if of_the_machine(error):
            raise
        side = image.shape[-1]
        raise UsageError(f"{name} cannot take images of {side} px: {error}") from error


class Images(Protocol):
    """What a model must know of its data; a DataSource is one."""

    @property
    def num_classes(self) -> int: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def image_size(self) -> int: ...


def create_for(images: Images, config: ModelConfig, seed: int) -> nn.Module:
    """Build a timm model for a data set: see `create`."""
    return create(
        config,
        num_classes=images.num_classes,
        in_chans=images.in_chans,
        image_size=images.image_size,
        seed=seed,
    )


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"timm cannot build {name} with {options}: {error}") from error


def from_recipe(recipe: dict[str, Any]) -> nn.Module:
    """Build the model that a card's `model` entry describes (the arguments of `create`)."""
    if "name" not in recipe or "num_classes" not in recipe:
        raise UsageError(
            "the card does not say how its model was built; make it with models.create"
        )
    known = [spec.name for spec in dataclasses.fields(ModelConfig)]
    config = ModelConfig(**{name: recipe[name] for name in known if name in recipe})
    shape = {key: recipe[key] for key in ("num_classes", "in_chans", "image_size", "seed")}
    return create(config, **shape)


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the prunable parameters by name, in the model's order, tied ones once.

    Prunable are the weights of every Conv and Linear layer and the projections of
    `nn.MultiheadAttention`, but for those without elements. `exclude` leaves some of them out:
    `head` and `stem` mean the classifier and first layer that timm records for the model; anything
    else is a shell pattern for the parameter's name or for one of the modules it lies in. A
    compiled or parallel model is looked into.

    Raises UsageError for a pattern without a match, and for a weight that is computed from others:
    under weight or spectral norm, `torch.nn.utils.prune`, or compact.
    """
    model = unwrapped(model)
    weights: dict[str, nn.Parameter] = {}
    computed: dict[str, UsageError] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for attribute in _prunable_attributes(module):
            name = f"{module_name}.{attribute}" if module_name else attribute
            weight = module._parameters.get(attribute)
            if weight is None:
                computed[name] = _computed(module, module_name, attribute)
                weight = getattr(module, attribute)
            if id(weight) not in seen:
                seen.add(id(weight))
                weights[name] = weight
    left_out: set[str] = set()
    for pattern in exclude:
        names = [name for name in weights if _excluded(model, pattern, name)]
        if not names:
            parts = {
                ".".join(name.split(".")[: depth + 1]) for name in weights for depth in range(3)
            }
            raise unknown("layer to exclude", pattern, parts)
        left_out.update(names)
    weights = {
        name: weight
        for name, weight in weights.items()
        if name not in left_out and (nn.parameter.is_lazy(weight) or weight.numel())
    }
    if not weights:
        raise UsageError(f"{type(model).__name__} has no prunable weight")
    for name in weights:
        if name in computed:
            raise computed[name]
        if COMPILED in name:
            raise UsageError(f"{name}: a part of the model is compiled; compile it afterwards")
    return weights


def _computed(module: nn.Module, name: str, attribute: str) -> UsageError:
    """Return the error for a layer whose weight is computed from other tensors."""
    if parametrize.is_parametrized(module, attribute):
        kind = type(module.parametrizations[attribute][0]).__name__  # type: ignore[index]
        if kind == "CompactWeight":
            return UsageError(f"{name}.{attribute} is compact already; densify the model first")
        how, function = kind.strip("_"), "parametrize.remove_parametrizations"
    else:
        tensors = {**module._parameters, **module._buffers}
        known_ones = (known for ending, known in COMPUTED.items() if attribute + ending in tensors)
        how, function = next(known_ones, ("its module", ""))
    call = f"torch.nn.utils.{function}(model.get_submodule({name!r}), {attribute!r})"
    return UsageError(
        f"{name}.{attribute} is no parameter: {how} computes it, so it cannot be pruned; "
        f"{f'call {call} first, or ' if function else ''}exclude the layer"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(model, PARALLEL):
            model = model.module
        elif isinstance(getattr(model, COMPILED, None), nn.Module):
            model = getattr(model, COMPILED)
        else:
            return model


def check_values(model: nn.Module) -> None:
    """Raise UsageError that names the first tensor without values that autograd can work with."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        problem = None
        if nn.parameter.is_lazy(tensor):
            problem = "is lazy and has no shape yet: call the model on a batch first"
        elif tensor.is_meta:
            problem = "is on the meta device and has no values: make the model on a real one"
        elif tensor.is_inference():
            problem = "was made under torch.inference_mode: make the model outside of it"
        if problem:
            raise UsageError(f"{name} {problem}")


def _prunable_attributes(module: nn.Module) -> Iterator[str]:
    if isinstance(module, CONV_OR_LINEAR):
        yield "weight"
    elif isinstance(module, nn.MultiheadAttention):
        for attribute in ATTENTION_WEIGHTS:
            if getattr(module, attribute, None) is not None:
                yield attribute


def _excluded(model: nn.Module, pattern: str, name: str) -> bool:
    key = {"head": "classifier", "stem": "first_conv"}.get(pattern)
    recorded = getattr(model, "pretrained_cfg", {}).get(key) if key else None
    patterns = [pattern]
    if recorded:
        patterns = [recorded] if isinstance(recorded, str) else list(recorded)
    parts = name.split(".")
    prefixes = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(fnmatchcase(prefix, each) for prefix in prefixes for each in patterns)


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the parameter `name`, and the attribute it is held under."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def expected_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """Return [C, H, W] of the images that a model was built for, or None if it does not show.

    The model itself comes first (its recipe, its first convolution, the image size of its patch
    embedding), then timm's configuration registered under its name.
    """
    recipe: Any = getattr(model, "autosparse_recipe", None)
    if recipe is not None:
        return recipe["in_chans"], recipe["image_size"], recipe["image_size"]
    registered = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    built = (getattr(module, "img_size", None) for module in model.modules())
    size = next((each for each in built if each is not None), None) or registered
    first = next((each for each in model.modules() if isinstance(each, nn.Conv2d)), None)
    if size is None or first is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return first.in_channels, int(height), int(width)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def device_name(device: torch.device) -> str:
    """Return `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` … into a device; raise UsageError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ["auto", "cpu", "cuda"]) from None
    if device.type == "mps":
        raise UsageError(f"device {name} lacks float64, which scores are computed in; use cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name} was asked for, but torch sees no GPU")
    return device


def called(model: nn.Module, name: str) -> nn.Module:
    """Return the module whose call uses a weight; attention uses its projection's uncalled."""
    owner = name.rpartition(".")[0]
    parent = model.get_submodule(owner.rpartition(".")[0])
    return parent if isinstance(parent, nn.MultiheadAttention) else model.get_submodule(owner)
