"""benchmarks/scaling.py: the paper model behind docs/scaling.md."""

import itertools

import pytest

from benchmarks import scaling, scaling_loop

MACHINE = scaling.Machine()
BATCH = (128, 8)


def test_the_page_holds_what_the_script_prints():
    page = (scaling.DOCS / "scaling.md").read_text(encoding="utf-8")
    assert scaling.written(page, BATCH, MACHINE) == page


@pytest.mark.parametrize("policy", scaling.POLICIES, ids=lambda policy: policy.name)
def test_every_candidate_is_run_once_a_step(policy):
    for gpus in scaling.GPUS:
        work = scaling.Work.of(gpus, *BATCH)
        assert gpus * work.passes * work.candidates == 128 * 8


@pytest.mark.parametrize(("policy", "billions"), [*zip(scaling.POLICIES, (7.6, 70.6), strict=True)])
def test_shapes_have_the_published_number_of_parameters(policy, billions):
    assert policy.parameters / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("policy", scaling.POLICIES, ids=lambda policy: policy.name)
def test_one_gpu_waits_for_nobody_and_sharding_saves_memory(policy):
    for place in scaling.PLACES:
        found = scaling.steps(policy, BATCH, MACHINE, place)
        assert found[0].communicating == 0
        assert all(s.communicating > 0 for s in found[1:])
        assert all(b.memory < a.memory for a, b in itertools.pairwise(found)) == (place != "DDP")
    ddp, fsdp, head = (scaling.steps(policy, BATCH, MACHINE, place)[-1].memory for place in scaling.PLACES)
    assert head < fsdp < ddp / 10


def test_a_ring_moves_what_the_others_have():
    size, rate = 1e9, MACHINE.nvlink
    assert MACHINE.collective(size, 1) == 0
    assert MACHINE.collective(size, 8) == pytest.approx(size * 7 / 8 / rate, rel=0.02)
    assert MACHINE.collective(size, 1024) > MACHINE.collective(size, 8)


def test_the_page_holds_the_loops_tables_too():
    page = (scaling.DOCS / "scaling.md").read_text(encoding="utf-8")
    assert scaling_loop.written(page, scaling_loop.tables(MACHINE, scaling_loop.Iteration())) == page


def test_sampling_takes_whole_rounds_of_batches():
    policy, engine = scaling.POLICIES[0], scaling_loop.TRANSFORMERS
    one, full, more = (scaling_loop.sampling(policy, engine, MACHINE, 2, n, 512) for n in (1, 128, 129))
    assert one == full and more == 2 * full
