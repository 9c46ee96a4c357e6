"""PyTorch's ambient settings, such as its default dtype, put aside while the pipeline runs."""

import contextlib

import torch


@contextlib.contextmanager
def own_torch_settings():
    """Context, also a decorator, with float32 and the CPU as defaults, without autocast and without inference mode:
    schedulers and models are written for these. Other settings give another sound, tensors that autograd refuses, or
    errors in the middle."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device_type in ("cpu", "cuda", "xpu", "mps"):
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def in_own_torch_settings(iterator):
    """Pass on what a generator yields, each time with [`own_torch_settings`], which its consumer does not get."""
    try:
        while True:
            with own_torch_settings():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
    finally:
        iterator.close()
