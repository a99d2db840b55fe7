"""What records its steps, and records of parts joined."""

import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from odenets import Flow, MLPField, measures, models
from odenets.detection import Pipeline
from odenets.errors import needs
from odenets.files import write_atomically
from odenets.recording import Records, is_recorder, recorder_in


class Broken(torch.nn.Module):
    """A recorder of the user's, whose depth is not known yet."""

    @property
    def depth(self):
        raise RuntimeError("the network has not been built yet")

    def record(self, x, /, **measures):
        return x, Records({})

    def steps(self, x, *, closing=True):
        return iter(())


def test_a_recorder_is_told_without_asking_for_its_properties():
    assert is_recorder(Broken())
    Pipeline(Broken())


def test_a_compiled_network_is_a_recorder():
    assert is_recorder(torch.compile(models.small_network(), backend="eager"))
    assert not is_recorder(torch.nn.Linear(2, 2))


def test_parts_with_other_measures_are_not_joined():
    flow, x = Flow(depth=2, solver="euler"), torch.randn(3, 2)
    (_, one), (_, other) = flow.record(x, a=measures.action), flow.record(x, r=measures.residue)
    with pytest.raises(ValueError, match=r"parts must have the same measures, got \['a'\] and \['r'\]"):
        Records.join([one, other])
    joined = Records.join([one, one])
    assert joined.starts == (0, 2)
    assert joined["a"].shape == (4, 3)


def test_threads_may_write_one_file_at_once(tmp_path):
    """Names from the number of the process alone are shared by threads, and by containers."""
    errors = []

    def write(i):
        try:
            for _ in range(50):
                write_atomically(tmp_path / "file", bytes([i]) * 1000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set((tmp_path / "file").read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_library_that_lacks_something_of_its_own_is_not_said_to_be_missing():
    with pytest.raises(ModuleNotFoundError, match=r"No module named .numpy\.no_such_part"), needs("training"):
        import numpy.no_such_part  # noqa: F401


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = Flow(depth=2)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(2, 4), Flow(depth=2)), r"got Sequential with a Flow in it at '1': write it as"),
        (Mine(), r"got Mine with a Flow in it at 'flow': write it as odenets.Network\(encoder, flow, head\)"),
        (AveragedModel(Flow(lambda: MLPField(2))), r"got a AveragedModel around one .*Recording\(network"),
    ],
)
def test_what_holds_a_recorder_is_told_from_what_wraps_one(network, message):
    with pytest.raises(TypeError, match=message):
        recorder_in(network)
