"""Tables of ratios from a result file."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import results
from ecanet.profile.turns import Ratio, geometric_mean, geometric_mean_of_ratios
from ecanet.text_table import columns

Cases = Mapping[str, Mapping[str, Any]]
#: Operations that walk whole maps.
PASSES = ("squeeze", "moments", "batch_moments", "apply_", "apply_backward", "input_backward")


@dataclass(frozen=True)
class Target:
    """A ratio that the library sets out to reach, and its limit.

    Attributes:
        case: Group and name of the case.
        ours: The competitor in the numerator.
        other: The competitor in the denominator.
        limit: What the ratio must not exceed.
        worst: Whether the largest ratio over the shapes counts, instead of their geometric mean.
        each_format: Whether each memory format is judged by itself.
        of: ``time``, or ``memory``: the peak of a call.
        least_bytes: Smaller maps do not count.
    """

    case: str
    ours: str
    other: str
    limit: float
    worst: bool = False
    each_format: bool = False
    of: str = "time"
    least_bytes: int = 0


CPU_TARGETS = (
    Target("module/forward", "ecanet", "timm", 1 / 2),
    Target("module/forward", "ecanet", "timm compiled", 1.0),
    Target("module/forward", "ecanet", "timm", 1.0, worst=True),
    Target("module/forward", "ecanet", "timm compiled", 1.0, worst=True),
    Target("inference/tail", "ecanet", "no gate", 1.1),
    Target("inference/tail", "ecanet", "timm", 1 / 3),
    Target("training/tail", "ecanet", "timm", 1 / 2),
    Target("training/tail", "ecanet", "no gate", 1.0),
    Target("training/factor", "neutral", "ecanet", 1.01),
    Target("inference/factor", "neutral", "ecanet", 1.01),
    Target("network/inference", "ecanet", "no gate", 1.0, each_format=True),
    Target("network/training", "ecanet", "no gate", 1.0, each_format=True),
    Target("training/tail", "ecanet compiled", "no gate compiled", 1.1),
    Target("network/inference", "ecanet compiled", "no gate compiled", 1.02, each_format=True),
    Target("network/training", "ecanet compiled", "no gate compiled", 1.02, each_format=True),
    Target("network/memory", "ecanet", "no gate", 1.02, each_format=True),
    Target("network/inference", "ecanet optimised", "no gate optimised", 1.02, each_format=True),
    *(
        target
        for gate, limit in (("gct", 1.0), ("grn", 1.0), ("srm", 1.1))
        for target in (
            Target(f"gates/{gate}", "ecanet", "no gate", limit),
            Target(f"gates/{gate}", "ecanet", "plain", 1 / 2),
            Target(f"gates/{gate}-saved", "ecanet", "no gate", 1.02),
        )
    ),
)


#: Every pass at 85 % of a copy's bandwidth; the tail as fast as compiled norm, addition and ReLU, and 1.25 times as
#: fast as with timm's gate; networks at 0.98 of the images per second of the network without a gate and 1.12 times
#: those with timm's, all compiled.
GPU_TARGETS = (
    *(Target(f"op/{op}", "ecanet", "roofline", 1 / 0.85, least_bytes=64 * 2**20, worst=True) for op in PASSES),
    Target("training/tail", "ecanet compiled", "no gate compiled", 1.0, each_format=True),
    Target("training/tail", "ecanet compiled", "timm compiled", 1 / 1.25, each_format=True),
    *(
        Target(f"network/{network}-{what}-compiled", "ecanet", other, limit, of=of)
        for network in ("resnet50", "resnet101", "mobilenet_v2")
        for what in ("training", "inference")
        for other, limit, of in (("no gate", 1 / 0.98, "time"), ("timm", 1 / 1.12, "time"), ("no gate", 1.02, "memory"))
        if of == "time" or what == "training"
    ),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a target was met.

    Attributes:
        what: The ratio in words.
        limit: What it must not exceed.
        ratio: The measured ratio.
        verdict: ``met``; ``within noise`` if only the interval reaches the limit; or ``missed``.
    """

    what: str
    limit: float
    ratio: Ratio
    verdict: str


def targets(settings: Mapping[str, Any]) -> tuple[Target, ...]:
    """The targets for the device that was measured."""
    return GPU_TARGETS if settings.get("device", "cpu") == "cuda" else CPU_TARGETS


def verdicts(cases: Cases, among: tuple[Target, ...] = CPU_TARGETS) -> list[Verdict]:
    """A verdict on every target for which there are measurements."""
    found = []
    for target in among:
        for where, keys in _keys_of(cases, target):
            if target.worst:
                keys = [max(keys, key=lambda key: ratio(cases, [key], target.ours, target.other).value)]
                where = "worst: " + " ".join(keys[0].split("/")[2:])
            measured = ratio(cases, keys, target.ours, target.other, target.of)
            verdict = "within noise" if measured.low <= target.limit else "missed"
            verdict = "met" if measured.value <= target.limit else verdict
            memory = ", peak memory" * (target.of == "memory")
            what = f"{target.case}{memory}, {where}: {target.ours} / {target.other}"
            found.append(Verdict(what, round(target.limit, 3), measured, verdict))
    return found


def _keys_of(cases: Cases, target: Target) -> Iterator[tuple[str, list[str]]]:
    """Groups of cases that are judged together: a description and the keys of each."""
    names = {target.ours, target.other} - {"roofline"}
    keys = [k for k in _of(cases, target.case) if names <= set(_measured(cases[k]))]
    keys = [k for k in keys if cases[k].get("map_bytes", 0) >= target.least_bytes]
    if target.of == "memory":
        keys = [k for k in keys if all(cases[k]["peak_bytes"][name] for name in names)]
    if target.other == "roofline":
        keys = [k for k in keys if "copy" in cases[k]["seconds"]]
    if not keys:
        return
    if target.each_format:
        for memory_format in dict.fromkeys(key.rpartition("/")[2] for key in keys):
            yield memory_format, [key for key in keys if key.endswith("/" + memory_format)]
    else:
        yield "geometric mean", keys


def _of(cases: Cases, case: str) -> list[str]:
    return [key for key in cases if key.startswith(case + "/")]


def _measured(case: Mapping[str, Any]) -> Mapping[str, Any]:
    return case["saved_bytes"] if "saved_bytes" in case else case["seconds"]


def ratio(cases: Cases, keys: list[str], ours: str, other: str, of: str = "time") -> Ratio:
    """Geometric mean of ``ours / other`` over some cases; ``roofline`` is the time of a copy of as many bytes."""
    if of == "memory":
        exact = geometric_mean([cases[key]["peak_bytes"][ours] / cases[key]["peak_bytes"][other] for key in keys])
        return Ratio(exact, exact, exact)
    if other == "roofline":
        pairs = [(cases[key]["seconds"][ours], _seconds_of_copies(cases[key])) for key in keys]
        return geometric_mean_of_ratios(pairs)
    if "saved_bytes" in cases[keys[0]]:
        exact = geometric_mean([value(cases[key], ours, other) for key in keys])
        return Ratio(exact, exact, exact)
    return geometric_mean_of_ratios([(cases[key]["seconds"][ours], cases[key]["seconds"][other]) for key in keys])


def value(case: Mapping[str, Any], ours: str, other: str) -> float:
    """``ours / other`` of one case."""
    measured = _measured(case)
    if "saved_bytes" in case:
        return measured[ours] / measured[other]
    return statistics.median(measured[ours]) / statistics.median(measured[other])


def _seconds_of_copies(case: Mapping[str, Any]) -> list[float]:
    """The time to copy as many bytes as the case must move, in each round."""
    return [case["maps"] / 2 * seconds for seconds in case["seconds"]["copy"]]


def roofline(case: Mapping[str, Any], name: str = "ecanet") -> float:
    """Bytes that must move / bandwidth of a copy / time: 1 is as fast as memory lets it be.

    A copy reads one map and writes one, so half its time is what one map takes.
    """
    return statistics.median(_seconds_of_copies(case)) / statistics.median(case["seconds"][name])


def summary(cases: Cases, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Geometric means over the shapes, and the targets: what a result file says first."""
    means: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys("/".join(key.split("/")[:2]) for key in cases):
        keys = _of(cases, name)
        for ours, other in _pairs(_measured(cases[keys[0]])):
            mean = ratio(cases, keys, ours, other)
            means.setdefault(name, {})[f"{ours} / {other}"] = [round(v, 3) for v in asdict(mean).values()]
    return {
        "geometric_means_with_interval": means,
        "targets": [
            {"what": v.what, "limit": v.limit, "is": round(v.ratio.value, 3), "verdict": v.verdict}
            for v in verdicts(cases, targets(settings))
        ],
    }


def _pairs(names: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of competitors that the columns compare."""
    ours = [name for name in names if name.startswith("ecanet")]
    others = [name for name in names if name != "copy" and name not in ours]
    pairs = []
    for other in others:
        kind = other.rpartition(" ")[2]
        like = f"ecanet {kind}" if kind in ("optimised", "compiled") else "ecanet"
        pairs.append((like if like in ours else "ecanet", other))
    return pairs


def report(document: results.Document) -> str:
    """All tables; the targets come last."""
    cases: Cases = document["cases"]
    machine, versions = document["machine"], document["versions"]
    gpu = machine.get("gpu")
    where = (
        f"{gpu['name']}, copies {gpu['copy_gb_per_second']:.4g} GB/s"
        if gpu
        else f"{machine['cpu']}, {machine['threads']} thread(s), ecanet uses {machine['ecanet_uses']}"
    )
    lines = [
        f"{where}; torch "
        f"{versions['torch']}, timm {versions['timm']}; commit {document['commit'][:10]}"
        + (" with changes" if document["tree_is_dirty"] else ""),
        f"load at start {document['load_average_at_start'][0]}; made by: {document['command']}",
    ]
    if document["kernels"] != "loaded":
        lines.append(f"NOT THE KERNELS: {document['kernels']}")
    if document["settings"]["quick"]:
        lines.append("QUICK: the numbers mean nothing")
    lines += [f"FAILED, not measured: {key}: {why}" for key, why in document.get("failed", {}).items()]
    lines += [
        f"WRONG, {key}: {what}" for key, case in document["cases"].items() for what in case.get("disagreements", ())
    ]
    lines += [f"skipped, not measured: {key}" for key in document.get("skipped", ())]
    lines += [f"stage {name}: {what}" for name, what in document.get("stages", {}).items()]
    if "checks" in document:
        lines += ["", *_checks(document["checks"]), "", *_compilation(document.get("compiled_ahead", {}))]
    for name in dict.fromkeys("/".join(key.split("/")[:2]) for key in cases):
        lines += ["", *_table(cases, name)]
    lines += ["", "Targets (ratios of median times; 95 % interval from resampled rounds)"]
    rows = [
        [v.what, f"<= {v.limit:.3g}", f"{v.ratio.value:.3f}", f"{v.ratio.low:.3f}-{v.ratio.high:.3f}", v.verdict]
        for v in verdicts(cases, targets(document["settings"]))
    ]
    return "\n".join([*lines, *columns([["ratio", "target", "is", "interval", ""], *rows])])


def _checks(checks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was compared with float64, and what was wrong."""
    rows = [
        [name, str(check.get("checks", 0)), str(len(check["failures"])), str(check.get("not_reached", "all"))]
        for name, check in checks.items()
    ]
    wrong = [f"WRONG: {failure}" for check in checks.values() for failure in check["failures"]]
    return [*columns([["compared with float64", "checks", "failed", "not reached"], *rows]), *wrong]


def _compilation(compiled: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Seconds of first calls of compiled networks, while other processes were running."""
    seconds = {what: s for job in compiled.values() for what, s in job.get("seconds", {}).items() if "network/" in what}
    if not seconds:
        return []
    rows = [[what.replace("network/", "").replace("/channels_last", ""), f"{s:.0f}"] for what, s in seconds.items()]
    return columns([["first call, with compilation", "seconds"], *rows])


def _table(cases: Cases, name: str) -> list[str]:
    keys = _of(cases, name)
    first = cases[keys[0]]
    pairs = _pairs(_measured(first))
    counted = "saved_bytes" in first
    unit, what = ("MB", "bytes saved for backward") if counted else ("ms", "time")
    title = f"{name}: {what} of ecanet, and it / that of the others"
    if first.get("maps"):
        title += f" (roofline: {first['maps']} maps must move)"
    timed = "copy" in first.get("seconds", ())
    images = "images" in first
    header = [
        "shape",
        "format",
        f"ecanet {unit}",
        *(["GB/s", "roofline"] if timed else []),
        *(["images/s", "peak GB"] if images else []),
        *(_heading(*pair) for pair in pairs),
    ]
    rows = []
    for key in keys:
        case, (_, _, shape, memory_format) = cases[key], key.split("/")
        amount = case["saved_bytes"]["ecanet"] / 1e6 if counted else statistics.median(case["seconds"]["ecanet"]) * 1e3
        rows.append([shape, memory_format, f"{amount:.4g}"])
        if timed:
            rows[-1] += [f"{case['maps'] * case['map_bytes'] / amount / 1e6:.4g}", f"{roofline(case):.2f}"]
        if images:
            peak = case["peak_bytes"]["ecanet"]
            rows[-1] += [f"{case['images'] / amount * 1e3:.4g}", "-" if peak is None else f"{peak / 1e9:.3g}"]
        rows[-1] += [f"{value(case, *pair):.3f}" for pair in pairs]
    if len(keys) > 1:
        means = [ratio(cases, keys, *pair) for pair in pairs]
        mean_part = (
            ["", f"{geometric_mean([roofline(cases[key]) for key in keys]):.2f}"] if timed else [""] * 2 * images
        )
        rows.append(["geometric mean", "", "", *mean_part, *(f"{mean.value:.3f}" for mean in means)])
        rows.append(
            ["interval", "", "", *[""] * 2 * (timed or images), *(f"{mean.low:.3f}-{mean.high:.3f}" for mean in means)]
        )
    return [title, *columns([header, *rows])]


def _heading(ours: str, other: str) -> str:
    return f"/ {other}" if ours == "ecanet" else f"{ours} / {other}"
