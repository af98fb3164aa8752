"""The two pictures of README: one neuron at work, and accuracy against steps.

    python recipes/results/pictures.py

The curves are the tables of few_steps.md, whose commands stand there.
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

from quartz_plugin import TTFSNeuron, encode
from quartz_plugin.plot import EXCITING, INHIBITING, MARK, NEUTRAL

HERE = Path(__file__).parent

MNIST_STEPS = (7, 19, 43, 91, 187)
MNIST = {
    "converted": (79.61, 97.97, 98.99, 99.16, 99.22),
    "scales by least squares": (95.05, 98.97, 99.08, 99.17, 99.21),
    "trained with its rounding": (97.86, 99.05),
}
RESNET_STEPS = (95, 179, 347, 683)
RESNET = {
    "converted": (51.9, 84.5, 88.6, 90.6),
    "scales by least squares": (68.7, 86.2, 89.3, 90.4),
    'weights tuned ("best")': (86.5, 90.3, 91.4, 91.5),
    "trained with its rounding": (89.1, 90.3),
}
LOOKS = {
    "converted": "C7o-",
    "scales by least squares": "C0o-",
    'weights tuned ("best")': "C2o-",
    "trained with its rounding": "C3o-",
}


def draw_neuron() -> None:
    """Three input spikes, the membrane and the spike of one neuron, T = 16."""
    t_max, weights, values = 16, (0.8, 0.4, -0.5), (0.8, 0.6, 0.4)
    window = t_max - 1
    neuron, state = TTFSNeuron(t_max, hold=True), None
    spikes = encode(torch.tensor([values]), t_max, steps=2 * window + 1)
    membrane = []
    for step in spikes:
        out, state = neuron(step @ torch.tensor(weights).unsqueeze(1), state)
        membrane.append(float(state.v))
        if out.any():
            fired = len(membrane) - 1
    _, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 3.8), height_ratios=(1, 2.2), layout="constrained")
    for row, (value, weight) in enumerate(zip(values, weights, strict=True)):
        step = int(spikes[:, 0, row].argmax())
        color = EXCITING if weight > 0 else INHIBITING
        above.plot([step, step], [-row - 0.4, -row + 0.4], color=color, linewidth=3)
        above.text(step + 0.4, -row, f"x = {value}, w = {weight}", va="center", fontsize=9, color=color)
    above.set(yticks=[], ylim=(-2.7, 0.7), ylabel="input\nspikes")
    below.step(range(len(membrane)), membrane, where="post", color=NEUTRAL)
    below.axhline(window + 0.5, color=INHIBITING, linestyle="--", linewidth=1)
    below.text(0.2, window + 0.9, "threshold S + 1/2", color=INHIBITING, fontsize=9)
    below.plot(fired, membrane[fired], "o", color=MARK)
    level = 2 * window - fired
    below.annotate(
        f"the one spike, at step {fired}:\nlevel {level}, value {level}/{window}", (fired, membrane[fired]),
        (fired + 0.7, 5.5), color=MARK, fontsize=9,
    )  # fmt: skip
    drive = sum(w * x for w, x in zip(weights, values, strict=True))
    below.text(window + 0.3, membrane[window] - 4.2, f"readout: v = S y,\ny = {drive:.2f}", fontsize=9)
    below.set(ylabel="membrane v", xlabel="step", xlim=(-0.5, 2 * window + 0.7), ylim=(-1.5, window + 3.5))
    for ax in (above, below):
        ax.axvspan(0, window, color="0.94", zorder=0)
        ax.axvline(window, color=NEUTRAL, linewidth=1, linestyle=":")
    above.set_title("the inputs' window: integrate", loc="left", fontsize=10)
    above.set_title("its own window: climb by one a step, fire once", loc="right", fontsize=10)
    _save("neuron")


def draw_accuracy() -> None:
    """Accuracy against the steps of an inference, beside the ANN's and the paper's."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    _draw_curves(left, MNIST_STEPS, MNIST, ann=99.23)
    left.plot((51, 91, 171), (99.05, 99.16, 99.25), "k*", label="the paper")
    left.set(title="MNIST, the paper's network, 10,000 images", ylim=(94.5, 99.6))
    _draw_curves(right, RESNET_STEPS, RESNET, ann=91.5)
    right.set(title="CIFAR-10, ResNet-20, 1,000 images", ylim=(65, 93.5))
    for ax, ticks in ((left, MNIST_STEPS), (right, RESNET_STEPS)):
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.set(xlabel="steps of an inference", ylabel="accuracy, %")
        ax.legend(fontsize=8, loc="lower right")
    _save("accuracy")


def _draw_curves(ax: Any, steps: tuple[int, ...], curves: dict[str, tuple[float, ...]], ann: float) -> None:
    for name, accuracies in curves.items():
        ax.plot(steps[: len(accuracies)], accuracies, LOOKS[name], label=name, markersize=4)
    ax.axhline(ann, color="k", linestyle="--", linewidth=1, label="ANN")


def _save(name: str) -> None:
    plt.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close()


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "quartz"
    draw_neuron()
    draw_accuracy()
