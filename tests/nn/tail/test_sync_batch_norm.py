"""SyncBatchNorm of two processes in the tail."""

from typing import Any

import pytest
import torch
from sync_processes import CASES as SYNC_CASES
from sync_processes import run_in_processes, training_step

from ecanet.ops import cpu


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes of one group sees in every case."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if cpu.why_not() is not None:
        pytest.skip(f"torch's own SyncBatchNorm wants a GPU, and {cpu.why_not()}")
    return run_in_processes(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", SYNC_CASES)
def test_sync_batch_norm_of_two_processes_is_one_process_on_the_joined_batch(case, two_processes) -> None:
    joined = training_step(case, sync=False)
    first, second = (seen[case] for seen in two_processes)
    assert first.keys() == joined.keys()
    for name, want in joined.items():
        if "gradient of norm" in name or "gradient of gate" in name:  # what DDP adds up
            got = first[name] + second[name]
        elif name.startswith(("norm.", "gate.")):
            assert torch.equal(first[name], second[name])
            got = first[name]
        else:
            got = torch.cat([first[name], second[name]])
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_where_every_process_has_an_empty_batch_the_statistics_shrink_as_in_torch(two_processes) -> None:
    for seen in (process["nothing"] for process in two_processes):
        assert seen["output 1"].shape == seen["gradient of x 1"].shape == (0, 16, 5, 3)
        assert seen["norm.num_batches_tracked"] == 2
        assert torch.equal(seen["norm.running_mean"], torch.zeros(16, dtype=torch.float64))
        torch.testing.assert_close(seen["norm.running_var"], torch.full((16,), 0.9**2, dtype=torch.float64))
        assert not any(t.any() for name, t in seen.items() if name.startswith("gradient of"))
