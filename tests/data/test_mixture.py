"""Mixtures: each source has its share in every part of a run, in its own order."""

import collections
import itertools
import json
import re

import cli
import numpy as np
import pytest

from lora_jax import errors, tokenizer
from lora_jax.data import batches, fields, mixture, packing, sources
from lora_jax.training import run_data

from lora_jax.cli import train  # isort: skip


@pytest.mark.parametrize(
    "weights", [(1, 1), (3, 1), (5, 2, 1), (1, 97, 1, 1), (7, 7, 7), (333, 500, 167), (1, 9999)]
)
def test_in_every_prefix_each_source_has_its_share_to_within_a_sequence(weights):
    period = sum(weights)
    mixed = mixture.Mixture([range(10**9)] * len(weights), weights)
    of = np.array([mixed.locate(n)[0] for n in range(period)])
    places = np.arange(1, period + 1)
    for source, weight in enumerate(weights):
        shown = (of == source).cumsum()
        assert np.abs(shown - places * weight / period).max() < 1
        assert shown[-1] == weight  # and so on forever
    assert mixed.locate(5 * period)[0] == of[0]


def numbered(*sizes):
    """Sources of examples whose tokens are 1000 · source + example."""
    return [
        packing.alone([(np.full(4, 1000 * number + example, np.int32), np.ones(4, bool))
                       for example in range(size)])
        for number, size in enumerate(sizes)
    ]  # fmt: skip


def mixed(weights, *sizes, seed=0, batch_size=4, grad_accum=2):
    shuffled = [batches.Shuffled(part, seed, n) for n, part in enumerate(numbered(*sizes))]
    sequences = mixture.Mixture(shuffled, weights)
    return batches.Batches(sequences, batch_size=batch_size, grad_accum=grad_accum, length=16)


def shown(made, steps):
    return [int(i) for step in steps for i in made.batch(step)["input_ids"][..., 0].ravel()]


def test_each_source_comes_in_permutations_of_its_own():
    made = mixed((3, 1), 10, 10)
    numbers = shown(made, range(10))
    for source, count in ((0, 60), (1, 20)):
        own = [number % 1000 for number in numbers if number // 1000 == source]
        assert len(own) == count
        epochs = [tuple(own[n : n + 10]) for n in range(0, count, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs)
    first = [
        [number % 1000 for number in numbers if number // 1000 == source][:10] for source in (0, 1)
    ]
    assert first[0] != first[1]
    assert made.num_steps(1) == 3  # of 8 sequences each; there are 20


def test_steps_depend_neither_on_the_order_of_requests_nor_on_the_split():
    straight = [mixed((5, 2, 1), 9, 4, 7).batch(step) for step in range(7)]
    again, other = mixed((5, 2, 1), 9, 4, 7), mixed((5, 2, 1), 9, 4, 7, batch_size=8, grad_accum=1)
    for step in (6, 2, 5):
        parts = [again.batch(step, slice(first, first + 2)) for first in (0, 2)]
        for name, array in straight[step].items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts], 1), array)
            np.testing.assert_array_equal(array.reshape(1, 8, -1), other.batch(step)[name])


# ------------------------------------------------------------------------- of a job


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of 90 examples with prompts, and of 60 with stories."""
    folder = tmp_path_factory.mktemp("data")
    stories = [json.dumps({"story": f"Once there were {n} dogs."}) for n in range(60)]
    (folder / "stories.jsonl").write_text("\n".join(stories))
    return cli.write_rows(folder / "cats.jsonl", 90), folder / "stories.jsonl"


@pytest.fixture(scope="module")
def reader():
    return tokenizer.load(cli.BASE)


def data_of(reader, *flags):
    settings = train.parse(["--model", "m", *map(str, flags)]).settings
    settings = settings.replace(seq_len=settings.data.resolve_seq_len(512))
    return run_data.RunData(settings, run_data.read(settings), reader, 2, 512, 1000)


def test_a_packed_mixture_of_different_kinds_of_examples(files, reader, capsys):
    flags = ("--dataset", *files, "--columns", "text=story", "--seq-len", 64, "--packing")
    made = data_of(reader, *flags, "--weights", "0.75,0.25", "--epochs", 2)
    kinds, packed = [], 0
    for step in range(made.num_steps):
        batch = made.batches.batch(step)
        for ids, mask in zip(*(batch[name].reshape(-1, 64) for name in
                               ("input_ids", "attention_mask")), strict=True):  # fmt: skip
            texts = [reader.decode(ids[mask == n]) for n in range(1, mask.max() + 1)]
            (kind,) = {"dogs" in text for text in texts}  # a sequence has examples of one source
            kinds.append(kind)
            packed += len(texts) > 1
    for count in itertools.accumulate([1] * len(kinds)):
        assert abs(sum(kinds[:count]) - count / 4) < 1
    assert packed > 0.9 * len(kinds)
    sizes = [len(source) for source in made.batches.sequences.sources]
    assert made.num_steps == -(-2 * sum(sizes) // 16)
    out = " ".join(capsys.readouterr().out.split())
    for name, size, share in zip(files, sizes, (0.75, 0.25), strict=True):
        assert f"{share:.1%} of {name}, seen {len(kinds) * share / size:.2g} times" in out


def test_without_weights_an_epoch_shows_all_examples_of_all_sources_once(files, reader):
    flags = ("--dataset", *files, "--columns", "text=story,prompt=prompt")
    made = data_of(reader, *flags, "--batch-size", 15, "--grad-accum", 1)
    assert made.num_steps == 10
    examples = [
        tuple(ids) for step in range(10) for ids in made.batches.batch(step)["input_ids"][0]
    ]
    assert max(collections.Counter(examples).values()) == 1 and len(examples) == 150


def test_examples_of_each_source_are_held_out_and_scored(tmp_path, reader):
    paths = [cli.write_rows(tmp_path / f"{n}.jsonl", 100, first=100 * n) for n in (1, 2)]
    flags = ("--dataset", *paths, "--eval-every", 1, "--exact-match", 3)
    made, weighted = data_of(reader, *flags), data_of(reader, *flags, "--weights", "1,3")
    assert len(made.held_out) == 4 and len(made.batches.sequences) == 196
    numbers = [int(re.search(r"\d+", reader.decode(ids))[0]) // 100 for ids, _ in made.scored]
    assert numbers == [1, 2, 1]
    assert weighted.fingerprints == made.fingerprints
    assert data_of(reader, *flags[:1], *paths[::-1], *flags[3:]).fingerprints != made.fingerprints


def test_a_column_that_no_source_has_is_refused(files):
    names = [*map(str, files)]
    with pytest.raises(errors.UserError, match="no column tale"):
        sources.load_all(names, {"text": "tale"})
    one, other = sources.load_all(names, {"text": "story"})
    assert fields.names_of(one) == ["prompt", "completion"]
    assert fields.names_of(other) == ["text"]
