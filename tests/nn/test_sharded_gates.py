"""Networks that FullyShardedDataParallel or fully_shard splits over processes train as the plain ones do."""

import pytest
import torch
from sharded_processes import GATES, WAYS, run_in_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.filterwarnings("ignore")  # torch's own, of what is deprecated and of CPUs
def test_sharded_over_processes_a_gate_computes_and_learns_the_same(world_size, tmp_path) -> None:
    for seen in run_in_processes(tmp_path, world_size):
        for gate in GATES:
            start, *_, trained = seen[gate]
            assert not torch.allclose(start, trained, rtol=1e-2)
            for way in WAYS:
                tolerance = 0.05 if "mixed" in way else 1e-4
                for got, want in zip(seen[f"{gate}, {way}"], seen[gate], strict=True):
                    assert (got - want).abs().max() < tolerance * want.abs().max(), f"{gate}, {way}"
