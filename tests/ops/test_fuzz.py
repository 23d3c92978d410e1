"""The C++ loops on random maps under AddressSanitizer and UndefinedBehaviorSanitizer: see fuzz_kernels.cpp."""

import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ecanet.ops import build

SECONDS = 3
SEED = 1

# Calls instead of inline checks compile in two thirds of the time; so does leaving out the checks of every pointer and
# of every vector's sum, which wraps on purpose.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZERS += ["-fno-sanitize=null,alignment,object-size,vptr,pointer-overflow,signed-integer-overflow"]
CALLS = {
    "gcc": ["--param", "asan-instrumentation-with-call-threshold=0"],
    "clang": ["-mllvm", "-asan-instrumentation-with-call-threshold=0"],
}
FLAGS = ["-std=c++20", "-Wno-psabi", "-fno-exceptions", "-fno-asynchronous-unwind-tables"]
FLAGS += ["-fno-omit-frame-pointer", *SANITIZERS]
# The loops without inlining: each function is compiled once, in a quarter of the time. The program that calls them and
# computes what they should give is made faster instead, so that as many maps are tried a second.
OF_LOOPS, OF_PROGRAM = ["-O0", "-Dalways_inline=unused"], ["-Og"]

TYPES = ["float", "double", "bfloat16", "float16"]
LOOPS = ["squeeze", "moments", "apply", "reduce", "input_grad"]
LOOPS += ["statistics", "coefficients", "coefficients_backward"]


def run(command: Sequence[str | Path], **kwargs) -> subprocess.CompletedProcess[str]:
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **kwargs}
    return subprocess.run([str(part) for part in command], check=False, **kwargs)


def instruction_sets() -> list[str]:
    """What this machine can run, by the names in kernels.h."""
    best = torch.backends.cpu.get_cpu_capability()
    return ["baseline", *(["avx2"] if best in ("AVX2", "AVX512") else []), *(["avx512"] if best == "AVX512" else [])]


@pytest.fixture
def compile_with_sanitizers(tmp_path) -> list[str]:
    """The compiler's command, once it has made a program that runs."""
    try:
        compiler = build.find_compiler()
    except build.NothingToBuildWithError as error:
        pytest.skip(str(error))
    kind = "clang" if "clang" in run([*compiler, "--version"]).stdout else "gcc"
    command = [*compiler, *FLAGS, *CALLS[kind]]
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }\n")
    made = run([*command, tmp_path / "empty.cpp", "-o", tmp_path / "empty"])
    if made.returncode != 0 or run([tmp_path / "empty"]).returncode != 0:
        lines = made.stdout.strip().splitlines() or ["its programs do not run"]
        pytest.skip(f"{compiler[0]} has no sanitizers here: {lines[-1]}")
    return command


def test_no_loop_reads_or_writes_outside_its_buffers(compile_with_sanitizers, tmp_path) -> None:
    sets = instruction_sets()
    fuzz = Path(__file__).with_name("fuzz_kernels.cpp")
    sources = [fuzz, *(build.SOURCES / f"loops_{name}.cpp" for name in sets)]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    which = [f"-DFUZZ_{name.upper()}" for name in sets]

    def compile_one(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
        flags = [*which, *(OF_PROGRAM if source == fuzz else OF_LOOPS), f"-I{build.SOURCES}"]
        return run([*compile_with_sanitizers, *flags, "-c", source, "-o", output])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        for done in pool.map(compile_one, sources, objects):
            assert done.returncode == 0, done.stdout[-3000:]
    program = tmp_path / "fuzz"
    linked = run([*compile_with_sanitizers, *objects, "-lm", "-o", program])
    assert linked.returncode == 0, linked.stdout[-3000:]

    # Leaks are looked for by tracing the process, which containers often forbid.
    done = run([program, str(SECONDS), str(SEED)], env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stdout[-6000:]
    counts = {name: int(count) for name, count in re.findall(r"^(.*): (\d+)$", done.stdout, re.MULTILINE)}
    assert counts.keys() == {f"{name} {dtype} {loop}" for name in sets for dtype in TYPES for loop in LOOPS}
    assert min(counts.values()) >= 3
