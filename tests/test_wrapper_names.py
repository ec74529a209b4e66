"""Names without the parts of wrappers: never two alike, and nothing left out but such parts."""

import copy
import pickle
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from unclamp.names import ModuleName, SiteName, joined, spellings, without_wrappers
from unclamp.rule import matches

PARTS = ("module", "base_layer", "a", "b")

Tree = tuple[list[str], set[str]]


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Paths of a tree, what is around first, and those that a wrapper put in, one a wrapper."""
    paths = [""]
    put_in: set[str] = set()
    for _ in range(draw(st.integers(0, 14))):
        above = draw(st.sampled_from(paths))
        part = draw(st.sampled_from(PARTS))
        path = f"{above}.{part}" if above else part
        if path in paths:
            continue
        paths.append(path)
        is_first = all(other.rpartition(".")[0] != above for other in put_in)
        if is_first and draw(st.booleans()):
            put_in.add(path)
    return sorted(paths, key=lambda path: path.split(".") if path else []), put_in


def bare(path: str, put_in: set[str]) -> str:
    """The path without the parts that were put in, by hand."""
    parts = path.split(".") if path else []
    kept = [p for n, p in enumerate(parts) if ".".join(parts[: n + 1]) not in put_in]
    return ".".join(kept)


def shortened(path: str, put_in: set[str]) -> set[str]:
    """The path without the first ones of those parts: none, one, two, ... all."""
    parts = path.split(".") if path else []
    at = [n for n in range(len(parts)) if ".".join(parts[: n + 1]) in put_in]
    return {
        ".".join(p for n, p in enumerate(parts) if n not in at[:number])
        for number in range(len(at) + 1)
    }


@given(trees())
def test_no_two_modules_have_one_name(tree: Tree) -> None:
    paths, put_in = tree
    names = without_wrappers([(path, path) for path in paths], put_in)
    around = {path.rpartition(".")[0] for path in put_in}
    inner = [name for name, path in zip(names, paths, strict=True) if path not in around]
    assert len(inner) == len(set(inner))


@given(trees())
def test_a_name_is_the_path_without_parts_of_wrappers_and_all_of_them_if_it_can_be(
    tree: Tree,
) -> None:
    paths, put_in = tree
    names = without_wrappers([(path, path) for path in paths], put_in)
    short = [bare(path, put_in) for path in paths]
    around = {path.rpartition(".")[0] for path in put_in}
    for name, path, plain in zip(names, paths, short, strict=True):
        assert name in shortened(path, put_in)
        same = [p for p, s in zip(paths, short, strict=True) if s == plain and p not in around]
        if path not in around and same == [path] and paths.count(plain) == 0:
            assert name == plain
        assert not isinstance(name, ModuleName) or name.spelled == path


def test_a_module_under_two_paths_has_the_same_name_twice() -> None:
    paths = [("", 0), ("forward", 1), ("forward.a", 2), ("original", 1), ("original.a", 2)]
    assert without_wrappers(paths, ["forward", "original"]) == ["", "", "a", "", "a"]


def test_of_two_that_would_have_one_name_the_inner_one_keeps_a_part() -> None:
    paths = [(p, p) for p in ("", "w", "w.base_layer", "w.base_layer.a", "w.a", "w.b")]
    names = without_wrappers(paths, ["w.base_layer"])
    assert names == ["", "w", "w", "w.base_layer.a", "w.a", "w.b"]
    paths = [("", 0), ("module", 1), *((f"module.{path}", path) for path, _ in paths[1:])]
    names = without_wrappers(paths, ["module", "module.w.base_layer"])
    assert names == ["", "", "w", "w", "w.base_layer.a", "w.a", "w.b"]


def test_without_wrappers_names_are_the_paths_and_plain_text() -> None:
    names = without_wrappers([("", 0), ("module", 1), ("module.a", 2)], [])
    assert [type(name) for name in names] == [str, str, str]


def wrapped(*paths: str) -> list[Any]:
    """Names under DDP of modules with these paths in the plain model."""
    every = {"", "module"}
    for path in paths:
        parts = ["module", *path.split(".")]
        every |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    tree = sorted(every)
    names = dict(zip(tree, without_wrappers([(p, p) for p in tree], ["module"]), strict=True))
    return [names[f"module.{path}"] for path in paths]


def test_a_glob_is_read_in_both_spellings() -> None:
    encoder, head = wrapped("encoder.lin", "head")
    for glob in ("encoder.lin", "lin", "encoder.*", "^encoder.lin", "module.encoder.lin"):
        assert matches(encoder, glob), glob
        assert not matches(head, glob), glob
    assert matches(encoder, "^module.encoder.lin")
    assert matches(head, "module.*")
    assert matches(head, "^module.head")


def test_a_users_own_module_is_what_a_glob_means_whatever_wraps_the_model() -> None:
    names = ["module", "module.lin", "head"]
    for found in (names, wrapped(*names)):
        assert [matches(name, "module.*") for name in found] == [False, True, False]
        assert [matches(name, "^module.lin") for name in found] == [False, True, False]


def test_a_tail_of_a_wrapped_path_is_no_plain_name() -> None:
    paths = ["", "base_model", "base_model.model", "base_model.model.lm_head"]
    *_, head = without_wrappers([(p, p) for p in paths], ["base_model", "base_model.model"])
    assert head == "lm_head"
    assert not matches(head, "model.*")
    assert matches(head, "base_model.model.lm_head")


def test_a_copy_has_its_path_and_is_matched_by_what_it_is_a_copy_of() -> None:
    paths = [(p, p) for p in ("", "head", "head.original", "head.copies", "head.copies.one")]
    names = without_wrappers(paths, ["head.original"], ["head.copies", "head.copies.one"])
    assert names[2:] == ["head", "head.copies", "head.copies.one"]
    assert [matches(names[4], glob) for glob in ("head", "^head", "head.copies.*")] == [True] * 3
    assert not matches(names[4], "*.head")


def test_a_part_of_a_module_has_its_spellings_too() -> None:
    (name,) = wrapped("experts")
    expert = joined(name, "gate.3")
    assert expert == "experts.gate.3"
    assert list(spellings(expert, "module.*")) == ["experts.gate.3", "module.experts.gate.3"]
    assert joined(name, "") is name
    assert joined("", "qk") == "qk"


def test_a_name_is_copied_and_pickled_with_its_spellings() -> None:
    (name,) = wrapped("a")
    for twin in (copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert isinstance(twin, ModuleName)
        assert (twin, twin.spelled, twin.marks) == ("a", "module.a", name.marks)
        assert "module" in twin.marks
    assert SiteName.from_dict(SiteName(name, "input").to_dict()) == SiteName("a", "input")


def test_a_mark_among_wildcards_is_one_unless_a_plain_name_could_be_meant() -> None:
    paths = [("", 0), ("q", 1), ("q.base_layer", 2), ("out_layer", 3)]
    name = without_wrappers(paths, ["q.base_layer"])[2]
    for glob in ("*base_layer", "*.base_layer", "q.base_layer*", "*base_layer*", "^q.base_layer"):
        assert matches(name, glob), glob
    assert not matches(name, "*_layer")  # of the plain model: out_layer, and not q
    own = without_wrappers([*paths, ("base_layers", 4)], ["q.base_layer"])[2]
    assert not matches(own, "*base_layer*")
    assert matches(own, "*.base_layer")
