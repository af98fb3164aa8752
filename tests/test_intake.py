"""Intake: what a network computes before its layers is carried out once, on a copy, or refused by name."""

import copy

import pytest
import torch
from helpers.random_graphs import COMPUTED, compute_weights
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.convert.trace import trace
from quartz_plugin.costs import ann_costs

FINE = {"t_max": 2000, "percentile": 100}
images = torch.rand(200, 6, generator=torch.Generator().manual_seed(1))


def small_ann():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def assert_spikes_as(ann, snn, at=0.005):
    with torch.no_grad():
        wanted = ann.eval()(images)
    assert (snn(images) - wanted).abs().max() < at * wanted.abs().max()


def contents(ann):
    """Everything that a network's modules hold: names, identities, values."""
    held = {}
    for path, module in ann.named_modules():
        held[path, "class"] = type(module), {name for name in vars(type(module)) if name[0] != "_"}
        for where in (vars(module), module._parameters, module._buffers, module._forward_pre_hooks):
            for name, value in where.items():
                held[path, name] = id(value), value.clone() if isinstance(value, torch.Tensor) else None
    return held


def assert_same_contents(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value[1], torch.Tensor):
            assert value[0] == other[key][0]
            assert torch.equal(value[1], other[key][1]), key
        else:
            assert value == other[key], key


class TestComputedWeights:
    @pytest.mark.parametrize("way", sorted(COMPUTED))
    def test_are_all_that_the_spiking_network_saves_and_loads(self, way):
        ann = small_ann()
        COMPUTED[way](ann[0])
        own = ann.state_dict().keys()
        snn = quartz_plugin.convert(ann, images)
        expected, state = snn(images), {name: value.clone() for name, value in snn.state_dict().items()}
        with torch.no_grad():
            for value in snn.state_dict().values():
                value.zero_()
        snn.load_state_dict(state)
        assert torch.equal(snn(images), expected)
        assert ann.state_dict().keys() == own
        ann.load_state_dict(ann.state_dict())

    @pytest.mark.parametrize("way", sorted(COMPUTED))
    @pytest.mark.parametrize("last", ["no forward", "with gradients", "no gradients", "inference mode", "loaded"])
    def test_are_those_of_the_next_forward(self, way, last, tmp_path):
        ann = small_ann()
        COMPUTED[way](ann[0])
        COMPUTED[way](ann[2])
        if last == "with gradients":
            ann(images)
        if last in ("no gradients", "loaded"):
            with torch.no_grad():
                ann(images)
        if last == "inference mode":
            with torch.inference_mode():
                ann(images)
        if last == "loaded":
            other = small_ann()
            COMPUTED[way](other[0])
            COMPUTED[way](other[2])
            ann.load_state_dict(other.state_dict())
        before = contents(ann)
        snn = quartz_plugin.convert(ann, images, **FINE)
        assert_same_contents(contents(ann), before)
        plain = small_ann()
        with torch.no_grad():
            wanted = ann.eval()(images)
            for ours, theirs in zip(plain, ann, strict=True):
                if isinstance(ours, nn.Linear):
                    ours.weight.copy_(theirs.weight)
                    ours.bias.copy_(theirs.bias)
            torch.testing.assert_close(plain(images), wanted)
        assert (snn(images) - wanted).abs().max() < 0.005 * wanted.abs().max()
        snn.save(tmp_path / "net.snn")
        assert torch.equal(quartz_plugin.load(tmp_path / "net.snn")(images), snn(images))

    @pytest.mark.parametrize("way", sorted(COMPUTED))
    def test_are_trained_verified_allocated_and_counted_as_plain_ones(self, way):
        ann = small_ann().eval()
        compute_weights(way, ann[0])
        plain = small_ann().eval()
        with torch.no_grad():
            settled = copy.deepcopy(ann)
            settled(images)
            plain.load_state_dict({f"{i}.{n}": getattr(settled[i], n) for i in (0, 2, 4) for n in ("weight", "bias")})
        before = contents(ann)
        net, expected = (quartz_plugin.prepare_qat(each, images, 8) for each in (ann, plain))
        torch.testing.assert_close(net(images), expected(images))
        assert {name for name, _ in net.named_parameters()} == {name for name, _ in expected.named_parameters()}
        check = quartz_plugin.verify(ann, quartz_plugin.convert(plain, images, **FINE), images)
        assert max(layer.worst for layer in check.layers) < 10
        one, other = (quartz_plugin.allocate_steps(each, images, 60, choices=(2, 4, 8)) for each in (ann, plain))
        assert one == other
        assert ann_costs(ann, images) == pytest.approx(ann_costs(plain, images), rel=1e-3)
        assert_same_contents(contents(ann), before)

    def test_of_any_hook_are_carried_out_once(self):
        ann = small_ann()
        raw = ann[0].weight.detach().clone()
        del ann[0].weight
        ann[0].raw = nn.Parameter(raw)
        ann[0].register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.raw.tanh()))
        ann[2].register_forward_pre_hook(lambda module, _: [None, module.weight.data.clamp_(-0.1, 0.2)][0])
        with torch.no_grad():
            ann(images)
            ann[0].raw.mul_(3)
        snn = quartz_plugin.convert(ann, images, **FINE)
        assert_spikes_as(ann, snn)
        assert set(trace(ann, images[:1]).module.state_dict()) == set(small_ann().state_dict())

    def test_made_by_a_hook_of_the_whole_network(self):
        ann = small_ann()
        ann.factor = 2.0
        raw = ann[0].weight.detach().clone()
        ann.register_forward_pre_hook(lambda net, _: [None, net[0].weight.data.copy_(raw * net.factor)][0])
        assert_spikes_as(ann, quartz_plugin.convert(ann, images, **FINE))

    def test_that_differ_from_call_to_call_are_refused(self):
        ann = small_ann()
        ann[2].register_forward_pre_hook(lambda module, _: [None, module.weight.data.mul_(0.5)][0])
        with pytest.raises(ConversionError, match=r"a hook gives '2' \(Linear\) other weights in each call.*remove"):
            quartz_plugin.convert(ann, images)

    def test_that_are_no_parameters_are_taken_as_they_are(self):
        ann = small_ann()
        weight = ann[0].weight.detach().clone()
        del ann[0].weight
        ann[0].weight = weight
        buffered = ann[2].weight.detach().clone()
        del ann[2].weight
        ann[2].register_buffer("weight", buffered)
        assert_spikes_as(ann, quartz_plugin.convert(ann, images, **FINE))
        net = quartz_plugin.prepare_qat(ann, images)
        assert dict(net.network.named_parameters()).keys() >= {"0.weight", "2.weight"}

    def test_that_are_nan_are_refused(self):
        ann = small_ann()
        parametrizations.weight_norm(ann[0])
        with torch.no_grad():
            ann[0].parametrizations.weight.original0.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"0\.weight contains NaN"):
            quartz_plugin.convert(ann, images)

    def test_that_cannot_be_computed_are_refused_by_name(self):
        ann = small_ann()
        ann[2].register_forward_pre_hook(prune.L1Unstructured(1))
        with pytest.raises(ConversionError, match=r"the weights of '2' \(Linear\) cannot be computed.*prune\.remove"):
            quartz_plugin.convert(ann, images)


class TestHooks:
    def test_that_record_are_taken_off_the_copy_alone(self):
        ann, seen = small_ann(), []
        ann[1].register_forward_hook(lambda module, inputs, out: seen.append(out.detach().cpu().numpy()))
        ann.register_forward_hook(lambda module, inputs, out: seen.append(out.tolist()))
        ann[0].register_full_backward_hook(lambda module, inputs, out: None)
        snn = quartz_plugin.convert(ann, images, **FINE)
        assert_spikes_as(ann, snn)
        assert len(ann[1]._forward_hooks) == len(ann._forward_hooks) == len(ann[0]._backward_hooks) == 1

    @pytest.mark.parametrize("kind", ["output", "output in place", "input"])
    @pytest.mark.parametrize("path", ["2", ""])
    def test_that_change_values_are_refused_by_name(self, kind, path):
        ann = small_ann()
        module = ann.get_submodule(path)
        if kind == "input":
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.0001,))
        elif kind == "output":
            module.register_forward_hook(lambda module, inputs, out: out * 1.0001)
        else:
            module.register_forward_hook(lambda module, inputs, out: [None, out.mul_(1.0001)][0])
        name = path or "the network itself"
        with pytest.raises(ConversionError, match=rf"a hook on '{name}' .* changes its {kind.split()[0]}.*remove"):
            quartz_plugin.convert(ann, images)

    def test_of_blocks_are_carried_out_where_tracing_sees_them(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.relu = nn.Linear(6, 6), nn.ReLU()

            def forward(self, x):
                return self.relu(self.fc(x))

        ann = nn.Sequential(Block(), nn.Linear(6, 3))
        ann[0].register_forward_hook(lambda module, inputs, out: out + 2 * inputs[0])
        assert_spikes_as(ann, quartz_plugin.convert(ann, images, **FINE))

    def test_a_forward_replaced_on_one_module_is_refused_by_name(self):
        ann = small_ann()
        ann[2].forward = lambda x: 2 * nn.functional.linear(x, ann[2].weight)
        with pytest.raises(ConversionError, match=r"'2' \(Linear\): its forward has been replaced"):
            quartz_plugin.convert(ann, images)
        ann = small_ann()
        ann.forward = lambda x: 2 * ann[0](x)
        with pytest.raises(ConversionError, match="its forward has been replaced"):
            quartz_plugin.convert(ann, images)


class Opaque(nn.Module):
    """As torch.compile wraps: a module that holds another as `_orig_mod`."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *inputs):
        raise AssertionError("not to be run")


COMPILE = torch.compile  # Lightning puts its own in its place when it is imported.
WRAPPERS = [nn.DataParallel, AveragedModel, COMPILE, Opaque]


class TestWrappers:
    @pytest.mark.parametrize("inner", WRAPPERS)
    @pytest.mark.parametrize("outer", WRAPPERS)
    def test_are_taken_off_wherever_they_are(self, inner, outer):
        if inner is outer is COMPILE:
            pytest.skip("torch.compile makes a function of what it has compiled")
        ann = small_ann()
        with torch.no_grad():
            prune.l1_unstructured(ann[2], "weight", 0.3)
        expected = quartz_plugin.convert(ann, images)
        modules = list(ann)
        modules[0] = inner(modules[0])
        wrapped = outer(inner(nn.Sequential(nn.Sequential(*modules[:2]), outer(nn.Sequential(*modules[2:])))))
        found = quartz_plugin.convert(wrapped, images)
        assert torch.equal(found(images), expected(images))
        assert [row["module"] for row in found.report] == ["0.0", "0.1", "1.0", "1.1", "1.2", "output"]

    def test_hand_down_their_hooks(self):
        ann = small_ann()
        ann[2] = nn.DataParallel(ann[2])
        ann[2].register_forward_hook(lambda module, inputs, out: 2 * out)
        with pytest.raises(ConversionError, match=r"a hook on '2' \(Linear\) changes its output"):
            quartz_plugin.convert(ann, images)


class TestNetworksThatAreNone:
    def test_exported_ones_in_parts_are_refused(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 3)

            def forward(self, x):
                return self.fc(x).relu()

        program = torch.export.export(Net(), (images,))
        for ann in (torch.export.unflatten(program), nn.Sequential(program.module())):
            with pytest.raises(ConversionError, match=r"an exported network.*give the exported program itself, or"):
                quartz_plugin.convert(ann, images)

    def test_scripted_parts_are_refused_with_their_path(self):
        ann = small_ann()
        ann[2] = torch.jit.trace(ann[2], torch.rand(1, 8))
        with pytest.raises(ConversionError, match=r"scripted network.*\(at '2'\).*give the nn.Module"):
            quartz_plugin.convert(ann, images)

    def test_what_cannot_be_copied_gives_the_reason(self):
        class Locked(nn.Linear):
            def __deepcopy__(self, memo):
                raise TypeError("a lock\nis held")

        with pytest.raises(ConversionError, match=r"^Sequential cannot be copied: a lock; .*copy\.deepcopy can copy$"):
            quartz_plugin.convert(nn.Sequential(Locked(6, 3)), images)
