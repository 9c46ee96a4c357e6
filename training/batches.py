"""Which clips make up which step, and the generators of everything random, keyed by what it is for."""

import signal

import numpy as np
import torch
from torch.utils.data import Sampler


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

    All epochs are one stream, each in an order of its own, and optimizer step n takes the n-th stretch of it.
    A batch may therefore straddle two epochs; none is ever smaller.
    """

    def __init__(self, num_clips, args, accelerator, first_step, num_steps):
        self.num_clips, self.seed = num_clips, args.seed
        self.batch_size, self.num_micro_steps = args.train_batch_size, args.gradient_accumulation_steps
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


def list_of_items(items):
    """Collate function: the captions, text states and waveforms of a batch differ in length and stay apart."""
    return {name: [item[name] for item in items] for name in items[0]}


def ignore_sigterm(worker):
    """For workers: a signal to the whole process group must not take them from under the loop that is to finish."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
