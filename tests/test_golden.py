"""The numbers of the authors' own simulation, reproduced without exception (shared/golden)."""

from itertools import pairwise

import pytest
import torch
from helpers.golden import FILES, LAYERS, NAMES, SYNAPSES, golden_steps, levels_of, read, spiking_network
from torch import nn

from quartz_plugin import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron, decode, encode, reset
from quartz_plugin.coding import window_length
from quartz_plugin.costs.counts import merged_operations

pytestmark = pytest.mark.shared

DTYPES = [torch.float32, torch.float64]

SOURCES = dict(zip(LAYERS, ["input", "pool1_decoded", "pool2_decoded", "if3_decoded"], strict=True))


files = pytest.mark.parametrize("file", FILES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def first_steps(spikes):
    """Step of the first spike of each unit, -1 where there is none."""
    fired = spikes != 0
    return torch.where(fired.any(0), fired.to(torch.int8).argmax(0), -1)


def trains(levels, readout):
    """Spikes, step for step up to the readout, of sources whose window ends there."""
    return (levels == readout - torch.arange(readout + 1).view(-1, *[1] * levels.dim())).float()


# ------------------------------------------------------------------------------------ each layer by itself


@files
@dtypes
@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_alone_reproduces_golden_values_and_times(file, layer, dtype):
    golden = read(file)
    t_max = int(golden["t_max"])
    weight, bias = (golden[f"{SYNAPSES[layer]}_{part}"].to(dtype) for part in ("weight", "bias"))
    x = golden[SOURCES[layer]]
    output = layer == "if4"
    if output:
        x = x.flatten(1)

    neuron = TTFSNeuron(
        t_max,
        layer=2,  # room for sources that fire early
        rectifier=None if output else "spike",
        bias=bias if output else bias[:, None, None],
        bias_code="spike",
        init_hidden=True,
    )
    readout = neuron.clock.readout
    arriving = trains(levels_of(x, t_max), readout).to(dtype)
    assert arriving.sum() == x.numel()  # everybody fires once
    synapse = nn.functional.linear if output else nn.functional.conv2d
    silence = torch.zeros_like(synapse(arriving[0], weight))
    currents = [synapse(s, weight) if s.any() else silence for s in arriving]
    currents += [silence] * (neuron.p.last_step - readout)
    with torch.no_grad():
        spikes = torch.stack([neuron(current) for current in currents])

    steps = first_steps(spikes)
    assert torch.equal(steps, golden_steps(golden, layer, readout))
    assert torch.equal(decode(spikes, t_max, start=readout).float(), golden[f"{layer}_decoded"])
    assert torch.equal(spikes.sum(0).float(), golden[f"{layer}_spike_count"])
    early = (steps < readout).double().mean().item()
    assert early == pytest.approx(golden[f"{layer}_early_share"].item(), abs=1e-7)


@files
@pytest.mark.parametrize("number", [1, 2])
def test_first_spike_pooling_reproduces_golden_pools(file, number):
    golden = read(file)
    t_max = int(golden["t_max"])
    readout = 3 * window_length(t_max)  # its window ends here
    spikes = trains(levels_of(golden[f"if{number}_decoded"], t_max), readout)
    pool = FirstSpikeMaxPool(nn.MaxPool2d(2), init_hidden=True)
    pooled = torch.stack([pool(s) for s in spikes])
    values = decode(pooled, t_max, start=readout - window_length(t_max))
    assert torch.equal(values, golden[f"pool{number}_decoded"])
    assert torch.equal(pooled.sum(0), torch.ones_like(values))


# --------------------------------------------------------------------- the whole network, from the images on


@files
@dtypes
def test_the_whole_network_reproduces_all_layers_from_the_images_on(file, dtype):
    golden = read(file)
    t_max = int(golden["t_max"])
    snn = spiking_network(golden, dtype)
    result = snn.run(golden["input"].to(dtype), engine="stepped")
    assert list(result.spike_steps) == ["input", *NAMES.values()]
    for layer, name in NAMES.items():
        window = snn.windows[name]
        steps = result.spike_steps[name]
        assert torch.equal(steps.long(), golden_steps(golden, layer, window.start)), layer
        values = result.levels(name).float() / window_length(t_max)
        assert torch.equal(values, golden[f"{layer}_decoded"]), layer
        early = result.early[name].double().mean().item()
        assert early == pytest.approx(golden[f"{layer}_early_share"].item(), abs=1e-7)
    torch.testing.assert_close(result.logits.float(), golden["output_decoded"])
    assert torch.equal(result.logits.argmax(1), golden["output_decoded"].argmax(1))
    assert torch.equal(result.spike_steps["input"].long(), first_steps(encode(golden["input"], t_max)))


def record_spikes(net, spikes):
    """Step a net by hand; the steps at which each of its neurons and pools fires, by the module's name."""
    recorded = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: recorded.setdefault(name, []).append(out))
        for name, module in net.named_modules()
        if isinstance(module, TTFSNeuron | FirstSpikeMaxPool)
    ]
    with torch.no_grad():
        out = torch.stack([net(s) for s in spikes])
    for handle in handles:
        handle.remove()
    return out, {name: torch.stack(outs) for name, outs in recorded.items()}


@files
def test_the_snntorch_network_stepped_by_hand_reproduces_all_layers(file):
    golden = read(file, images=16)
    t_max = int(golden["t_max"])
    snn = spiking_network(golden)
    net = snn.to_snntorch()
    spikes = encode(golden["input"], t_max, snn.n_steps)
    out, recorded = record_spikes(net, spikes)
    assert torch.equal(recorded[NAMES["if4"]], out)
    for layer, name in NAMES.items():
        assert torch.equal(first_steps(recorded[name]), golden_steps(golden, layer, snn.windows[name].start)), layer
        assert torch.equal(decode(recorded[name], t_max, start=snn.windows[name].start), golden[f"{layer}_decoded"]), (
            layer
        )
        assert torch.equal(recorded[name].sum(0), golden[f"{layer}_spike_count"])
    for pool, source in (("2", "1"), ("5", "4")):
        pooled = decode(recorded[pool], t_max, start=snn.windows[source].start)
        assert torch.equal(pooled, golden[f"pool{'25'.index(pool) + 1}_decoded"])


@pytest.mark.parametrize("file", ["p99_t4", "p99.9_t4"])
def test_after_a_reset_the_snntorch_network_says_the_same(file):
    golden = read(file)
    snn = spiking_network(golden)
    net = snn.to_snntorch()
    spikes = encode(golden["input"][:8], int(golden["t_max"]), snn.n_steps)
    with torch.no_grad():
        first = torch.stack([net(s) for s in spikes])
        reset(net)
        assert torch.equal(torch.stack([net(s) for s in spikes]), first)
    start = snn.windows["output"].start
    assert torch.equal(decode(first, int(golden["t_max"]), start), golden["if4_decoded"][:8])


@pytest.mark.parametrize("file", ["p99_t4", "p99.9_t16"])
def test_the_norse_network_stepped_by_hand_reproduces_the_output(file):
    pytest.importorskip("norse")
    golden = read(file, images=16)
    t_max = int(golden["t_max"])
    snn = spiking_network(golden)
    net, state, out = snn.to_norse(), None, []
    with torch.no_grad():
        for s in encode(golden["input"], t_max, snn.n_steps):
            spk, state = net(s, state)
            out.append(spk)
    start = snn.windows["output"].start
    assert torch.equal(first_steps(torch.stack(out)), golden_steps(golden, "if4", start))
    assert torch.equal(decode(torch.stack(out), t_max, start), golden["output_decoded"])


@files
def test_layers_follow_each_other_without_delay_though_some_biases_come_before_their_windows(file):
    """A bias above 1 needs empty steps in front in layer 1 alone, and there all biases are small here."""
    golden = read(file)
    t_max = int(golden["t_max"])
    snn = spiking_network(golden)
    windows = list(snn.windows.values())
    assert [later.start - earlier.end for earlier, later in pairwise(windows)] == [0, 0, 0, 0]
    assert snn.n_steps == 6 * window_length(t_max) + 1
    assert not [module for module in snn.modules() if isinstance(module, AxonalDelay)]
    before = [
        int((layer.neuron.clock.bias_spike_steps(layer.neuron.bias) < layer.neuron.clock.first_input).sum())
        for layer in snn.graph.layers
    ]
    assert before[0] == 0
    assert (sum(before) > 0) == file.startswith("p99_")


@pytest.mark.parametrize("file", ["p99_t4", "p99_t16"])
def test_empty_steps_in_front_shift_all_spikes_and_change_none(file):
    """A bias of 1.25 in the first layer starts the clock earlier; other channels say what they said."""
    golden = dict(read(file, images=8))
    window = window_length(int(golden["t_max"]))
    plain = spiking_network(golden).run(golden["input"], engine="stepped")
    golden["conv1_bias"] = golden["conv1_bias"].clone()
    golden["conv1_bias"][0] = 1.25
    snn = spiking_network(golden)
    shift = snn.windows["1"].start - window
    assert shift == -round(window * 0.75) + window
    shifted = snn.run(golden["input"], engine="stepped")
    assert torch.equal(shifted.spike_steps["1"][:, 1:], plain.spike_steps["1"][:, 1:] + shift)
    assert shifted.early["1"][:, 0].any()
    assert [type(module) for module in snn.to_snntorch()].count(AxonalDelay) == 1
    net = snn.to_snntorch()
    with torch.no_grad():
        out = torch.stack([net(s) for s in encode(golden["input"], window + 1, snn.n_steps)])
    assert torch.equal(first_steps(out), shifted.spike_steps["output"].long())


@files
def test_merged_operations_are_within_2_percent_of_the_authors_counts(file):
    """Layer by layer; the authors' count holds a little float noise."""
    golden = read(file)
    snn = spiking_network(golden)
    result = snn.run(golden["input"], engine="stepped")
    for number, counts in enumerate(merged_operations(snn.graph, result).values(), 1):
        assert float(counts.double().mean()) == pytest.approx(float(golden[f"if{number}_n_ops"]), rel=0.02), number
