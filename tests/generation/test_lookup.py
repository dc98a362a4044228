"""Guesses from repetitions."""

from lora_jax.generation import lookup


def test_a_guess_is_what_followed_the_same_tokens():
    found = lookup.Lookup([5, 6, 7, 8, 9, 1, 6, 7])
    assert found.draft(2) == [8, 9]
    assert found.draft(10) == [8, 9, 1, 6, 7]
    found.extend([8])
    assert found.draft(1) == [9]
    found.extend([2])
    assert found.draft(3) == []


def test_the_longest_and_then_the_latest_repetition_counts():
    assert lookup.Lookup([1, 2, 3, 4, 2, 3, 5, 1, 2, 3]).draft(1) == [4]
    assert lookup.Lookup([2, 3, 4, 2, 3, 5, 9, 2, 3]).draft(1) == [5]
    assert lookup.Lookup([1, 9, 1]).draft(1) == []  # one token is too little
    assert lookup.Lookup([]).draft(1) == []
