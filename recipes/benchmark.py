"""Time of a simulation, as a multiple of the same ANN's forward pass on the same images.

    python recipes/benchmark.py                                     # the paper's MNIST network, random weights
    python recipes/benchmark.py --data ../shared --memory true      # trained, on real images; peak memory as well
    python recipes/benchmark.py --data ../shared --networks [mnist,vgg11,resnet20,squeezenet] --t_max [16,64]
    python recipes/benchmark.py --networks resnet20 --t_max 4 --batch_size 20 --slow true
    python recipes/benchmark.py --data ../shared --t_max 16 --batch_size 100 --test_pass true

For each T everything runs in one process, interleaved: ANN, engine, engine, ..., ANN, engine, ..., after one round
that warms up; the table gives medians. The ANN gets images that are normalised already, and is timed in both layouts,
contiguous and channels-last: multiples are of the faster. `--networks` are mnist, vgg11, resnet20, squeezenet, resnet50
and efficientnet_lite0. A CSV file and a picture go to runs/benchmark.

"integer" has weights of 8 bits, and pairs of neurons where linear maps stand in a row; "ANN in int8" is the same
operators on images that are quantised already, without an encoder or spike times. "logits alone" computes no spike
times but the output's; "all spikes" records those of every layer; "all metrics" counts on them every cost that the
recipes' test reports. "event, hold off" is logits alone, of a neuron without hold whose bias is a synapse. stepped is
the paper's neuron, and so is to_snntorch() in a user's loop over the global clock. Rate code is the same ANN with
snnTorch's Leaky (beta = 1, reset by subtraction) for ReLU, weights scaled by the same percentiles, currents that stay:
16 steps of a plain loop.
"""

from quartz_plugin.lightning.benchmark import main

if __name__ == "__main__":
    main()
