r"""CIFAR-10: fit, convert, test, predict, sweep. A VGG that 2 CPU cores train in an hour, ResNet-20, or your own.

    python recipes/cifar10.py fit --data.root data                # downloaded unless data/cifar-10-batches-py is there
    python recipes/cifar10.py convert --data.root data --ckpt_path runs/cifar10/best.ckpt --t_max 32
    python recipes/cifar10.py test --data.root data --ckpt_path runs/cifar10/best.ckpt \
        --snn runs/cifar10/snn.safetensors
    python recipes/cifar10.py predict --snn runs/cifar10/snn.safetensors --images '[cat.png, ship.png]'
    python recipes/cifar10.py sweep --data.root data --ckpt_path runs/cifar10/best.ckpt
    python recipes/cifar10.py figures                             # its pictures once more, beside the paper's

`--data.root` may also be a folder with train/CLASS/*.png, val and test. Trained weights go without fit, as ResNet-20's:

    python recipes/cifar10.py sweep --config recipes/configs/cifar10_resnet20.yaml --data.root FOLDER \
        --model.weights FILE

Everything is written to runs/cifar10: best.ckpt, last.ckpt, snn.safetensors, convert.csv, test.json, test.csv,
sweep.csv, pictures, logs/ (CSV), tensorboard/; `--all_figures true` prints all figures of convert and test. A run that
was cut off goes on with `fit --ckpt_path runs/cifar10/last.ckpt`. `--help` behind a command lists its options;
`--config FILE.yaml` reads them from a file; recipes/configs/cifar10.yaml has every key.
"""

from types import MappingProxyType
from typing import Any

from quartz_plugin.lightning import CIFAR10Data, ImageClassifier, QuartzCLI


class CIFAR10Classifier(ImageClassifier):
    """A network for 32 x 32 images, trained with SGD and a cosine schedule after a warm-up.

    Parameters
    ----------
    arch : str
        vgg_cifar10, vgg11_bn_cifar10 or resnet20 (quartz_plugin.lightning), any classification model of
        torchvision, timm:NAME, hf:OWNER/NAME, hf:FOLDER, or the import path of your own class.
    weight_decay : float
        SGD's; not for biases and batch norms.
    **options
        Those of ImageClassifier.
    """

    # VGG11 with batch norm, percentile 99 (arXiv:2309.16795).
    published = MappingProxyType(
        {
            "the paper's VGG11": (
                {"accuracy": 0.9239},
                {"t_max": 8, "steps": 92, "accuracy": 0.8331},
                {"t_max": 16, "steps": 196, "accuracy": 0.9136},
                {"t_max": 32, "steps": 404, "accuracy": 0.9215},
                {"t_max": 64, "steps": 820, "accuracy": 0.9226},
            )
        }
    )

    def __init__(self, arch: str = "vgg_cifar10", weight_decay: float = 5e-4, **options: Any) -> None:
        super().__init__(arch, weight_decay=weight_decay, **options)


def main() -> None:
    """Run the command line."""
    QuartzCLI.main(
        CIFAR10Classifier,
        CIFAR10Data,
        trainer_defaults={
            "default_root_dir": "runs/cifar10",
            "max_epochs": 30,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
        },
    )


if __name__ == "__main__":
    main()
