"""A study as YAML: conditions that differ in their gates, seeds, and the recipe that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecanet.study.conditions import SETTINGS, SWEEP, conditions_from_options, recipes
from ecanet.study.statistics import fewest_seeds
from ecanet.train.config import Recipe, model_of_a_file
from ecanet.train.recipes import check_blocks, for_parser, read_plain, with_source_named
from ecanet.untrusted import check_plain, listed, shown

_CONDITION_KEYS = (*SETTINGS, SWEEP)
_KEYS = ("conditions", "seeds", "recipe")
#: Largest number of conditions, and of seeds, in a file.
_MAX_ITEMS = 1000
_SEEDS_HINT = "every condition is trained with each of its seeds, such as --seeds 9 or seeds: [0, 1, 2]"


@dataclass
class StudyFile:
    """The content of a study's file, which may leave out any of these parts.

    Attributes:
        conditions: Changes to the recipe's block ``model`` by name, the baseline first.
        seeds: Seeds.
        recipe: Blocks of the recipe, as :func:`ecanet.train.recipes.read_recipe` returns them.
    """

    conditions: dict[str, dict[str, Any]]
    seeds: list[int]
    recipe: dict[str, dict[str, Any]]


def read_study(path: str | Path) -> StudyFile:
    """Read a study. Its content is treated as data, as a recipe's is: no object is built and no reference followed.

    Args:
        path: The YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a study; the message names the file and the mistake.
    """
    source, content = shown(str(path), 200), read_plain(path, "study")
    if not isinstance(content, dict):
        raise ValueError(f"{source} is not a study: it must hold {', '.join(_KEYS)}, got {shown(content)}")
    if unknown := [key for key in content if key not in _KEYS]:
        raise ValueError(f"{source}: a study has only the parts {', '.join(_KEYS)}, got {listed(map(str, unknown), 5)}")
    conditions, seeds, recipe = content.get("conditions", {}), content.get("seeds", []), content.get("recipe", {})
    _check_conditions(conditions, source)
    recipe = check_blocks(recipe, f"{source}: recipe")
    if "seed" in recipe.get("trainer", {}):
        raise ValueError(f"{source}: recipe.trainer.seed is not for a study: {_SEEDS_HINT}")
    return StudyFile(conditions, _checked_seeds(seeds, source), recipe)


def _check_conditions(conditions: object, source: str) -> None:
    if not isinstance(conditions, dict) or len(conditions) > _MAX_ITEMS:
        got = f"{len(conditions)} of them" if isinstance(conditions, dict) else shown(conditions)
        raise ValueError(
            f"{source}: conditions must be at most {_MAX_ITEMS} names with changes, such as none: {{gate: null}}, "
            f"got {got}"
        )
    for name, changes in conditions.items():
        where = f"{source}: conditions.{shown(name)}"
        if not isinstance(name, str) or not isinstance(changes, dict):
            raise ValueError(f"{where} must be a name with {', '.join(_CONDITION_KEYS)}, got {shown(changes)}")
        changes = conditions[name] = model_of_a_file(changes, where)
        for key, value in changes.items():
            if key not in _CONDITION_KEYS:
                raise ValueError(f"{where} cannot have {shown(key)}; it may have {', '.join(_CONDITION_KEYS)}")
            try:
                check_plain(value, f"{where}.{key}")
            except TypeError as error:
                raise ValueError(str(error)) from error


def _checked_seeds(seeds: object, source: str) -> list[int]:
    if type(seeds) is int and 0 < seeds <= _MAX_ITEMS:
        return list(range(seeds))
    if isinstance(seeds, list) and len(seeds) <= _MAX_ITEMS and all(type(seed) is int for seed in seeds):
        return seeds
    raise ValueError(
        f"{source}: seeds must be their number, from 1 to {_MAX_ITEMS}, or a list of integers, got {shown(seeds)}"
    )


def with_study_recipe(args: list[str]) -> list[str]:
    """Add to a command line the recipe of its study's file, and ``--data.source`` if only ``--data.root`` is given.

    Args:
        args: The command line; a study's file comes first, if there is one. Options after it override its recipe.

    Raises:
        FileNotFoundError: as in :func:`read_study`.
        ValueError: as in :func:`read_study`; or ``--trainer.seed`` is given, or ``--model.gate`` with ``--gates``.
    """
    recipe = read_study(args[0]).recipe if args and not args[0].startswith("-") else {}
    words = [word.partition("=")[0] for word in args]
    if "--trainer.seed" in words:
        raise ValueError(f"--trainer.seed is not for a study: {_SEEDS_HINT}")
    if "--model.gate" in words and {"--gates", "--kernel-sizes"} & set(words):
        raise ValueError("--model.gate sets the gate of every condition: leave it out, as --gates names them all")
    if "source" not in recipe.get("data", {}):
        args = with_source_named(args)
    return ["--config", for_parser(recipe), *args] if recipe else args


def conditions_and_seeds(
    recipe: Recipe, file: Path | None, gates: str | None, kernel_sizes: str | None, seeds: int | None
) -> tuple[dict[str, Recipe], Sequence[int]]:
    """The recipe of every condition, and the seeds, from a study's file or from the options that replace parts of it.

    Args:
        recipe: What the conditions share.
        file: A study's file.
        gates: As in :func:`ecanet.study.conditions.conditions_from_options`; if only ``kernel_sizes`` is given, no gate
            and ECA.
        kernel_sizes: As in :func:`ecanet.study.conditions.conditions_from_options`.
        seeds: Number of seeds, which replace those of the file.

    Raises:
        ValueError: neither or both name the conditions, a condition is not valid, or there are no seeds.
    """
    study = read_study(file) if file is not None else StudyFile({}, [], {})
    by_options = gates is not None or kernel_sizes is not None
    if bool(study.conditions) == by_options:
        how = "--gates none,eca or --kernel-sizes 1,3,5, or conditions in a study's file"
        raise ValueError(f"conditions must be named once, by {how}, got {'both' if by_options else 'neither'}")
    changes = study.conditions
    if by_options:
        changes = conditions_from_options("none,eca" if gates is None else gates, kernel_sizes)
    by_name = recipes(recipe, changes)
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {seeds}")
    if seeds is None and not study.seeds:
        fewest = fewest_seeds(len(by_name) - 1)
        raise ValueError(
            f"seeds must be given: with {len(by_name)} conditions, fewer than --seeds {fewest} can show nothing"
        )
    return by_name, study.seeds if seeds is None else range(seeds)
