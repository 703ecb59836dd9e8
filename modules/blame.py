"""Find the module that is to blame: where an error was raised, or where two runs that must agree part.  B batch, T time."""

import inspect
import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import init_parameters, method_parameters
from model import Branch

TORCH_ATTRIBUTES = vars(nn.Module()).keys()
TOLERANCE = 1e-4  # relative to the largest number of a result


class Call(NamedTuple):
    """The first input and output of a call of a module, each (B, T, ...)."""

    x: Tensor
    y: Tensor


Calls = dict[tuple[nn.Module, int], Call]  # by module and turn, in the order in which they end


def blocks_of(model: nn.Module) -> dict[nn.Module, str]:
    """The blocks of all layer strings in a model, with their names in these strings."""
    return {
        block: name
        for branch in model.modules() if isinstance(branch, Branch)
        for block, name in zip(branch.blocks, [step for step in branch.steps if step not in "+|"], strict=True)
    }  # fmt: skip


def enclosing_blocks(module: nn.Module, model: nn.Module) -> dict[nn.Module, str]:
    """The blocks of layer strings that a module is part of, with their names, the innermost first."""
    return {block: name for block, name in reversed(blocks_of(model).items()) if module in block.modules()}


def blame(module: nn.Module, model: nn.Module) -> nn.Module:
    """The innermost block that a module is part of; the module itself if there is none."""
    return next(iter(enclosing_blocks(module, model)), module)


def takes_cache(block: nn.Module) -> bool:
    """Whether its forward names `cache`, or hands all inputs on to a layer in brackets."""
    inputs = inspect.signature(type(block).forward).parameters.values()
    hands_on = "layer" in init_parameters(type(block)) and any(value.kind is value.VAR_KEYWORD for value in inputs)
    return hands_on or "cache" in method_parameters(type(block), "forward")


def failing_block(error: BaseException) -> str:
    """The name of the block in which an error was raised, or whose output did not fit into what followed; "" if it was none."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        branch, block = frame.f_locals.get("self"), frame.f_locals.get("block")  # of Branch.forward
        if isinstance(branch, Branch) and block in (names := blocks_of(branch)):
            return names[block]
    return ""


def record_calls(model: nn.Module, runs: list[Callable[[], object]]) -> Calls:
    """All calls of the blocks, or of all modules of a model without blocks, and of the model itself.

    Those of several runs, which read a sequence piece by piece, are joined.
    """
    passes: list[Calls] = []

    def record(module, inputs, output):
        y = output[0] if isinstance(output, tuple) else output
        if inputs and isinstance(inputs[0], Tensor) and isinstance(y, Tensor) and inputs[0].dim() > 1 < y.dim():
            turn = next(turn for turn in itertools.count() if (module, turn) not in passes[-1])
            passes[-1][module, turn] = Call(inputs[0].detach().clone(), y.detach().clone())

    modules = {*blocks_of(model)} or {*model.modules()}
    hooks = [module.register_forward_hook(record) for module in modules | {model}]
    try:
        for run in runs:
            passes.append({})
            run()
    finally:
        for hook in hooks:
            hook.remove()
    joined = {place: [calls[place] for calls in passes if place in calls] for place in passes[0]}
    return {place: Call(join(x), join(y)) for place, calls in joined.items() for x, y in [zip(*calls, strict=True)]}


def join(pieces: tuple[Tensor, ...]) -> Tensor:
    """Pieces (B, t, ...) of a sequence, joined along the time; the last one if they do not fit."""
    fits = len({(piece.shape[0], piece.shape[2:]) for piece in pieces}) == 1
    return torch.cat(pieces, dim=1) if fits else pieces[-1]


def first_difference(model: nn.Module, expected: Calls, ours: Calls, T: int) -> nn.Module | None:
    """None if two runs agree in the first T tokens. Else the first module whose outputs differ although its inputs agree."""
    if agree(expected[model, 0].y[:, :T], ours[model, 0].y[:, :T]):
        return None
    for place, one in expected.items():
        other = ours.get(place)
        if other and agree(one.x[:, :T], other.x[:, :T]) and not agree(one.y[:, :T], other.y[:, :T]):
            return place[0]
    return model


def agree(ours: Tensor, expected: Tensor) -> bool:
    return relative_error(ours, expected) < TOLERANCE


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite if something is not finite or the shapes differ."""
    if ours.shape != expected.shape:
        return torch.inf
    if not ours.numel():
        return 0.0
    error = ((ours.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=0.01)).item()
    return error if error == error else torch.inf


def hidden_weights(model: nn.Module) -> list[str]:
    """A line for each attribute that hides weights from torch, such as a plain list of modules."""
    modules, weights, problems = {*model.modules()}, {id(weight) for weight in model.parameters()}, []
    for module in model.modules():
        for name in vars(module).keys() - TORCH_ATTRIBUTES:
            value = getattr(module, name)
            hidden = [part for part in trainable_parts(value) if part not in modules and id(part) not in weights]
            if hidden:
                kind, part = type(value).__name__, "Module" if isinstance(hidden[0], nn.Module) else "Parameter"
                cure = {"list": f"nn.{part}List", "tuple": f"nn.{part}List", "dict": f"nn.{part}Dict"}.get(kind, "nn.Parameter")
                where = f"`{name}` of {type(module).__name__} is a plain {kind}"
                problems.append(f"{where}, so what is in it is neither trained nor saved: make it an {cure}")
    return problems


def trainable_parts(value) -> Iterator[nn.Module | Tensor]:
    """The modules with weights and the tensors with gradients in a list, tuple or dict, or the value itself if it is one."""
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from trainable_parts(item)
    elif isinstance(value, nn.Module):
        yield from [value] * any(weight.requires_grad for weight in value.parameters())
    elif isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
        yield value
