"""Packing against the definition written as loops; plans against their promises."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from fastrank import packing
from fastrank.model.graphs import fill
from fastrank.packing import (
    Bucket,
    EncodedTexts,
    PackedBatch,
    Pairs,
    pack_lists,
    pack_pairs,
    plan_batches,
    plan_chunks,
    plan_even_batches,
    restore_order,
)


def _random_pairs(rng, count, longest=40):
    lengths = rng.integers(1, longest, size=count)
    return [
        (rng.integers(0, 30_000, size=n).astype(np.int32), rng.integers(0, 2, size=n).astype(np.int32)) for n in lengths
    ]


def test_lists_are_packed_in_order():
    rng = np.random.default_rng(0)
    lists = [_random_pairs(rng, count) for count in (3, 0, 1, 8, 0)]
    lists.append([lists[0][0], lists[0][0]])  # the same pair twice
    batch = pack_lists(lists)
    pairs = [pair for pairs in lists for pair in pairs]
    assert (batch.num_pairs, batch.num_lists, batch.num_tokens) == (14, 6, sum(len(ids) for ids, _ in pairs))
    assert batch.max_pair_tokens == max(len(ids) for ids, _ in pairs)
    assert batch.list_offsets.tolist() == [0, 3, 3, 4, 12, 12, 14]
    assert batch.pair_offsets.dtype == batch.list_offsets.dtype == torch.int32
    assert batch.token_ids.dtype == batch.token_types.dtype == batch.positions.dtype == torch.int64
    assert batch.pair_offsets[0] == 0 and batch.pair_offsets[-1] == batch.num_tokens
    for i, (ids, types) in enumerate(pairs):
        part = slice(int(batch.pair_offsets[i]), int(batch.pair_offsets[i + 1]))
        assert batch.token_ids[part].tolist() == ids.tolist()
        assert batch.token_types[part].tolist() == types.tolist()
        assert batch.positions[part].tolist() == list(range(len(ids)))


def test_pairs_are_one_list_and_no_pairs_are_an_empty_one():
    pairs = _random_pairs(np.random.default_rng(1), 5)
    assert pack_pairs(pairs).list_offsets.tolist() == [0, 5]
    for empty in (pack_pairs([]), pack_lists([[]])):
        assert (empty.num_tokens, empty.num_pairs, empty.num_lists, empty.max_pair_tokens) == (0, 0, 1, 0)
        assert empty.pair_offsets.tolist() == [0]
    assert pack_lists([]).list_offsets.tolist() == [0]


def test_pairs_may_be_any_sequences_of_whole_numbers():
    wide = np.arange(12, dtype=np.int64)
    batch = pack_pairs([([3, 1], [0, 1]), ((), ()), (wide[::4], (1, 1, 1)), (np.uint8([9]), np.zeros(1))])
    assert batch.token_ids.tolist() == [3, 1, 0, 4, 8, 9]
    assert batch.token_types.tolist() == [0, 1, 1, 1, 1, 0]
    assert batch.pair_offsets.tolist() == [0, 2, 2, 5, 6]
    joined = Pairs.join([([3, 1], [0, 1]), (wide[::4], (1, 1, 1))])
    assert joined.ids.dtype == joined.types.dtype == np.int32
    assert [(ids.tolist(), types.tolist()) for ids, types in joined] == [([3, 1], [0, 1]), ([0, 4, 8], [1, 1, 1])]
    for ids in ([2**32 + 7], [1.5], [np.nan]):
        with pytest.raises(ValueError, match="must be whole numbers of 32 bits, not"):
            pack_pairs([(ids, [0])])
    # As many of both in all, so that only the pairs tell.
    with pytest.raises(ValueError, match="Pair 1 has 1 token ids and 2 token types"):
        pack_pairs([([1, 2], [0, 0]), ([3], [0, 0]), ([4, 5], [0])])


def test_a_batch_made_by_hand_finds_its_longest_pair_and_moves():
    tokens = torch.arange(7)
    batch = PackedBatch(tokens, tokens, tokens, torch.tensor([0, 2, 7], dtype=torch.int32), torch.tensor([0, 2]))
    assert batch.max_pair_tokens == 5
    moved = batch.to("meta")
    assert moved.token_ids.is_meta and moved.list_offsets.is_meta and moved.max_pair_tokens == 5


def test_offsets_past_32_bits_are_refused(monkeypatch):
    ids = np.broadcast_to(np.int32(0), (2**30,))  # takes no memory
    monkeypatch.delattr(Pairs, "join")  # which would take 16 GiB
    with pytest.raises(ValueError, match="lower max_batch_tokens"):
        pack_pairs([(ids, ids)] * 2)


@pytest.mark.parametrize("budget", [1, 7, 64, 200, 10**9])
def test_plans_hold_every_pair_once_within_the_budget(budget):
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 65, size=1000)
    plan = plan_batches(lengths, budget)
    order = np.concatenate(plan)
    assert sorted(order.tolist()) == list(range(1000))
    # Longest first; equal lengths in the caller's order.
    assert order.tolist() == sorted(range(1000), key=lambda i: (-lengths[i], i))
    sizes = [int(lengths[indices].sum()) for indices in plan]
    for i, (indices, size) in enumerate(zip(plan, sizes, strict=True)):
        assert size <= budget or len(indices) == 1
        if i + 1 < len(plan):
            assert size + lengths[plan[i + 1][0]] > budget, "the next pair would have fitted"
    values = rng.standard_normal(1000).astype(np.float32)
    restored = restore_order(plan, [values[indices] for indices in plan])
    assert restored.dtype == np.float32 and restored.tolist() == values.tolist()


@pytest.mark.parametrize("budget", [7, 100, 4000, 10**6])
def test_even_batches_have_about_equally_many_tokens(budget):
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 60, size=700)
    plan = plan_even_batches(lengths, budget)
    order = np.concatenate(plan)
    assert sorted(order) == list(range(700)) and (np.diff(lengths[order]) <= 0).all()
    sizes = np.array([lengths[indices].sum() for indices in plan])
    assert all(size <= budget or len(indices) == 1 for size, indices in zip(sizes, plan, strict=True))
    if budget == 4000:
        assert len(plan) <= lengths.sum() / budget + 2 and sizes[:-1].min() > 0.9 * sizes.max()
    if budget == 10**6:
        assert len(plan) == 1


def test_nothing_to_plan():
    assert plan_batches([], 10) == [] and plan_chunks([], 10) == [] and plan_even_batches([], 10) == []
    assert [list(indices) for indices in plan_even_batches([0, 0], 10)] == [[0, 1]]
    restored = restore_order([], [])
    assert restored.shape == (0,) and restored.dtype == np.float32
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        plan_batches([3], 0)


def test_chunks_are_whole_lists_in_order():
    assert plan_chunks([5, 5, 20, 1, 9, 1, 0], 10) == [range(0, 2), range(2, 3), range(3, 5), range(5, 7)]
    rng = np.random.default_rng(3)
    sizes = rng.integers(0, 50, size=300)
    chunks = plan_chunks(sizes, 100)
    assert [i for chunk in chunks for i in chunk] == list(range(300))
    assert all(sizes[list(chunk)].sum() <= 100 for chunk in chunks)


def test_the_shortest_and_the_longest_pair_are_known():
    pairs = [(np.arange(n), np.zeros(n, int)) for n in (5, 2, 9)]
    assert pack_pairs(pairs).span == (2, 9) and pack_pairs([]).span == (0, 0)
    batch = pack_pairs(pairs)
    found = PackedBatch(batch.token_ids, batch.token_types, batch.positions, batch.pair_offsets, batch.list_offsets)
    assert found.span == (2, 9)
    assert batch.to("cpu").span == (2, 9)


def test_a_batch_goes_to_a_gpu_as_one_piece_of_memory():
    batch = pack_lists([_random_pairs(np.random.default_rng(0), 3), []])
    tensors = batch.token_ids, batch.pair_offsets, batch.list_offsets, torch.rand(3).half(), torch.zeros(0)
    memory = packing._join(tensors)
    parts = packing._split(memory, tensors)
    for part, tensor in zip(parts, tensors, strict=True):
        assert part.dtype == tensor.dtype and part.equal(tensor)
        assert part.untyped_storage().data_ptr() == memory.data_ptr() and part.data_ptr() % 16 == 0


@pytest.fixture(params=["C++", "Python"])
def written_in(request, monkeypatch):
    if request.param == "C++" and packing._cpu is None:
        pytest.skip("The C++ extension fastrank._cpu is not built.")
    if request.param == "Python":
        monkeypatch.setattr(packing, "_cpu", None)


def _mix(value, more):
    value = (value ^ more) * 0x9E3779B97F4A7C15 % 2**64
    return value ^ value >> 29


def _unmix(value):
    value ^= value >> 29 ^ value >> 58
    return value * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64


def _same_hash():
    """Five pairs of four tokens, of which csrc/pairs.cpp's hash is one and the same."""
    wanted = 123456789
    for first in (0, 1, 2**32, 7 << 40, 2**64 - 1):
        second = _mix(4, first) ^ _unmix(wanted)
        assert _mix(_mix(4, first), second) == wanted
        yield np.array([first, second], np.uint64).view(np.int32), np.zeros(4, np.int32)


def test_different_pairs_are_told_apart(written_in):
    rng = np.random.default_rng(5)
    lists = [
        [],
        [([], [])] * 3,
        [*_same_hash()] * 2,
        [([1, 2], [0, 0]), ([1, 2], [0, 1]), ([1], [0]), ([1, 2], [0, 0]), ([2, 1], [0, 0]), ([1, 2, 0], [0, 0, 0])],
    ]
    lists += [
        [(rng.integers(0, 2, n), rng.integers(0, 2, n)) for n in rng.integers(0, longest, 500)]
        for longest in (1, 2, 4, 9)
    ]
    for pairs in lists:
        keys = [(tuple(map(int, ids)), tuple(map(int, types))) for ids, types in pairs]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        place, first = Pairs.join(pairs).find_distinct()
        assert place.dtype == first.dtype == np.int64
        assert place.tolist() == [numbers[key] for key in keys]
        assert first.tolist() == [keys.index(key) for key in numbers]


def test_a_batch_is_packed_in_any_order_and_filled_up(written_in):
    rng = np.random.default_rng(6)
    for count in (1, 2, 50):
        pairs = _random_pairs(rng, count)
        order = rng.integers(0, count, rng.integers(1, 2 * count + 1))
        plain = pack_pairs(pairs, order)
        by_hand = [pairs[i] for i in order]
        assert plain.token_ids.tolist() == [int(i) for ids, _ in by_hand for i in ids]
        assert plain.token_types.tolist() == [int(i) for _, types in by_hand for i in types]
        assert plain.positions.tolist() == [i for ids, _ in by_hand for i in range(len(ids))]
        assert plain.pair_offsets.tolist() == [0, *np.cumsum([len(ids) for ids, _ in by_hand]).tolist()]
        for num_pairs, num_tokens in ((1, 1), (3, 7), (7, 7), (40, 1000)):
            bucket = Bucket(plain.num_tokens + num_tokens, plain.num_pairs + num_pairs, 1000)
            filled, expected = pack_pairs(pairs, order, bucket=bucket, filler=(9, 1)), fill(plain, bucket, (9, 1))
            assert filled.span == expected.span
            for one, other in zip(filled._tensors, expected._tensors, strict=True):
                assert one.dtype == other.dtype and one.equal(other)
            # What goes to a GPU, and what it goes over there.
            assert filled._memory.equal(packing._memory_of(packing._split(filled._memory, filled._tensors)))
            for one, other in zip(packing._split(filled._memory, expected._tensors), expected._tensors, strict=True):
                assert one.equal(other)
    with pytest.raises(IndexError):
        pack_pairs(pairs, np.array([count]))
    # The last pair, as in any sequence.
    assert pack_pairs(pairs, np.array([-1])).token_ids.tolist() == pairs[-1][0].tolist()


def test_a_changed_batch_does_not_send_what_it_was_made_of(written_in):
    batch = pack_pairs(_random_pairs(np.random.default_rng(0), 5))
    assert batch._joined is batch._memory is not None
    others = dataclasses.replace(batch, token_types=1 - batch.token_types), copy.deepcopy(batch)
    for other in (*others, pickle.loads(pickle.dumps(batch))):
        assert other._joined is None or other._joined.data_ptr() == other.token_ids.data_ptr()
    assert others[0]._joined is None


@pytest.mark.parametrize("bucket", [Bucket(2, 2, 9), Bucket(9, 1, 9), Bucket(3, 1, 9), Bucket(9, 2, 9)])
def test_a_bucket_that_pairs_do_not_fit_is_refused(bucket, written_in):
    pairs = Pairs.join([(np.ones(2, np.int32), np.zeros(2, np.int32))] * 2)
    with pytest.raises(ValueError):
        pack_pairs(pairs, bucket=bucket)


@pytest.mark.skipif(packing._cpu is None, reason="The C++ extension fastrank._cpu is not built.")
def test_cpp_reads_and_writes_nothing_outside_of_its_arrays():
    def ids(*values):
        return np.array(values, np.int32)

    def places(*values):
        return np.array(values, np.int64)

    two, frame = (ids(1, 2), ids(0, 0)), [(ids(9), ids(0))] * 3
    for begin, count in ((0, 3), (2, 1), (3, 0), (-1, 1), (0, -1), (2**62, 2**62), (2**63 - 1, 2)):
        spans, good = (places(begin), places(count)), (places(0), places(2))
        with pytest.raises(ValueError, match="inside of the ids"):
            packing._cpu.find_distinct(*two, *spans)
        with pytest.raises(ValueError, match="inside of the ids"):
            packing._cpu.pack_pairs(*two, *spans, 0, 0, *(places(0, 0) for _ in range(3)), ids(0, 0))
        for query, document in ((spans, good), (good, spans)):
            with pytest.raises(ValueError, match="inside of the ids"):
                packing._cpu.join_pairs(two[0], *query, two[0], *document, frame, 0, 1)
    for begins, counts, types in ((places(0), places(1, 1), two[1]), (places(0), places(2), ids(0))):
        with pytest.raises(ValueError, match="as many"):
            packing._cpu.find_distinct(two[0], types, begins, counts)
    with pytest.raises(ValueError, match="as many documents as queries"):
        packing._cpu.join_pairs(two[0], places(0, 0), places(1, 1), two[0], places(0), places(1), frame, 0, 1)
    for wrong in (frame[:2], [*frame[:2], (ids(9, 9), ids(0))]):
        with pytest.raises(ValueError, match=r"before, between and behind|as many types"):
            packing._cpu.join_pairs(two[0], places(0), places(1), two[0], places(0), places(1), wrong, 0, 1)
    # Tokens, types, positions and offsets that a batch of two tokens in one pair has room for.
    for sizes in ((1, 1, 1, 2), (2, 2, 2, 0), (2, 2, 2, 1), (3, 3, 3, 2), (2, 1, 2, 2), (2, 2, 3, 2), (1, 1, 1, 3)):
        room = [np.zeros(size, np.int64) for size in sizes[:3]]
        with pytest.raises(ValueError, match=r"equally many tokens|room for the pairs"):
            packing._cpu.pack_pairs(*two, places(0), places(2), 0, 0, *room, np.zeros(sizes[3], np.int32))


def test_encoded_texts_are_a_sequence():
    arrays = [np.arange(n, dtype=np.int32) for n in (3, 0, 0, 5, 0)]
    texts = EncodedTexts.join(arrays)
    assert len(texts) == 5 and texts.lengths.tolist() == [3, 0, 0, 5, 0] and len(EncodedTexts.join([])) == 0
    assert [ids.tolist() for ids in texts] == [texts[i].tolist() for i in range(5)] == [ids.tolist() for ids in arrays]
    assert [ids.tolist() for ids in texts[3:]] == [[0, 1, 2, 3, 4], []] and texts.ids.dtype == np.int32
    more = texts.insert([1, 4], [np.int32([7, 8]), np.int32([9])])
    assert [ids.tolist() for ids in more] == [[0, 1, 2], [7, 8], [], [0, 1, 2, 3, 4], [9]]
