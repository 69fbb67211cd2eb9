import json
import re
from pathlib import Path, PurePosixPath

from vision_ssm.data.datasets import LabelledImages, shorten
from vision_ssm.data.tars import TarMember, list_members
from vision_ssm.errors import InputError


def read_shards(
    root: Path, split: str, classes: tuple[str, ...], input_key: str = "jpg;jpeg;png;webp", target_key: str = "cls"
) -> LabelledImages:
    """The samples of webdataset shards on a disk, indexed, so that they can be read in any order.

    Args:
        root: The folder of the shards.
        split: Their names, such as `train-{0000..0146}.tar`, or a split in the folder's `_info.json`.
        classes: Names of the classes.
        input_key: Extensions of images, separated by semicolons.
        target_key: `cls`, a file that holds the class as a number; otherwise a field of the sample's `json`.

    Raises:
        InputError: Shards are missing or damaged, or a sample has no class, or one that does not exist.
    """
    images: list[TarMember] = []
    targets: list[int] = []
    names: list[str] = []
    extensions = image_extensions(input_key)
    for shard in find_shards(root, split):
        samples: dict[str, dict[str, TarMember]] = {}
        for path, member in list_members(shard, PurePosixPath()):
            name, extension = sample_name(path)
            samples.setdefault(name, {})[extension] = member
        for name, parts in samples.items():
            image = next((parts[extension] for extension in extensions if extension in parts), None)
            if image is None:
                continue
            file = parts.get(target_file(target_key))
            target = parse_target(file.open().read() if file else None, target_key, f"{shard}: {name}")
            if not 0 <= target < len(classes):
                raise InputError(f"{shard}: {name} is of class {target}, and there are {len(classes)} (--data.classes)")
            images.append(image)
            targets.append(target)
            names.append(f"{shard.name}/{name}")
    if not images:
        raise InputError(f"no images in the shards {split} of {root} (looked for {input_key})")
    return LabelledImages(images, targets, classes, names)


def find_shards(root: Path, split: str) -> list[Path]:
    """The files of a split; see `read_shards`.

    Raises:
        InputError: There is no such split, or files of it are missing.
    """
    if ".tar" in split:
        names = expand_braces(split.split("|")[0])
    else:
        info = next((path for name in ("_info.json", "info.json") if (path := root / name).is_file()), None)
        try:
            splits = json.loads(info.read_text())["splits"] if info else {}
            names = list(splits[split]["filenames"])
        except (ValueError, KeyError, TypeError):
            have = f"{info} names no split {split}" if info else f"{root} has no _info.json that names split {split}"
            raise InputError(f"{have}; name the shards, such as {split}-{{0000..0146}}.tar") from None
    if missing := [name for name in names if not (root / name).is_file()]:
        raise InputError(f"{root} lacks {shorten(missing)}")
    return [root / name for name in names]


def expand_braces(pattern: str) -> list[str]:
    """The names that `a-{00..12}.tar` or `{a,b}.tar` stand for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        options = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        options = match[1].split(",")
    rests = expand_braces(pattern[match.end() :])
    return [f"{pattern[: match.start()]}{option}{rest}" for option in options for rest in rests]


def sample_name(path: PurePosixPath) -> tuple[str, str]:
    """Which sample of a shard a file belongs to, and the file's extension, which begins at the first dot."""
    key, _, extension = path.name.partition(".")
    return str(path.with_name(key)), extension.lower()


def image_extensions(input_key: str) -> list[str]:
    """The extensions of images, those to prefer first."""
    return [key.strip().lower() for key in input_key.split(";")]


def target_file(key: str) -> str:
    """Extension of the file that holds the class."""
    return "cls" if key == "cls" else "json"


def parse_target(text: bytes | None, key: str, sample: str) -> int:
    """The class in a sample's file.

    Args:
        text: Content of the file, if there is one.
        key: See `read_shards`.
        sample: What to call it.

    Raises:
        InputError: There is no file, or no class in it.
    """
    if text is None:
        raise InputError(f"{sample} has no .{target_file(key)}")
    try:
        return int(text if key == "cls" else json.loads(text)[key])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{sample}: no class in .{target_file(key)}" + (f" under {key}" if key != "cls" else "")
        ) from None
