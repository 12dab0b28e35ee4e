"""Replicas and stages, by arithmetic that can be done by hand."""

import itertools

import pytest
import torch

from ddp_eval.distributed import collectives
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf.pipeline_parallel import split_layers
from ddp_eval.errors import UserError
from ddp_eval.layout import KINDS, LAYERS, SHARD, TENSOR, WHOLE_COPIES, Layout, possible_layouts
from ddp_eval.placement.kinds import Kind, kind_of, resolve_layout


def test_words_become_layouts():
    """Catches a K that is lost, and a choice made without knowing the model."""
    assert resolve_layout("replicas", 6, 6) == WHOLE_COPIES
    assert resolve_layout("tensor:3", 6, 6) == Layout(TENSOR, 3)
    assert resolve_layout("layers:2", 6, 2) == Layout(LAYERS, 2)
    assert resolve_layout("tensor", 16, 8) == Layout(TENSOR, 8)
    assert resolve_layout("tensor", 1, 1) == WHOLE_COPIES
    assert [resolve_layout(words, 8, 8) for words in ("auto", "measure", "layers")] == [None] * 3
    assert str(Layout(LAYERS, 4)) == "layers:4"
    assert possible_layouts(4) == [WHOLE_COPIES, *(Layout(kind, count) for count in (2, 4) for kind in (TENSOR, LAYERS, SHARD))]


def test_every_kind_has_its_class():
    """Catches a kind that the command line takes and that nothing stands behind, and a sentence that is wrong."""
    for name in KINDS:
        assert isinstance(kind_of(Layout(name, 2)), Kind)
    assert kind_of(WHOLE_COPIES).sentence(6) == "6 copies of the model, on a rank each"
    assert kind_of(Layout(TENSOR, 3)).sentence(6) == "2 copies of the model, each matrix split over 3 ranks"
    assert kind_of(Layout(LAYERS, 6)).sentence(6) == "1 copy of the model, the layers split over 6 ranks"


def test_ranks_that_do_not_divide():
    """Catches ranks left over in silence, or a refusal that does not say which number to change."""
    with pytest.raises(UserError, match=r"takes 2 ranks for each copy .*, and 5 ranks leave 1 over: start 4 or 6 ranks"):
        resolve_layout("layers:2", 5, 5)
    with pytest.raises(UserError, match=r"takes 4 ranks for each copy .*, and there are only 2: start 4 ranks"):
        resolve_layout("tensor:4", 2, 2)


def test_packs_are_dealt_to_replicas():
    """Catches two ranks of one replica with different packs, and packs that fall between replicas."""
    device = torch.device("cpu")
    worlds = [World(rank, rank, 6, device, ranks_per_replica=2) for rank in range(6)]
    assert [(world.replica, world.shard_index) for world in worlds] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    shares = [collectives.shard(world, 7) for world in worlds]
    assert shares[0::2] == shares[1::2] == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]


def test_stages_are_even():
    """Catches a layer on no stage or on two, and a last stage that does its share of layers and the head as well."""
    assert split_layers([1.0] * 4, 0.0, 2) == [range(0, 2), range(2, 4)]
    assert split_layers([1.0] * 5, 0.0, 2) == [range(0, 3), range(3, 5)]
    assert split_layers([1.0] * 8, 2.0, 2) == [range(0, 5), range(5, 8)], "the head weighs as much as two layers"
    assert split_layers([1.0] * 3, 9.0, 3) == [range(0, 1), range(1, 2), range(2, 3)]
    assert split_layers([5.0, 1.0, 1.0, 1.0], 0.0, 2) == [range(0, 1), range(1, 4)], "a first layer unlike the others"
    for count, stages in itertools.product(range(1, 9), range(1, 5)):
        if stages <= count:
            spans = split_layers([1.0] * count, 0.3, stages)
            assert [number for span in spans for number in span] == list(range(count))
            assert all(spans)
    with pytest.raises(UserError, match="more parts than it has layers"):
        split_layers([1.0, 1.0], 0.0, 3)
