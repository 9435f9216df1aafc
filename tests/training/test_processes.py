"""What happens to the process group at the end of a command."""

import pytest
import torch.distributed as dist
from test_distributed import free_port

from llava_fwd2bot.training.processes import ending_process_group


@pytest.fixture
def group():
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{free_port()}", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("leave", [lambda: None, lambda: exit(143)])
def test_the_process_group_is_destroyed_at_the_end_and_after_a_signal(group, leave):
    """A group that outlives the interpreter aborted a process now and then, after its training was done."""
    try:
        with ending_process_group():
            leave()
    except SystemExit as stop:
        assert stop.code == 143
    assert not dist.is_initialized()


def test_after_an_error_the_process_group_is_left_to_the_launcher(group):
    """Other processes may wait in a collective: destroying the group could then wait for them."""
    with pytest.raises(ValueError), ending_process_group():
        raise ValueError("bad row")
    assert dist.is_initialized()


def test_without_a_process_group_nothing_happens():
    with ending_process_group():
        pass
    assert not dist.is_initialized()
