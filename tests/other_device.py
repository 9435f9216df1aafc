"""A training forward on a device that is not the CPU, where there is none. tests/core/test_other_device.py runs it.

PyTorch's fake tensors stand on a device written in Python, and refuse to meet those of the CPU. Numbers are not
computed. It is a process of its own: the device stays registered.
"""

from __future__ import annotations

import torch
from conftest import captions, settings, shake, standard_batch, toy_base, toy_processor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils import backend_registration

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.modeling import objective

OTHER = "other"


class Fake(FakeTensorMode):
    avoid_device_init = True  # a copy to the device is not computed either


def there(tensor: torch.Tensor) -> torch.Tensor:
    """Its like on the other device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=OTHER, requires_grad=tensor.requires_grad)


def loss_device(processor, planned: bool, **changes) -> str:
    """Where the loss of a batch comes out; what mixes devices raises an error."""
    model = shake(add_fwd2bot(toy_base(processor), settings(**changes), processor)).train()
    batch = {**standard_batch(model), **captions()}
    plans, make = [], objective.BatchPlanner.__call__
    objective.BatchPlanner.__call__ = lambda *a: plans.append(make(*a)) or plans[-1]
    model(**batch)
    # positions depend on the ids, which a fake tensor does not have
    objective.BatchPlanner.__call__ = lambda *a: plans[0]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with Fake(allow_non_fake_inputs=True):
        state, inputs = ({name: there(t) for name, t in tensors.items()} for tensors in (state, batch))
        found = functional_call(model, state, (), {**inputs, **({"plan": plans[0].to(OTHER)} if planned else {})})
    objective.BatchPlanner.__call__ = make
    assert found.answer_loss.device.type == found.contrastive_loss.device.type == OTHER
    return found.loss.device.type


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend(OTHER)
    getattr(torch, OTHER).get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch.autocast asks
    toy = toy_processor()
    for more in ({}, {"residual": "average"}, {"bridge": "linear", "pooling": "first"}):
        for given in (False, True):
            print(loss_device(toy, given, **more))
