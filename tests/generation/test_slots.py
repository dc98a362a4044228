"""Which slot a request gets."""

from lora_jax.generation import slots


def slot(index, tokens=(), *, key=(), busy=False, used=0, group=0):
    return slots.Slot(index, group, list(tokens), key, busy, used)


PROMPT = list(range(100))


def chosen(*among, prompt=PROMPT, key=()):
    found = slots.choose(among, prompt, key)
    return found and (found.slot.index, found.source.index, found.num_common)


def test_the_slot_with_the_longest_prefix():
    assert chosen(slot(0), slot(1, PROMPT[:30]), slot(2, PROMPT[:20])) == (1, 1, 30)
    assert chosen(slot(0, [*PROMPT[:30], 7]), slot(1, [9, *PROMPT])) == (0, 0, 30)
    assert chosen(slot(0, PROMPT * 2)) == (0, 0, 99)  # the last token is computed again


def test_without_a_prefix_the_slot_that_was_used_least_recently():
    assert chosen(slot(0, [7], used=3), slot(1, [8], used=1), slot(2, [9], used=2)) == (1, 1, 0)


def test_a_busy_slot_lends_its_prefix_if_it_is_worth_a_copy():
    free = slot(1, used=5), slot(2, used=4)
    assert chosen(slot(0, PROMPT[:50], busy=True), *free) == (2, 0, 50)
    assert chosen(slot(0, PROMPT[:10], busy=True), *free) == (2, 2, 0)
    assert chosen(slot(0, PROMPT[:50], busy=True, group=1), *free) == (2, 2, 0)  # out of reach
    assert chosen(slot(0, PROMPT, busy=True)) is None


def test_another_key_has_no_prefix():
    assert chosen(slot(0, PROMPT, key="other", used=1), slot(1)) == (1, 1, 0)
    assert chosen(slot(0, PROMPT, key=None), key=None)[2] == 0
