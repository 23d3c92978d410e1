"""README and the pages beside it: blocks run as pasted, links lead somewhere, numbers are those of the result files."""

import importlib.util
import io
import json
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.tables import ratio, value
from ecanet import cli
from ecanet.nn import GATES, LinearGate, build_gate
from ecanet.profile.turns import geometric_mean

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs/performance.md"
PAGES = (
    README,
    ROOT / "README.zh-CN.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
#: Pages whose examples other tests run: tests/surgery/test_docs.py, tests/integrations/test_ultralytics.py.
RUN_ELSEWHERE = ("surgery.md", "yolo.md")


def blocks(page: Path, language: str) -> list[str]:
    """What stands between fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def flat(page: Path) -> str:
    """A page without its line breaks."""
    return " ".join(page.read_text().split())


PASTED = [page for page in PAGES if page.name not in RUN_ELSEWHERE and blocks(page, "python")]


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 170


@pytest.mark.parametrize("page", PASTED, ids=lambda page: page.name)
def test_every_python_block_runs_as_pasted_in_order_and_without_a_network(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError(f"a block of {page.name} asks for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    if "from ecanet.train" in page.read_text():
        _train_on_few_pictures(monkeypatch)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    if page == README:
        assert "17 gates inserted: +59 parameters" in capsys.readouterr().out


def _train_on_few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from ecanet.train import find_lr
    from ecanet.train.data import TensorImages, embedded, loading

    there = embedded()
    few = {
        part: TensorImages(of.images[:256], of.labels[:256])
        for part, of in (("train", there.train), ("val", there.val))
    }
    monkeypatch.setattr(loading, "embedded", lambda: there._replace(**few))
    monkeypatch.setattr(find_lr, "_STEPS", 14)


def test_the_page_about_the_tail_and_the_readme_have_blocks_to_run() -> None:
    assert {README.name, "how-it-works.md"} <= {page.name for page in PASTED}


# --- commands ---

COMMAND = r"(?:[A-Z_]+=\S+ )*(?:ecanet [a-z]|make [a-z]|python -m benchmarks\.|python scripts/)[^`#\n]*"


def commands(page: Path) -> Iterator[list[str]]:
    """Commands of this repository in blocks and in running text, as words without variables of the environment."""
    running = re.sub(r"^```\w*\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(rf"^({COMMAND})", "".join(blocks(page, "bash")), re.MULTILINE)
    found += re.findall(rf"^    ({COMMAND})", running, re.MULTILINE)
    found += re.findall(rf"`({COMMAND})`", " ".join(running.split()))
    for command in dict.fromkeys(found):
        words = shlex.split(command.split(" && ")[0].split(";")[0])
        yield [word for word in words if not re.match(r"[A-Z_]+=", word)]


@cache
def options(program: str) -> frozenset[str]:
    """Every option that ``--help`` of a verb, a benchmark or a script names."""
    call, arguments = _entry(program)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), suppress(SystemExit):
        patch.setattr(sys, "argv", [program, *arguments, "--help"])
        call()
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w.-]*", said.getvalue()))


def _entry(program: str) -> tuple[Callable[[], object], list[str]]:
    if program in cli.VERBS:
        return cli.main, [program]
    module = importlib.import_module(program)
    return (importlib.import_module(f"{program}.__main__") if hasattr(module, "__path__") else module).main, []


def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def faults(words: list[str]) -> list[str]:
    """What a command names that is not there."""
    if words[0] == "make":
        return [f"make {word}" for word in words[1:] if word not in targets()]
    if words[0] == "ecanet":
        program, rest = words[1], words[2:]
        if program not in cli.VERBS:
            return [f"ecanet {program}"]
    else:
        program = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        rest = words[3:] if words[1] == "-m" else words[2:]
        if importlib.util.find_spec(program) is None:
            return [program]
    named = {word.partition("=")[0] for word in rest if word.startswith("--")}
    files = [word for word in rest if re.match(r"(recipes|benchmarks|docs|tests|scripts)/", word)]
    missing = [word for word in files if not (ROOT / word).exists()]
    return sorted(named - options(program) - {"--help"}) + missing if named else missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_verbs_options_targets_and_files_that_are_there(page: Path) -> None:
    assert {" ".join(words): found for words in commands(page) if (found := faults(words))} == {}


def test_a_command_that_is_wrong_anywhere_is_noticed() -> None:
    assert faults(shlex.split("ecanet fit --optim.epoch 3")) == ["--optim.epoch"]
    assert faults(shlex.split("ecanet fitt")) == ["ecanet fitt"]
    assert faults(shlex.split("ecanet insert --model torchvision/resnet50 --whre block")) == ["--whre"]
    assert faults(shlex.split("ecanet fit --config recipes/none.yaml")) == ["recipes/none.yaml"]
    assert faults(shlex.split("python -m benchmarks.gpu --buget 420")) == ["--buget"]
    assert faults(shlex.split("python scripts/make_image.py")) == ["scripts.make_image"]
    assert faults(shlex.split("make tests")) == ["make tests"]
    assert ["ecanet", "fit", "--resume", "--out", "runs/fashion"] in commands(README)
    assert ["make", "demo"] in commands(README)


# --- links and names ---


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", flat(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_public_name_of_ecanet_in_running_text_exists(page: Path) -> None:
    for name in set(re.findall(r"`(ecanet(?:\.\w+)+)", page.read_text())):
        found: Any = importlib.import_module("ecanet")
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_the_readme_has_a_row_for_every_gate_of_the_paper_and_names_its_class() -> None:
    _, _, table = README.read_text().partition("## Gates\n")
    rows = re.findall(r"^\| (`.*?) \| `(\w+)\(", table.partition("\n## ")[0], re.MULTILINE)
    named = {name: cls for names, cls in rows for name in re.findall(r"`(\w+)`", names)}
    gates = {name: build_gate(name, 64) for name in GATES}
    of_the_paper = {name: gate for name, gate in gates.items() if isinstance(gate, LinearGate) or name == "se"}
    assert named == {name: type(gate).__name__ for name, gate in of_the_paper.items()}


# --- numbers ---


@cache
def cases(file: str) -> dict[str, Any]:
    """What a result file measured."""
    return json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())["cases"]


ONE, TWO = "cpu-1-threads", "cpu-2-threads"
NETWORKS, INFERENCE = "cpu-1-thread-compiled-networks", "cpu-1-thread-compiled-inference"
COMPILED, KEPT, GIVEN_BACK = "cpu-1-thread-compiled", "cpu-1-thread-factor-pages-kept", "cpu-1-thread-factor"
GPU = "gpu-h200-2"


def values(file: str, group: str, ours: str, other: str) -> list[float]:
    """Our time relative to the other's, for each shape and format of a group."""
    return [value(case, ours, other) for key, case in cases(file).items() if key.startswith(f"{group}/")]


def mean(file: str, group: str, other: str, kind: str = "") -> str:
    """Geometric mean, smallest and largest."""
    found = values(file, group, f"ecanet{kind}", f"{other}{kind}")
    return f"{geometric_mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def each(file: str, group: str, other: str, kind: str = "", digits: int = 2) -> str:
    """Contiguous and channels last."""
    return ", ".join(f"{v:.{digits}f}" for v in values(file, group, f"ecanet{kind}", f"{other}{kind}"))


def each_with_interval(file: str, group: str, kind: str = "") -> str:
    keys = [key for key in cases(file) if key.startswith(f"{group}/")]
    found = [ratio(cases(file), [key], f"ecanet{kind}", f"no gate{kind}") for key in keys]
    return ", ".join(f"{r.value:.2f} ({r.low:.2f}-{r.high:.2f})" for r in found)


def factor(file: str, group: str) -> str:
    keys = [key for key in cases(file) if key.startswith(f"{group}/")]
    found = ratio(cases(file), keys, "neutral", "ecanet")
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def moved(case: dict[str, Any], name: str) -> float:
    """Bytes relative to the network without a gate."""
    return sum(case[name][way] for way in ("forward", "backward")) / sum(
        case["no gate"][way] for way in ("forward", "backward")
    )


def traffic(prefix: str, memory_format: str) -> str:
    rows = [c for key, c in cases("traffic").items() if key.startswith(prefix) and key.endswith(f"/{memory_format}")]
    return " | ".join(", ".join(f"{moved(case, name):.2f}" for case in rows) for name in ("ecanet", "timm", "SE"))


def performance_rows() -> list[str]:
    """Every row of docs/performance.md, from the result files."""
    optimised = "network, inference, both after `optimize_for_inference`"
    rows = []
    for n, file in ((1, ONE), (2, TWO)):
        for name, group in (("training tail", "training/tail"), ("inference tail", "inference/tail")):
            rows.append(f"{name} | {n} | {mean(file, group, 'no gate')} | {mean(file, group, 'timm')}")
        rows.append(f"module alone, out of place | {n} | | {mean(file, 'module/forward', 'timm')}")
        for name in ("training", "inference"):
            told = "training step" if name == "training" else name
            both = (each(file, f"network/{name}", other) for other in ("no gate", "timm"))
            rows.append(f"network, {told} | {n} | {' | '.join(both)}")
        rows.append(f"{optimised} | {n} | {each(file, 'network/inference', 'no gate', ' optimised')} |")
    saved = (each(ONE, "network/memory", "no gate", digits=3), each(ONE, "network/memory", "timm"))
    assert saved == (each(TWO, "network/memory", "no gate", digits=3), each(TWO, "network/memory", "timm"))
    rows.append(f"network, bytes saved for the backward | 1, 2 | {' | '.join(saved)}")
    for name, file, group in (
        ("network, training step", NETWORKS, "network/training"),
        ("network, inference", INFERENCE, "network/inference"),
        ("timm's `ecaresnet50d` after `fuse_tails_`, training step", NETWORKS, "surgery/ecaresnet50d-training"),
        ("timm's `ecaresnet50d` after `fuse_tails_`, inference", NETWORKS, "surgery/ecaresnet50d-inference"),
    ):
        rows.append(f"{name} | {each_with_interval(file, group)} | {each(file, group, 'timm')}")
    rows += [
        f"{optimised} | {each_with_interval(INFERENCE, 'network/inference', ' optimised')} |",
        f"network, training step, both compiled | {each_with_interval(NETWORKS, 'network/training', ' compiled')} |",
        f"network, inference, both compiled | {each_with_interval(INFERENCE, 'network/inference', ' compiled')} |",
    ]
    for name, kind in (("training tail", ""), ("training tail, both compiled", " compiled")):
        both = (mean(COMPILED, "training/tail", other, kind) for other in ("no gate", "timm"))
        rows.append(f"{name} | {' | '.join(both)}")
    for name, file in (("pages kept", KEPT), ("pages given back", GIVEN_BACK)):
        rows.append(f"{name} | {factor(file, 'training/factor')} | {factor(file, 'inference/factor')}")
    for name, key in (("ECA-ResNet-50", "resnet50"), ("ECA-MobileNetV2", "mobilenet_v2")):
        rows.append(f"{name}, training step, channels last | {traffic(f'{key}/training', 'channels_last')}")
        rows.append(f"{name}, inference, channels last | {traffic(f'{key}/inference', 'channels_last')}")
    for memory_format in ("channels last", "contiguous"):
        moved_by_tails = traffic("tail/", memory_format.replace(" ", "_"))
        rows.append(f"training tail, 56 x 56 to 7 x 7, {memory_format} | {moved_by_tails}")
    return [f"| {row} |" for row in rows]


def test_every_row_of_the_performance_page_is_what_its_result_file_says() -> None:
    lines = PERFORMANCE.read_text().splitlines()
    told = [line for line in lines if line.startswith("|") and not line.startswith(("| |", "|-"))]
    assert sorted(told) == sorted(performance_rows())


def spread(found: list[float]) -> str:
    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
    return low if low == high else f"{low} to {high}"


def test_the_costs_in_the_readme_are_the_best_and_the_worst_figure_of_all_files() -> None:
    eager = (ONE, TWO, NETWORKS)
    inference = (*eager, INFERENCE)

    def over(files: tuple[str, ...], group: str, other: str, kind: str = "") -> str:
        return spread([v for file in files for v in values(file, group, f"ecanet{kind}", f"{other}{kind}")])

    training_step = " | ".join(over(eager, "network/training", other) for other in ("no gate", "timm"))
    one_call = " | ".join(over(inference, "network/inference", other) for other in ("no gate", "timm"))
    optimised = over(inference, "network/inference", "no gate", " optimised")
    compiled = (
        over((NETWORKS,), "network/training", "no gate", " compiled"),
        over((INFERENCE,), "network/inference", "no gate", " compiled"),
    )
    readme = flat(README)
    assert f"| training step | {training_step} |" in readme
    assert f"| inference | {one_call} |" in readme
    assert f"`optimize_for_inference` | {optimised} |" in readme
    assert f"(one processor, one thread) | {', '.join(compiled)} |" in readme
    saved = each(ONE, "network/memory", "no gate", digits=3), each(ONE, "network/memory", "timm")
    assert f"| bytes kept for the backward pass | {' | '.join(cell.split(', ')[0] for cell in saved)} |" in readme
    tails = [f"{geometric_mean(values(file, 'inference/tail', 'ecanet', 'no gate')):.1f}" for file in (ONE, TWO)]
    largest = max(v for file in (ONE, TWO) for v in values(file, "inference/tail", "ecanet", "no gate"))
    assert (
        f"the tail alone takes {' to '.join(tails)} times as long as addition and ReLU, up to {largest:.1f}" in readme
    )


def test_the_first_screen_says_what_the_result_files_say() -> None:
    first_screen = " ".join("\n".join(README.read_text().splitlines()[:50]).split())
    one, two = (values(file, "training/tail", "ecanet", "timm") for file in (ONE, TWO))
    files = (ONE, TWO, NETWORKS, INFERENCE)
    step, call = (
        spread([v for file in files for v in values(file, f"network/{what}", "ecanet", "timm")])
        for what in ("training", "inference")
    )
    assert f"{geometric_mean(one):.2f} of its time with timm's module on one thread of an AMD EPYC" in first_screen
    assert f"({spread(one)} by shape of the map), {geometric_mean(two):.2f} on two ({spread(two)})" in first_screen
    assert f"whole ResNet-50 takes {step} of timm's time in a training step, {call} at inference" in first_screen
    on_gpu = {
        f"{name} {what}": spread(values(GPU, f"{what}/tail", f"{name} compiled", "no gate compiled"))
        for name in ("operation", "timm")
        for what in ("training", "inference")
    }
    assert (
        f"took {on_gpu['operation training']} of the time without a gate in training and "
        f"{on_gpu['operation inference']} at inference (timm's: {on_gpu['timm training']}, {on_gpu['timm inference']})"
    ) in first_screen
    photographs = cases("photographs").items()
    right = {
        name: {case["running"]["right"] for key, case in photographs if key.startswith(f"mobilenet_v2/{name}/")}
        for name in ("no gate", "ECA, function kept", "ECA, random gate")
    }
    assert right == {"no gate": {17}, "ECA, function kept": {17}, "ECA, random gate": {0}}
    assert "recognises 17 of 20 photographs, and 17 right after `insert_gates_`" in first_screen


def test_the_tails_on_the_page_about_gpus_are_what_the_result_file_says() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    for group, names in (
        (
            "training/tail",
            {
                "training step, ours, eager": "ecanet",
                "ours, compiled, one operation": "operation compiled",
                "ours, compiled, the formula": "formula compiled",
                "timm's `EcaModule`, compiled": "timm compiled",
                "squeeze-and-excitation, compiled": "SE compiled",
                "no gate, eager": "no gate",
                "timm's, eager": "timm",
            },
        ),
        (
            "inference/tail",
            {
                "inference, ours, eager": "ecanet",
                "ours, compiled, one operation": "operation compiled",
                "ours, compiled, the formula": "formula compiled",
                "timm's, compiled": "timm compiled",
                "squeeze-and-excitation, compiled": "SE compiled",
                "no gate, eager": "no gate",
            },
        ),
    ):
        for told, name in names.items():
            cells = " | ".join(f"{v:.2f}" for v in values(GPU, group, name, "no gate compiled"))
            assert f"| {told} | {cells} |" in page
