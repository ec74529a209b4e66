"""Sites are named as the model's modules are now: in copies, in other models, after pruning."""

import copy

import torch
from torch import nn

from unclamp import Recipe, convert
from unclamp.nn import find_ledgers


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def names(model: nn.Module) -> list[str]:
    return [
        str(site.name)
        for ledger in find_ledgers(model)
        for index, site in enumerate(ledger.sites)
        if index not in ledger.gone
    ]


def test_a_stack_of_copies_has_a_name_for_each_of_its_sites() -> None:
    one = block()
    convert(one, Recipe())
    stack = nn.ModuleList(copy.deepcopy(one) for _ in range(3))
    found = names(stack)
    assert len(found) == len(set(found)) == 18
    assert {name.rpartition(".")[0] for name in found} == {"0", "1", "2"}


def test_a_converted_part_has_the_names_of_the_model_that_it_is_put_into() -> None:
    part = block()
    convert(part, Recipe())
    del_root = nn.ModuleDict({"body": copy.deepcopy(part), "head": nn.Linear(4, 2)})
    convert(del_root, Recipe())
    assert {name.split(" ")[0] for name in names(del_root)} == {"body.0", "body.1", "head"}


def test_a_layer_that_was_pruned_is_gone() -> None:
    model = nn.Sequential(*block(), nn.Linear(4, 4))
    convert(model, Recipe())
    assert len(names(model)) == 9
    del model[1]
    model(torch.randn(2, 4)).sum().backward()
    assert sorted({name.split(" ")[0] for name in names(model)}) == ["0", "1"]
    assert len(names(model)) == 6


def test_a_look_at_a_part_does_not_rename_the_whole() -> None:
    model = nn.Sequential(block(), nn.Linear(4, 4))
    convert(model, Recipe())
    before = names(model)
    find_ledgers(model[0])
    (ledger,) = find_ledgers(model[0])
    assert [str(site.name) for site in ledger.sites] == before
