"""A study as YAML: conditions that differ in their gates, seeds, and the recipe that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecanet.study.conditions import SETTINGS, SWEEP, of_gates, recipes
from ecanet.study.statistics import fewest_seeds
from ecanet.train.config import Recipe, model_of_a_file
from ecanet.train.recipes import check_blocks, for_parser, read_plain, with_source_named
from ecanet.untrusted import check_plain, listed, shown

_OF_A_CONDITION = (*SETTINGS, SWEEP)
_KEYS = ("conditions", "seeds", "recipe")
#: Conditions and seeds of a file, at most.
_MOST = 1000
_ITS_SEEDS = "every condition is trained with each of its seeds, such as --seeds 9 or seeds: [0, 1, 2]"


@dataclass
class StudyFile:
    """What a study's file says; it may leave each out.

    Attributes:
        conditions: By name, the baseline first: changes to the recipe's block ``model``.
        seeds: Seeds.
        recipe: Blocks of the recipe, as :func:`ecanet.train.recipes.read_recipe` returns them.
    """

    conditions: dict[str, dict[str, Any]]
    seeds: list[int]
    recipe: dict[str, dict[str, Any]]


def read_study(path: str | Path) -> StudyFile:
    """Read a study. What it says is data, as in a recipe: nothing is built or followed.

    Args:
        path: The YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no study; the message names the file and the mistake.
    """
    source, content = shown(str(path), 200), read_plain(path, "study")
    if not isinstance(content, dict):
        raise ValueError(f"{source} is no study: it must hold {', '.join(_KEYS)}, got {shown(content)}")
    if unknown := [key for key in content if key not in _KEYS]:
        raise ValueError(
            f"{source}: {listed(map(str, unknown), 5)} is no part of a study, which are {', '.join(_KEYS)}"
        )
    conditions, seeds, recipe = content.get("conditions", {}), content.get("seeds", []), content.get("recipe", {})
    _check_conditions(conditions, source)
    recipe = check_blocks(recipe, f"{source}: recipe")
    if "seed" in recipe.get("trainer", {}):
        raise ValueError(f"{source}: recipe.trainer.seed is not for a study: {_ITS_SEEDS}")
    return StudyFile(conditions, _seeds_of(seeds, source), recipe)


def _check_conditions(conditions: object, source: str) -> None:
    if not isinstance(conditions, dict) or len(conditions) > _MOST:
        got = f"{len(conditions)} of them" if isinstance(conditions, dict) else shown(conditions)
        raise ValueError(
            f"{source}: conditions must be at most {_MOST} names with changes, such as none: {{gate: null}}, got {got}"
        )
    for name, changes in conditions.items():
        where = f"{source}: conditions.{shown(name)}"
        if not isinstance(name, str) or not isinstance(changes, dict):
            raise ValueError(f"{where} must be a name with {', '.join(_OF_A_CONDITION)}, got {shown(changes)}")
        changes = conditions[name] = model_of_a_file(changes, where)
        for key, value in changes.items():
            if key not in _OF_A_CONDITION:
                raise ValueError(f"{where} has no {shown(key)}; it may have {', '.join(_OF_A_CONDITION)}")
            try:
                check_plain(value, f"{where}.{key}")
            except TypeError as error:
                raise ValueError(str(error)) from error


def _seeds_of(seeds: object, source: str) -> list[int]:
    if type(seeds) is int and 0 < seeds <= _MOST:
        return list(range(seeds))
    if isinstance(seeds, list) and len(seeds) <= _MOST and all(type(seed) is int for seed in seeds):
        return seeds
    raise ValueError(
        f"{source}: seeds must be their number, from 1 to {_MOST}, or a list of integers, got {shown(seeds)}"
    )


def with_study_read(args: list[str]) -> list[str]:
    """A command line with the recipe of its study, and with the source of ``--data.root`` if nothing names it.

    Args:
        args: The command line; a study's file comes first, if there is one. Options after it override its recipe.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read_study`; or an option says a single seed.
    """
    recipe = read_study(args[0]).recipe if args and not args[0].startswith("-") else {}
    words = [word.partition("=")[0] for word in args]
    if "--trainer.seed" in words:
        raise ValueError(f"--trainer.seed is not for a study: {_ITS_SEEDS}")
    if "--model.gate" in words and {"--gates", "--kernel-sizes"} & set(words):
        raise ValueError("--model.gate says the gate of every condition: leave it out, as --gates names them all")
    if "source" not in recipe.get("data", {}):
        args = with_source_named(args)
    return ["--config", for_parser(recipe), *args] if recipe else args


def conditions_and_seeds(
    recipe: Recipe, file: Path | None, gates: str | None, kernel_sizes: str | None, seeds: int | None
) -> tuple[dict[str, Recipe], Sequence[int]]:
    """The recipe of every condition, and the seeds, from a study's file and the options that take its place.

    Args:
        recipe: What the conditions share.
        file: A study's file.
        gates: As in :func:`ecanet.study.conditions.of_gates`; with ``kernel_sizes`` alone, none and ECA.
        kernel_sizes: As there.
        seeds: Number of seeds.

    Raises:
        ValueError: neither or both name the conditions, a condition is none, or there are no seeds.
    """
    said = read_study(file) if file is not None else StudyFile({}, [], {})
    by_options = gates is not None or kernel_sizes is not None
    if bool(said.conditions) == by_options:
        how = "--gates none,eca or --kernel-sizes 1,3,5, or conditions in a study's file"
        raise ValueError(f"conditions must be named once, by {how}, got {'both' if by_options else 'neither'}")
    changes = of_gates("none,eca" if gates is None else gates, kernel_sizes) if by_options else said.conditions
    found = recipes(recipe, changes)
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {seeds}")
    if seeds is None and not said.seeds:
        fewest = fewest_seeds(len(found) - 1)
        raise ValueError(
            f"seeds must be given: with {len(found)} conditions, fewer than --seeds {fewest} can show nothing"
        )
    return found, said.seeds if seeds is None else range(seeds)
