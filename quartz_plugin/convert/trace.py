"""Stage 1, trace: the ANN as a graph in which every node calls a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.build import Builder
from quartz_plugin.convert.calls import NAMED, function_name
from quartz_plugin.convert.capture import capture
from quartz_plugin.convert.exported import CALLED
from quartz_plugin.convert.lines import line_of_node
from quartz_plugin.convert.programs import as_network, open_batch
from quartz_plugin.convert.shapes import value_dependent
from quartz_plugin.convert.symbolic import Tracer, class_name, reason_against, refusal
from quartz_plugin.convert.tail import builds_output, hosted_nodes
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.convert.unused import erase_unused
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.inputs import Input, Inputs
from quartz_plugin.intake import carry_out_hooks, copy_of, first_line, hooks_of, make_plain
from quartz_plugin.operators.table import (
    FUNCTIONS,
    OPERATORS,
    REASONS,
    ConversionError,
    Rule,
    rules_with,
)
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.structure import flattened

Rules = Mapping[type[nn.Module], Rule]

EXAMPLES = 3
"""Size of the batch that a network is traced with: what mixes the batch with the units then shows."""


def trace(ann: nn.Module, example: Tensor, rules: Rules | None = None, inputs: Inputs | None = None) -> TracedNetwork:
    """Trace a copy of `ann` in eval mode; `ann` itself is left alone.

    Functions and methods become modules of the table; a module or function that is not in it is refused before
    anything is computed.

    Parameters
    ----------
    ann : nn.Module
        The trained network.
    example : Tensor
        Values of the input layer's units for one image, ``[1, ...]``: the image itself, unless `inputs` packs it.
    rules : dict, optional
        Rules for module classes, beside those of ``register_rule`` and before them.
    inputs : Inputs, optional
        The tensors that the network takes; by default one, as the example is.

    Raises
    ------
    ConversionError
        If torch.fx cannot trace the network, an operation cannot be converted, the network does not run on the
        example, or the traced network computes something else than the network itself.
    ValueError
        If a weight or a batch-norm statistic is NaN or infinite.
    """
    ann = as_network(ann)
    if not isinstance(ann, nn.Module):
        raise TypeError(f"ann must be a torch.nn.Module, got {type(ann).__name__}")
    # Different images show what mixes them; a batch of another size, what has taken the size for a number.
    others = torch.rand(
        EXAMPLES - 1, *example.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    examples = torch.cat([example[:1], others.to(example)])
    with exact_arithmetic(), torch.no_grad():
        inputs = inputs or Inputs((Input(INPUT, tuple(example.shape[1:])),))
        try:
            return _trace(ann, examples, rules_with(rules), inputs)
        except ConversionError:
            if not _takes_one_image_alone(ann, inputs, examples):
                raise
            return _trace(ann, examples, rules_with(rules), inputs, one_image=True)


def _takes_one_image_alone(ann: nn.Module, inputs: Inputs, examples: Tensor) -> bool:
    """Check whether a network takes one image and no more, as one that was exported for one does."""
    network = copy_of(ann).to(device=examples.device, dtype=examples.dtype)
    # A user's code raises what it likes.
    try:
        _run(network, inputs.unpack(examples[:1].clone()))
    except Exception:
        return False
    try:
        leaves = flattened(_run(network, inputs.unpack(examples.clone())), lambda each: isinstance(each, Tensor))[1]
    except Exception:
        return True
    # Sizes that are numbers in the graph may take several images for a larger one.
    captured = isinstance(network, fx.GraphModule)
    return captured and any(leaf.dim() == 0 or len(leaf) != len(examples) for leaf in leaves.values())


def _trace(ann: nn.Module, examples: Tensor, rules: Rules, inputs: Inputs, one_image: bool = False) -> TracedNetwork:
    """Trace with a batch of examples, and compare with the network itself on the last of them.

    With `one_image` the network takes no more: it is traced on one, and the size of the batch then left open.
    """
    root = copy_of(ann)
    _refuse_meta(root, inputs.unpack(examples), rules)
    # The traced network computes in the examples' type, which is float32 at least.
    root = root.to(device=examples.device, dtype=examples.dtype)
    several = [] if one_image else [inputs.unpack(examples)]
    name, tracer, wanted = type(root).__name__, Tracer(*several, inputs.unpack(examples[:1])), None
    others = examples[-1:] if one_image else examples[1:]
    if hooked := hooks_of(root):
        wanted = carry_out_hooks(root, hooked, tracer, rules, _run, inputs.unpack(others), inputs.unpack(examples[:1]))
    make_plain(root)
    _check_finite(root)
    if "forward" in vars(root):
        raise ConversionError(refusal("the network itself", name, reason_against(root)))
    known = _known_graph(root, name, tracer, rules, inputs)
    if wanted is None:
        wanted = _run(copy_of(ann).to(device=examples.device, dtype=examples.dtype), inputs.unpack(others.clone()))
    network = Builder(known.root, known.paths, known.dynamic, known.hosted, examples).build(known.graph)
    network = replace(network, inputs=inputs)
    return _as_the_network_itself(network, wanted, others.clone())


def _as_the_network_itself(network: TracedNetwork, wanted: Any, images: Tensor) -> TracedNetwork:
    """The traced network, compared with what the network itself returns, whose classes it takes over."""
    structure, wanted_leaves = flattened(wanted, lambda each: isinstance(each, Tensor))
    try:
        given = network.outputs.results(network.output(images))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ConversionError(_DIFFERENT) from error
    if len(given) != len(wanted_leaves) or not all(map(_alike, wanted_leaves.values(), given)):
        raise ConversionError(_DIFFERENT)
    return replace(network, outputs=replace(network.outputs, structure=structure))


def _alike(wanted: Tensor, given: Any) -> bool:
    """Check whether two outputs are the same but for rounding; one in a hundred classes may differ."""
    if not isinstance(given, Tensor) or wanted.shape != given.shape:
        return False
    if not wanted.is_floating_point():
        return bool((wanted == given).double().mean() >= 0.99) if wanted.numel() else True
    tolerance = 1e-3 * float(wanted.abs().nan_to_num(0.0, posinf=0.0).max()) if wanted.numel() else 0.0
    return torch.allclose(wanted.double(), given.double(), rtol=0, atol=tolerance, equal_nan=True)


class _Known(NamedTuple):
    """A network as it was captured: nodes whose values depend on the image, those that the host carries out, paths."""

    root: nn.Module
    graph: fx.Graph
    dynamic: set[fx.Node]
    hosted: set[fx.Node]
    paths: dict[fx.Node, str]


def _known_graph(root: nn.Module, name: str, tracer: Tracer, rules: Rules, inputs: Inputs | None = None) -> _Known:
    """The network as torch.fx sees it, of known operations; its numbers do not matter."""
    root = _with_rules(root, rules)
    if not isinstance(root, nn.Sequential) and (
        type(root).__module__.startswith("torch.nn") or type(root) in OPERATORS
    ):
        root = nn.Sequential(root)
    graph = capture(root, name, tracer)
    if len(tracer.inputs) == 1:
        open_batch(graph, tracer.sizes_of)
    _refuse_more_inputs(graph, tracer.count)
    if inputs is not None:
        inputs.unpack_in(graph)
    dynamic = value_dependent(graph)
    erase_unused(root, graph, dynamic)
    paths = _paths(root, graph, dynamic)
    hosted = hosted_nodes(root, graph, dynamic)
    _check_known(root, graph, paths, dynamic - hosted)
    return _Known(root, graph, dynamic, hosted, paths)


def _refuse_more_inputs(graph: fx.Graph, count: int) -> None:
    """Refuse a forward that takes more than the inputs given and its defaults."""
    for extra in [node for node in graph.nodes if node.op == "placeholder"][count:]:
        if not extra.args and extra.users:
            raise ConversionError(
                f"the network is given {count} input tensor{'s' if count > 1 else ''}; forward also takes "
                f"{extra.target!r}: give example_input as a tuple with all of them"
            )


def _refuse_meta(root: nn.Module, examples: tuple[Tensor, ...], rules: Rules) -> None:
    """Refuse a network without numbers; first for the module that would stand in the way with them."""
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if tensor.is_meta:
            on_meta = tuple(each.to("meta") for each in examples)
            one = tuple(each[:1] for each in on_meta)
            _known_graph(root, type(root).__name__, Tracer(on_meta, one), rules)
            raise ConversionError(f"{name} is on the meta device, which holds no numbers; load the weights first")


_DIFFERENT = (
    "the traced network computes something else than the network itself: its forward is random in eval mode, computes "
    "with the size of the batch, "
    "changes a tensor in place (as `x += y` does) that it uses again under another name, or a registered rule is "
    "not the module it stands for"
)


def _check_finite(root: nn.Module) -> None:
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} contains NaN or infinity; the network cannot be converted")


def _with_rules(root: nn.Module, rules: Rules) -> nn.Module:
    """Put what the users' rules make in the place of their modules."""
    done: dict[int, nn.Module] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        rule = rules.get(type(module))
        if rule is None:
            continue
        if id(module) not in done:
            try:
                done[id(module)] = replacement = rule(module)
            except Exception as error:
                raise ConversionError(
                    f"the rule registered for {type(module).__name__} failed at {path!r}: {first_line(error)}"
                ) from error
            if not isinstance(replacement, nn.Module):
                raise TypeError(
                    f"the rule registered for {type(module).__name__} must return a torch.nn.Module, "
                    f"got {type(replacement).__name__} for {path!r}"
                )
        if not path:
            return done[id(module)].eval()
        root.set_submodule(path, done[id(module)].eval())
    return root


def _paths(root: nn.Module, graph: fx.Graph, dynamic: set[fx.Node]) -> dict[fx.Node, str]:
    """Path for every node: a module's own, or the owner's and the function's name; unique."""
    taken = {name for name, _ in root.named_modules()} | {INPUT}
    called: set[str] = {INPUT}
    paths: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "call_module" or CALLED in node.meta:
            path = str(node.meta.get(CALLED, node.target))
            path = unique_path(path, taken) if path in called else path
            called.add(path)
        elif node.op in ("call_function", "call_method"):
            owner = next((module for module, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
            name = node.meta.get(NAMED) or function_name(node.target)
            path = unique_path(f"{owner}.{name}" if owner else name, taken)
        else:
            continue
        paths[node] = path
        if node in dynamic:
            taken.add(path)
    return paths


def _check_known(root: nn.Module, graph: fx.Graph, paths: dict[fx.Node, str], dynamic: set[fx.Node]) -> None:
    """Refuse, by name, what is not in the table or what the table refuses."""
    for node in graph.nodes:
        if node not in dynamic or node.op in ("placeholder", "output") or builds_output(node):
            continue
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            reason, operation = reason_against(module), class_name(module)
        else:
            reason = None if node.target in FUNCTIONS else REASONS.get(node.target, "")
            operation = function_name(node.target)
        if reason is not None:
            raise ConversionError(refusal(paths[node], operation, reason) + line_of_node(node))


def _run(network: nn.Module, examples: tuple[Tensor, ...]) -> Any:
    """Run the network itself; an error of torch about an unfit input becomes ours, and so does what is no output."""
    try:
        out = network(*(each.clone() for each in examples))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        shapes = [[1, *each.shape[1:]] for each in examples]
        shape = shapes[0] if len(shapes) == 1 else shapes
        raise ConversionError(
            f"the network does not run on inputs of shape {shape} (the first of those given, [N, ...]): "
            f"{first_line(error)}"
        ) from error
    try:
        flattened(out, lambda each: isinstance(each, Tensor))
    except TypeError as error:
        raise ConversionError(f"the network must return a tensor, or several nested: {error}") from error
    return out
