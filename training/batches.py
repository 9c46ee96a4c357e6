"""Which clips make up which step, and random generators keyed by the seed and by what is drawn.

No draw comes from a running stream. So a run that was killed and resumed does exactly what an unbroken one does, and a
batch is the same however it is spread over processes and accumulation steps.
"""

import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm


def keyed_generator(*key):
    """A torch.Generator that depends on nothing but `key` (non-negative integers)."""
    # with its length, since SeedSequence takes (0, 1) and (0, 1, 0) for the same
    state = np.random.SeedSequence([len(key), *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class EpochSampler(Sampler):
    """Keys `(epoch, index)` of one epoch, in an order that depends on `(seed, epoch)` alone.

    Args:
        start (`int`): number of keys to leave out: those already trained on before a resume, over all processes.

    `epoch` and `start` may be set between epochs. There is deliberately no `set_epoch`: accelerate would call it with
    its own count, which begins at 0 after a resume.
    """

    def __init__(self, num_clips, *, seed=0, epoch=0, start=0, shuffle=True):
        self.num_clips = num_clips
        self.seed = seed
        self.epoch = epoch
        self.start = start
        self.shuffle = shuffle

    def __len__(self):
        return max(self.num_clips - self.start, 0)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch, self.num_clips])  # no clip's stream: index < num_clips
        order = rng.permutation(self.num_clips) if self.shuffle else np.arange(self.num_clips)
        return iter([(self.epoch, int(index)) for index in order[self.start :]])


class StepSampler:
    """Keys `(epoch, index)` of the clips of each accumulation step of one process, from `first_step` on.

    All epochs are one sequence, each in an order of its own, and optimizer step n takes the n-th section of it.
    A batch may therefore straddle two epochs; none is ever smaller.

    Args:
        first_step, num_steps (`int`): in optimizer steps.
        batch_size (`int`): clips per process and accumulation step.
        num_micro_steps (`int`, *optional*, defaults to 1): accumulation steps in an optimizer step.
    """

    def __init__(self, num_clips, accelerator, first_step, num_steps, *, seed, batch_size, num_micro_steps=1):
        self.num_clips, self.seed = num_clips, seed
        self.batch_size, self.num_micro_steps = batch_size, num_micro_steps
        self.rank, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.first_step, self.num_steps = first_step, num_steps

    def __len__(self):
        return (self.num_steps - self.first_step) * self.num_micro_steps

    def __iter__(self):
        epoch, order = -1, None
        sampler = EpochSampler(self.num_clips, seed=self.seed)
        for micro_step in range(self.first_step * self.num_micro_steps, self.num_steps * self.num_micro_steps):
            first = (micro_step * self.num_processes + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.num_clips != epoch:
                    sampler.epoch = epoch = position // self.num_clips
                    order = list(sampler)
                keys.append(order[position % self.num_clips])
            yield keys


def step_loader(dataset, accelerator, steps, num_workers=0, *, seed, batch_size, num_micro_steps=1):
    """Batches of a data set, as dicts of lists, for the optimizer steps in the `range` `steps`: see `StepSampler`."""
    sampler = StepSampler(
        len(dataset),
        accelerator,
        steps.start,
        steps.stop,
        seed=seed,
        batch_size=batch_size,
        num_micro_steps=num_micro_steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=list_of_items,
        num_workers=num_workers,
        worker_init_fn=ignore_sigterm,
    )


def list_of_items(items):
    """Collate function: captions, text states and waveforms of a batch differ in length and are not stacked."""
    return {name: [item[name] for item in items] for name in items[0]}


def ignore_sigterm(worker):
    """For workers: a signal to the whole process group must not end them before the training loop has finished."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def shared_indices(accelerator, num_items, what, leave=False):
    """This process's share of the indices of so many items, under a progress bar."""
    indices = range(accelerator.process_index, num_items, accelerator.num_processes)
    return tqdm(indices, desc=what, unit="clip", leave=leave, disable=not accelerator.is_local_main_process)
