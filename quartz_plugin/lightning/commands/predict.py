"""predict: classify image files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quartz_plugin import plot
from quartz_plugin.lightning.commands.base import CommandTrainer
from quartz_plugin.lightning.data.preparation import ImagePreparation
from quartz_plugin.lightning.loading import check_size, load_both, name_of
from quartz_plugin.lightning.modules import Classifier
from quartz_plugin.lightning.notes import class_names_of
from quartz_plugin.lightning.outputs import save_pictures
from quartz_plugin.metrics import decision_latency
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.tables import format_table, printable
from quartz_plugin.task import class_scores


class Predict(CommandTrainer):
    """Predictions."""

    @torch.no_grad()
    def predict(  # type: ignore[override]
        self,
        model: Classifier,
        datamodule: Any,
        images: str | list[str],
        snn: str | None = None,
        ckpt_path: str | None = None,
        top: int = 5,
    ) -> list[dict[str, Any]]:
        """Classify image files: the most likely classes, the step of the decision, and a picture of the spikes.

        Parameters
        ----------
        model : Classifier
            The classifier.
        datamodule : ClassificationData
            Its data; a spiking network's file holds itself how images are prepared.
        images : str | list[str]
            An image file, or several: '[a.jpg, b.jpg]'.
        snn : str, optional
            File that convert wrote; without it the ANN answers (--ckpt_path or --model.weights).
        ckpt_path : str, optional
            Checkpoint of the ANN that fit wrote.
        top : int
            How many classes to show.
        """
        trained, network = load_both(model, snn, ckpt_path, datamodule)
        images = [images] if isinstance(images, str) else images
        if not images:
            raise ValueError("no images: give --images a list of files, as --images '[a.jpg, b.jpg]'")
        batch = _read(images, network, datamodule)
        result = None if network is None else network.run(batch)
        answers: dict[str, torch.Tensor] = {}
        if network is not None and result is not None:
            answers[name_of(network)] = result.logits
        if trained.fitted_on is not None:
            answers["ANN"] = trained.eval()(batch)
        names = (class_names_of(network.graph.settings) if network else []) or list(datamodule.class_names)
        stems = _stems(images)
        found = []
        for number, path in enumerate(images):
            decided = None if result is None else int(decision_latency(result)[number])
            when = "" if decided is None else f"  decided at step {decided} of {network.n_steps}"  # type: ignore[union-attr]
            tops = {who: top_classes(class_scores(logits)[number], top, names) for who, logits in answers.items()}
            ranks = zip(*tops.values(), strict=True)
            print(f"{printable(path)}{when}")
            print(format_table([*tops], [[f"{name}  {100 * share:.1f} %" for name, share in rank] for rank in ranks]))
            found.append({"image": path, "decision_step": decided, **tops})
            if result is not None:
                picture = f"{stems[number]}_raster"
                drawn = save_pictures(Path(self.default_root_dir), {picture: partial(plot.raster, result, number)})
                print(f"wrote {printable(drawn[picture])}\n")
        return found


def _read(images: Sequence[str], network: SpikingNetwork | None, datamodule: Any) -> torch.Tensor:
    """Read image files as the network's file has it; older files, and ANNs, take the data's preparation."""
    held = None if network is None else ImagePreparation.from_settings(network.graph.settings)
    if held is None:
        batch = torch.stack([datamodule.read(path) for path in images])
    else:
        batch = torch.stack([held.read(path) for path in images])
    if network is not None:
        check_size(network, batch[0])
    return batch


def _stems(images: Sequence[str]) -> list[str]:
    """Names of files without ending, numbered where two are alike."""
    stems = [Path(path).stem for path in images]
    alike = len(set(stems)) < len(stems)
    return [f"{number}_{stem}" if alike else stem for number, stem in enumerate(stems, 1)]


def top_classes(logits: torch.Tensor, count: int, names: Sequence[str]) -> list[tuple[str, float]]:
    """Return the `count` most likely classes of one image's logits ``[classes]``, and their softmax.

    Examples
    --------
    >>> top_classes(torch.tensor([0.0, 2.0, 0.0]), 1, ["cat", "dog", "owl"])[0][0]
    'dog'
    """
    shares, classes = logits.softmax(0).topk(min(count, len(logits)))
    named = len(names) == len(logits)
    return [
        (names[number] if named else f"class {number}", share)
        for number, share in zip(classes.tolist(), shares.tolist(), strict=True)
    ]
