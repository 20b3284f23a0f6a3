import itertools
import logging
import math
import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from gentrain.data.base import CorruptItem, TensorItems
from gentrain.data.loader import Loader, order
from gentrain.data.toys import UNLIMITED, Mixture


class OneByOne:
    """Items without the fast path; those in `bad` are corrupt."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise CorruptItem(f"image {index} is broken")
        return {"x": torch.tensor([float(index)]), "label": torch.tensor(index % 3)}


def in_memory(count):
    return TensorItems(torch.arange(count).float()[:, None], torch.arange(count) % 3)


def take(loader, steps):
    return list(itertools.islice(loader, steps))


def stream(items, steps, batch_size, world_size=1, micro_batches=1, **options):
    """{position: item read there} over all ranks."""
    read = {}
    for rank in range(world_size):
        loader = Loader(items, 5, batch_size, rank=rank, world_size=world_size, micro_batches=micro_batches, **options)
        for step in take(loader, steps):
            assert len(step) == micro_batches
            for batch in step:
                assert batch["label"].equal(batch["x"][:, 0].long() % 3)
                pairs = list(zip(batch["index"].tolist(), batch["x"][:, 0].long().tolist()))
                assert not read.keys() & dict(pairs).keys()
                read.update(pairs)
    return read


# --- the order ------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**63 - 1), st.integers(1, 300), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(seed, count, epoch):
    items = order(seed, count, torch.arange(epoch * count, (epoch + 1) * count))
    assert items.sort()[0].equal(torch.arange(count))


@given(st.integers(0, 1000), st.integers(1, 2**45), st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_position_is_ordered_alone_as_in_company(seed, count, positions):
    together = order(seed, count, torch.tensor(positions))
    assert (together >= 0).all() and (together < count).all()
    assert together.tolist() == [int(order(seed, count, torch.tensor([p]))) for p in positions]


def test_the_order_is_fixed_for_ever():
    """A run resumed with a later version must go on where it stopped."""
    assert order(0, 10, torch.arange(20)).tolist() == [2, 9, 0, 8, 7, 6, 5, 3, 4, 1, 7, 8, 1, 2, 5, 6, 4, 3, 9, 0]
    assert order(2**40, 10**9, torch.tensor([0, 10**9])).tolist() == [74483998, 882166592]


@pytest.mark.parametrize("count", [4, 6, 100])
def test_the_order_looks_random(count):
    """Where an item goes, and what follows it, is uniform over seeds and epochs."""
    draws = 100_000 if count < 10 else 20_000
    orders = torch.cat([order(seed, count, torch.arange(draws // 4 * count)).reshape(-1, count) for seed in range(4)])
    gaps = (orders[:, 1:] - orders[:, :-1]) % count - 1
    for values, cells in ((orders[:, 0], count), (orders[:, -1], count), (gaps[:, 0], count - 1), (gaps[:, count // 2 - 1], count - 1)):
        assert chisquare(values.bincount(minlength=cells).numpy()).pvalue > 1e-5
    same = (orders[1:] == orders[:-1]).double().mean().item()  # epochs are unrelated
    assert abs(same - 1 / count) < 5 / count / math.sqrt(draws)


# --- ranks, micro-batches, workers, resuming --------------------------------------------------------------------------------------


def test_rows_of_ranks_and_micro_batches():
    loader = Loader(in_memory(100), 0, 24, rank=1, world_size=3, micro_batches=2, start=48)
    first, second = next(iter(loader))
    assert first["index"].tolist() == [52, 53, 54, 55]  # 48 + (0 * 3 + 1) * 4
    assert second["index"].tolist() == [64, 65, 66, 67]  # 48 + (1 * 3 + 1) * 4
    assert first["index"].dtype == torch.int64 and first["x"].shape == (4, 1) and first["label"].shape == (4,)


@given(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (4, 1), (3, 4)]), st.integers(1, 40), st.integers(0, 500))
@settings(max_examples=10, deadline=None)
def test_the_stream_does_not_depend_on_ranks_and_micro_batches(split, count, start):
    world_size, micro_batches = split
    read = stream(in_memory(count), 4, 12, world_size, micro_batches, start=start)
    positions = torch.arange(start, start + 48)
    assert read == dict(zip(positions.tolist(), order(5, count, positions).tolist()))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_stream_does_not_depend_on_workers(workers):
    assert stream(OneByOne(50), 10, 8, 2, 2, workers=workers) == stream(in_memory(50), 10, 8)


def test_a_run_goes_on_at_any_position():
    whole = stream(in_memory(37), 12, 10)
    for start in (10, 33, 70):
        rest = stream(in_memory(37), 3, 10, start=start)
        assert rest == {position: whole[position] for position in range(start, start + 30)}


def test_each_iteration_begins_at_start():
    loader = Loader(in_memory(30), 0, 6, start=6)
    assert take(loader, 1)[0][0]["index"].equal(take(loader, 1)[0][0]["index"])


def test_blocks_join_without_a_seam(monkeypatch):
    monkeypatch.setattr("gentrain.data.loader._BLOCK", 16)
    assert stream(in_memory(37), 20, 6, 2, 1) == dict(enumerate(order(5, 37, torch.arange(120)).tolist()))


def test_unlimited_items():
    first, second = (batch["x"] for (batch,) in take(Loader(Mixture().split("train"), 0, 64, start=UNLIMITED - 64), 2))
    assert first.shape == second.shape == (64, 2)


def test_workers_end_with_the_iterator():
    iterator = iter(Loader(OneByOne(50), 0, 4, workers=2))
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert not multiprocessing.active_children()


# --- corrupt items ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_items_are_replaced_counted_and_named(workers, caplog):
    bad = [3, 11, 12, 19]
    loader = Loader(OneByOne(20, bad), 5, 4, workers=workers)
    with caplog.at_level(logging.WARNING):
        read = [item for (batch,) in take(loader, 20) for item in batch["x"][:, 0].long().tolist()]
    expected = order(5, 20, torch.arange(80)).tolist()
    for position, item in enumerate(expected):
        if item in bad:
            epoch = expected[position - position % 20 :][:20]
            after = [epoch[(position + k) % 20] for k in range(1, 20)]
            item = next(item for item in after if item not in bad)
        assert read[position] == item
    assert loader.corrupt == {index: f"image {index} is broken" for index in bad}
    warned = [record.message for record in caplog.records]
    assert len(warned) == 4 and all(sum(f"image {index} is broken" in message for message in warned) == 1 for index in bad)


def test_replacements_do_not_depend_on_ranks_and_workers():
    items = OneByOne(20, [3, 11, 12, 19])
    assert stream(items, 10, 12, 3, 2, workers=1) == stream(items, 10, 12)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_corrupt_items_end_the_run_with_their_names(workers):
    loader = Loader(OneByOne(20, range(5)), 0, 4, workers=workers, max_corrupt=4)
    with pytest.raises(RuntimeError, match="5 corrupt items, more than the limit") as raised:
        take(loader, 10)
    assert all(f"image {index} is broken" in str(raised.value) for index in range(5))
    assert len(take(Loader(OneByOne(20, range(5)), 0, 4, max_corrupt=5), 10)) == 10


@pytest.mark.parametrize("count", [1, 6])
def test_nothing_readable_ends_the_run(count):
    with pytest.raises(RuntimeError, match=f"{count} corrupt items"):
        take(Loader(OneByOne(count, range(count)), 0, 4), 1)


def test_other_faults_are_not_hidden():
    class Faulty(OneByOne):
        def __getitem__(self, index):
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        take(Loader(Faulty(3), 0, 1), 1)


# --- refusals ---------------------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch of 10 does not divide over 2 ranks x 3 micro-batches; use a multiple of 6, such as 12"):
        Loader(in_memory(5), 0, 10, world_size=2, micro_batches=3)


def test_no_items_are_refused():
    with pytest.raises(ValueError, match="no items"):
        Loader(in_memory(0), 0, 4)
