"""Sources: batches of any iterable, their first one, and what a checkpoint keeps of their order."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from odenets.modes import random_state, set_random_state
from odenets.training.data import Batches, TensorData
from odenets.training.sources import Source, part, samples_in

DATASET = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10) % 3)


class Noisy(Dataset):
    """Samples with noise of all three global generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.rand(1) + random.random() + np.random.rand(), i % 2  # noqa: NPY002


class Stream(IterableDataset):
    """Nine samples, shared by the workers, of unknown number."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from ((torch.full((2,), float(i)), i % 2) for i in range(first, 9, step))


def values(batches) -> list[list[float]]:
    return [x.flatten().tolist() for x, _ in batches]


def generated():
    yield torch.zeros(2, 1), torch.zeros(2)
    yield torch.ones(2, 1), torch.zeros(2)


def seeded(**kwargs) -> DataLoader:
    return DataLoader(DATASET, 4, shuffle=True, generator=torch.Generator().manual_seed(3), **kwargs)


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (DataLoader(DATASET, 4), 3),
        (DataLoader(DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET), 5, False)), 2),
        (DataLoader(Stream(), 4), None),
        ([(torch.zeros(2, 1), torch.zeros(2))], 1),
        (((torch.zeros(2, 1), torch.zeros(2)) for _ in range(2)), None),
    ],
    ids=["loader", "batch sampler", "stream", "list", "generator"],
)
def test_batches_of_any_iterable(data, length):
    source = Source.of(data)
    assert source.length == length
    batches = list(source.epoch(0))
    assert len(batches) == (length or len(batches))
    assert all(isinstance(x, Tensor) and len(x) == len(y) for x, y in batches)


def test_a_stream_of_unknown_length_comes_whole_from_workers():
    source = Source.of(DataLoader(Stream(), 4, num_workers=2))
    assert sorted(x for batch in values(source.epoch(0)) for x in batch[::2]) == list(range(9))


def test_collate_makes_the_pair_of_dictionaries():
    source = Source.of([{"image": torch.ones(2, 1), "label": torch.zeros(2)}], lambda b: (b["image"], b["label"]))
    ((x, y),) = source.epoch(0)
    assert x.sum() == 2
    assert y.sum() == 0


def test_inputs_with_conditioning_come_as_a_tuple():
    pairs = TensorDataset(torch.zeros(4, 2), torch.ones(4, 1))
    loader = DataLoader([((x, c), 0) for x, c in pairs], 2)
    (x, c), _ = next(Source.of(loader).epoch(0))
    assert x.shape == (2, 2)
    assert c.shape == (2, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [seeded, lambda **k: DataLoader(Noisy(), 2, shuffle=True, **k)])
def test_the_first_batch_is_that_of_the_epoch_and_costs_no_random_state(make, workers):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    before = random_state()
    expected = values(Source.of(make(num_workers=workers)).epoch(0))
    after = torch.rand(1), random.random()
    set_random_state(before)
    source = Source.of(make(num_workers=workers))
    first, _ = source.first()
    assert torch.equal(torch.get_rng_state(), before["rng"])
    assert first.flatten().tolist() == expected[0]
    torch.rand(100)  # what a network draws when it is made from the first batch is drawn beside
    assert values(source.epoch(0)) == expected
    assert (torch.rand(1), random.random()) == after


def test_the_first_batch_of_an_iterator_is_not_lost():
    source = Source.of(generated())
    assert source.first()[0].sum() == 0
    assert [x.sum().item() for x, _ in source.epoch(2)] == [0, 2]


def test_another_epoch_than_that_of_the_first_batch_begins_with_the_generators_as_they_were():
    source, other = Source.of(seeded()), Source.of(seeded())
    source.first(0)
    assert values(source.epoch(1)) == values(other.epoch(1))


def test_an_iterator_has_one_epoch():
    source = Source.of(generated())
    assert len(list(source.epoch(0))) == 2
    with pytest.raises(ValueError, match=r"batches is an iterator \(generator\), which gives one epoch: pass a list"):
        next(source.epoch(1))


def test_seeded_loaders_go_on_from_their_state():
    source = Source.of(seeded(num_workers=2))
    list(source.epoch(0))
    state, expected = source.state_dict(), values(source.epoch(1))
    again = Source.of(seeded(num_workers=2))
    again.load_state_dict(state)
    assert values(again.epoch(1)) == expected != values(again.epoch(2))


def test_samplers_with_generators_of_their_own_are_kept_too():
    def loader() -> DataLoader:
        return DataLoader(DATASET, 4, sampler=RandomSampler(DATASET, generator=torch.Generator().manual_seed(1)))

    source, again = Source.of(loader()), Source.of(loader())
    list(source.epoch(0))
    again.load_state_dict(source.state_dict())
    assert values(source.epoch(1)) == values(again.epoch(1))


def test_samplers_are_told_the_epoch():
    sampler = DistributedSampler(DATASET, num_replicas=2, rank=0, seed=1)
    source = Source.of(DataLoader(DATASET, 5, sampler=sampler))
    first, second, again = values(source.epoch(0)), values(source.epoch(1)), values(source.epoch(0))
    assert first == again != second


def test_an_evaluation_leaves_seeded_samplers_where_they_stood():
    source, other = Source.of(seeded()), Source.of(seeded())
    list(source.in_order())
    assert values(source.epoch(0)) == values(other.epoch(0))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    list(Source.of(DataLoader(Noisy(), 2, shuffle=True)).in_order())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[2]) == before[1:]  # noqa: NPY002


def test_random_state_of_python_and_numpy_is_kept():
    state = random_state()
    drawn = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
    set_random_state(state)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == drawn  # noqa: NPY002


def test_batches_in_memory_keep_the_epoch_of_a_subclass():
    class Doubled(Batches):
        def epoch(self, epoch):
            return ((2 * x, y) for x, y in super().epoch(epoch))

    data = TensorData(torch.arange(4.0)[:, None], torch.zeros(4, dtype=torch.long))
    source = Source.of(Doubled(data, 2))
    source.move_to(nn.Linear(1, 1, dtype=torch.float64))
    assert values(source.epoch(0)) == [[0, 2], [4, 6]]
    assert values(source.in_order()) == [[0, 1], [2, 3]]
    assert next(source.epoch(0))[0].dtype == torch.float64


def test_batches_come_in_the_precision_of_the_network():
    batch = ((torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32)), {"y": torch.zeros(2), "n": torch.zeros(2).long()})
    source = Source.of([batch])
    for dtype, finer in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        source.move_to(nn.Linear(1, 1, dtype=dtype))
        (x, c), y = next(source.epoch(0))
        assert (x.dtype, c.dtype, y["y"].dtype, y["n"].dtype) == (dtype, torch.int32, finer, torch.int64)


def test_a_part_of_a_batch_is_taken_of_every_tensor_with_a_row_a_sample():
    batch = ((torch.arange(4.0), torch.tensor(2.0)), {"y": torch.arange(4)})
    (x, c), y = part(batch, slice(1, None, 2))
    assert (x.tolist(), c.item(), y["y"].tolist()) == ([1, 3], 2, [1, 3])
    assert samples_in(batch[0]) == 4


PAIR = (torch.zeros(2, 1), torch.zeros(2))


@pytest.mark.parametrize(
    ("data", "collate", "error", "words"),
    [
        (DATASET, None, TypeError, "an iterable of batches, got TensorDataset: pass torch.utils.data.DataLoader"),
        (torch.zeros(3, 2), None, TypeError, "an iterable of batches, got Tensor: pass a DataLoader, or a list of"),
        (3, None, TypeError, "an iterable of batches, got int"),
        ([], None, ValueError, "batches must hold at least one batch, got none of list"),
        (DataLoader(DATASET, 11, drop_last=True), None, ValueError, "at least one batch, got none of DataLoader"),
        (iter([]), None, ValueError, "at least one batch, got none of list_iterator"),
        ([torch.zeros(2, 1)], None, TypeError, r"batch 1 of batches must be a pair .* one tensor \(2, 1\): give coll"),
        ([{"x": PAIR[0]}], None, TypeError, r"batch 1 of batches must be a pair .* dict with \['x'\]: give collate="),
        ([PAIR, (*PAIR, 1)], None, TypeError, "batch 2 of batches must be a pair .* tuple of 3 parts: give collate="),
        ([PAIR], lambda b: b[0], TypeError, "what collate returns for batch 1 of batches must be a pair"),
        ([PAIR], 3, TypeError, "collate must be a function batch"),
        ([("a", 1)], None, TypeError, r"the inputs of batch 1 of batches must be tensors \(B, ...\), got str"),
        ([(torch.zeros(0, 1), torch.zeros(0))], None, ValueError, "batch 1 of batches must hold samples, got none"),
    ],
)
def test_what_is_no_data_is_named_with_the_remedy(data, collate, error, words):
    with pytest.raises(error, match=words):
        list(Source.of(data, collate).epoch(0))


def test_a_state_of_other_generators_is_refused():
    source = Source.of([PAIR])
    with pytest.raises(ValueError, match=r"must hold the seeded generators .* \['loader'\], got \[\]"):
        source.load_state_dict(Source.of(seeded()).state_dict())


def test_a_part_of_a_batch_is_taken_of_targets_in_a_list():
    words = ["one", "two", "three", "four"]
    boxes = [{"boxes": torch.rand(n, 4)} for n in (1, 4, 2, 3)]
    for targets in (words, tuple(words), boxes):
        assert part((torch.rand(4, 2), targets), slice(1, 3))[1] == targets[1:3]


def test_batches_that_draw_in_a_loop_of_their_own_are_told_where():
    class Noisy(Batches):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match=r"draw in epoch\(self, epoch\), got a Noisy with an __iter__"):
        Source.of(Noisy((torch.rand(4, 2), torch.arange(4)), 2))
