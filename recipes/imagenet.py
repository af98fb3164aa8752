r"""ImageNet, or any images in folders: fit, convert, test, predict, sweep, with any ReLU network of torchvision.

    # 1,000 images drawn on the spot: the whole way.
    python recipes/imagenet.py fit --config recipes/configs/demo.yaml
    python recipes/imagenet.py convert --config recipes/configs/demo.yaml --ckpt_path runs/demo/best.ckpt --t_max 64
    python recipes/imagenet.py test --config recipes/configs/demo.yaml --ckpt_path runs/demo/best.ckpt \
        --snn runs/demo/snn.safetensors

    # Published weights, on ImageNet in its layout (imagenet/train/n01440764/*.JPEG, imagenet/val/...): no fit.
    python recipes/imagenet.py convert --data.root imagenet --model.arch resnet50 --model.weights DEFAULT --t_max 64
    python recipes/imagenet.py test --data.root imagenet --model.arch resnet50 --model.weights DEFAULT \
        --snn runs/imagenet/snn.safetensors
    python recipes/imagenet.py sweep --data.root imagenet --model.arch resnet50 --model.weights DEFAULT
    python recipes/imagenet.py figures                            # its pictures once more, beside the paper's

    # Your own images (photos/CLASS/*.jpg), from published weights; then classify a file.
    python recipes/imagenet.py fit --data.root photos --model.arch resnet18 --model.weights DEFAULT --model.lr 0.01
    python recipes/imagenet.py convert --data.root photos --model.arch resnet18 --ckpt_path runs/imagenet/best.ckpt
    python recipes/imagenet.py predict --snn runs/imagenet/snn.safetensors --images cat.jpg

Everything is written to runs/imagenet: best.ckpt, last.ckpt, snn.safetensors, convert.csv, test.json, test.csv,
sweep.csv, pictures, logs/ (CSV), tensorboard/; `--all_figures true` prints all figures of convert and test. A run that
was cut off goes on with `fit --ckpt_path runs/imagenet/last.ckpt`. On several machines or GPUs: `--trainer.devices 8
--trainer.num_nodes 2 --trainer.strategy ddp`, with every command. `--help` behind a command lists its options;
`--config FILE.yaml` reads them from a file; recipes/configs/imagenet.yaml has every key.
"""

from types import MappingProxyType
from typing import Any

from quartz_plugin.lightning import FolderData, ImageClassifier, QuartzCLI


class ImageNetClassifier(ImageClassifier):
    """A network for images in folders, trained with SGD and a cosine schedule after a warm-up.

    Parameters
    ----------
    cost_images : int, optional
        Costs are counted on so many of the test images, evenly spread; null counts on all.
    **options
        Those of ImageClassifier.
    """

    # VGG11, percentile 99, on the full validation set (arXiv:2309.16795).
    published_classes = 1000
    published = MappingProxyType(
        {
            "the paper's VGG11": (
                {"accuracy": 0.6811},
                {"t_max": 16, "steps": 196, "accuracy": 0.5444},
                {"t_max": 32, "steps": 404, "accuracy": 0.6444},
                {"t_max": 64, "steps": 820, "accuracy": 0.6724},
            )
        }
    )

    def __init__(self, cost_images: int | None = 50, **options: Any) -> None:
        super().__init__(cost_images=cost_images, **options)


def main() -> None:
    """Run the command line."""
    QuartzCLI.main(
        ImageNetClassifier,
        FolderData,
        trainer_defaults={
            "default_root_dir": "runs/imagenet",
            "max_epochs": 30,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
        },
    )


if __name__ == "__main__":
    main()
