from hypothesis import example, given
from hypothesis import strategies as st

from svit.names import did_you_mean, distinct


def test_names_that_occur_twice_get_their_tags():
    assert distinct(["crane", "cat", "crane"], ["n1", "n2", "n3"]) == ["crane (n1)", "cat", "crane (n3)"]
    assert distinct(["a", "b"], ["n1", "n2"]) == ["a", "b"]
    assert distinct(["a", "b", "a"]) == ["a (0)", "b", "a (2)"]
    assert distinct(["a", "a", "b"], ["n", "n", "m"]) == ["a (n) (0)", "a (n) (1)", "b"]
    assert distinct([]) == []


@given(st.lists(st.text("ab (012)", max_size=6), max_size=12))
@example(["a", "a", "a (0)", "a (0)", "a (0) (0)"])
def test_no_two_names_are_the_same(names):
    found = distinct(names)
    assert len(set(found)) == len(names)
    assert all(new.startswith(old) for new, old in zip(found, names, strict=True))
    assert distinct(found) == found
    assert found == names or len(set(names)) < len(names)


def test_the_nearest_names():
    assert did_you_mean("svit_smal", ["svit_small", "resnet18"]) == "; did you mean svit_small?"
    assert did_you_mean("xyz", ["svit_small"]) == ""
