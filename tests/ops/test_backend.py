"""Which implementation is chosen, and what is said about one that cannot run."""

import asyncio
import contextlib
import functools
import itertools
import logging
import multiprocessing
import runpy
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ecanet
from ecanet.ops import backend as backends
from ecanet.ops import cpu, gpu
from ecanet.ops.backend import CPU_DTYPES, backend, choose, current
from ecanet.ops.build import hash_within, sources_hash
from tests import fresh

MISSING = "the C++ kernels are not built; to build them: ecanet build"


@pytest.fixture(autouse=True)
def _from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_choice", "auto")
    monkeypatch.setattr(backends, "_has_warned", False)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were loaded: nothing here calls into it."""
    monkeypatch.setattr(cpu, "_reason", None)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_reason", MISSING)


def feature_map(dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(2, 8, 3, 3, dtype=dtype, device=device)


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_auto_takes_the_kernels_where_they_run(dtype: torch.dtype) -> None:
    assert choose(feature_map(dtype)) == "cpu"
    with backend("reference"):
        assert choose(feature_map(dtype)) == "reference"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (feature_map(torch.complex64), "float32, float64, bfloat16 and float16, this tensor is torch.complex64"),
        (feature_map(torch.int32), "this tensor is torch.int32"),
        (feature_map(device="meta"), "tensors on the CPU, this one is on meta"),
    ],
    ids=["complex", "int", "meta"],
)
def test_auto_takes_the_reference_elsewhere_and_cpu_says_why_not(x: torch.Tensor, reason: str) -> None:
    assert choose(x) == "reference"
    with backend("cpu"), pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run: .*{reason}"):
        choose(x)


@pytest.mark.usefixtures("loaded")
def test_choices_nest_and_end_with_their_block() -> None:
    with backend("reference"):
        with backend("cpu"):
            assert current() == "cpu"
        assert current() == "reference"
        with pytest.raises(KeyError), backend("auto"):
            raise KeyError
        assert current() == "reference"
    assert current() == "auto"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_choices_left_in_any_order_leave_what_is_right(order: tuple[int, ...]) -> None:
    names = ["reference", "cpu", "reference"]
    contexts = [backend(name) for name in names]
    for context in contexts:
        context.__enter__()
    left = [0, 1, 2]
    for i in order:
        contexts[i].__exit__(None, None, None)
        left.remove(i)
        assert current() == (names[left[-1]] if left else "auto")


@pytest.mark.usefixtures("loaded")
def test_a_generator_closed_inside_another_context_takes_back_its_own_choice() -> None:
    def generator() -> Iterator[str]:
        with backend("reference"):
            yield current()

    running = generator()
    assert next(running) == "reference"
    with backend("cpu"):
        running.close()
        assert current() == "cpu"
    assert current() == "auto"


@pytest.mark.usefixtures("loaded")
def test_tasks_that_overlap_leave_what_was_there() -> None:
    async def task(name: str, entered: asyncio.Event, may_leave: asyncio.Event) -> None:
        with backend(name):
            entered.set()
            await may_leave.wait()

    async def both() -> list[str]:
        events = [asyncio.Event() for _ in range(4)]
        first = asyncio.create_task(task("reference", events[0], events[1]))
        await events[0].wait()
        second = asyncio.create_task(task("cpu", events[2], events[3]))
        await events[2].wait()
        seen = [current()]
        for event, one in ((events[1], first), (events[3], second)):
            event.set()
            await one
            seen.append(current())
        return seen

    assert asyncio.run(both()) == ["cpu", "cpu", "auto"]


@pytest.mark.usefixtures("loaded")
def test_threads_that_overlap_leave_what_was_there() -> None:
    entered, may_leave = threading.Event(), threading.Event()

    @ecanet.backend("reference")
    def chosen() -> None:
        entered.set()
        assert may_leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chosen)
        assert entered.wait(10)
        with backend("cpu"):
            assert current() == "cpu"
            may_leave.set()
            first.result(10)
            assert current() == "cpu"
    assert current() == "auto"


@pytest.mark.usefixtures("loaded")
def test_many_threads_at_once_leave_what_was_there() -> None:
    def enter_and_leave(name: str) -> None:
        for _ in range(300):
            with backend(name):
                current()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(enter_and_leave, ["reference", "cpu", "auto", "cpu"]))
    finally:
        sys.setswitchinterval(interval)
    assert current() == "auto"


def _current(queue: "multiprocessing.Queue[str]") -> None:
    with backend("auto"):
        pass
    queue.put(current())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12 and later
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_keeps_the_choice() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with backend("reference"):
        process = context.Process(target=_current, args=(queue,))
        process.start()
    assert queue.get(timeout=30) == "reference"
    process.join(30)
    assert process.exitcode == 0


def test_one_object_nests_in_itself() -> None:
    chosen = backend("reference")
    with chosen, chosen:
        assert current() == "reference"
    assert current() == "auto"


def test_an_error_on_entering_changes_nothing(missing: None) -> None:
    with backend("reference"):
        with pytest.raises(RuntimeError), backend("cpu"):
            raise AssertionError("entered")
        assert current() == "reference"
    assert current() == "auto"


async def coroutine() -> None: ...


def generator() -> Iterator[None]:
    yield


async def async_generator() -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("function", [coroutine, generator, async_generator], ids=lambda f: f.__name__)
def test_what_runs_after_its_call_is_not_decorated(function) -> None:
    with pytest.raises(TypeError, match=r"write `with ecanet\.backend\('reference'\):` inside it"):
        backend("reference")(function)


def test_decorates_a_function() -> None:
    @ecanet.backend("reference")
    def chosen() -> str:
        return choose(feature_map())

    assert [chosen(), chosen(), current()] == ["reference", "reference", "auto"]


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="name must be one of auto, reference, cpu, triton, got 'cuda'"),
        backend("cuda"),
    ):
        pass
    assert current() == "auto"


@pytest.mark.usefixtures("loaded")
def test_compiled_functions_choose_inside_them() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def numbers(x: torch.Tensor) -> list[torch.Tensor]:
        inside, nested = [], []
        with backend("reference"):
            inside.append(x + (1 if choose(x) == "cpu" else 2))
            with backend("cpu"):
                nested.append(x + (1 if choose(x) == "cpu" else 2))
        return [*inside, *nested, x + (1 if choose(x) == "cpu" else 2)]

    x = torch.zeros(1, 1)
    assert [number.item() for number in numbers(x)] == [2, 1, 1]
    with backend("reference"):
        assert [number.item() for number in numbers(x)] == [2, 1, 2]
    assert [number.item() for number in numbers(x)] == [2, 1, 1]
    assert current() == "auto"


@pytest.mark.usefixtures("loaded")
def test_compiled_functions_follow_the_choice() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def number(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if choose(x) == "cpu" else 2)

    x = torch.zeros(1, 1)
    assert number(x).item() == 1
    with backend("reference"):
        assert number(x).item() == 2
    assert number(x).item() == 1


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("what", ["tail", "gate"])
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_what_cannot_run_is_refused_compiled_as_in_eager_code(
    name: str, what: str, fullgraph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_choice", name)  # as ECANET_BACKEND sets it
    monkeypatch.setattr(cpu, "_reason", "the one thing that is missing")
    monkeypatch.setattr(gpu, "why_not", lambda: "the one thing that is missing")
    norm, gate, x = torch.nn.BatchNorm2d(8), ecanet.ECA(8), torch.randn(2, 8, 3, 3)

    def run(x: torch.Tensor) -> torch.Tensor:
        return gate(x) if what == "gate" else ecanet.nn.norm_gate_add_act(x, norm, gate, x, "relu")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=fullgraph, backend="eager")
    refusal = f"backend '{name}' cannot run: the one thing that is missing"
    for call in (run, compiled, lambda x: ecanet.nn.explain(x, norm, gate, compiled=True)):
        with pytest.raises(RuntimeError, match=refusal):
            call(x)
    torch._dynamo.reset()
    torch.vmap(gate)(x[None])  # plain PyTorch, whatever was asked for
    torch.compile(torch.vmap(gate), backend="eager")(x[None])
    torch._dynamo.reset()
    monkeypatch.setattr(backends, "_choice", "auto")
    compiled(x)


@pytest.mark.usefixtures("loaded")
def test_a_type_the_kernels_do_not_take_is_refused_compiled_as_in_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, x = ecanet.ECA(8), torch.randn(2, 8, 3, 3, device="meta")
    torch._dynamo.reset()
    compiled = torch.compile(gate, backend="eager")
    with backend("cpu"):
        for call in (gate, compiled):
            with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: .* this one is on meta"):
                call(x)


# --- the environment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "choice"), [("", "auto"), ("reference", "reference"), ("cpu", "cpu")])
def test_environment_is_the_choice_to_start_from(value: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECANET_BACKEND", value)
    assert runpy.run_path(backends.__file__)["_choice"] == choice


def test_wrong_environment_is_an_error_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECANET_BACKEND", "Cpu")
    with pytest.raises(ValueError, match="ECANET_BACKEND must be one of auto, reference, cpu, triton, got 'Cpu'"):
        runpy.run_path(backends.__file__)


# --- what cannot run ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("missing")
def test_cpu_without_the_library_is_refused_at_once() -> None:
    with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run: {MISSING.replace('+', '.')}"), backend("cpu"):
        raise AssertionError("entered")


@pytest.mark.usefixtures("missing")
def test_cpu_of_the_environment_without_the_library_is_refused_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_choice", "cpu")
    with pytest.raises(RuntimeError, match="ecanet build"):
        choose(feature_map())


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: "torch sees no GPU")
    reason = "backend 'triton' cannot run: torch sees no GPU"
    with pytest.raises(RuntimeError, match=reason), backend("triton"):
        raise AssertionError("entered")
    monkeypatch.setattr(backends, "_choice", "triton")
    with pytest.raises(RuntimeError, match=reason):
        choose(feature_map())


@pytest.mark.parametrize(
    ("gpu_there", "interpreter", "reason"),
    [
        (
            False,
            False,
            "torch sees no GPU; on the CPU they run only in Triton's interpreter, slowly: TRITON_INTERPRET=1",
        ),
        (False, True, None),
        (True, False, None),
    ],
    ids=["neither", "interpreter", "GPU"],
)
def test_where_triton_runs(gpu_there, interpreter, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_there)
    monkeypatch.setattr(gpu, "interpreting", lambda: interpreter)
    assert gpu.why_not.__wrapped__() == reason


def test_the_interpreter_takes_tensors_on_the_cpu_only_where_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "interpreting", lambda: True)
    assert choose(feature_map()) != "triton"
    with backend("triton"):
        assert choose(feature_map()) == "triton"
        with pytest.raises(RuntimeError, match=r"bfloat16 and float16, this tensor is torch\.complex64"):
            choose(feature_map(torch.complex64))
        with pytest.raises(RuntimeError, match="tensors on a GPU, this one is on meta"):
            choose(feature_map(device="meta"))
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    with backend("triton"), pytest.raises(RuntimeError, match="tensors on a GPU, this one is on cpu"):
        choose(feature_map())


@pytest.mark.usefixtures("missing")
def test_the_reference_says_once_that_it_stands_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ecanet"):
        assert choose(feature_map(device="meta")) == "reference"
        with backend("reference"):
            assert choose(feature_map()) == "reference"
        assert caplog.messages == []
        assert [choose(feature_map()) for _ in range(3)] == ["reference"] * 3
    assert caplog.messages == [f"ecanet: plain PyTorch runs on the CPU: {MISSING}"]


@pytest.mark.usefixtures("loaded")
def test_nothing_is_said_about_a_type_the_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    assert choose(feature_map(torch.complex64)) == "reference"
    assert caplog.messages == []


# --- the library --------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a library is looked for, and is not."""
    monkeypatch.setattr(cpu, "_reason", "not tried")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "ecanet_cpu.so")
    return tmp_path / "ecanet_cpu.so"


def test_library_not_built(library: Path) -> None:
    cpu.load()
    assert cpu.why_not() == MISSING


def test_library_built_from_other_sources(library: Path) -> None:
    library.write_bytes(b"...ecanet built from 0123456789abcdef...")
    assert hash_within(library) == "0123456789abcdef"
    cpu.load()
    assert cpu.why_not() == "the C++ kernels are built from other sources; to build them again: ecanet build"


def test_library_that_does_not_load(library: Path) -> None:
    library.write_bytes(f"ecanet built from {sources_hash()}".encode())
    cpu.load()
    reason = cpu.why_not()
    assert reason is not None
    assert reason.startswith(f"the C++ kernels cannot be loaded ({library}: ")
    assert reason.endswith("); to build them again: ecanet build")
    assert "\n" not in reason


def test_a_signal_may_enter_while_the_main_thread_does() -> None:
    """In a process of its own, which a lock held twice would hold for ever."""
    script = """
import signal, time, ecanet, ecanet.ops
def tick(*_):
    with ecanet.backend("reference"):
        pass
    signal.setitimer(signal.ITIMER_REAL, 1e-4)
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 1e-4)
end = time.monotonic() + 1
while time.monotonic() < end:
    with ecanet.backend("auto"):
        pass
signal.signal(signal.SIGALRM, signal.SIG_IGN)
print(ecanet.ops.backend.current())
"""
    done = fresh.run(script, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "auto"), done.stderr[-2000:]


async def later() -> None: ...


class Later:
    async def __call__(self) -> None: ...


@contextlib.contextmanager
def manager() -> Iterator[None]:
    yield


@pytest.mark.parametrize("what", [functools.partial(later), Later(), manager], ids=["partial", "object", "manager"])
def test_what_runs_after_the_call_cannot_be_decorated_whatever_wraps_it(what) -> None:
    with pytest.raises(TypeError, match="is a coroutine or a generator, which runs later"):
        backend("reference")(what)
