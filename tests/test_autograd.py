"""What the project's own autograd functions and operations share."""

from __future__ import annotations

from tostlm.autograd import namespace


def test_a_namespace_reads_like_its_module() -> None:
    assert namespace("tostlm.tssa.operator") == "tostlm_tssa_operator"


def test_modules_of_different_names_have_different_namespaces() -> None:
    modules = ["a.b", "a_b", "a-b", "ab", "a.b_", "a.lr=0.1", "a.lr_0.1", "é.b"]
    spaces = [namespace(module) for module in modules]
    assert len(set(spaces)) == len(modules)
    assert all(space.isascii() and space.isidentifier() for space in spaces)
