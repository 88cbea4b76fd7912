"""Two halves of an image folder's classes, as folders of links: one to train on, one to fine-tune on.

    python benchmarks/studies/class_split.py --root data/cifar10 --output data

makes data/cifar10-even and data/cifar10-odd: the classes whose place in alphabetical order is even, and the others.
For CIFAR-10 each has vehicles and animals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SPLITS = ("train", "val", "test")


def split(root: Path, output: Path) -> tuple[Path, Path]:
    """Links to the classes of ``root`` under ``output``/NAME-even and ``output``/NAME-odd; what is there stays.

    Raises:
        FileNotFoundError: ``root`` holds no folder of a split.
    """
    halves = tuple(output / f"{root.name}-{half}" for half in ("even", "odd"))
    found = [root / name for name in SPLITS if (root / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"{root} holds none of {', '.join(f'{name}/' for name in SPLITS)}")
    for folder in found:
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        for place, source in enumerate(classes):
            link = halves[place % 2] / folder.name / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(source.resolve(), target_is_directory=True)
    return halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with train/CLASS/ and val/ or test/CLASS/")
    parser.add_argument("--output", type=Path, required=True, help="where the two folders go")
    arguments = parser.parse_args()
    for half in split(arguments.root.expanduser(), arguments.output.expanduser()):
        print(half)


if __name__ == "__main__":
    main()
