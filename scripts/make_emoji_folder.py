"""Write a folder of emoji in colour, sorted by category, for `ecanet fit` and `ecanet study`.

    npm pack emoji-datasource-google emoji-datasource-twitter
    mkdir google twitter
    tar xzf emoji-datasource-google-*.tgz -C google && tar xzf emoji-datasource-twitter-*.tgz -C twitter
    python scripts/make_emoji_folder.py google/package twitter/package runs/emoji

Each emoji is drawn by Google (Noto Emoji, SIL Open Font License) and by Twitter (Twemoji, CC-BY 4.0); the packages' own
licence is MIT. Both drawings of an emoji go to the same part, so that no validation picture has a twin to learn from:
one emoji in four, by a hash of its code, is for validation. Skin tones and the five components are left out.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

from PIL import Image

_IMAGE = re.compile(r"[0-9a-f-]{2,80}\.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("google", type=Path, help="The unpacked package emoji-datasource-google.")
    parser.add_argument("twitter", type=Path, help="The unpacked package emoji-datasource-twitter.")
    parser.add_argument("out", type=Path, help="A folder that does not exist yet.")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: choose another folder")
    counts = {"train": 0, "val": 0}
    for vendor in ("google", "twitter"):
        package: Path = getattr(args, vendor)
        if not (package / "emoji.json").is_file():
            parser.error(f"{package} has no emoji.json: give the folder `package` of the unpacked archive")
        for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
            name, category = str(emoji["image"]), str(emoji["category"])
            if category == "Component" or not emoji[f"has_img_{vendor}"]:
                continue
            if not _IMAGE.fullmatch(name):
                parser.error(f"{package / 'emoji.json'} names the image {name!r}, which is no file name of a code")
            part = "val" if hashlib.sha256(name.encode()).digest()[0] < 64 else "train"
            folder = args.out / part / re.sub(r"\W+", "_", category).lower()
            folder.mkdir(parents=True, exist_ok=True)
            with Image.open(package / "img" / vendor / "64" / name) as picture:
                drawn = picture.convert("RGBA")
            white = Image.new("RGBA", drawn.size, "white")
            Image.alpha_composite(white, drawn).convert("RGB").save(folder / f"{vendor}-{name}")
            counts[part] += 1
    print(f"wrote {args.out}: {counts['train']} pictures to train on, {counts['val']} to validate")


if __name__ == "__main__":
    main()
