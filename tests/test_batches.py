import torch

from training.batches import EpochSampler, StepSampler, keyed_generator


def test_the_sampler_may_be_moved_on_and_keeps_the_order_without_shuffling():
    sampler = EpochSampler(5, shuffle=False)
    assert list(sampler) == [(0, index) for index in range(5)]
    sampler.epoch, sampler.start = 2, 3
    assert list(sampler) == [(2, 3), (2, 4)] and len(sampler) == 2


def test_each_epoch_takes_every_clip_once_however_many_processes():
    class Accelerator:
        num_processes = 3

    options = {"seed": 0, "batch_size": 2, "num_micro_steps": 2}
    parts = []
    for rank in range(3):
        Accelerator.process_index = rank
        parts.append(list(StepSampler(7, Accelerator, 0, 14, **options)))
    keys = [key for micro_step in zip(*parts) for batch in micro_step for key in batch]
    assert len(keys) == 14 * 12
    for epoch in range(len(keys) // 7):
        assert sorted(keys[7 * epoch : 7 * epoch + 7]) == [(epoch, index) for index in range(7)]
    Accelerator.process_index = 1
    assert list(StepSampler(7, Accelerator, 5, 14, **options)) == parts[1][10:]


def test_generators_depend_on_every_part_of_their_key():
    draws = {key: float(torch.rand(1, generator=keyed_generator(*key))) for key in [(0, 1), (1, 0), (0, 1, 0), (0, 2)]}
    assert len(set(draws.values())) == 4
    assert draws[(0, 1)] == float(torch.rand(1, generator=keyed_generator(0, 1)))
