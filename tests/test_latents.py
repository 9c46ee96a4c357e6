import itertools
import multiprocessing
import signal
import time

import numpy as np
import soundfile
import torch

from training.data import Clip
from training.latents import LatentCache, cache_key


def write_noise(path, seed=0):
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 99), 16000)
    return Clip(str(path), ("a sound",))


def test_a_key_depends_on_content_and_settings_alone(tmp_path):
    first, second = write_noise(tmp_path / "a.wav"), write_noise(tmp_path / "b.wav")
    key = cache_key(first, {"rate": 16000, "start": 0})
    assert key == cache_key(second, {"start": 0, "rate": 16000})
    assert key == cache_key((tmp_path / "a.wav").read_bytes(), {"rate": 16000, "start": 0})
    assert key != cache_key(first, {"rate": 16000, "start": 1})
    write_noise(tmp_path / "a.wav", seed=1)
    assert key != cache_key(first, {"rate": 16000, "start": 0})


def test_the_cache_gives_back_what_was_put(tmp_path):
    cache, key = LatentCache(tmp_path / "cache"), cache_key(b"x", {})
    assert cache.get(key) is None and key not in cache
    batch = torch.randn(4, 8, 6, requires_grad=True)
    mean, logvar = batch[1].chunk(2)
    tensors = {"mean": mean, "logvar": logvar.T, "mask": torch.tensor([True, False]), "half": torch.ones(2).bfloat16()}
    cache.put(key, tensors)
    found = LatentCache(tmp_path / "cache").get(key)
    assert found.keys() == tensors.keys() and key in cache
    assert all(found[name].dtype == tensors[name].dtype for name in found)
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    cache.put(key, {"mean": torch.zeros(1)})
    assert list(cache.get(key)) == ["mean"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key}.safetensors"]


def test_a_damaged_or_foreign_file_counts_as_absent(tmp_path):
    cache, key, other = LatentCache(tmp_path), cache_key(b"x", {}), cache_key(b"y", {})
    cache.put(key, {"mean": torch.randn(50)})
    data = cache.path(key).read_bytes()
    for damaged in (b"", data[:4], data[:60], data[:-1], bytes(len(data)), b"text" * 100):
        cache.path(key).write_bytes(damaged)
        assert cache.get(key) is None and key not in cache
    cache.path(other).parent.mkdir(exist_ok=True)
    cache.path(other).write_bytes(data)
    assert cache.get(other) is None
    cache.put(key, {"mean": torch.ones(1)})
    assert key in cache


def test_what_others_put_into_the_cache_counts_as_absent_and_is_not_lost(tmp_path):
    cache, key, other = LatentCache(tmp_path), cache_key(b"x", {}), cache_key(b"z", {})
    cache.path(key).mkdir(parents=True)
    (cache.path(key) / "notes.txt").write_text("the user's")
    (tmp_path / other[:2]).write_text("the user's")
    (tmp_path / "README").write_text("the user's")
    for each in (key, other):
        assert cache.get(each) is None
        cache.put(each, {"mean": torch.ones(1)})
        assert each in cache
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert [path.read_text() for path in kept] == ["the user's"] * 3


def write_for_long(folder, keys):
    torch.set_num_threads(1)
    end = time.monotonic() + 10  # the test kills it long before, but a test that is killed itself must leave no writer
    for number in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()):
        tensors = {"a": torch.full((200000,), number), "b": torch.tensor(number)}
        LatentCache(folder).put(keys[number % len(keys)], tensors)


def test_killed_writers_leave_nothing_half_written(tmp_path):
    cache = LatentCache(tmp_path)
    keys = [cache_key(b"", {"number": number}) for number in range(3)]

    def complete():
        found = [tensors for tensors in map(cache.get, keys) if tensors]
        assert all(bool((tensors["a"] == tensors["b"]).all()) for tensors in found)
        return len(found)

    fork = multiprocessing.get_context("fork")
    most = 0
    for delay_in_s in (0.2, 0.05, 0.13, 0.21, 0.08, 0.11):
        writers = [fork.Process(target=write_for_long, args=(tmp_path, keys)) for _ in range(2)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + delay_in_s
        while time.monotonic() < deadline:
            most = max(most, complete())
        for writer in writers:
            writer.kill()
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
        assert complete() >= most
    assert most > 0
