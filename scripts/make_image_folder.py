"""Write the embedded pictures as an image folder, FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png.

Example: python scripts/make_image_folder.py runs/fashion_folder
"""

import argparse
from pathlib import Path

from PIL import Image

from ecanet.train.data import embedded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    splits = embedded()
    for split, images in (("train", splits.train), ("val", splits.val)):
        for index in range(len(images)):
            image, label = images[index]
            path = folder / split / splits.classes[label].replace("/", "-") / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)
    print(f"wrote {folder}: ecanet fit --config recipes/small/image_folder.yaml --data.root {folder}")


if __name__ == "__main__":
    main()
