"""Link data and weights that lie beside the checkout into datasets/, or say how to get each;
needs only Python.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
HOW_TO_GET = {
    "voc_subset": "python tools/prepare_voc_subset.py --download --voc datasets/VOC",
    "bccd": "github.com/Shenggan/BCCD_Dataset (MIT), its folder BCCD/ as datasets/bccd",
    "cifar10_10k": "python tools/prepare_cifar10_10k.py --download --cifar datasets/cifar10",
    "tiny_imagenet_20": "only tests use it: 20 classes of Tiny ImageNet",
    "voc2007_eval_oracle": "only tests use it: published detections and AP of a VOC2007 detector",
    "weights": "python tools/prepare_weights.py",
}


def main() -> None:
    """Print one line for each data set."""
    for name, how in HOW_TO_GET.items():
        link = ROOT / "datasets" / name
        source = SHARED / "weights" if name == "weights" else SHARED / "data" / name
        if link.exists():
            print(f"datasets/{name}: is there")
        elif source.exists():
            link.symlink_to(Path("../..") / source.relative_to(ROOT.parent))
            print(f"datasets/{name}: linked")
        else:
            print(f"datasets/{name}: is not there; {how}")


if __name__ == "__main__":
    main()
